"""Scheduler: who comes when, with whom, and who leaves early changes no image; memory does not grow."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bozzetto import load
from bozzetto.checkpoints.folders import save_drafter
from bozzetto.decoding import scheduler
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.scheduler import CANCELLED, DONE, QueueFull, Scheduler
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.drafters.glance import GlanceConfig, GlanceNet
from bozzetto.errors import UsageError
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.settings import GenerateSettings

WINDOW, EXACT = GenerateSettings("jacobi", "seed-exact"), GenerateSettings("jacobi", "exact", window=4)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


def drawn_alone(pipe: Pipeline, ticket: ImageRequest) -> torch.Tensor:
    result = pipe.generate([ticket.label], seed=ticket.seed, indices=[ticket.index], settings=ticket.settings)
    return result.images[0].tokens


def mixed(choose: random.Random) -> GenerateSettings:
    law = {"guidance": choose.choice([1.0, 2.0, 3.5]), "temperature": choose.choice([0.0, 0.8, 1.0])}
    cut = {"top_k": choose.choice([0, 0, 3]), "top_p": choose.choice([1.0, 1.0, 0.8])}
    method = choose.choice([("jacobi", "seed-exact", 0), ("jacobi", "exact", 4), ("none", "seed-exact", 0)])
    return GenerateSettings(*method, **law, **cut)


def drafted(choose: random.Random) -> GenerateSettings:
    """Of a model with an EAGLE layer, in few kinds of law, so that images meet."""
    methods = ["eagle/block", "eagle:tree=2x2x1/tree", "eagle:tree=dynamic-7-3-2/lantern:k=4", "eagle:stop=0.3/block"]
    drafter, rule = choose.choice([*methods, "jacobi:second=eagle/exact"]).split("/")
    window = 4 if drafter.startswith("jacobi") else 0
    return GenerateSettings(
        drafter, rule, window, choose.choice([1.0, 2.0]), tv_budget=choose.choice([None, None, 3.0])
    )


def crowd(
    pipe: Pipeline,
    count: int,
    choose: random.Random,
    after: Callable[[int], object],
    mixed: Callable[[random.Random], GenerateSettings] = mixed,
) -> list[ImageRequest]:
    """Images of all kinds that come in at random, some of which are given up; `after` is told how many are done."""
    engine, asked, done = Scheduler(pipe, slots=6, queue=20), list[ImageRequest](), 0
    while len(asked) < count or engine.waiting or engine.active:
        for _ in range(min(choose.randrange(4), count - len(asked), engine.queue - len(engine.waiting))):
            asked.append(
                engine.submit(choose.randrange(3), seed=choose.randrange(3), index=len(asked), settings=mixed(choose))
            )
        if asked and choose.random() < 0.03:
            engine.cancel(choose.choice(asked[-12:]))
        done += len(engine.step())
        after(done)
    return asked


def resident() -> int:
    """Bytes of memory that this process holds (where it can be told)."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 1


