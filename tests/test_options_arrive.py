"""Every option of a verb reaches the settings that its work is done with: none is typed for nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.cli import main as cli
from bozzetto.cli.options import Bench, Convert, Draw, Evaluate, Generate, Profile, Sample, Serve
from bozzetto.common.options import LoadOptions
from bozzetto.evaluate.bench import BenchSettings
from bozzetto.evaluate.compare import CompareSettings
from bozzetto.evaluate.evaluation import EvaluateSettings
from bozzetto.evaluate.profile import ProfileSettings
from bozzetto.methods.table import DRAFTERS, RULES
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
ENGINE = {"progress", *(f.name for f in fields(LoadOptions))}  # of loading and of the terminal
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
    defaults = {f.name: f.default for f in fields(Draw)}
    assert set(LAW) | ENGINE | {"model"} == set(defaults) and not [k for k, v in LAW.items() if defaults[k] == v]
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
    words = ["bench", *typed(own), *typed({k: v for k, v in lists.items() if k != "methods" or not suite})]
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


def loading_words() -> dict[str, Any]:
    """Every option of loading, each with another value than its own."""
    words = {name: f"a-{name}" for name in ("captions", "text_encoder", "tokenizer", "vqgan", "vae", "sampler")}
    return {**words, "dtype": "bfloat16", "device": "cpu", "device_map": "auto", "image_size": 512, "offline": True} | {
        "adapter": "an-adapter"
    }


@pytest.mark.parametrize("verb", ["generate", "bench", "profile", "sample", "evaluate", "serve"])
def test_every_option_of_loading_reaches_whoever_loads(verb, monkeypatch, tmp_path):
    values = loading_words()
    assert set(values) == {f.name for f in fields(LoadOptions)}
    assert not [f.name for f in fields(LoadOptions) if values[f.name] == f.default]
    where = "bozzetto.cli.serve.load" if verb == "serve" else "bozzetto.pipeline.loading.load"
    monkeypatch.setattr(where, stop)
    monkeypatch.setattr("bozzetto.evaluate.features.make_extractor", lambda spec: spec)
    out = {"serve": ["--port", "0"], "bench": [], "profile": []}.get(verb, ["--out", str(tmp_path / "out")])
    with pytest.raises(Arrived) as caught:
        cli.main([verb, "--model", "flowers", *typed(values), *out])
    assert LoadSettings(**values) in caught.value.args[0]


def test_serve(monkeypatch):
    keys, made = Path(__file__), dict[str, Any]()
    pipe = SimpleNamespace(need_pictures=lambda: None, resolve=lambda settings: settings)
    monkeypatch.setattr("bozzetto.cli.serve.load", lambda *given: pipe)
    monkeypatch.setattr("bozzetto.serve.guard.read_keys", lambda path: ["key"] if path == keys else [])
    monkeypatch.setattr("bozzetto.cli.serve.Worker", lambda load, **named: made.update(worker=named) or "worker")
    monkeypatch.setattr("bozzetto.cli.serve.Terms", lambda *given: made.update(terms=given) or "terms")
    monkeypatch.setattr("bozzetto.cli.serve.make_app", lambda *given, **named: made.update(app=(given, named)))
    monkeypatch.setattr("bozzetto.cli.serve.Server", lambda app, limit, word: stop(limit, word))
    own: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "slots": 3, "queue": 5, "limit": 7.5, "alias": "a=emoji"}
    own |= {"resize": True, "api_keys": keys, "allowed_host": "Here", "compile": "max", "deterministic": True}
    with pytest.raises(Arrived) as caught:
        cli.main(["serve", "--model", "emoji", *typed(own)])
    assert caught.value.args[0][0] == 7.5 and "emoji at http://127.0.0.1:" in caught.value.args[0][1]
    base = GenerateSettings(compile="max", deterministic=True)
    assert made["worker"] == {"slots": 3, "queue": 5, "limit": 7.5, "base": base}
    assert made["terms"] == ("worker", {"a": "emoji"}, True)
    assert made["app"] == (("worker",), {"keys": ("key",), "hosts": ("here",), "terms": "terms"})
    of_ray = {"ray", "replicas", "max_replicas", "ongoing"}  # tests/test_serve_ray.py
    assert {f.name for f in fields(Serve)} == {*own, "model", *of_ray, *ENGINE} - {"progress"}


def test_convert_train_report_and_models(monkeypatch, tmp_path):
    """Verbs whose options are arguments of one function."""
    names = {"vq": "V", "gpt": "G", "image_size": 384, "class_names": "C", "store": "float16", "text_encoder": "T"}
    names |= {"checkpoint": "K", "vae": "A", "drafter": "D", "model": "M", "out": "O"}
    assert {"what", *names} == {f.name for f in fields(Convert)}
    path = {name: Path(str(value)) for name, value in names.items()}
    wanted: dict[str, tuple[str, list[Any]]] = {
        "llamagen": ("convert.convert_llamagen", [path["gpt"], path["vq"], path["out"], 384, path["class_names"]]),
        "mar": ("convert_mar.convert_mar", [path["checkpoint"], path["vae"], path["out"], path["class_names"]]),
        "eagle": ("convert_drafter.convert_eagle", [path["drafter"], path["model"], path["out"]]),
    }
    wanted["llamagen"][1].extend(["float16", "T"])
    wanted["mar"][1].append("float16")
    wanted["eagle"][1].append("float16")
    for what, (function, values) in wanted.items():
        monkeypatch.setattr(f"bozzetto.checkpoints.{function}", stop)
        with pytest.raises(Arrived) as caught:
            cli.main(["convert", what, *typed({k: v for k, v in names.items() if path[k] in values or v in values})])
        assert caught.value.args[0] == values
    monkeypatch.setattr("bozzetto.evaluate.report.build_report", stop)
    with pytest.raises(Arrived) as caught:
        cli.main(["report", "a", "b", "--out", "page.html", "--progress"])
    assert caught.value.args[0] == [(Path("a"), Path("b")), Path("page.html"), True]
    monkeypatch.setattr("bozzetto.cli.listing.list_models", stop)
    with pytest.raises(Arrived) as caught:
        cli.main(["models", "here"])
    assert caught.value.args[0] == [Path("here")]
    monkeypatch.setattr("bozzetto.train.families.read_recipe", lambda path, what: SimpleNamespace(out=(what, path)))
    monkeypatch.setattr("bozzetto.train.families.train", stop)
    with pytest.raises(Arrived) as caught:
        cli.main(["train", "target", "r.yaml", "--restart"])
    assert caught.value.args[0] == [SimpleNamespace(out=("target", Path("r.yaml"))), True]


def test_the_method_as_typed_reaches_workers_of_ray(tiny_model, tmp_path, monkeypatch):
    """Each worker opens the run that the first process began, and refuses one that is called something else."""
    sampling_ray = pytest.importorskip("bozzetto.evaluate.sampling_ray", exc_type=ImportError)
    runs: list[Any] = []

    def here(run: Any, blocks: list[list[int]], *settings: Any) -> None:
        runs.append((run, sampling_ray.worker_settings(run, *settings[:2])))

    monkeypatch.setattr(sampling_ray, "_map", here)
    monkeypatch.setattr(sampling_ray.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(sampling_ray.ray, "cluster_resources", dict)
    words = ["sample", "--model", str(tiny_model), "--method", "jacobi/exact@window=3", "--count", "2", "--ray", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    ((run, settings),) = runs
    assert sampling_ray.ShardWriter(**settings).run.description() == run.description()


def test_help_is_quick():
    """Nothing of torch is imported before a verb is known."""
    code = "import sys, bozzetto.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_names_every_drafter_and_rule(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = capsys.readouterr().out
    names = {name for table in (DRAFTERS, RULES) for _, name in table}
    assert not [name for name in names if name not in shown]


CONVERT = ["convert", "mar", "--out", "o", "--checkpoint", "c", "--vae", "v"]
COMPARE = ["evaluate", "--compare", "none", "jacobi/exact"]


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        *(
            (["bench"], option, "belongs to --suite")
            for option in ("images", "quality_batch", "data", "out", "extractor")
        ),
        (["bench", "--suite", "lantern"], "methods", "--suite has methods"),
        *((COMPARE, option, "--compare has no use") for option in ("methods", "reference", "data", "bootstrap")),
        *((CONVERT, option, "convert mar has no use") for option in ("gpt", "text_encoder", "drafter", "image_size")),
        (["convert", "eagle", "--out", "o", "--drafter", "d", "--model", "m"], "class_names", "eagle has no use"),
        *((["serve"], option, "belongs to --ray") for option in ("replicas", "max_replicas", "ongoing")),
        (["serve", "--ray"], "ongoing", "belongs to --max-replicas"),
    ],
)
def test_an_option_of_another_mode_is_refused(words, option, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flag = "--" + option.replace("_", "-")
    assert cli.main([*words, flag, "512"]) == 2
    message = capsys.readouterr().err
    assert f"{flag} = " in message and "512" in message and said in message
    assert not list(tmp_path.iterdir())
