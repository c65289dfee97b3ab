"""The thread that decodes: takes the images of requests into the admission loop and tells what becomes of them.

Only this thread touches models, so that nothing is shared but the inbox. Pictures are made by other threads, each on
one core, in float32: their bytes are those of an image drawn alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from bozzetto.admission import Admission, Ticket
from bozzetto.images import one_core
from bozzetto.pipeline import Pipeline
from bozzetto.serve.methods import methods_of
from bozzetto.serve.metrics import Metrics
from bozzetto.settings import GenerateSettings

_PAINTERS = 2
_PROMPTS = 1024  # prompts whose features are kept per model
_WATCHED = 0.05  # seconds between pictures for somebody who watches


@dataclass(frozen=True)
class Order:
    """The images that one request asks for: 0..count-1 of a seed. partials: pictures on the way; watched: whether every
    pass is told."""

    model: str
    prompt: str
    settings: GenerateSettings
    seed: int
    count: int = 1
    partials: int = 0
    watched: bool = False


@dataclass(frozen=True)
class Partial:
    """A picture on the way: the `number`-th of image `index`, grey where nothing is drawn yet."""

    index: int
    number: int
    picture: Image.Image


@dataclass(frozen=True)
class Progress:
    """What passes did since the last one told. seconds: since the image's first pass; done: tokens."""

    index: int
    seconds: float
    done: int
    passes: int
    picture: Image.Image | None


@dataclass(frozen=True)
class Finished:
    """An image. seconds: from its first pass to its last; trace: tokens that each pass committed."""

    index: int
    picture: Image.Image
    tokens: int
    passes: int
    accepted: int
    drafted: int
    seconds: float
    trace: list[int]


@dataclass(frozen=True)
class Failed:
    """The order comes to nothing."""

    error: Exception


class Busy(Exception):
    """The queue is full. seconds: after which it is worth trying again."""

    def __init__(self, seconds: int):
        super().__init__(f"the server is busy: try again in {seconds} s")
        self.seconds = seconds


class TooLong(Exception):
    """An order took longer than a request may."""


Event = Partial | Progress | Finished | Failed


@dataclass(eq=False)
class _Drawn:
    """An image of an order in the admission loop. told: partial pictures so far; shown: when it was watched last;
    painting: the last picture of it that was handed to the painters."""

    order: Job
    index: int
    ticket: Ticket
    began: float | None = None
    told: int = 0
    shown: float = 0.0
    watching: bool = False  # a picture for who watches is being made
    painting: Future[None] | None = None


@dataclass(eq=False)
class Job:
    """An order on its way. post: is told events, from any thread; left: images that are not finished."""

    order: Order
    post: Callable[[Event], None]
    due: float
    left: int
    images: list[_Drawn] = field(default_factory=list)
    over: bool = False