def test_mixed_images_are_those_drawn_one_by_one_and_memory_stays_flat(pipe: Pipeline) -> None:
    memory = dict[int, int]()
    asked = crowd(pipe, 290, random.Random(0), lambda done: memory.setdefault(done // 25 * 25, resident()))
    finished = [ticket for ticket in asked if ticket.status == DONE]
    assert {ticket.status for ticket in asked} == {DONE, CANCELLED} and len(finished) >= 200
    for ticket in finished[::2]:  # drawing them alone is what takes time here
        assert torch.equal(ticket.result, drawn_alone(pipe, ticket)), ticket
    assert memory[max(memory)] <= 1.05 * memory[50]


def test_images_of_drafters_come_and_go(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    save_drafter(folder / "eagle", EagleNet(eagle_config(load(folder).target.config)), folder, {})
    pipe = load(folder)
    asked = crowd(pipe, 60, random.Random(1), lambda done: None, drafted)
    finished = [ticket for ticket in asked if ticket.status == DONE]
    assert {ticket.status for ticket in asked} == {DONE, CANCELLED} and len(finished) > 40
    for ticket in finished:
        assert torch.equal(ticket.result, drawn_alone(pipe, ticket)), ticket


def test_images_of_all_seeds_share_the_passes_of_a_drafter(pipe: Pipeline, tiny_model: Path) -> None:
    settings = GenerateSettings(f"model:folder={tiny_model}:tree=chain-2", "block")
    engine = Scheduler(pipe, slots=3)
    asked = [engine.submit(i % 3, seed=i % 2, index=i, settings=settings) for i in range(7)]
    asked += [engine.submit(0, index=9, settings=WINDOW)]
    engine.step()
    engine.cancel(asked[2])
    assert {t.index for t in engine.drain()} == {0, 1, 3, 4, 5, 6, 9}
    for ticket in (t for t in asked if t.status == DONE):
        assert torch.equal(ticket.result, drawn_alone(pipe, ticket))


def test_continuous_tokens_are_admitted_too(tiny_flow: Path) -> None:
    pipe = load(tiny_flow)
    engine = Scheduler(pipe, slots=2)
    settings = [GenerateSettings(*method, window=3) for method in (("none", "plain"), ("jacobi", "pathwise"))]
    asked = [engine.submit(i % 3, index=i, settings=settings[i % 2]) for i in range(5)]
    assert len(list(engine.drain())) == 5
    for ticket in asked:
        assert torch.allclose(ticket.result, drawn_alone(pipe, ticket), atol=1e-3)


@pytest.mark.parametrize("drafter", ["jacobi", "jacobi:fill=glance:fresh=1", "jacobi:second=glance"])
def test_an_image_does_not_depend_on_how_many_slots_there_are(tiny_model: Path, tmp_path: Path, drafter: str) -> None:
    """The noise of a rule that is not seed-exact depends on the window, which is that of one image alone."""
    torch.manual_seed(0)
    net = GlanceNet(GlanceConfig(32, 16, 4, places=4, narrow=8, ffn=16, rank=4))
    save_drafter(tmp_path / "glance", net, tiny_model, {})
    pipe = load(tiny_model)
    folder = f":folder={tmp_path / 'glance'}" if ":" in drafter else ""
    settings, drawn = GenerateSettings(drafter + folder, "exact", guidance=2.0), []
    for slots in (1, 3, 8):
        engine = Scheduler(pipe, slots=slots)
        asked = [engine.submit(i % 3, seed=3, index=i, settings=settings) for i in range(6)]
        list(engine.drain())
        drawn.append(torch.stack([ticket.result for ticket in asked]))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_methods_take_turns(pipe: Pipeline) -> None:
    engine = Scheduler(pipe, slots=4)
    sequential = engine.submit(0, settings=GenerateSettings("none"))
    exact = engine.submit(0, settings=EXACT)
    for _ in range(6):
        engine.step()
    assert sequential.passes == exact.passes == 3


def test_a_full_queue_says_so_and_has_room_again_when_somebody_leaves(pipe: Pipeline) -> None:
    engine = Scheduler(pipe, slots=1, queue=2)
    asked = [engine.submit(0, index=i, settings=WINDOW) for i in range(2)]
    with pytest.raises(QueueFull, match="2 images are waiting already"):
        engine.submit(0, index=2, settings=WINDOW)
    assert engine.cancel(asked[0]) and not engine.cancel(asked[0])
    engine.submit(0, index=3, settings=WINDOW)
    assert [t.index for t in engine.drain()] == [1, 3]
    assert not engine.cancel(asked[1])


def test_an_image_given_up_while_it_is_drawn_frees_its_slot_and_has_no_tokens(pipe: Pipeline) -> None:
    engine = Scheduler(pipe, slots=1)
    first, second = (engine.submit(0, index=i, settings=WINDOW) for i in range(2))
    engine.step()
    engine.cancel(first)
    assert list(engine.drain()) == [second]
    with pytest.raises(ValueError, match="an image that is cancelled has no tokens"):
        _ = first.result
    assert torch.equal(second.tokens, drawn_alone(pipe, second))


def test_the_old_names_still_work_and_say_what_they_are_called_now(pipe: Pipeline) -> None:
    with pytest.warns(DeprecationWarning, match="Scheduler now"):
        from bozzetto.admission import DONE, Admission
    assert DONE == scheduler.DONE
    image = Admission(pipe).submit(1, index=2)
    with pytest.warns(DeprecationWarning, match="its own request"):
        assert image.request.label == 1 and Admission is Scheduler


def test_nothing_to_do_is_no_pass(pipe: Pipeline) -> None:
    assert Scheduler(pipe).step() == []


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"label": 3}, "label = 3 is not allowed: a whole number from 0 to 2"),
        ({"label": "tulip"}, "label = 'tulip' is not allowed: a whole number from 0 to 2"),
        ({"label": 0, "seed": -1}, "seed = -1 is not allowed"),
        ({"label": 0, "seed": float("nan")}, "seed = nan is not allowed"),
        ({"label": 0, "seed": 2**63}, "seed = 9223372036854775808 is not allowed"),
        ({"label": 0, "index": -2}, "index = -2 is not allowed"),
        ({"label": 0, "settings": GenerateSettings(steps=4)}, "steps is not allowed here"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(pipe: Pipeline, asked: dict[str, int], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        Scheduler(pipe).submit(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"slots": 0}, {"queue": 0}])
def test_an_engine_without_room_is_refused(pipe: Pipeline, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="a whole number >= 1"):
        Scheduler(pipe, **options)


def test_images_may_be_asked_for_and_given_up_from_other_threads(pipe: Pipeline) -> None:
    engine, asked, stop = Scheduler(pipe, slots=4, queue=1000), list[ImageRequest](), threading.Event()

    def customer(number: int) -> None:
        for i in range(12):
            asked.append(engine.submit(i % 3, seed=number, index=i, settings=(WINDOW, EXACT)[i % 2]))
            if i % 5 == 4:
                engine.cancel(asked[-1])

    def draw() -> None:
        while not stop.is_set() or engine.waiting or engine.active:
            engine.step()

    artist = threading.Thread(target=draw)
    customers = [threading.Thread(target=customer, args=(n,)) for n in range(3)]
    for thread in (artist, *customers):
        thread.start()
    for thread in customers:
        thread.join()
    stop.set()
    artist.join()
    assert len(asked) == 36 and {t.status for t in asked} <= {DONE, CANCELLED}
    for ticket in (t for t in asked if t.status == DONE):
        assert torch.equal(ticket.result, drawn_alone(pipe, ticket))
