"""The Python interface on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import bozzetto
from bozzetto import GenerateSettings, Pipeline, UsageError
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import save_tokenizer
from bozzetto.checkpoints.own_sampling import OwnSampling
from bozzetto.evaluate.sampling import SampleRun
from bozzetto.pipeline.results import GeneratedImage, plan_batches
from bozzetto.settings import default_window


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return bozzetto.load(tiny_model)


def test_classes_go_by_name_or_number_and_take_turns(pipe: Pipeline) -> None:
    images = pipe.generate(["tulip", 0], seed=1, count=3).images
    assert [i.class_name for i in images] == ["tulip", "daisy", "tulip"]
    assert [i.index for i in images] == [0, 1, 2]
    assert [i.class_name for i in pipe.generate(seed=1).images] == ["daisy", "rose", "tulip"]


def test_a_text_is_one_class_and_not_a_list_of_letters(pipe: Pipeline, tmp_path: Path) -> None:
    for asked in ("tulip", 2):
        assert [i.class_name for i in pipe.generate(asked).images] == ["tulip"]
        assert next(pipe.stream(asked)).class_names == ["tulip"]
        assert pipe.labels(asked) == [2]
    assert SampleRun(tmp_path / "run", pipe, GenerateSettings(), classes="tulip").classes == [2]
    with pytest.raises(UsageError, match="unknown class 'tul'"):
        pipe.generate("tul")
    assert [i.class_name for i in pipe.generate(name for name in ("rose", "tulip")).images] == ["rose", "tulip"]
    for wrong in (None, 1.0, b"rose"):
        with pytest.raises(UsageError, match="names, numbers or prompts"):
            pipe.generate(wrong)


def test_a_number_of_images_without_end_begins_at_once(pipe: Pipeline) -> None:
    """What a plan takes does not depend on how many images it is for."""
    count, plan = plan_batches([0, 1, 2], 10**12, 0, 2, 4)
    assert count == 10**12 and next(plan) == ([2, 3, 4, 5], [2, 0, 1, 2])

    class Enough(Exception):
        pass

    def stop(image: GeneratedImage) -> None:
        if image.index == 5:
            raise Enough

    with pytest.raises(Enough):
        pipe.generate("tulip", count=10**12, batch=2, take=stop)


def test_images_that_somebody_takes_are_not_kept(pipe: Pipeline) -> None:
    kept, taken = pipe.generate(count=5, batch=2, seed=3, window=4), list[GeneratedImage]()
    result = pipe.generate(count=5, batch=2, seed=3, window=4, take=taken.append)
    assert result.images == [] and [i.sha256 for i in taken] == [i.sha256 for i in kept.images]
    assert (
        (result.count, result.tokens, result.passes) == (kept.count, kept.tokens, kept.passes) == (5, 80, kept.passes)
    )
    assert result.tokens_per_pass == kept.tokens_per_pass and result.windows == kept.windows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 0),
        ("count", 2.5),
        ("count", 10**5000),
        ("count", "3"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", float("nan")),
        ("first_index", -1),
        ("first_index", 2**63 - 1),
    ],
    ids=lambda x: str(x) if x != 10**5000 else "digits",
)
def test_a_request_out_of_range_is_refused(pipe: Pipeline, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} = .{{1,100}} is not allowed: a whole number"):
        pipe.generate(["rose"], **{"count": 2, name: value})


@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_an_image_does_not_depend_on_its_batch(pipe: Pipeline, rule: str) -> None:
    options = {"seed": 4, "rule": rule, "window": 4}
    together = pipe.generate(["rose"], count=5, batch=5, **options).images
    alone = pipe.generate(["rose"], count=5, batch=1, **options).images
    last = pipe.generate(["rose"], count=1, first_index=4, **options).images[0]
    assert [i.sha256 for i in together] == [i.sha256 for i in alone]
    assert last.sha256 == together[4].sha256


def test_accounts_add_up(pipe: Pipeline) -> None:
    result = pipe.generate(count=4, batch=2, seed=2, window=3)
    for image in result.images:
        assert image.accepted <= image.drafted
        assert image.accepted + image.target_passes - len(image.tokens) in (0, 1)
    passes = sum(i.target_passes for i in result.images)
    assert result.tokens_per_pass == pytest.approx(4 * 16 / passes)
    assert set(result.seconds) == {"total", "draft", "target", "decode"}
    assert result.seconds["total"] >= result.seconds["target"] > 0


def test_every_rule_of_codes_has_a_margin(pipe: Pipeline) -> None:
    ways = ({"drafter": "none"}, {"window": 4}, {"window": 4, "temperature": 0.0}, {"window": 4, "rule": "grouped"})
    for options in ({"rule": "exact", **way} for way in ways):
        margin = pipe.generate(["rose"], **options).images[0].margin
        assert margin is not None and 0 <= margin < float("inf")


def test_without_drafts_both_rules_are_the_sequential_sampler(pipe: Pipeline) -> None:
    a, b = (pipe.generate(seed=5, drafter="none", rule=rule).images for rule in ("seed-exact", "exact"))
    assert [i.sha256 for i in a] == [i.sha256 for i in b]


def test_the_stream_ends_with_what_generate_returns(pipe: Pipeline) -> None:
    events = list(pipe.stream(["rose", "tulip"], seed=3, batch=2))
    images = pipe.generate(["rose", "tulip"], seed=3, batch=2).images
    assert events[-1].indices == [0, 1]
    assert events[-1].class_names == ["rose", "tulip"]
    assert all(torch.equal(tokens, image.tokens) for tokens, image in zip(events[-1].tokens, images, strict=True))
    assert int(events[0].count.min()) >= 1


def test_a_preview_is_grey_where_nothing_is_drawn(pipe: Pipeline) -> None:
    tokens = pipe.generate(["rose"], seed=3).images[0].tokens
    half = np.asarray(pipe.preview(tokens, 8))  # two of four rows of tokens, 16 of 32 pixel rows
    assert (half[16:] == 128).all()
    assert np.array_equal(half[:16], np.asarray(pipe.decode(tokens))[:16])
    assert np.array_equal(np.asarray(pipe.preview(tokens, 16)), np.asarray(pipe.decode(tokens)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": ["lily"]}, "unknown class 'lily' .*daisy, rose, tulip"),
        ({"classes": [3]}, "unknown class 3 .*0-2"),
        ({"classes": ["-1"]}, "unknown class '-1'"),
        ({"count": 0}, "count = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"first_index": -1}, "first_index = -1"),
        ({"batch": 0}, "batch = 0"),
        ({"window": -2}, "window = -2"),
        ({"guidance": 0.5}, "guidance = 0.5"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"drafter": "psychic"}, "unknown drafter 'psychic' .*none, jacobi"),
        ({"rule": "lucky"}, "unknown rule 'lucky' .*seed-exact, exact"),
        ({"windows": 3}, "unknown option 'windows' .*window"),
        ({"settings": GenerateSettings(), "window": 3}, "not both: window"),
    ],
)
def test_bad_requests_name_the_value_and_what_is_allowed(pipe: Pipeline, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pipe.generate(**{"classes": ["rose"], **options})


def test_bad_models_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model 'nowhere'"):
        bozzetto.load("nowhere")
    with pytest.raises(UsageError, match=r"unknown dtype 'int4' .*float32, bfloat16"):
        bozzetto.load(tiny_model, dtype="int4")
    for device in ("abacus", "cuda:99"):
        with pytest.raises(UsageError, match=f"device '{device}' is not available"):
            bozzetto.load(tiny_model, device=device)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    save_tokenizer(folder, VQTokenizer(VQConfig(codes=8, width=16, pre_blocks=1, post_blocks=1, image_size=32)), {})
    with pytest.raises(UsageError, match="8 codes on a 4x4 grid, the target expects 16"):
        bozzetto.load(folder)
    config = json.loads((tiny_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "class_names": ["rose"]}))
    with pytest.raises(UsageError, match="class_names must list 3 names"):
        bozzetto.load(folder)


@pytest.mark.parametrize(("cheap", "least"), [(32, 2), (16, 1), (8, 1)])
def test_the_automatic_window_narrows_with_the_batch(cheap: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bozzetto.settings.cheap_rows", lambda: cheap)
    for dtype in ("float32", "bfloat16"):
        for compiled in (False, True):
            windows = [default_window(n, dtype, compiled=compiled) for n in (1, 2, 4, 8, 16, 64)]
            assert windows == sorted(windows, reverse=True)
            assert min(windows) == least and windows[0] >= 8
    assert GenerateSettings(drafter="none").with_own(OwnSampling()).window_for(1, 256, "float32") == 1
    assert GenerateSettings(window=64).with_own(OwnSampling()).window_for(1, 16, "float32") == 16
