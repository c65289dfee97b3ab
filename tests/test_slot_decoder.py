"""Slots behind the pipeline: compiled decoding refills its batch, and draws the images of the eager engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bozzetto import load
from bozzetto.checkpoints.folders import save_drafter
from bozzetto.decoding.fused import FusedBatch
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.scheduler import Scheduler
from bozzetto.decoding.widths import MeasuredWidth, read_seconds
from bozzetto.drafters.glance import GlanceConfig, GlanceNet
from bozzetto.errors import UsageError
from bozzetto.evaluate.bench import BenchSettings, bench
from bozzetto.laws.categorical import LawSettings
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.settings import GenerateSettings


@pytest.fixture
def pipe(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "cache"))
    return load(tiny_model)


@pytest.mark.parametrize(("rule", "window"), [("seed-exact", 0), ("seed-exact", 3), ("exact", 3)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_images_are_those_of_the_eager_engine(pipe: Pipeline, rule: str, guidance: float, window: int) -> None:
    law = {"drafter": "jacobi", "rule": rule, "guidance": guidance, "window": window, "batch": 4}
    eager, slots = (pipe.generate(count=4, seed=3, compile=mode, **law) for mode in ("off", "max"))
    assert [a.sha256 for a in eager.images] == [b.sha256 for b in slots.images]
    if window:
        for name in ("target_passes", "accepted", "drafted"):
            assert [getattr(a, name) for a in eager.images] == [getattr(b, name) for b in slots.images]
        assert [a.trace for a in eager.images] == [b.trace for b in slots.images]


@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_windows_that_a_glance_fills_are_those_of_the_eager_engine(
    pipe: Pipeline, tiny_model: Path, tmp_path: Path, rule: str
) -> None:
    torch.manual_seed(0)
    net = GlanceNet(GlanceConfig(32, 16, 4, places=4, narrow=8, ffn=16, rank=4))
    save_drafter(tmp_path / "glance", net, tiny_model, {})
    drafter = f"jacobi:fill=glance:fresh=1:folder={tmp_path / 'glance'}"
    law = {"drafter": drafter, "rule": rule, "guidance": 2.0, "window": 4, "batch": 3}
    eager, slots = (pipe.generate(count=5, seed=3, compile=mode, **law) for mode in ("off", "max"))
    assert [a.sha256 for a in eager.images] == [b.sha256 for b in slots.images]
    assert [a.trace for a in eager.images] == [b.trace for b in slots.images]
    admission = Scheduler(pipe, slots=2)
    asked = [admission.submit(i % 3, seed=3, index=i, settings=GenerateSettings(drafter, rule, 4)) for i in range(5)]
    list(admission.drain())
    assert [pipe.decode(t.result).tobytes() for t in asked] == [a.image.tobytes() for a in eager.images]


def test_more_images_than_the_batch_holds_enter_as_others_finish(pipe: Pipeline) -> None:
    one_by_one = [pipe.generate(indices=[i], seed=5, batch=1).images[0].sha256 for i in range(11)]
    result = pipe.generate(count=11, seed=5, batch=3, compile="max", window=4)
    assert [image.sha256 for image in result.images] == one_by_one
    assert [image.index for image in result.images] == list(range(11))
    assert len(result.windows) == 1  # not four batches


def test_the_window_follows_what_passes_cost_and_the_seconds_are_kept(pipe: Pipeline, tmp_path: Path) -> None:
    settings = GenerateSettings("jacobi", "seed-exact", batch=2, compile="max")
    _, batch = pipe.decoded([0, 1], 0, [0, 1], settings)
    assert isinstance(batch, FusedBatch) and isinstance(batch.width, MeasuredWidth)
    (kept,) = (tmp_path / "cache").glob("times-*.json")
    assert '"2x1"' in kept.read_text()
    for (images, width), seconds in read_seconds(kept).items():
        assert batch.width.seconds(images, width) == seconds
    assert pipe.decoded([2], 1, [7], replace(settings, batch=2))[1] is not batch  # for one image
    assert pipe.decoded([2, 0], 1, [7, 8], settings)[1] is batch


def test_a_stream_of_slots_ends_with_the_images_and_never_takes_tokens_back(pipe: Pipeline) -> None:
    settings = GenerateSettings("jacobi", "seed-exact", window=4, batch=3, compile="max")
    before = torch.zeros(3, dtype=torch.int64)
    for event in pipe.stream((), seed=1, count=3, settings=settings):
        assert (event.count >= before).all() and event.width == 4
        assert (event.tokens[torch.arange(16) >= event.count[:, None]] == 0).all()
        before = event.count
    images, _ = pipe.decoded([0, 1, 2], 1, [0, 1, 2], settings)
    assert torch.equal(event.tokens, torch.stack([image.result for image in images]))


def test_a_stream_that_is_left_early_leaves_nothing_behind(pipe: Pipeline) -> None:
    settings = GenerateSettings("jacobi", "seed-exact", window=4, batch=3, compile="max")
    wanted = [image.result for image in pipe.decoded([1] * 3, 0, [7, 8, 9], settings)[0]]
    left = pipe.passes([0, 1, 2], 1, [0, 1, 2], settings)
    images, _ = next(left)
    there = [image.result for image in pipe.decoded([1] * 3, 0, [7, 8, 9], settings)[0]]  # while it waits
    assert all(torch.equal(*pair) for pair in zip(there, wanted, strict=True))
    left.close()
    again = [image.result for image in pipe.decoded([1] * 3, 0, [7, 8, 9], settings)[0]]
    assert all(torch.equal(*pair) for pair in zip(again, wanted, strict=True)) and images[0].tokens is None


@pytest.mark.parametrize("law", [{"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.0}, {"temperature": 0.6}])
def test_laws_that_cut_off_are_those_of_the_eager_engine(pipe: Pipeline, law: dict[str, float]) -> None:
    drawn = [pipe.generate(count=3, seed=2, compile=mode, batch=2, **law) for mode in ("off", "default")]
    assert [a.sha256 for a in drawn[0].images] == [b.sha256 for b in drawn[1].images]


def test_what_slots_cannot_do_is_left_to_the_other_decoder(pipe: Pipeline, tiny_model: Path) -> None:
    drafter = f"model:folder={tiny_model}:tree=chain-2"
    assert pipe.generate(count=1, compile="max", drafter=drafter, rule="block").tokens_per_pass > 1
    assert not pipe.fuses(pipe.resolve(GenerateSettings("jacobi", "seed-exact", compile="off")))


def test_deterministic_is_for_compiled_passes() -> None:
    with pytest.raises(UsageError, match="deterministic is not allowed with compile = 'off': auto, default, max"):
        GenerateSettings(deterministic=True, compile="off")


def test_waves_of_a_round_are_decoded_without_waiting_for_the_last_of_a_batch(pipe: Pipeline) -> None:
    settings = BenchSettings(("jacobi/seed-exact",), batches=(2,), windows=(3,), rounds=1, compile="max", waves=3)
    bare, none, jacobi = bench(pipe, settings)["results"]
    assert none["passes"] == bare["passes"] == 3 * 16
    assert jacobi["passes"] < none["passes"] and jacobi["tokens_per_pass"] > 1


def test_lanes_of_several_shapes_share_one_target(pipe: Pipeline) -> None:
    for window, guidance, batch in ((2, 2.0, 2), (2, 1.0, 4), (3, 1.0, 4)):
        settings = GenerateSettings("jacobi", "seed-exact", window=window, guidance=guidance, compile="max")
        lane = pipe.make_batch(pipe.resolve(replace(settings, batch=batch)))
        assert isinstance(lane, FusedBatch)
        lane.width = lambda images: 2
        lane.admit([ImageRequest(i % 2, 0, i, LawSettings(guidance)) for i in range(batch)])
        while lane.active:
            lane.step()
