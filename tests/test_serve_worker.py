"""The thread that decodes, without HTTP: what orders become, whoever else is there."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bozzetto import load
from bozzetto.decoding.batch import RowBatch
from bozzetto.decoding.fused import FusedBatch
from bozzetto.errors import UsageError
from bozzetto.pipeline.conditions import PromptBook
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve.orders import Finished, Order, Partial
from bozzetto.serve.problems import ApiError
from bozzetto.serve.worker import Worker
from bozzetto.settings import GenerateSettings
from serving import slowed, until


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


@pytest.fixture
def worker(pipe: Pipeline) -> Iterator[Worker]:
    made = Worker(lambda: {"tiny": pipe}, slots=4, queue=8, warm=False)
    made.start()
    assert made.ready.wait(20)
    yield made
    made.stop()
    made.join(20)
    assert not made.is_alive()


def order(prompt: str = "rose", seed: int = 0, **more: Any) -> Order:
    settings = GenerateSettings(window=2) if "settings" not in more else more.pop("settings")
    return Order("tiny", prompt, settings, seed, **more)


def collected(worker: Worker, asked: Order) -> list[Any]:
    """Events of an order up to its end."""
    told: queue.Queue[Any] = queue.Queue()
    worker.submit(asked, told.put)
    events, left = [], asked.count
    while left:
        events.append(told.get(timeout=20))
        left -= isinstance(events[-1], Finished)
        if isinstance(events[-1], Exception):
            break
    return events


def test_every_image_of_an_order_is_the_one_drawn_alone(worker: Worker, pipe: Pipeline) -> None:
    found = {event.index: event for event in collected(worker, order(seed=9, count=4))}
    alone = pipe.generate(["rose"], seed=9, count=4, batch=1, window=2)
    for index, image in enumerate(alone.images):
        assert np.array_equal(np.asarray(found[index].picture), np.asarray(image.image))
        assert found[index].image.trace == image.trace and sum(image.trace.committed) == 16
    until(lambda: worker.held == 0)


def test_who_watches_is_told_tokens_that_only_grow_and_the_end(worker: Worker) -> None:
    slowed(worker, 0.06)
    events = collected(worker, order(settings=GenerateSettings("none", "seed-exact"), watched=True))
    progress = [event for event in events if isinstance(event, Partial)]
    assert len(progress) > 3 and [p.done for p in progress] == sorted({p.done for p in progress})
    assert isinstance(events[-1], Finished) and events[-1].image.passes == 16


def test_two_who_watch_lanes_of_their_own_both_see_their_pictures(worker: Worker) -> None:
    told: list[queue.Queue[Any]] = [queue.Queue(), queue.Queue()]
    batches = GenerateSettings("jacobi", "grouped", window=2)  # not in slots: a lane for each seed
    with worker.wake:  # both come in one turn, and only one of their lanes has it
        for seed, events in enumerate(told):
            worker.submit(order(seed=seed, settings=batches, watched=True), events.put)
    for events in told:
        found = [events.get(timeout=20)]
        while not isinstance(found[-1], Exception | Finished):
            found.append(events.get(timeout=20))
        assert isinstance(found[0], Partial) and found[0].done > 0 and isinstance(found[-1], Finished)


def test_partial_pictures_come_once_each(worker: Worker) -> None:
    events = collected(worker, order(settings=GenerateSettings("none", "seed-exact"), partials=3, count=2))
    told = [(event.index, event.number) for event in events if isinstance(event, Partial)]
    assert sorted(told) == [(index, number) for index in range(2) for number in range(3)]


@pytest.mark.parametrize("bad", [order(prompt="cactus"), order(settings=GenerateSettings("eagle", "block"))])
def test_an_order_that_cannot_be_drawn_fails_alone(worker: Worker, bad: Order) -> None:
    (event,) = collected(worker, bad)
    assert isinstance(event, UsageError)
    assert isinstance(collected(worker, order())[-1], Finished)
    until(lambda: worker.held == 0)


def test_what_is_accepted_is_finished_before_the_end(pipe: Pipeline) -> None:
    worker = Worker(lambda: {"tiny": pipe}, slots=2, queue=8, warm=False)
    told: queue.Queue[Any] = queue.Queue()
    worker.start()
    assert worker.ready.wait(20)
    for seed in range(3):
        worker.submit(order(seed=seed, count=2), told.put)
    worker.stop()
    worker.join(20)
    assert [type(told.get(timeout=1)) for _ in range(6)] == [Finished] * 6


def test_no_more_is_accepted_than_slots_and_queue_hold(pipe: Pipeline) -> None:
    idle = Worker(lambda: {"tiny": pipe}, slots=2, queue=3)  # never started: nothing leaves
    idle.submit(order(count=4), print)
    with pytest.raises(ApiError):
        idle.submit(order(count=2), print)
    idle.submit(order(), print)
    with pytest.raises(ApiError, match="try again in"):
        idle.submit(order(), print)


def test_a_model_that_cannot_be_loaded_is_said_and_not_served(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    worker = Worker(lambda: 1 / 0, failed=lambda: told.append("failed"))  # type: ignore[arg-type, return-value]
    worker.start()
    worker.join(20)
    assert isinstance(worker.failure, ZeroDivisionError) and not worker.ready.is_set()
    assert told == ["failed"] and "ZeroDivisionError" in caplog.text
    assert "could not be made ready: ZeroDivisionError" in (worker.complaint() or "")


def test_a_warm_up_that_fails_is_logged_with_its_cause(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/secret/folder")

    monkeypatch.setattr("bozzetto.decoding.scheduler.Scheduler.step", full)
    worker = Worker(lambda: {"tiny": pipe})
    worker.start()
    worker.join(20)
    assert "/secret/folder" in caplog.text and "Traceback" in caplog.text  # the log is the operator's
    assert worker.complaint() == (
        "the models could not be made ready: OSError (No space left on device), see the server's log"
    )


@pytest.mark.parametrize("mode", ["off", "default"])
def test_a_pass_is_made_before_the_first_request(mode: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stepped = load(tiny_model, device="cpu"), list[int]()
    for kind in (FusedBatch, RowBatch):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, step=step: (stepped.append(self.active), step(self))[1])
    base = GenerateSettings(drafter="none", compile=mode)
    worker = Worker(lambda: {"tiny": pipe}, slots=4, base=base)
    worker.start()
    until(worker.ready.is_set, 120)  # the kernels are built
    assert sum(stepped) == 1
    worker.stop()
    worker.join(20)


def test_who_is_told_to_stop_does_not_finish_the_warm_up(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, seen = Worker(lambda: {"a": pipe, "b": pipe}, slots=4), list[Any]()
    monkeypatch.setattr(worker, "_one_pass", lambda pipe: (seen.append(pipe), worker.stop()))
    worker.start()
    worker.join(120)
    assert len(seen) == 1 and not worker.is_alive() and worker.failure is None


def test_a_model_that_draws_nothing_any_more_is_told_from_one_request_that_failed(
    worker: Worker, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bozzetto.serve.worker._AGAIN", 0.05)
    monkeypatch.setattr(worker.loops["tiny"], "step", lambda: 1 / 0)
    assert isinstance(collected(worker, order())[-1], ZeroDivisionError)
    until(lambda: not worker.doubted)  # a pass of ours went well
    assert worker.complaint() is None and "ZeroDivisionError" in caplog.text
    with monkeypatch.context() as broken:
        broken.setattr("bozzetto.decoding.scheduler.Scheduler.step", lambda self: 1 / 0)
        assert isinstance(collected(worker, order())[-1], ZeroDivisionError)
        until(lambda: worker.complaint() == "passes of tiny fail: ZeroDivisionError, see the server's log")
    until(lambda: worker.complaint() is None)  # found out without a request
    assert isinstance(collected(worker, order())[-1], Finished)


def test_a_thread_that_ends_tells_everyone_who_waits_and_who_comes_later(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: queue.Queue[Any] = queue.Queue()
    worker = Worker(lambda: {"tiny": pipe}, warm=False, failed=lambda: told.put("failed"))
    monkeypatch.setattr(worker, "_finish", lambda *_: 1 / 0)
    worker.start()
    assert worker.ready.wait(20)
    for seed in range(2):
        worker.submit(order(seed=seed, count=2), told.put)
    worker.join(20)
    assert [type(told.get(timeout=1)) for _ in range(3)] == [ZeroDivisionError, ZeroDivisionError, str]
    assert worker.complaint() == "drawing has ended: ZeroDivisionError, see the server's log"
    worker.submit(order(), told.put)
    assert isinstance(told.get(timeout=1), ZeroDivisionError) and "ZeroDivisionError" in caplog.text


def test_painting_leaves_the_number_of_threads_as_it_was(pipe: Pipeline) -> None:
    before = torch.get_num_threads()
    worker = Worker(lambda: {"tiny": pipe}, warm=True)
    worker.start()
    assert worker.ready.wait(20)
    worker.stop()
    worker.join(20)
    assert torch.get_num_threads() == before


def test_painters_have_one_core_each_whatever_everybody_else_has(pipe: Pipeline) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    worker = Worker(lambda: {"tiny": pipe}, warm=False)
    worker.start()
    try:
        assert worker.ready.wait(20)
        torch.set_num_threads(2)
        asked = [worker.painters.submit(torch.get_num_threads) for _ in range(8)]
        assert [answer.result() for answer in asked] == [1] * 8
    finally:
        worker.stop()
        worker.join(20)
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["flowers-flow", "flowers-mar"])
def test_continuous_models_are_served_too(name: str) -> None:
    pipe = load(name)
    settings = GenerateSettings(steps=2, passes=4 if name == "flowers-mar" else 0)
    worker = Worker(lambda: {"tiny": pipe}, slots=2, queue=2, warm=False)
    worker.start()
    until(lambda: worker.ready.is_set() or worker.failure, 60)
    events = collected(worker, Order("tiny", "rose", settings, 1, count=1, partials=1))
    worker.stop()
    wanted = pipe.generate(["rose"], seed=1, settings=pipe.alone(settings)).images[0]
    assert [type(event) for event in events] == [Partial, Finished]
    assert np.array_equal(np.asarray(events[-1].picture), np.asarray(wanted.image))
    shares = (np.asarray(events[0].picture) == 128).all(-1).mean()
    assert 0.2 < shares < 0.8  # of a masked model's too: grey is what is not known, wherever that is


def test_a_book_with_an_end_lets_the_oldest_prompt_go() -> None:
    given: list[tuple[str, int | None]] = []

    def add(text: str, negative: str, label: int | None) -> int:
        given.append((text, label))
        return len({t for t, was in given if was is None}) - 1 if label is None else label

    book = PromptBook([], add)
    book.most = 3
    assert [book.label(text, "") for text in ("a", "b", "c", "a", "d", "e", "a")] == [0, 1, 2, 0, 1, 2, 0]
    assert given[3:] == [("d", 1), ("e", 2)] and book.names == ["a", "d", "e"]
    assert book.label("b", "") == 1 and book.names == ["a", "b", "e"]


def test_a_prompt_that_is_drawn_keeps_its_place_whoever_else_asks() -> None:
    given: list[tuple[str, int | None]] = []

    def add(text: str, negative: str, label: int | None) -> int:
        given.append((text, label))
        return len({t for t, was in given if was is None}) - 1 if label is None else label

    book, busy = PromptBook([], add), {0}
    book.remember(3, lambda: busy)
    assert [book.label(text, "") for text in ("a", "b", "c", "d", "e", "f")] == [0, 1, 2, 1, 2, 1]
    assert book.label("a", "") == 0 and book.names == ["a", "f", "e"]
    busy |= {1, 2}
    assert book.label("g", "") == 3 and book.names == ["a", "f", "e", "g"]  # rather more than another one's words


def test_an_order_whose_pass_fails_fails_alone(worker: Worker, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    make = pipe.make_batch

    alone = pipe.generate(["rose"], seed=9, count=2, batch=1, drafter="none").images

    def broken(settings: GenerateSettings, closed: bool) -> Any:
        lane = make(settings, closed)
        monkeypatch.setattr(lane, "step", lambda: 1 / 0)
        return lane

    slowed(worker, 0.05)
    told: queue.Queue[Any] = queue.Queue()
    worker.submit(order(seed=9, count=2, settings=GenerateSettings("none")), told.put)
    until(lambda: worker.loops["tiny"].active == 2)
    monkeypatch.setattr(pipe, "make_batch", broken)
    (event,) = collected(worker, order(seed=1, count=3, settings=GenerateSettings("jacobi", "exact", window=4)))
    assert isinstance(event, ZeroDivisionError)
    found = sorted((told.get(timeout=20) for _ in range(2)), key=lambda event: event.index)
    for event, image in zip(found, alone, strict=True):
        assert np.array_equal(np.asarray(event.picture), np.asarray(image.image))
    until(lambda: worker.held == 0 and not worker.drawn and not worker.jobs)


def test_images_whose_lane_fails_once_are_drawn_again(
    worker: Worker, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, passes = pipe.make_batch, [0]

    wanted = pipe.generate(["rose"], seed=2, count=3, batch=1, drafter="none").images

    def once(settings: GenerateSettings, closed: bool) -> Any:
        lane = make(settings, closed)
        step = lane.step

        def stepped() -> Any:
            passes[0] += 1
            return 1 / 0 if passes[0] == 4 else step()

        monkeypatch.setattr(lane, "step", stepped)
        return lane

    monkeypatch.setattr(pipe, "make_batch", once)
    asked = order(seed=2, count=3, partials=2, settings=GenerateSettings("none"))
    events = collected(worker, asked)
    finished = {event.index: event for event in events if isinstance(event, Finished)}
    for index, image in enumerate(wanted):
        assert np.array_equal(np.asarray(finished[index].picture), np.asarray(image.image))
    assert len(events) == 3 * 3 and passes[0] >= 4 + 3 * 16


def test_a_picture_on_the_way_that_fails_is_its_orders_own_matter(
    worker: Worker, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partial(ticket: Any) -> Any:
        raise StopIteration

    monkeypatch.setattr(worker.loops["tiny"], "partial", partial)
    told: queue.Queue[Any] = queue.Queue()
    worker.submit(order(seed=3), told.put)
    (event,) = collected(worker, order(seed=4, partials=2, settings=GenerateSettings("none")))
    assert isinstance(event, Exception) and isinstance(told.get(timeout=20), Finished) and worker.is_alive()
    until(lambda: worker.held == 0)
