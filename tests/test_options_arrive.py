"""Every option of a verb reaches the settings that its work is done with: none is typed for nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bozzetto.cli import main as cli
from bozzetto.cli.options import Bench, Evaluate, Generate, Profile, Sample
from bozzetto.cli.options_shared import Law, Loading
from bozzetto.evaluate.bench import BenchSettings
from bozzetto.evaluate.compare import CompareSettings
from bozzetto.evaluate.evaluation import EvaluateSettings
from bozzetto.evaluate.profile import ProfileSettings
from bozzetto.settings import GenerateSettings

LAW: dict[str, Any] = {
    "seed": 7,
    "window": 3,
    "guidance": 1.5,
    "temperature": 0.5,
    "top_k": 4,
    "top_p": 0.9,
    "tv_budget": 2.0,
    "steps": 5,
    "last_steps": 2,
    "passes": 6,
    "guidance_schedule": "linear",
    "negative_prompt": "ugly",
    "quality_words": True,
    "compile": "max",
    "deterministic": True,
    "batch": 11,
}
ENGINE = {"progress", *(f.name for f in fields(Loading))}  # of loading and of the terminal
GENERATE = {k: v for k, v in LAW.items() if k != "seed"}


class Arrived(Exception):
    """Stops a verb where its settings are complete."""


def stop(*given: Any, **named: Any) -> Any:
    raise Arrived([*given, *named.values()])


def typed(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def arrived(monkeypatch: pytest.MonkeyPatch, arguments: list[str], where: str, kind: type) -> Any:
    """The settings of a kind that a verb gives to `where`."""
    pipe = SimpleNamespace(default_methods=("none",), generate=stop, name="toy")
    monkeypatch.setattr("bozzetto.pipeline.loading.load", lambda *given, **named: pipe)
    monkeypatch.setattr("bozzetto.evaluate.features.make_extractor", lambda spec: spec)
    monkeypatch.setattr("bozzetto.evaluate.suites.suite_models", lambda suite, model: [])
    monkeypatch.setattr(where, stop)
    with pytest.raises(Arrived) as caught:
        cli.main(arguments)
    return next(value for value in caught.value.args[0] if isinstance(value, kind))


def test_the_table_of_this_file_knows_every_option():
    defaults = {f.name: f.default for f in fields(Law)}
    assert set(LAW) | ENGINE == set(defaults) and not [k for k, v in LAW.items() if defaults[k] == v]
    assert set(GENERATE) | {"drafter", "rule"} == {f.name for f in fields(GenerateSettings)}


def test_sample(monkeypatch, tmp_path):
    words = ["sample", "--model", "flowers", "--method", "none", *typed(LAW), "--out", str(tmp_path / "run")]
    found = arrived(monkeypatch, words, "bozzetto.evaluate.sampling.SampleRun", GenerateSettings)
    assert found == GenerateSettings("none", "seed-exact", **GENERATE)
    typed_there = {f.name for f in fields(Sample)} - set(LAW) - ENGINE
    assert typed_there == {"classes", "model", "method", "count", "ray", "npz", "out"}


def test_evaluate_and_its_comparison(monkeypatch, tmp_path):
    base = GenerateSettings("none", "seed-exact", **GENERATE)
    own = {"count": 9, "bootstrap": 5, "data": "pictures", "reference": "train", "methods": "none"}
    words = ["evaluate", *typed(LAW), *typed(own), "--out", str(tmp_path / "run")]
    found = arrived(monkeypatch, words, "bozzetto.evaluate.evaluation.evaluate", EvaluateSettings)
    assert found == EvaluateSettings(("none",), ("train",), 9, 5, 7, base, Path("pictures"))
    words = ["evaluate", *typed(LAW), "--count", "9", "--compare", "none", "none", "--out", str(tmp_path / "run")]
    found = arrived(monkeypatch, words, "bozzetto.evaluate.compare.compare", CompareSettings)
    assert found == CompareSettings("none", "none", 9, 7, base)
    typed_there = {f.name for f in fields(Evaluate)} - set(LAW) - ENGINE
    assert typed_there == {*own, "model", "compare", "extractor", "out", "json"}


def test_generate(monkeypatch, tmp_path):
    settings = {**GENERATE, "drafter": "none", "rule": "plain"}
    words = ["generate", "tulip", "--model", "flowers", *typed({**settings, "seed": 7}), "--out", str(tmp_path / "o")]
    pipe = SimpleNamespace(generate=stop, labels=stop)
    monkeypatch.setattr("bozzetto.pipeline.loading.load", lambda *given, **named: pipe)
    monkeypatch.setattr(cli, "_check_request", stop)
    with pytest.raises(Arrived) as caught:
        cli.main(words)
    assert GenerateSettings(**settings) in caught.value.args[0]
    assert {f.name for f in fields(GenerateSettings)} <= {f.name for f in fields(Generate)}


@pytest.mark.parametrize("suite", [False, True])
def test_bench_and_its_suites(suite, monkeypatch, tmp_path):
    own: dict[str, Any] = {"count": 3, "rounds": 2, "temperature": 0.5, "top_p": 0.9, "seed": 7, "threads": 1}
    own |= {"compile": "max", "deterministic": True, "waves": 2}
    lists = {"methods": "none", "batch": "2", "guidance": "1.5", "window": "3", "top_k": "4"}
    right = BenchSettings(("none",), (2,), (1.5,), (3,), (4,), **own)
    words = ["bench", *typed(own), *typed(lists)]
    if not suite:
        assert arrived(monkeypatch, words, "bozzetto.evaluate.bench.bench", BenchSettings) == right
        fixed = {"model", "suite", "images", "quality_batch", "data", "extractor", "out", "json"}
        assert {f.name for f in fields(Bench)} == {*own, *lists, *fixed, *ENGINE}
        return
    words += ["--suite", "continuous", "--images", "30", "--quality-batch", "5", "--data", "d", "--out", str(tmp_path)]
    where = "bozzetto.evaluate.suites.run_suite"
    assert arrived(monkeypatch, words, where, BenchSettings) == right
    base = GenerateSettings("none", "seed-exact", 3, 1.5, 0.5, 4, 0.9, 5, compile="max", deterministic=True)
    wanted = EvaluateSettings(("none",), count=30, seed=7, base=base, data=Path("d"), recitation=False)
    assert arrived(monkeypatch, words, where, EvaluateSettings) == wanted


def test_profile(monkeypatch):
    own = {"method": "none", "batch": 2, "guidance": 1.5, "window": 3, "seconds": 0.1, "threads": 1}
    own |= {"compile": "max", "deterministic": True}
    found = arrived(monkeypatch, ["profile", *typed(own)], "bozzetto.evaluate.profile.profile", ProfileSettings)
    assert found == replace(ProfileSettings(), **own)
    assert {f.name for f in fields(Profile)} - {"model", "json"} - ENGINE == set(own)
