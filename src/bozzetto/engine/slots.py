"""Continuous batching: images enter and leave the slots of a batch between passes, each with settings of its own.

A lane decodes images that share a drafter (coupled Jacobi windows, or none) and a rule. An image's tokens depend on its
own class, seed, number and settings only, never on who shares the passes (in float32, but for near ties: see README).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bozzetto.engine.advance import Advance, SlotState
from bozzetto.engine.trace import PassTrace
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_TOKEN, STREAM_VERIFY, fold, gumbel_rows, image_keys
from bozzetto.models.base import Target
from bozzetto.rules.base import Rule

_AHEAD = 16  # positions whose noise is made at a time


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw. label: class or caption number; seed, index: fix its noise; law: its own."""

    label: int
    seed: int
    index: int
    law: LawSettings


@dataclass
class SlotImage:
    """An image in a slot. count: committed tokens; margin: smallest Gumbel margin so far."""

    request: ImageRequest
    count: int = 0
    passes: int = 0
    accepted: int = 0
    drafted: int = 0
    margin: float = float("inf")
    noise_until: int = 0
    trace: PassTrace = field(default_factory=PassTrace)
    tokens: Tensor | None = None  # int64 [N], once it is finished


Width = Callable[[int], int]


class SlotLane:
    """Slots that are decoded together.

    width: places per pass for a number of images, at most `widest`; with a rule that is not seed-exact it has to be
    constant, because its noise depends on it. guided: whether images may have guidance; filtered: whether they may have
    a top-k, a top-p or no temperature.
    """

    def __init__(self, target: Target, rule: Rule, slots: int, width: Width, widest: int, guided: bool, filtered: bool):
        self.target, self.rule, self.slots, self.width = target, rule, slots, width
        self.widest, self.guided, self.filtered = widest, guided, filtered
        self.advance = Advance(rule, target.length, widest, filtered)
        self.images: list[SlotImage | None] = []
        self.state: SlotState | None = None
        self.numbers = torch.arange(target.vocab, device=target.device)
        self.draw_noise: Callable[[Tensor, Tensor], Tensor] = gumbel_rows
        self.ring = 2 * widest + 2 * _AHEAD
        step = getattr(target, "step", None)  # compiled passes
        self.compiled = None if step is None else step.slots(self.advance)
        if step is not None:
            self.draw_noise = step.noise

    @property
    def active(self) -> int:
        """Images in slots."""
        return sum(image is not None for image in self.images)

    @property
    def free(self) -> int:
        return self.slots - self.active

    def admit(self, requests: Sequence[ImageRequest]) -> list[SlotImage]:
        """Give slots to images. Raises ValueError for more than are free, or laws that the lane is not for."""
        if len(requests) > self.free:
            raise ValueError(f"{len(requests)} images for {self.free} free slots")
        for request in requests:
            self._check(request.law)
        images = [SlotImage(request) for request in requests]
        if images:
            self._resize(self.active + len(images))
            open_slots = [i for i, image in enumerate(self.images) if image is None]
            self._place(images, open_slots[: len(images)])
        return images

    def _check(self, law: LawSettings) -> None:
        if law.guided and not self.guided:
            raise ValueError("this lane is for images without guidance")
        if not self.filtered and (law.top_k or law.top_p != 1 or not law.temperature):
            raise ValueError("this lane is for images without top-k, top-p and greedy choices")

    @torch.no_grad()
    def _resize(self, wanted: int) -> None:
        """Have a batch of at least `wanted` rows, or of few more than that: images keep their order."""
        size = 1 << max(0, wanted - 1).bit_length()
        if size == len(self.images):
            return
        going = [i for i, image in enumerate(self.images) if image is not None]
        rows = torch.tensor([*going, *[0] * (size - len(going))], dtype=torch.int64, device=self.target.device)
        if self.state is None:
            self.session = self.target.begin(torch.zeros_like(rows), self.guided, self.widest)
            self.state = self._blank(size)
        else:
            self.session.keep(rows)
            self.state = SlotState(*(part[rows] for part in self.state.tensors()))
        self.images = [*(self.images[i] for i in going), *[None] * (size - len(going))]

    def _blank(self, size: int) -> SlotState:
        device, vocab = self.target.device, self.target.vocab
        whole = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        ones = torch.ones(size, device=device)
        laws = (size, self.widest - 1, vocab) if self.rule.needs_law and self.widest > 1 else (size, 1, 1)
        return SlotState(
            inputs=whole(size, self.widest),
            count=whole(size),
            drafted=whole(size),
            guidance=ones,
            temperature=ones.clone(),
            top_k=whole(size),
            top_p=ones.clone(),
            keys=whole(size),
            passes=whole(size),
            noise=torch.zeros(size, self.ring, vocab, device=device),
            tokens=whole(size, self.target.length + self.widest),
            laws=torch.zeros(laws, device=device),
        )

    @torch.no_grad()
    def _place(self, images: Sequence[SlotImage], slots: Sequence[int]) -> None:
        s, device = self.state, self.target.device
        assert s is not None
        rows = torch.tensor(slots, dtype=torch.int64, device=device)
        asked = [image.request for image in images]
        self.session.admit(rows, torch.tensor([r.label for r in asked], dtype=torch.int64, device=device))
        for name in ("inputs", "count", "drafted", "passes", "laws"):
            getattr(s, name)[rows] = 0
        for slot, image in zip(slots, images, strict=True):
            request, law = image.request, image.request.law
            index = torch.tensor([request.index], dtype=torch.int64, device=device)
            s.keys[slot] = image_keys(request.seed, STREAM_VERIFY, index)[0]
            s.guidance[slot], s.temperature[slot] = law.guidance, law.temperature or 1.0
            s.top_k[slot], s.top_p[slot] = law.top_k if law.temperature else -1, law.top_p
            self.images[slot] = image
        self.noise_keys = self._noise_keys()

    def _noise_keys(self) -> Tensor:
        asked = [(0, 0) if image is None else (image.request.seed, image.request.index) for image in self.images]
        keys = [image_keys(seed, STREAM_TOKEN, torch.tensor([i], device=self.target.device)) for seed, i in asked]
        return torch.cat(keys)

    def _fill_noise(self, width: int) -> None:
        """Make the noise that this pass and its next drafts can ask for."""
        rows: list[int] = []
        positions: list[int] = []
        for slot, image in enumerate(self.images):
            if image is None:
                continue
            needed = min(image.count + width + self.widest, self.target.length + _AHEAD)
            while image.noise_until < needed:
                rows += [slot] * _AHEAD
                positions += range(image.noise_until, image.noise_until + _AHEAD)
                image.noise_until += _AHEAD
        if rows:
            assert self.state is not None
            row, position = torch.tensor([rows, positions], dtype=torch.int64, device=self.target.device)
            keys = fold(self.noise_keys[row], position)
            self.state.noise[row, position % self.ring] = self._draw(keys)

    def _draw(self, keys: Tensor) -> Tensor:
        """int64 [n] -> float32 [n, V]."""
        return self.draw_noise(keys, self.numbers)

    @torch.no_grad()
    def step(self) -> list[SlotImage]:
        """One target pass; returns the images that it finished, which leave their slots."""
        s = self.state
        if s is None or not self.active:
            return []
        width = min(self.width(self.active), self.widest)
        self._fill_noise(width)
        furthest = max(image.count for image in self.images if image is not None)
        if self.compiled is None:
            scores = self.session.score(s.inputs[:, :width].contiguous(), s.count, furthest)
            assert scores.logits is not None
            report = s.take(self.advance(scores.logits, *s.tensors()))
        else:
            report = s.take(self.compiled(self.session, width, furthest, s.tensors()))
        return self._note(report.tolist(), width)  # the one synchronisation

    def _note(self, report: list[list[float]], width: int) -> list[SlotImage]:
        """Bookkeeping of a pass; finished images leave."""
        done = []
        assert self.state is not None
        for slot, image in enumerate(self.images):
            if image is None:
                continue
            committed, accepted, margin = int(report[0][slot]), int(report[1][slot]), report[2][slot]
            drafted = min(width - 1, self.target.length - image.count) if image.passes else 0
            image.count, image.passes = image.count + committed, image.passes + 1
            image.accepted, image.drafted = image.accepted + accepted, image.drafted + drafted
            image.margin = min(image.margin, margin)
            for name, value in (("committed", committed), ("accepted", accepted), ("drafted", drafted), ("spent", 0.0)):
                getattr(image.trace, name).append(value)
            if image.count == self.target.length:
                image.tokens = self.state.tokens[slot, : self.target.length].clone()
                self._leave(slot)
                done.append(image)
        return done

    def _leave(self, slot: int) -> None:
        assert self.state is not None
        self.images[slot] = None
        self.state.count[slot] = 0

    def cancel(self, image: SlotImage) -> None:
        """Free the slot of an image that is not wanted any more."""
        for slot, other in enumerate(self.images):
            if other is image:
                self._leave(slot)

    def shrink(self) -> None:
        """Give up rows that nobody needs, where that makes passes of half the size or less."""
        if self.active and 2 * (1 << max(0, self.active - 1).bit_length()) <= len(self.images):
            self._resize(self.active)
            self.noise_keys = self._noise_keys()
