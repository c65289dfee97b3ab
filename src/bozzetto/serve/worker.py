"""The thread that decodes: takes the images of requests into a scheduler and tells what becomes of them.

Only this thread touches models, so that nothing is shared but the inbox. Pictures are made by other threads, each on
one core, in float32: their bytes are those of an image drawn alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from bozzetto.common.images import Origin, one_core
from bozzetto.decoding.scheduler import Scheduler
from bozzetto.errors import UsageError
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve.methods import methods_of
from bozzetto.serve.metrics import Metrics
from bozzetto.serve.orders import Drawn, Event, Finished, Job, Order, Partial
from bozzetto.serve.problems import ApiError
from bozzetto.settings import GenerateSettings

_PAINTERS = 2
_PROMPTS = 1024  # prompts whose features are kept per model
_WATCHED = 0.05  # seconds between pictures for somebody who watches
_SIZES = 4  # other sizes than a model's own whose caches are kept, over all models
_AGAIN = 5.0  # seconds between looks at a model whose passes fail
_log = logging.getLogger("bozzetto.serve")


class Worker(threading.Thread):
    """load: gives models by name; slots: images in passes at a time; queue: images that may wait; limit: seconds per
    order; base: settings that every image shares (compile, deterministic); warm: one pass of each model first; failed:
    told, from this thread, that it cannot go on (`failure` says why)."""

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
        failed: Callable[[], None] = lambda: None,
    ):
        super().__init__(name="bozzetto-worker", daemon=True)
        self.load, self.slots, self.queue, self.limit = load, slots, queue, limit
        self.base, self.warm = base or GenerateSettings(), warm
        self.metrics = metrics or Metrics()
        self.pipes: dict[str, Pipeline] = {}
        self.rules: dict[str, dict[str, list[str]]] = {}  # methods by model
        self.examples: dict[str, tuple[str, ...]] = {}  # classes or prompts that come with a model
        self.ready = threading.Event()
        self.settled = threading.Event()  # it is ready, or never will be
        self.failure: Exception | None = None
        self.failed = failed
        self.doubted: set[str] = set()  # models of which a pass has failed since the last that did not
        self.trouble: dict[str, str] = {}  # models that draw nothing, and why
        self.looked = 0.0  # when doubted models were looked at last
        self.wake = threading.Condition()
        self.inbox: deque[Job] = deque()
        self.unwanted: deque[Job] = deque()
        self.held = 0  # images accepted and not over
        self.pace = 1.0  # seconds per image, lately
        self.stopping = False
        self.loops: dict[str, Scheduler] = {}  # by place, see Order
        self.jobs: list[Job] = []
        self.drawn: dict[int, Drawn] = {}

    # Called from any thread.

    def submit(self, order: Order, post: Callable[[Event], None], accept: Callable[[], None] = lambda: None) -> Job:
        """Take an order. Raises ApiError where the queue is full."""
        job = Job(order, post, accept, time.monotonic() + self.limit, order.count)
        with self.wake:
            if self.failure is not None:
                post(self.failure)
                return job
            if self.held + order.count > self.slots + self.queue:
                seconds = max(1, round(self.held * self.pace))
                message, headers = f"the server is busy: try again in {seconds} s", {"retry-after": str(seconds)}
                raise ApiError(429, message, code="queue_full", headers=headers)
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

    def complaint(self) -> str | None:
        """Why nothing can be drawn, in words that hold nothing of a request or of this machine's files; None: all is
        well, as far as is known."""
        if self.failure is not None:
            what = "drawing has ended" if self.ready.is_set() else "the models could not be made ready"
            return f"{what}: {_named(self.failure)}"
        if self.ready.is_set() and not self.is_alive():
            return "the server is stopping"
        failing = [f"passes of {name} fail: {why}" for name, why in sorted(self.trouble.items())]
        return "; ".join(failing) or None

    # Called from this thread only.

    def run(self) -> None:
        """Load, warm up, and decode until told to stop."""
        try:
            self._prepare()
            if not self.stopping:
                self.ready.set()
            self.settled.set()
            while self._turn():
                pass
            self.painters.shutdown()
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """There is no way on: say so to the log, to everyone who waits, and to whoever keeps this process."""
        _log.error("drawing has ended: no image can be drawn any more", exc_info=error)
        with self.wake:
            self.failure = error
            left = [*self.jobs, *self.inbox]
        self.settled.set()
        for job in left:
            job.post(error)
        self.failed()

    def _prepare(self) -> None:
        threads = torch.get_num_threads()
        self.painters = ThreadPoolExecutor(_PAINTERS, "bozzetto-painter", one_core)
        list(self.painters.map(lambda _: time.sleep(0.05), range(_PAINTERS)))  # so that they are there
        torch.set_num_threads(threads)  # theirs is taken over by threads that are made later
        self.pipes = self.load()
        for name, pipe in self.pipes.items():
            self.examples[name] = tuple(pipe.classes)  # before any client has a word in it
            self._open(name, pipe)
            self.rules[name] = methods_of(pipe)
        if self.warm:
            self._warm_up()

    def _warm_up(self) -> None:
        """One pass of every model. Left early by who is told to stop: nothing is accepted before it is over."""
        for loop in self.loops.values():
            if self.stopping:
                return
            self._one_pass(loop.pipe)

    def _one_pass(self, pipe: Pipeline) -> None:
        """Of sequential decoding of an image of ours. Raises what it fails with."""
        alone, settings = Scheduler(pipe, 1, 1), replace(self.base, drafter="none", rule="auto")
        alone.submit(pipe.labels((), settings)[0], settings=settings)
        alone.step()
        if alone.broken is not None:
            raise alone.broken

    def _look_again(self) -> None:
        """A pass with an image of ours tells a model that draws nothing any more from one request that could not be
        drawn."""
        self.looked = time.monotonic()
        for name in sorted(self.doubted):
            try:
                self._one_pass(self.loops[name].pipe)
            except Exception as error:
                self.trouble[name] = _named(error)
            else:
                self._well(name)

    def _well(self, name: str) -> None:
        self.doubted.discard(name)
        self.trouble.pop(name, None)

    def _turn(self) -> bool:
        """Take what came in and do one pass of each model; False at the end."""
        with self.wake:
            while not (self.inbox or self.unwanted or self.drawn or self.stopping):
                if not self.wake.wait(_AGAIN if self.doubted else None):
                    break
            new, gone = list(self.inbox), list(self.unwanted)
            self.inbox.clear()
            self.unwanted.clear()
        for job in new:
            self._begin(job)
        now = time.monotonic()
        for job in gone:
            self._drop(job, None)
        for job in [job for job in self.jobs if job.due < now]:
            late = f"the images took longer than the {self.limit:g} s that a request may"
            self._drop(job, ApiError(504, late, code="timeout"))
        for name, loop in self.loops.items():
            if loop.busy:
                self._pass(name, loop)
        if self.doubted and now - self.looked >= _AGAIN:
            self._look_again()
        with self.wake:
            return bool(self.drawn or self.inbox or not self.stopping)

    def _begin(self, job: Job) -> None:
        order = job.order
        try:
            loop = self._loop(order)
            pipe = loop.pipe
            settings = pipe.resolve(order.settings)
            (label,) = pipe.labels([order.prompt], settings)
            self.jobs.append(job)
            for index in range(order.count):
                image = loop.submit(label, seed=order.seed, index=index, settings=settings)
                job.images.append(Drawn(job, image))
                self.drawn[id(image)] = job.images[-1]
        except Exception as error:  # whatever a model makes of a request must not end the thread
            _say("an order could not be begun", error)
            self._drop(job, error, new=True)
        else:
            job.accept()

    def _loop(self, order: Order) -> Scheduler:
        """The loop of a model, or of its twin for pictures of another size, which begins when it is first asked for.
        Raises UsageError for a size that the model does not draw."""
        if order.place not in self.loops:
            twin = self.pipes[order.model].in_size(order.size or self.pipes[order.model].size)
            idle = [k for k, loop in self.loops.items() if k not in self.pipes and not loop.busy]
            for place in idle[: max(0, len(self.loops) - len(self.pipes) + 1 - _SIZES)]:
                del self.loops[place]
                self._well(place)
            self._open(order.place, twin)
        return self.loops[order.place]

    def _open(self, place: str, pipe: Pipeline) -> None:
        def busy() -> set[int]:  # labels of its images that are asked for and not over
            return {d.image.label for d in self.drawn.values() if d.job.order.place == place}

        pipe.remember(max(_PROMPTS, 2 * (self.slots + self.queue)), busy)
        self.loops[place] = Scheduler(pipe, self.slots, self.slots + self.queue)

    def _drop(self, job: Job, error: Exception | None, new: bool = False) -> None:
        """Give up an order; error: what its client is told."""
        if job.over or (job not in self.jobs and not new):
            return
        for drawn in job.images:
            if self.drawn.pop(id(drawn.image), None) is not None:
                self.loops[job.order.place].cancel(drawn.image)
        self._over(job, job.left)
        job.left = 0
        if error is not None:
            job.post(error)

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

    def _pass(self, name: str, loop: Scheduler) -> None:
        """One target pass of a model."""
        began = time.monotonic()
        try:
            over = loop.step()
        except Exception as error:  # what the loop itself cannot mend
            _say(f"a pass of {name} has failed", error)
            self.doubted.add(name)
            self._collapse(name, error)
            return
        if loop.broken is None:
            self._well(name)
        else:
            _say(f"a pass of {name} has failed", loop.broken)
            self.doubted.add(name)
        now = time.monotonic()
        self.metrics.passed(name, loop.active + sum(image.error is None for image in over), now - began)
        for drawn in [d for d in self.drawn.values() if d.job.order.place == name]:
            if not drawn.image.passes:
                drawn.began = None  # it waits, for a place (perhaps again) or for its batch's turn
            elif drawn.began is None:
                drawn.began = began
        for image in over:
            found = self.drawn.pop(id(image), None)  # none: an image before it took its order along
            if found is not None and image.error is not None:
                self._drop(found.job, image.error)
            elif found is not None:
                self._finish(found, now)
        for drawn in list(self.drawn.values()):
            if drawn.job.order.place == name and drawn.began is not None:
                try:
                    self._show(drawn, loop, now)
                except Exception as error:  # who only watches must not end the thread
                    _say("a picture on the way could not be made", error)
                    self._drop(drawn.job, error)

    def _collapse(self, name: str, error: Exception) -> None:
        for job in [job for job in self.jobs if job.order.place == name]:
            self._drop(job, error)
        self.loops[name] = Scheduler(self.loops[name].pipe, self.slots, self.slots + self.queue)

    def _finish(self, drawn: Drawn, now: float) -> None:
        job, image = drawn.job, drawn.image
        assert drawn.began is not None
        seconds = now - drawn.began
        self.pace += 0.1 * (seconds / max(1, min(self.held, self.slots)) - self.pace)
        self.metrics.finished(job.order.place, image, seconds)
        pipe = self.loops[job.order.place].pipe
        origin = Origin(pipe.prompt_of(image.label), image.seed, image.index)
        self._over(job, 1)
        near = None if image.margin == float("inf") else image.margin < pipe.rounding(drawn.job.order.settings)
        self._paint(drawn, lambda: job.post(Finished(image, pipe.decode_here(image.result, origin), seconds, near)))

    def _show(self, drawn: Drawn, loop: Scheduler, now: float) -> None:
        """Partial pictures, at even shares of the tokens; for who watches, the passes too."""
        job, image, order = drawn.job, drawn.image, drawn.job.order
        assert drawn.began is not None
        pipe = loop.pipe
        number = None
        share = (drawn.told + 1) * pipe.target.length
        if drawn.told < order.partials and image.count * (order.partials + 1) >= share:
            number, drawn.told = drawn.told, drawn.told + 1
        elif order.watched and not drawn.watching and now - drawn.shown >= _WATCHED:
            drawn.shown, drawn.watching = now, True
        else:
            return
        seconds, passes, seen = now - drawn.began, image.passes, loop.partial(image)

        def paint() -> None:
            job.post(Partial(image.index, number, seconds, seen[1], passes, pipe.preview(*seen)))
            drawn.watching = False

        self._paint(drawn, paint)

    def _paint(self, drawn: Drawn, work: Callable[[], Any]) -> None:
        """Do this work after what was to be done for the same image before: pictures leave in their order."""
        before = drawn.painting

        def safely() -> None:
            if before is not None:
                before.result()  # it was handed out earlier, so that it runs or is done
            try:
                work()
            except Exception as error:
                _say("a picture could not be made", error)
                drawn.job.post(error)

        drawn.painting = self.painters.submit(safely)


def _say(what: str, error: Exception) -> None:
    """To the log, with the cause; what a client did wrong is only said to the client."""
    if not isinstance(error, UsageError):
        _log.error(what, exc_info=error)


def _named(error: Exception) -> str:
    """What went wrong, without the names of files that messages have."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{f' ({reason})' if reason else ''}, see the server's log"
