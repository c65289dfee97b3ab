"""One image's failure is its own: the others are drawn, with the bytes that they have alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bozzetto import load
from bozzetto.common.written import spelled
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.scheduler import DONE, DRAWING, FAILED, Scheduler
from bozzetto.errors import UsageError
from bozzetto.methods.table import read_drafter
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.settings import GenerateSettings

WINDOW, EXACT = GenerateSettings("jacobi", "seed-exact"), GenerateSettings("jacobi", "exact", window=4)
POISON = 13  # index of an image over which passes fail


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


def poisoned(pipe: Pipeline, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes fail in `method` (admit or step) where image POISON is among theirs."""
    make = pipe.make_batch

    def made(settings: GenerateSettings, closed: bool) -> Any:
        lane, held = make(settings, closed), []
        admit, step = lane.admit, lane.step

        def admitted(images: list[Any]) -> Any:
            held.extend(image.index for image in images)
            if method == "admit" and POISON in held:
                raise RuntimeError("no room")
            return admit(images)

        def stepped() -> Any:
            if method == "step" and POISON in held:
                raise RuntimeError("no pass")
            return step()

        lane.admit, lane.step = admitted, stepped
        return lane

    monkeypatch.setattr(pipe, "make_batch", made)


def alone(pipe: Pipeline, ticket: ImageRequest) -> torch.Tensor:
    drawn = pipe.generate([ticket.label], seed=ticket.seed, indices=[ticket.index], settings=ticket.settings)
    return drawn.images[0].tokens


@pytest.mark.parametrize("method", ["admit", "step"])
@pytest.mark.parametrize("settings", [WINDOW, EXACT, GenerateSettings("jacobi", "lantern:k=4", window=4)])
def test_a_lane_that_fails_takes_nobody_along_who_is_not_at_fault(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, method: str, settings: GenerateSettings
) -> None:
    poisoned(pipe, method, monkeypatch)
    engine = Scheduler(pipe, slots=4)
    asked = [engine.submit(i % 3, seed=1, index=i, settings=settings) for i in (0, 1)]
    engine.step()
    asked += [engine.submit(2, seed=1, index=i, settings=settings) for i in (POISON, 2, 3)]
    asked += [engine.submit(0, index=5, settings=GenerateSettings("none"))]  # another lane
    over = list(engine.drain())
    assert {t.index: t.status for t in over} == {i: FAILED if i == POISON else DONE for i in (0, 1, 2, 3, 5, 13)}
    with pytest.raises(RuntimeError, match="no "):
        _ = asked[2].result
    monkeypatch.undo()
    for ticket in (t for t in asked if t.status == DONE):
        assert torch.equal(ticket.result, alone(pipe, ticket))


def test_one_that_is_given_up_while_its_lane_fails_is_not_drawn_again(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(pipe, "step", monkeypatch)
    engine = Scheduler(pipe, slots=2)
    bad, good = (engine.submit(0, index=i, settings=WINDOW) for i in (POISON, 0))
    assert engine.step() == [] and good.status == bad.status == "waiting" and good.passes == 0
    assert engine.cancel(bad) and list(engine.drain()) == [good] and bad.error is None


@pytest.mark.parametrize(
    ("drafter", "rule", "named"),
    [
        ("plane", "block", "trained drafter"),
        ("jacobi:fill=plane", "auto", "trained drafter"),
        ("jacobi:second=eagle", "exact", "trained drafter"),
        ("jacobi", "lantern:k=1500", "at most 15"),
        ("eagle", "lantern", "trained drafter"),
    ],
)
@pytest.mark.parametrize("window", [0, 4])
def test_what_a_method_needs_is_known_to_be_there_before_it_joins_the_others(
    pipe: Pipeline, drafter: str, rule: str, named: str, window: int
) -> None:
    engine = Scheduler(pipe, slots=4)
    good = engine.submit(0, settings=WINDOW)
    engine.step()
    with pytest.raises(UsageError, match=named):
        engine.submit(1, settings=GenerateSettings(drafter, rule, window=window))
    assert good.status == DRAWING and not engine.waiting and list(engine.drain()) == [good]


def test_a_lane_that_cannot_be_made_again_fails_its_own_images_only(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scheduler(pipe, slots=1)
    first, second = engine.submit(0, index=0, settings=WINDOW), engine.submit(0, index=1, settings=EXACT)
    engine.step()
    engine.batches = {key: batch for key, batch in engine.batches.items() if key == first.key}  # as after many others
    monkeypatch.setattr(pipe, "make_batch", lambda settings, closed: 1 / 0)
    assert {t.index: t.status for t in engine.drain()} == {0: DONE, 1: FAILED}
    assert isinstance(second.error, ZeroDivisionError)


def test_one_drafter_has_one_lane_however_it_is_spelled() -> None:
    spellings = ("jacobi:fill=glance:fresh=2", "jacobi:fresh=002:fill=glance", "jacobi:fill=glance:fresh=2:places=8")
    assert {spelled(read_drafter(text)) for text in spellings} == {"jacobi:fill=glance:fresh=2"}
    assert (
        spelled(read_drafter("jacobi:fill=glance:fresh=00")) == "jacobi:fill=glance"
        and spelled(read_drafter("none")) == "none"
    )
