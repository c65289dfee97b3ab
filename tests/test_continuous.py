"""Models of continuous tokens behind the same verbs: pipelines, command line, manifest, suite, the same-law test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bozzetto
from bozzetto import UsageError
from bozzetto.cli.main import main
from bozzetto.evaluate.bench import BenchSettings, bench, bench_table
from bozzetto.evaluate.samelaw import rejected, vector_tests
from bozzetto.pipeline.kinds import CausalVectors, MaskedVectors
from bozzetto.pipeline.pipeline import Pipeline

FLOW_METHODS = [
    ("none", "plain"),
    ("none", "reflection:depth=3"),
    ("none", "coupled:depth=3"),
    ("jacobi", "chains"),
    ("jacobi", "pathwise:epsilon=0.2"),
]
MASKED_METHODS = [("none", "plain"), ("none", "coupled:depth=3")]


@pytest.fixture(scope="module")
def flow(tiny_flow: Path) -> Pipeline:
    return bozzetto.load(tiny_flow)


@pytest.fixture(scope="module")
def masked(tiny_mar: Path) -> Pipeline:
    return bozzetto.load(tiny_mar)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_the_family_in_the_folder_decides_the_pipeline(flow: Pipeline, masked: Pipeline) -> None:
    assert isinstance(flow.kind, CausalVectors) and isinstance(masked.kind, MaskedVectors)


def test_auto_takes_the_familys_exact_method_and_a_drafter_or_rule_alone_finds_its_partner(
    flow: Pipeline, masked: Pipeline
) -> None:
    def chosen(pipe: Pipeline, **options: str) -> tuple[str, str]:
        settings = pipe.resolve(bozzetto.GenerateSettings(**options))
        return settings.drafter.text, settings.rule.text

    assert chosen(flow, compile="off") == ("jacobi", "chains")
    assert chosen(flow, compile="max") == ("none", "plain")  # drafts do not pay on our kernels
    assert chosen(flow, drafter="none") == chosen(flow, drafter="none", rule="seed-exact") == ("none", "plain")
    assert chosen(flow, rule="reflection") == ("none", "reflection")
    assert chosen(flow, rule="pathwise") == ("jacobi", "pathwise")
    assert chosen(masked) == ("none", "plain")


@pytest.mark.parametrize(("drafter", "rule"), FLOW_METHODS)
def test_a_flow_image_is_the_same_in_any_batch_and_order(flow: Pipeline, drafter: str, rule: str) -> None:
    options = {"seed": 3, "drafter": drafter, "rule": rule, "window": 4}
    whole = flow.generate(count=5, batch=5, **options).images
    alone = flow.generate(indices=[4, 1], batch=1, **options).images
    for image in alone:
        # The head's weights are large: 16 tokens enlarge the rounding between batches to 1.5e-4 with one thread.
        torch.testing.assert_close(image.tokens, whole[image.index].tokens, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("drafter", "rule"), MASKED_METHODS)
def test_a_masked_image_is_the_same_in_any_batch_and_order(masked: Pipeline, drafter: str, rule: str) -> None:
    options = {"seed": 3, "drafter": drafter, "rule": rule, "passes": 5}
    whole = masked.generate(count=4, batch=4, **options).images
    alone = masked.generate(indices=[3, 0], batch=1, **options).images
    for image in alone:
        torch.testing.assert_close(image.tokens, whole[image.index].tokens, atol=1e-4, rtol=0)


def test_pathwise_with_a_vanishing_epsilon_gives_the_pixels_of_sequential_decoding(flow: Pipeline) -> None:
    plain = flow.generate(count=3, seed=5, drafter="none")
    for window in (2, 4, 16):
        drafted = flow.generate(count=3, seed=5, drafter="jacobi", rule="pathwise:epsilon=1e-4", window=window)
        for a, b in zip(plain.images, drafted.images, strict=True):
            apart = np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3
            assert 0 <= b.farthest <= 1e-4


@pytest.mark.parametrize("folder", ["tiny_flow", "tiny_mar"])
def test_bfloat16_draws_with_every_exact_rule(folder: str, request: pytest.FixtureRequest) -> None:
    pipe = bozzetto.load(request.getfixturevalue(folder), dtype="bfloat16")
    for drafter, rule in FLOW_METHODS if folder == "tiny_flow" else MASKED_METHODS:
        image = pipe.generate(count=1, drafter=drafter, rule=rule).images[0]
        assert image.tokens.dtype == torch.float32 and bool(image.tokens.isfinite().all())


def test_a_larger_epsilon_needs_fewer_passes_and_reports_its_distance(flow: Pipeline) -> None:
    passes = []
    for epsilon in (0.01, 0.3, 3.0):
        result = flow.generate(count=4, batch=4, drafter="jacobi", rule=f"pathwise:epsilon={epsilon}", window=8)
        passes.append(sum(i.target_passes for i in result.images))
        assert all(0 <= i.moved <= i.farthest <= epsilon for i in result.images)
    assert passes == sorted(passes, reverse=True) and passes[-1] < passes[0]


def test_speculation_inside_the_head_saves_serial_calls(flow: Pipeline, masked: Pipeline) -> None:
    for pipe, rule in ((flow, "reflection"), (masked, "coupled")):
        plain = pipe.generate(count=2, drafter="none", rule="plain")
        assert plain.head_calls == 2 * 16 * 6
        assert pipe.generate(count=2, drafter="none", rule=rule).head_calls < plain.head_calls


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "seed-exact", "drafter": "jacobi"}, "'seed-exact' is for codes"),
        ({"rule": "lantern", "drafter": "eagle"}, "is for codes"),
        ({"rule": "chains", "drafter": "none"}, "makes none"),
        ({"rule": "plain", "drafter": "jacobi"}, "needs no drafter"),
        ({"rule": "joint", "drafter": "jacobi"}, "does not carry a window on"),
        ({"rule": "pathwise:epsilon=-1"}, "epsilon = -1"),
        ({"rule": "pathwise:over=image"}, "over = 'image' is not allowed: token, run"),
        ({"rule": "reflection:depth=0"}, "depth = 0"),
        ({"top_k": 5}, "top-k"),
        ({"temperature": 0.0}, "temperature"),
        ({"passes": 4}, "passes is not allowed here"),
        ({"tv_budget": 1.0}, "tv_budget is not allowed here"),
        ({"steps": -1}, "steps = -1"),
    ],
)
def test_what_does_not_fit_a_flow_model_is_refused_with_its_name(
    flow: Pipeline, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        flow.generate(count=1, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "reflection"}, "reflection"),
        ({"passes": 17}, "passes = 17 .*1 to 16"),
        ({"guidance_schedule": "cosine"}, "'cosine' .*linear, constant"),
        ({"rule": "chains", "drafter": "jacobi"}, "is masked"),
        ({"rule": "cspd", "drafter": "model"}, "comes without a smaller model"),
    ],
)
def test_what_does_not_fit_a_masked_model_is_refused_with_its_name(
    masked: Pipeline, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        masked.generate(count=1, **options)


def test_options_of_denoising_are_refused_by_a_model_of_codes(tiny_model: Path) -> None:
    pipe = bozzetto.load(tiny_model)
    for option, value in (("steps", 4), ("passes", 4), ("guidance_schedule", "linear")):
        with pytest.raises(UsageError, match=f"{option} is not allowed here"):
            pipe.generate(count=1, **{option: value})
    with pytest.raises(UsageError, match="is for continuous tokens"):
        pipe.generate(count=1, rule="chains", drafter="jacobi")


def test_the_manifest_counts_the_heads_work_and_names_the_tokens_file(tiny_flow: Path, tmp_path: Path) -> None:
    assert run("generate", "--model", tiny_flow, "--count", 2, "--out", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["head_calls"] > 0 and content["head_rows"] >= content["head_calls"]
    assert content["settings"]["drafter"] == "none" and content["settings"]["rule"] == "plain"
    tokens = np.load(tmp_path / "out" / "tokens.npz")
    for image in content["images"]:
        assert image["tokens"] == "tokens.npz" and image["distance_max"] == 0
        assert tokens[image["file"]].shape == (16, 32) and tokens[image["file"]].dtype == np.float32


def test_bench_prints_head_calls_and_a_method_may_have_settings_of_its_own(masked: Pipeline) -> None:
    methods = ("none", "none@passes=4", "none/coupled")
    report = bench(masked, BenchSettings(methods=methods, count=1, rounds=1))
    rows = {row["method"]: row for row in report["results"]}
    assert rows["none"]["passes"] == 16 and rows["none@passes=4"]["passes"] == 4
    assert rows["none"]["head_calls"] == 16 * 6 > rows["none/coupled"]["head_calls"]
    assert "head calls" in bench_table(report)


def test_vectors_of_one_law_are_not_told_apart_and_of_others_are() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 16, 4, generator=generator) for _ in range(2))
    assert not rejected(vector_tests(a, b, 999))
    assert rejected(vector_tests(a, 1.1 * b, 999))
    assert rejected(vector_tests(a, b + 0.1, 999))
    mixed = b.clone()
    mixed[:, 1:] = (b[:, 1:] + 0.5 * b[:, :-1]) / 1.25**0.5
    assert rejected(vector_tests(a, mixed, 999))


def test_samples_of_vectors_are_resumed_and_compared(tiny_flow: Path, tmp_path: Path) -> None:
    flags = ("--model", tiny_flow, "--method", "jacobi/chains", "--window", 4, "--batch", 4)
    assert run("sample", *flags, "--count", 4, "--out", tmp_path / "s") == 0
    assert run("sample", *flags, "--count", 8, "--out", tmp_path / "s") == 0
    assert len(list((tmp_path / "s").glob("shard-*.npz"))) == 2
