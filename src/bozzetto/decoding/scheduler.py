"""Images are asked for at any time, enter batches between passes, and are done, or given up, one by one.

Images of one method share passes, each with its own class, seed, guidance and filters; methods take turns. What an
image becomes does not depend on who was there with it (float32), and whether it becomes something does neither: where a
batch fails, its images are drawn again, each in one of its own, and only those that fail again come to nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bozzetto.decoding.batch import Batch
from bozzetto.decoding.images import CANCELLED, DONE, DRAWING, FAILED, WAITING, ImageRequest
from bozzetto.errors import UsageError, check_number, require
from bozzetto.settings import GenerateSettings

_OVER = (DONE, CANCELLED, FAILED)
_IDLE = 4  # batches without images that are kept for the next ones


class QueueFull(UsageError):
    """More images wait than the queue holds."""


class Scheduler:
    """pipe: a Pipeline; slots: images in passes at a time; queue: images that may wait for one; closed: whether all
    images are there from the beginning, as those of `generate`: batches that others could join then pay only with
    `compile`.

    `submit` and `cancel` may be called from any thread; `step` by one thread at a time.
    """

    def __init__(self, pipe: Any, slots: int = 8, queue: int = 64, closed: bool = False):
        for name, value in (("slots", slots), ("queue", queue)):
            require(value >= 1, name, value, "a whole number >= 1")
        self.pipe, self.slots, self.queue, self.closed = pipe, slots, queue, closed
        self.waiting: deque[ImageRequest] = deque()
        self.batches: dict[Hashable, Batch] = {}
        self.drawing: dict[Hashable, list[ImageRequest]] = {}
        self.broken: Exception | None = None  # why a batch failed in the last step
        self.lock = threading.RLock()

    @property
    def active(self) -> int:
        """Images in passes."""
        return sum(len(images) for images in self.drawing.values())

    @property
    def busy(self) -> bool:
        """Whether any image waits or is drawn."""
        return bool(self.waiting or self.drawing)

    def submit(
        self, label: int, *, seed: int = 0, index: int = 0, settings: GenerateSettings | None = None
    ) -> ImageRequest:
        """Ask for image `index` of a seed, as it is where it is drawn alone; label: number of its class or caption.
        `settings.batch` says nothing here. Raises QueueFull, and UsageError for what the model cannot do."""
        last = len(self.pipe.classes) - 1
        for name, value, most in (("seed", seed, 2**63 - 1), ("index", index, 2**63 - 1), ("label", label, last)):
            shown = "2^63 - 1" if most > last else most
            check_number(name, value, 0, most, f"a whole number from 0 to {shown}", whole=True)
        settings = replace(self.pipe.alone(settings or GenerateSettings()), batch=self.slots)
        image = ImageRequest(label, seed, index, settings.law)
        with self.lock:
            if len(self.waiting) >= self.queue:
                raise QueueFull(f"{self.queue} images are waiting already, more are not allowed: try again later")
            self.add([image], settings)
        return image

    def add(self, images: Sequence[ImageRequest], settings: GenerateSettings) -> Batch:
        """Images of one seed wait for places in a batch of `settings.batch`. settings: resolved; their window is that
        of such a batch, unless they say one. The batch is made here, so that whatever is needed for it (a trained
        drafter, a table) is known to be there before they join others: raises UsageError where it is not."""
        key = self.pipe.batch_key(settings, images[0].seed, self.closed)
        for image in images:
            image.settings, image.key = settings, key
        with self.lock:
            batch = self._batch(images[0])
            self.waiting.extend(images)
        return batch

    def cancel(self, image: ImageRequest) -> bool:
        """An image is not wanted any more; its slot is free from the next pass on. False if it was done already."""
        with self.lock:
            if image.status in _OVER:
                return False
            if image.status == WAITING:
                self.waiting.remove(image)
            image.status = CANCELLED  # one that is being drawn leaves before the next pass
        return True

    def step(self) -> list[ImageRequest]:
        """One target pass of one batch; returns the images that are over: done by this pass, or failed. Nothing to do:
        no pass."""
        with self.lock:
            self.broken = None
            self._leave()
            failed = self._enter()
            key = next(iter(self.drawing), None)
            if key is None:
                return failed
            images, batch = self.drawing.pop(key), self.batches[key]
            expected = any(image.key == key for image in self.waiting)
        try:
            if not expected:
                batch.shrink()
            finished = batch.step()
        except Exception as error:
            return failed + self._give_up(key, images, error)
        with self.lock:
            left = [image for image in images if image.tokens is None]
            if left:
                self.drawing[key] = left  # behind the others: batches take turns
            done = [image for image in finished if image.status == DRAWING]
            for image in done:
                image.status = DONE
        return failed + done

    def _give_up(self, key: Hashable, images: list[ImageRequest], error: Exception) -> list[ImageRequest]:
        """A batch has failed: nobody knows whose fault it was, and what it holds means nothing any more. Its images
        begin again, each alone; returns those which were."""
        with self.lock:
            self.broken = error
            self.batches.pop(key, None)
            wanted = [image for image in images if image.status != CANCELLED]
            failed = [image for image in wanted if image.alone]
            again = [image for image in wanted if not image.alone]
            for image in failed:
                image.status, image.error = FAILED, error
            for image in again:
                image.begin_again((key, id(image)))
            self.waiting.extendleft(reversed(again))
        return failed

    def _leave(self) -> None:
        """Take cancelled images out of their batches."""
        for key, images in list(self.drawing.items()):
            kept = [image for image in images if image.status != CANCELLED]
            for image in images:
                if image.status == CANCELLED:
                    self.batches[key].cancel(image)
            if kept:
                self.drawing[key] = kept
            else:
                del self.drawing[key]

    def _enter(self) -> list[ImageRequest]:
        """Give places to those who wait, the first ones first; a batch that is full lets others pass. Returns those
        whose batch failed over them."""
        chosen: dict[Hashable, list[ImageRequest]] = {}
        room, still, failed = self.slots - self.active, deque[ImageRequest](), list[ImageRequest]()
        while self.waiting and room > 0:
            image = self.waiting.popleft()
            group = chosen.setdefault(image.key, [])
            try:
                enters = len(group) < self._batch(image).free
            except Exception as error:  # the batch had been given up for others, and cannot be made again
                self.broken = image.error = error
                image.status = FAILED
                failed.append(image)
                continue
            (group if enters else still).append(image)
            room -= enters
        self.waiting.extendleft(reversed(still))
        for key, images in ((key, group) for key, group in chosen.items() if group):
            there = [*self.drawing.get(key, []), *images]
            try:
                self.batches[key].admit(images)
            except Exception as error:
                self.drawing.pop(key, None)
                failed += self._give_up(key, there, error)
                continue
            for image in images:
                image.status = DRAWING
            self.drawing[key] = there
        if not self.closed:
            idle = [key for key in self.batches if key not in self.drawing]
            for key in idle[: max(0, len(idle) - _IDLE)]:
                del self.batches[key]
        return failed

    def _batch(self, image: ImageRequest) -> Batch:
        if image.key not in self.batches:
            self.batches[image.key] = self.pipe.make_batch(image.settings, self.closed)
        return self.batches[image.key]

    def partial(self, image: ImageRequest) -> tuple[Tensor, int, Tensor | None]:
        """What an image that is being drawn has: tokens [N, ...], how many, and which of them, bool [N], where they do
        not come in order. To be called between passes. Raises ValueError for an image that is not drawn."""
        if image.status != DRAWING:
            raise ValueError(f"an image that is {image.status} is not being drawn")
        batch = self.batches[image.key]
        return batch.tokens_of(image), image.count, batch.known_of(image)

    def drain(self) -> Iterator[ImageRequest]:
        """Images as they are over, until nobody waits."""
        while self.busy:
            yield from self.step()

    def clear(self) -> None:
        """Give up all images, and the batches that are quickly made."""
        self.waiting.clear()
        self.drawing.clear()
        self.batches = {key: batch for key, batch in self.batches.items() if batch.prepared}
        for batch in self.batches.values():
            batch.clear()
