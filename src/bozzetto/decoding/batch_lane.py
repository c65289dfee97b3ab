"""What slots cannot do, behind the same few methods: images of one method and seed, decoded as a batch that nobody
joins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.loop import PassEvent
from bozzetto.decoding.slots import ImageRequest, SlotImage


class BatchLane:
    """decoder: engine.loop.Decoder or engine.masked.MaskedDecoder; length: tokens per image; slots: images together."""

    def __init__(self, decoder: Any, length: int, slots: int, device: torch.device):
        self.decoder, self.length, self.slots, self.device = decoder, length, slots, device
        self.images: list[SlotImage] = []
        self.unwanted: set[int] = set()
        self.events: Iterator[PassEvent] = iter(())

    @property
    def active(self) -> int:
        """Images that are being decoded and wanted."""
        return sum(i not in self.unwanted and image.tokens is None for i, image in enumerate(self.images))

    @property
    def free(self) -> int:
        return 0 if self.images else self.slots

    def admit(self, requests: Sequence[ImageRequest]) -> list[SlotImage]:
        """Begin a batch of images of one seed. Raises ValueError while there is one, or for several seeds."""
        if len(requests) > self.free or len({request.seed for request in requests}) > 1:
            raise ValueError(f"{len(requests)} images for {self.free} free places, or of several seeds")
        if requests:
            self.images, self.unwanted = [SlotImage(request) for request in requests], set()
            labels, index = (
                torch.tensor([getattr(r, name) for r in requests], device=self.device) for name in ("label", "index")
            )
            self.events = self.decoder.stream(labels, requests[0].seed, index)
        return list(self.images)

    def step(self) -> list[SlotImage]:
        """One target pass; returns the images that it finished."""
        event = next(self.events, None)
        if event is None:
            self.images = []
            return []
        done = [image for row, image in enumerate(self.images) if self._take(image, row, event)]
        if not self.active:
            self.clear()
        return [image for image in done if not image.cancelled]

    def _take(self, image: SlotImage, row: int, event: PassEvent) -> bool:
        """Bring an image up to date; returns whether this pass finished it."""
        if image.tokens is not None:
            return False
        count, accepted, drafted = (int(part[row]) for part in (event.count, event.accepted, event.drafted))
        trace = image.trace
        trace.committed.append(count - image.count)
        trace.accepted.append(accepted - image.accepted)
        trace.drafted.append(drafted - image.drafted)
        trace.spent.append(0.0)
        image.count, image.passes = count, image.passes + 1
        image.accepted, image.drafted = accepted, drafted
        image.partial = event.tokens[row]
        image.known = None if event.known is None else event.known[row]
        image.margin = image.margin if event.margin is None else float(event.margin[row])
        if image.count == self.length:
            image.tokens = event.tokens[row].clone()
        return image.tokens is not None

    def cancel(self, image: SlotImage) -> None:
        """An image is not wanted any more; its batch goes on while somebody wants another."""
        image.cancelled = True
        self.unwanted.update(i for i, other in enumerate(self.images) if other is image)
        if not self.active:
            self.clear()

    def clear(self) -> None:
        """Give up the batch."""
        self.images, self.events = [], iter(())

    def tokens_of(self, image: SlotImage) -> Tensor:
        """What an image has so far, [N, ...]."""
        found = image.tokens if image.tokens is not None else image.partial
        if found is None:
            raise ValueError("this image has had no pass yet")
        return found.clone()

    def shrink(self) -> None:
        """Nothing: finished images leave by themselves."""