class Worker(threading.Thread):
    """pipes: models by name; slots: images in passes at a time; queue: images that may wait; limit: seconds per order;
    base: settings that every image shares (compile, deterministic); warm: draw a few images first."""

    def __init__(
        self,
        load: Callable[[], dict[str, Pipeline]],
        *,
        slots: int = 8,
        queue: int = 64,
        limit: float = 120.0,
        base: GenerateSettings | None = None,
        warm: bool = True,
        metrics: Metrics | None = None,
    ):
        super().__init__(name="bozzetto-worker", daemon=True)
        self.load, self.slots, self.queue, self.limit = load, slots, queue, limit
        self.base, self.warm = base or GenerateSettings(), warm
        self.metrics = metrics or Metrics()
        self.pipes: dict[str, Pipeline] = {}
        self.rules: dict[str, dict[str, list[str]]] = {}  # methods by model
        self.ready = threading.Event()
        self.failure: Exception | None = None
        self.wake = threading.Condition()
        self.inbox: deque[Job] = deque()
        self.unwanted: deque[Job] = deque()
        self.held = 0  # images accepted and not over
        self.pace = 1.0  # seconds per image, lately
        self.stopping = False
        self.loops: dict[str, Admission] = {}
        self.jobs: list[Job] = []
        self.drawn: dict[int, _Drawn] = {}

    # Called from any thread.

    def submit(self, order: Order, post: Callable[[Event], None]) -> Job:
        """Take an order. Raises Busy where the queue is full."""
        job = Job(order, post, time.monotonic() + self.limit, order.count)
        with self.wake:
            if self.held + order.count > self.slots + self.queue:
                raise Busy(max(1, round(self.held * self.pace)))
            self.held += order.count
            self.metrics.waiting(self.held)
            self.inbox.append(job)
            self.wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for an order any more."""
        with self.wake:
            self.unwanted.append(job)
            self.wake.notify()

    def stop(self) -> None:
        """Finish what was accepted, then end."""
        with self.wake:
            self.stopping = True
            self.wake.notify()

    # Called from this thread only.

    def run(self) -> None:
        """Load, warm up, and decode until told to stop."""
        threads = torch.get_num_threads()
        try:
            self.painters = ThreadPoolExecutor(_PAINTERS, "bozzetto-painter", one_core)
            list(self.painters.map(lambda _: time.sleep(0.05), range(_PAINTERS)))  # so that they are there
            torch.set_num_threads(threads)  # theirs is taken over by threads that are made later
            self.pipes = self.load()
            self.loops = {
                name: Admission(pipe, self.slots, self.slots + self.queue) for name, pipe in self.pipes.items()
            }
            for name, pipe in self.pipes.items():
                pipe.remember(_PROMPTS)
                self.rules[name] = methods_of(pipe)
            if self.warm:
                self._warm_up()
        except Exception as error:
            self.failure = error
            return
        self.ready.set()
        while self._turn():
            pass
        self.painters.shutdown()

    def _warm_up(self) -> None:
        """One image alone and as many as there are slots, of every model, so that no request waits for graphs."""
        for loop in self.loops.values():
            label = loop.pipe.labels((), self.base)[0]
            for count in sorted({1, self.slots}):
                for index in range(count):
                    loop.submit(label, index=index, settings=self.base)
                for ticket in loop.drain():
                    loop.pipe.decode(ticket.tokens)

    def _turn(self) -> bool:
        """Take what came in and do one pass of each model; False at the end."""
        with self.wake:
            while not (self.inbox or self.unwanted or self.drawn or self.stopping):
                self.wake.wait()
            new, gone = list(self.inbox), list(self.unwanted)
            self.inbox.clear()
            self.unwanted.clear()
        for job in new:
            self._begin(job)
        now = time.monotonic()
        for job in gone:
            self._drop(job, None)
        for job in [job for job in self.jobs if job.due < now]:
            self._drop(job, TooLong(f"the images took longer than the {self.limit:g} s that a request may"))
        for name, loop in self.loops.items():
            if loop.waiting or loop.drawing:
                self._pass(name, loop)
        with self.wake:
            return bool(self.drawn or self.inbox or not self.stopping)

    def _begin(self, job: Job) -> None:
        order = job.order
        try:
            pipe, loop = self.pipes[order.model], self.loops[order.model]
            settings = pipe.resolve(order.settings)
            (label,) = pipe.labels([order.prompt], settings)
            self.jobs.append(job)
            for index in range(order.count):
                ticket = loop.submit(label, seed=order.seed, index=index, settings=settings)
                drawn = _Drawn(job, index, ticket)
                job.images.append(drawn)
                self.drawn[id(ticket)] = drawn
        except Exception as error:  # whatever a model makes of a request must not end the thread
            self._drop(job, error, new=True)

    def _drop(self, job: Job, error: Exception | None, new: bool = False) -> None:
        """Give up an order; error: what its client is told."""
        if job.over or (job not in self.jobs and not new):
            return
        for drawn in job.images:
            if self.drawn.pop(id(drawn.ticket), None) is not None:
                self.loops[job.order.model].cancel(drawn.ticket)
        self._over(job, job.left)
        job.left = 0
        if error is not None:
            job.post(Failed(error))

    def _over(self, job: Job, images: int) -> None:
        """Images leave; the order ends with its last one."""
        job.left -= images
        if job.left <= 0:
            job.over = True
        if job.over and job in self.jobs:
            self.jobs.remove(job)
        with self.wake:
            self.held -= images
            self.metrics.waiting(self.held)

    def _pass(self, name: str, loop: Admission) -> None:
        """One target pass of a model."""
        began = time.monotonic()
        try:
            finished = loop.step()
        except Exception as error:  # a lane that fails takes its images with it, not the server
            self._collapse(name, error)
            return
        now = time.monotonic()
        self.metrics.passed(name, loop.active + len(finished), now - began)
        for drawn in [d for d in self.drawn.values() if d.order.order.model == name]:
            if drawn.began is None and drawn.ticket.image is not None:
                drawn.began = began
        for ticket in finished:
            self._finish(self.drawn.pop(id(ticket)), now)
        for drawn in list(self.drawn.values()):
            if drawn.order.order.model == name and drawn.began is not None:
                self._show(drawn, loop, now)

    def _collapse(self, name: str, error: Exception) -> None:
        for job in [job for job in self.jobs if job.order.model == name]:
            self._drop(job, error)
        self.loops[name] = Admission(self.pipes[name], self.slots, self.slots + self.queue)

    def _finish(self, drawn: _Drawn, now: float) -> None:
        job, image = drawn.order, drawn.ticket.image
        assert image is not None and drawn.began is not None
        seconds = now - drawn.began
        self.pace += 0.1 * (seconds / max(1, min(self.held, self.slots)) - self.pace)
        self.metrics.finished(job.order.model, image, len(drawn.ticket.tokens), seconds)
        pipe, tokens, told = self.pipes[job.order.model], drawn.ticket.tokens, list(image.trace.committed)
        self._over(job, 1)

        def paint() -> None:
            picture = pipe.decode_here(tokens)
            counts = (len(tokens), image.passes, image.accepted, image.drafted)
            job.post(Finished(drawn.index, picture, *counts, seconds, told))

        self._paint(drawn, paint)

    def _show(self, drawn: _Drawn, loop: Admission, now: float) -> None:
        """Partial pictures, at even shares of the tokens; for who watches, the passes too."""
        job, image = drawn.order, drawn.ticket.image
        order = job.order
        assert image is not None and drawn.began is not None
        pipe = self.pipes[order.model]
        due = drawn.told < order.partials and (
            image.count * (order.partials + 1) >= (drawn.told + 1) * pipe.target.length
        )
        if due:
            drawn.told += 1
            number, tokens = drawn.told - 1, loop.partial(drawn.ticket)
            self._paint(drawn, lambda: job.post(Partial(drawn.index, number, pipe.preview(*tokens))))
        if order.watched and not drawn.watching and now - drawn.shown >= _WATCHED:
            drawn.shown, drawn.watching = now, True
            seconds, passes, seen = now - drawn.began, image.passes, loop.partial(drawn.ticket)

            def paint() -> None:
                job.post(Progress(drawn.index, seconds, seen[1], passes, pipe.preview(*seen)))
                drawn.watching = False

            self._paint(drawn, paint)

    def _paint(self, drawn: _Drawn, work: Callable[[], Any]) -> None:
        """Do this work after what was to be done for the same image before: pictures leave in their order."""
        before = drawn.painting

        def safely() -> None:
            if before is not None:
                before.result()  # it was handed out earlier, so that it runs or is done
            try:
                work()
            except Exception as error:
                drawn.order.post(Failed(error))

        drawn.painting = self.painters.submit(safely)
