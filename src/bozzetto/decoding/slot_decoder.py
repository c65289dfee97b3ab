"""Slots as a decoder: a list of images with one law, more of them than slots if need be, in the order given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bozzetto.decoding.loop import PassEvent
from bozzetto.decoding.slots import ImageRequest, SlotImage, SlotLane
from bozzetto.decoding.state import BatchResult
from bozzetto.decoding.trace import PassTrace
from bozzetto.laws.categorical import LawSettings


class SlotDecoder:
    """As engine.loop.Decoder, but images enter as others finish. lane: with no images of anybody else."""

    refills = True

    def __init__(self, lane: SlotLane, law: LawSettings):
        self.lane, self.law = lane, law

    def _passes(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[list[SlotImage]]:
        """Yields after every pass the images so far, in order; `self.result` is there in the end."""
        lane, images = self.lane, list[SlotImage]()
        lane.clear()
        self.made = 0
        lane.clock.parts.update(target=0.0, draft=0.0)
        pairs = zip(labels.tolist(), index.tolist(), strict=True)
        asked = [ImageRequest(label, seed, number, self.law) for label, number in pairs]
        while len(images) < len(asked) or lane.active:
            entering = asked[len(images) : len(images) + lane.free]
            images += lane.admit(entering)
            lane.step()
            self.made += 1
            if len(images) == len(asked):
                lane.shrink()
            yield images
        self.result = self._result(images)

    def _result(self, images: list[SlotImage]) -> BatchResult:
        nothing = torch.zeros(len(images))
        found = [image.tokens for image in images if image.tokens is not None]
        return BatchResult(
            tokens=torch.stack(found),
            passes=torch.tensor([image.passes for image in images]),
            drafted=torch.tensor([image.drafted for image in images]),
            accepted=torch.tensor([image.accepted for image in images]),
            margin=torch.tensor([image.margin for image in images]),
            spent=nothing,
            moved=nothing,
            farthest=nothing,
            batch_passes=self.made,
            seconds=self.lane.clock.seconds(),
        )

    def run(self, labels: Tensor, seed: int, index: Tensor) -> BatchResult:
        """Decode to the end. labels, index: int64 [n]."""
        for _ in self._passes(labels, seed, index):
            pass
        return self.result

    def traced(
        self, labels: Tensor, seed: int, index: Tensor, tick: Callable[[int], object]
    ) -> tuple[BatchResult, list[PassTrace]]:
        """Decode to the end; tick: told after every pass how many tokens are committed in all."""
        images: list[SlotImage] = []
        for images in self._passes(labels, seed, index):
            tick(sum(image.count for image in images))
        return self.result, [image.trace for image in images]

    def stream(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[PassEvent]:
        """Decode and yield one event per target pass, about all the images."""
        n, lane, began = len(index), self.lane, time.perf_counter()
        for number, images in enumerate(self._passes(labels, seed, index), 1):
            tokens = torch.zeros(n, lane.target.length, dtype=torch.int64, device=lane.target.device)
            for row, image in enumerate(images):
                tokens[row] = lane.tokens_of(image)
            figures = [[getattr(i, name) for i in images] for name in ("count", "accepted", "drafted")]
            count, accepted, drafted = torch.tensor([f + [0] * (n - len(images)) for f in figures])
            seconds = time.perf_counter() - began
            yield PassEvent(tokens, count, accepted, drafted, torch.zeros(n), number, lane.places, seconds)
            began = time.perf_counter()
