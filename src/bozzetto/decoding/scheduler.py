"""Admission: images are asked for at any time, enter between passes, and are done, or given up, one by one.

Images of one method share passes, each with its own class, seed, guidance and filters; methods take turns. What an
image becomes does not depend on who was there with it (float32), and whether it becomes something does neither: where a
lane fails, its images are drawn again, each in a lane of its own, and only those that fail again come to nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from bozzetto.decoding.slots import ImageRequest, SlotImage
from bozzetto.errors import UsageError, check_number
from bozzetto.settings import GenerateSettings

WAITING, DRAWING, DONE, CANCELLED, FAILED = "waiting", "drawing", "done", "cancelled", "failed"
_OVER = (DONE, CANCELLED, FAILED)
_IDLE_LANES = 4  # lanes without images that are kept for the next ones


class QueueFull(UsageError):
    """More images wait than the queue holds."""


class Lane(Protocol):
    """Images that are decoded together: SlotLane or BatchLane."""

    @property
    def active(self) -> int: ...
    @property
    def free(self) -> int: ...
    def admit(self, requests: list[ImageRequest]) -> list[SlotImage]: ...
    def step(self) -> list[SlotImage]: ...
    def cancel(self, image: SlotImage) -> None: ...
    def tokens_of(self, image: SlotImage) -> Tensor: ...
    def shrink(self) -> None: ...


@dataclass(eq=False)
class Ticket:
    """An image that was asked for. status: `waiting`, `drawing`, `done`, `cancelled` or `failed`; image: its progress;
    alone: whether it is drawn in a lane of its own, after the one that it shared failed; error: why it failed."""

    request: ImageRequest
    settings: GenerateSettings
    key: Hashable
    status: str = WAITING
    image: SlotImage | None = field(default=None, repr=False)
    alone: bool = False
    error: Exception | None = None

    @property
    def tokens(self) -> Tensor:
        """Of a finished image: int64 [N], or float32 [N, D]. Raises ValueError before, and of a failed one why it
        failed."""
        if self.error is not None:
            raise self.error
        if self.image is None or self.image.tokens is None:
            raise ValueError(f"an image that is {self.status} has no tokens yet")
        return self.image.tokens


class Admission:
    """pipe: a Pipeline; slots: images in passes at a time; queue: images that may wait for one.

    `submit` and `cancel` may be called from any thread; `step` by one thread at a time.
    """

    def __init__(self, pipe: Any, slots: int = 8, queue: int = 64):
        for name, value in (("slots", slots), ("queue", queue)):
            if value < 1:
                raise UsageError(f"{name} = {value} is not allowed: a whole number >= 1")
        self.pipe, self.slots, self.queue = pipe, slots, queue
        self.waiting: deque[Ticket] = deque()
        self.lanes: dict[Hashable, Lane] = {}
        self.drawing: dict[Hashable, list[Ticket]] = {}
        self.broken: Exception | None = None  # why a lane failed in the last step
        self.lock = threading.RLock()

    @property
    def active(self) -> int:
        """Images in passes."""
        return sum(len(tickets) for tickets in self.drawing.values())

    def submit(self, label: int, *, seed: int = 0, index: int = 0, settings: GenerateSettings | None = None) -> Ticket:
        """Ask for image `index` of a seed; label: number of its class or caption. `settings.batch` says nothing here.

        Raises QueueFull, and UsageError for what the model cannot do: the image's lane is made here, so that whatever
        is needed for it (a trained drafter, a table) is known to be there before it joins the others.
        """
        last = len(self.pipe.classes) - 1
        for name, value, most in (("seed", seed, 2**63 - 1), ("index", index, 2**63 - 1), ("label", label, last)):
            shown = "2^63 - 1" if most > last else most
            check_number(name, value, 0, most, f"a whole number from 0 to {shown}", whole=True)
        settings = self.pipe.alone(settings or GenerateSettings())
        request = ImageRequest(label, seed, index, settings.law)
        ticket = Ticket(request, settings, self.pipe.lane_key(settings, seed))
        with self.lock:
            if len(self.waiting) >= self.queue:
                raise QueueFull(f"{self.queue} images are waiting already, more are not allowed: try again later")
            self._lane(ticket)
            self.waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """An image is not wanted any more; its slot is free from the next pass on. False if it was done already."""
        with self.lock:
            if ticket.status in _OVER:
                return False
            if ticket.status == WAITING:
                self.waiting.remove(ticket)
            ticket.status = CANCELLED  # one that is being drawn leaves before the next pass
        return True

    def step(self) -> list[Ticket]:
        """One target pass of one lane; returns the images that are over: done by this pass, or failed. Nothing to do:
        no pass."""
        with self.lock:
            self.broken = None
            self._leave()
            failed = self._enter()
            key = next(iter(self.drawing), None)
            if key is None:
                return failed
            tickets, lane = self.drawing.pop(key), self.lanes[key]
            expected = any(ticket.key == key for ticket in self.waiting)
        try:
            if not expected:
                lane.shrink()
            finished = {id(image) for image in lane.step()}
        except Exception as error:
            return failed + self._give_up(key, tickets, error)
        with self.lock:
            done = [t for t in tickets if id(t.image) in finished]
            left = [t for t in tickets if id(t.image) not in finished]
            if left:
                self.drawing[key] = left  # behind the others: lanes take turns
            for ticket in done:
                ticket.status = DONE if ticket.status == DRAWING else ticket.status
        return failed + [ticket for ticket in done if ticket.status == DONE]

    def _give_up(self, key: Hashable, tickets: list[Ticket], error: Exception) -> list[Ticket]:
        """A lane has failed: nobody knows whose fault it was, and what it holds means nothing any more. Its images
        begin again, each alone; returns those which were."""
        with self.lock:
            self.broken = error
            self.lanes.pop(key, None)
            wanted = [ticket for ticket in tickets if ticket.status != CANCELLED]
            for ticket in wanted:
                if ticket.alone:
                    ticket.status, ticket.error = FAILED, error
                else:
                    ticket.image, ticket.status, ticket.alone = None, WAITING, True
                    ticket.key = (ticket.key, id(ticket))
            self.waiting.extendleft(ticket for ticket in reversed(wanted) if ticket.status == WAITING)
        return [ticket for ticket in wanted if ticket.status == FAILED]

    def _leave(self) -> None:
        """Take cancelled images out of their lanes."""
        for key, tickets in list(self.drawing.items()):
            for ticket in (t for t in tickets if t.status == CANCELLED):
                assert ticket.image is not None
                self.lanes[key].cancel(ticket.image)
            kept = [t for t in tickets if t.status != CANCELLED]
            if kept:
                self.drawing[key] = kept
            else:
                del self.drawing[key]

    def _enter(self) -> list[Ticket]:
        """Give places to those who wait, the first ones first; a lane that is full lets others pass. Returns those
        whose lane failed over them."""
        chosen: dict[Hashable, list[Ticket]] = {}
        room, still, failed = self.slots - self.active, deque[Ticket](), list[Ticket]()
        for ticket in self.waiting:
            group = chosen.setdefault(ticket.key, [])
            try:
                enters = room > 0 and len(group) < self._lane(ticket).free
            except Exception as error:  # the lane had been given up for others, and cannot be made again
                self.broken = ticket.error = error
                ticket.status = FAILED
                failed.append(ticket)
                continue
            (group if enters else still).append(ticket)
            room -= enters
        self.waiting = still
        for key, tickets in ((key, group) for key, group in chosen.items() if group):
            there = [*self.drawing.get(key, []), *tickets]
            try:
                images = self.lanes[key].admit([t.request for t in tickets])
            except Exception as error:
                self.drawing.pop(key, None)
                failed += self._give_up(key, there, error)
                continue
            for ticket, image in zip(tickets, images, strict=True):
                ticket.image, ticket.status = image, DRAWING
            self.drawing[key] = there
        idle = [key for key in self.lanes if key not in self.drawing]
        for key in idle[: max(0, len(idle) - _IDLE_LANES)]:
            del self.lanes[key]
        return failed

    def _lane(self, ticket: Ticket) -> Lane:
        if ticket.key not in self.lanes:
            self.lanes[ticket.key] = self.pipe.make_lane(replace(ticket.settings, batch=self.slots))
        return self.lanes[ticket.key]

    def partial(self, ticket: Ticket) -> tuple[Tensor, int, Tensor | None]:
        """What an image that is being drawn has: tokens [N, ...], how many, and which of them, bool [N], where they do
        not come in order. To be called between passes. Raises ValueError for an image that is not drawn."""
        if ticket.image is None or ticket.status != DRAWING:
            raise ValueError(f"an image that is {ticket.status} is not being drawn")
        return self.lanes[ticket.key].tokens_of(ticket.image), ticket.image.count, ticket.image.known

    def drain(self) -> Iterator[Ticket]:
        """Images as they are over, until nobody waits."""
        while self.waiting or self.drawing:
            yield from self.step()
