"""The suite: one run with the columns of speed, of quality and of bias, and the command line around the new methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bozzetto.checkpoints.folders import load_target, save_drafter
from bozzetto.cli.main import main
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.drafts import CODES, VECTORS
from bozzetto.evaluate.sampling import method_settings
from bozzetto.evaluate.suites import SUITES, suite_models
from bozzetto.methods.table import RULES, named, split_method
from bozzetto.settings import GenerateSettings
from toys import make_rule


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random drafter."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("with") / "drafter"))
    torch.manual_seed(0)
    net = EagleNet(eagle_config(load_target(folder, "llamagen").config))
    save_drafter(folder / "eagle", net, folder, {"target_name": "tiny"})
    return folder


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("name", SUITES)
def test_every_method_of_a_suite_is_one_that_can_be_typed(name: str) -> None:
    for part in SUITES[name]:
        for method in part.methods:
            assert method_settings(method, GenerateSettings("none", "seed-exact")).batch == 1


def test_followers_hold_every_rule_and_are_run_whole_for_a_shipped_model(model: Path) -> None:
    parts = SUITES["followers"]
    used = [{make_name(method) for method in part.methods} for part in parts]
    assert all(
        set(named(RULES, CODES)) <= names for part, names in zip(parts, used, strict=True) if part.family == "llamagen"
    )
    assert set(named(RULES, VECTORS)) - {"plain", "coupled"} <= set.union(
        *used
    )  # plain: none; coupled: for masked models
    names = [part.model for part in parts]
    for shipped in names:
        assert [name for name, _ in suite_models("followers", shipped)] == names
    (own,) = suite_models("followers", str(model))
    assert own == (str(model), parts[0])


def make_name(method: str) -> str:
    """The rule of a method."""
    return split_method(method.partition("@")[0])[1].partition(":")[0]


def test_generate_with_a_relaxed_rule_writes_what_it_spent(model: Path, tmp_path: Path) -> None:
    flags = ("--model", model, "--drafter", "eagle:tree=2x2", "--rule", "lantern:k=5:delta=0.3", "--count", 3)
    for name, budget in (("free", ()), ("tight", ("--tv-budget", 0.4)), ("none", ("--tv-budget", 0))):
        assert run("generate", *flags, *budget, "--out", tmp_path / name) == 0
    spent = {}
    for name in ("free", "tight", "none"):
        content = json.loads((tmp_path / name / "manifest.json").read_text())
        spent[name] = [image["tv_spent"] for image in content["images"]]
        for image in content["images"]:
            assert sum(image["trace"]["spent"]) == pytest.approx(image["tv_spent"], abs=1e-4)
            assert len(image["trace"]["spent"]) == image["target_passes"]
    assert max(spent["none"]) == 0 < max(spent["tight"]) <= 0.4 + 1e-5 < max(spent["free"])


def test_the_neighbours_are_kept_and_used_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "cache"))
    flags = ("--model", model, "--drafter", "eagle", "--rule", "lantern:k=5", "--count", 1)
    before = sorted(model.iterdir())
    assert run("generate", *flags, "--out", tmp_path / "a") == 0
    (table,) = (tmp_path / "cache").glob("neighbours-*")
    kept = table.stat().st_mtime_ns
    assert run("generate", *flags, "--out", tmp_path / "b") == 0
    assert table.stat().st_mtime_ns == kept
    assert sorted(model.iterdir()) == before  # which may be read-only


@pytest.mark.parametrize(
    ("drafter", "rule", "named"),
    [
        ("eagle:tree=20x20x20", "tree", ["tree = '20x20x20'", "cache holds 128"]),
        ("eagle", "lantern:k=16", ["k = 16 is not allowed: at most 15", "16 codes"]),
        ("eagle", "lantern:delta=2", ["delta = 2.0", "0 to 1"]),
        ("eagle", "lantern++:lambda=0.9", ["lambda = 0.9", ">= 1"]),
        ("eagle:folder=nowhere", "tree", ["nowhere"]),
        ("model:folder=nowhere", "tree", ["nowhere"]),
        ("jacobi", "cascade", ["does not carry a window"]),
    ],
)
def test_bad_methods_exit_with_2_and_leave_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drafter: str, rule: str, named: list[str]
) -> None:
    out = tmp_path / "out"
    assert run("generate", "--model", model, "--drafter", drafter, "--rule", rule, "--out", out) == 2
    message = capsys.readouterr().err
    assert all(text in message for text in named), message
    assert list(tmp_path.iterdir()) == []


def test_a_drafter_of_another_target_and_a_model_without_one_are_refused(
    model: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "eagle" / "config.json").read_text())
    (other / "eagle" / "config.json").write_text(json.dumps({**config, "target_weights": "00ff"}))
    assert run("generate", "--model", other, "--drafter", "eagle", "--out", tmp_path / "out") == 2
    assert "a drafter of another target" in capsys.readouterr().err
    assert run("generate", "--model", tiny_model, "--drafter", "eagle", "--out", tmp_path / "out") == 2
    assert "comes without a trained drafter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_smaller_target_of_another_tokenizer_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    with open(other / "tokenizer.safetensors", "ab") as f:
        f.write(b"\0")
    flags = ("generate", "--model", model, "--rule", "tree", "--count", 1, "--out", tmp_path / "out")
    assert run(*flags, "--drafter", f"model:folder={other}") == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert run(*flags, "--drafter", f"model:folder={model}:tree=2x1") == 0


def test_the_bench_of_a_suite_wants_one_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--suite", "lantern", "--batch", "1,2") == 2
    assert "one value each for batch" in capsys.readouterr().err


def test_every_rule_names_its_paper() -> None:
    import inspect

    for rule in named(RULES, CODES).values():
        assert "arXiv" in (inspect.getmodule(type(rule)).__doc__ or "") + (rule.__doc__ or "")
        assert make_rule(rule.name).name == rule.name


def test_the_report_draws_what_relaxed_rules_spent_and_nothing_for_exact_ones(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    flags = ("--model", model, "--drafter", "eagle:tree=2x2", "--count", 2)
    for rule in ("lantern:k=5:delta=0.3", "tree"):
        name = rule.partition(":")[0]
        assert run("generate", *flags, "--rule", rule, "--tv-budget", 3, "--out", tmp_path / name) == 0
        assert run("report", tmp_path / name, "--out", tmp_path / f"{name}.html") == 0
    relaxed, exact = ((tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("lantern", "tree"))
    assert "Bias spent" in relaxed and "budget per image" in relaxed
    assert "Bias spent" not in exact
