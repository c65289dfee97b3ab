"""The command line: promised files and fields, the same pictures either way, bad input leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bozzetto
from bozzetto.cli.main import main
from bozzetto.pipeline.pipeline import Pipeline

FIELDS = {"file", "class", "seed", "index", "sha256", "target_passes", "accepted", "drafted", "margin", "near_tie"}


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *named: str, code: int = 2) -> None:
    """One clear line on stderr that names the value, no traceback, and an untouched folder."""
    errors = capsys.readouterr().err
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("bozzetto: error: " if code == 2 else "bozzetto: cancelled")
    for text in named:
        assert text in lines[0]
    assert list(folder.iterdir()) == []


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder in which nothing may be left behind."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def test_generate_writes_exactly_the_promised_files_and_fields(tiny_model, tmp_path, capsys):
    out = tmp_path / "a" / "out"
    assert run("generate", "tulip", 1, "--model", tiny_model, "--count", 4, "--seed", 7, "--out", out) == 0
    names = ["000000-tulip.png", "000001-rose.png", "000002-tulip.png", "000003-rose.png"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "manifest.json", "sheet.png"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no staging folder
    content = manifest(out)
    assert [i["file"] for i in content["images"]] == names
    assert [i["class"] for i in content["images"]] == ["tulip", "rose"] * 2
    for image in content["images"]:
        assert set(image) == FIELDS | {"tokens", "trace", "tv_spent"}
        assert len(image["tokens"]) == sum(image["trace"]["committed"]) == 16
        assert image["seed"] == 7
    assert set(content["seconds"]) == {"total", "draft", "target", "decode"}
    assert {"model", "seed", "count", "drafter", "rule", "window", "guidance", "dtype"} <= set(content["settings"])
    assert {"command", "commit", "versions", "machine", "time"} <= set(content)
    passes = sum(i["target_passes"] for i in content["images"])
    assert content["tokens_per_pass"] == pytest.approx(4 * 16 / passes)
    assert str(out / "sheet.png") in capsys.readouterr().out


def test_sha256_is_that_of_the_pixels_in_the_png(tiny_model, tmp_path):
    assert run("generate", "--model", tiny_model, "--out", tmp_path) == 0
    for image in manifest(tmp_path)["images"]:
        pixels = Image.open(tmp_path / image["file"]).convert("RGB").tobytes()
        assert hashlib.sha256(pixels).hexdigest() == image["sha256"]


def test_speculation_and_batch_size_do_not_change_the_pictures(tiny_model, tmp_path):
    hashes = []
    for number, (drafter, batch) in enumerate([("none", 1), ("none", 4), ("jacobi", 1), ("jacobi", 4)]):
        out = tmp_path / str(number)
        options = ("--count", 5, "--seed", 3, "--drafter", drafter, "--batch", batch, "--out", out)
        assert run("generate", "--model", tiny_model, *options) == 0
        hashes.append([i["sha256"] for i in manifest(out)["images"]])
    assert hashes[1:] == hashes[:1] * 3


def test_flags_win_over_the_config_file_and_the_file_over_defaults(tiny_model, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {tiny_model}\nclasses: [rose, 0]\nseed: 5\ntop_k: 4\n")
    assert run("generate", "--config", config, "--seed", 6, "--out", tmp_path / "o") == 0
    content = manifest(tmp_path / "o")
    assert [i["class"] for i in content["images"]] == ["rose", "daisy"]
    assert (content["settings"]["seed"], content["settings"]["top_k"]) == (6, 4)


def test_a_second_run_replaces_its_files_and_keeps_those_of_others(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for seed in (1, 2):
        assert run("generate", "rose", "--model", tiny_model, "--seed", seed, "--out", tmp_path) == 0
    names = ["000000-rose.png", "manifest.json", "notes.txt", "sheet.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert manifest(tmp_path)["settings"]["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["daisi"], ["daisi", "daisy, rose, tulip"]),
        (["3"], ["'3'", "0-2"]),
        (["--count", "-3"], ["count = -3", ">= 1"]),
        (["--count", "0"], ["count = 0"]),
        (["--batch", "-1"], ["batch = -1"]),
        (["--seed", "-1"], ["seed = -1"]),
        (["--window", "-2"], ["window = -2"]),
        (["--top-k", "-5"], ["top_k = -5"]),
        (["--top-p", "0"], ["top_p = 0"]),
        (["--guidance", "nan"], ["guidance = nan"]),
        (["--drafter", "oracle"], ["oracle", "none, jacobi"]),
        (["--rule", "lax"], ["lax", "seed-exact, exact"]),
        (["--dtype", "float8"], ["float8", "float32, bfloat16"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_a_bad_option_is_refused_before_weights_are_read(arguments, named, tiny_model, empty, capsys, monkeypatch):
    monkeypatch.setattr("bozzetto.pipeline.loading.load", lambda *a, **k: pytest.fail("weights were read"))
    assert run("generate", *arguments, "--model", tiny_model, "--out", empty / "a" / "out") == 2
    refused(capsys, empty, *named)


def test_an_unknown_model_is_refused(empty, capsys):
    assert run("generate", "--model", "orchids", "--out", empty / "out") == 2
    refused(capsys, empty, "orchids", "shipped")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("windoww: 4\n", ["windoww", "window"]),
        ("window: many\n", ["window", "many"]),
        ("window: [1\n", ["not valid YAML"]),
        ("- 1\n", ["mapping"]),
        ("config: other.yaml\n", ["config"]),
    ],
)
def test_a_bad_config_file_is_refused(text, named, tiny_model, tmp_path, empty, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    assert run("generate", "--model", tiny_model, "--config", config, "--out", empty / "out") == 2
    refused(capsys, empty, *named)


def _misshape(state: dict[str, torch.Tensor]) -> None:
    state["output.weight"] = torch.zeros(15, 32)


def _drop(state: dict[str, torch.Tensor]) -> None:
    del state["norm.weight"]


def _poison(state: dict[str, torch.Tensor]) -> None:
    state["norm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_misshape, ["output.weight", "(15, 32)", "(16, 32)"]),
        (_drop, ["missing key", "norm.weight"]),
        (_poison, ["norm.weight", "non-finite"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(damage, named, broken, empty, capsys):
    state = load_file(broken / "model.safetensors")
    damage(state)
    save_file(state, broken / "model.safetensors")
    assert run("generate", "--model", broken, "--out", empty / "a" / "out") == 2
    refused(capsys, empty, *named)


def test_a_truncated_checkpoint_is_refused(broken, empty, capsys):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert run("generate", "--model", broken, "--out", empty / "out") == 2
    refused(capsys, empty, "model.safetensors")


def test_an_out_that_is_a_file_is_refused(tiny_model, tmp_path, capsys, empty):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("generate", "--model", tiny_model, "--out", out) == 2
        refused(capsys, empty, "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(tiny_model, empty, capsys, monkeypatch):
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert run("generate", "--model", tiny_model, "--out", empty / "a" / "out") == 2
    refused(capsys, empty, "No space left on device", "000002-tulip.png", str(empty / "a"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_run_exits_130_and_leaves_nothing_behind(number, tiny_model, empty, capsys, monkeypatch):
    def interrupted(self, *arguments):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(Pipeline, "pictures", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert run("generate", "--model", tiny_model, "--out", empty / "a" / "out") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    refused(capsys, empty, code=130)


def test_a_process_stopped_from_outside_leaves_nothing_behind(tiny_model, empty):
    source = Path(bozzetto.__file__).parent.parent
    command = [sys.executable, "-m", "bozzetto", "generate", "--model", tiny_model, "--count", 10**12]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command), "--out", str(empty / "out")], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 60
        while not list(empty.iterdir()) and time.monotonic() < deadline:  # the staging folder
            time.sleep(0.05)
        assert list(empty.iterdir())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert errors.startswith("bozzetto: cancelled")
    assert "Traceback" not in errors
    assert list(empty.iterdir()) == []


def test_its_code_is_kept_where_an_import_was_interrupted(tmp_path):
    text = "try:\n    exec('raise KeyboardInterrupt')\nexcept KeyboardInterrupt:\n    pass\n"
    (tmp_path / "sitecustomize.py").write_text(text)  # as a dataclass being made when the signal came
    path = os.pathsep.join(map(str, (tmp_path, Path(bozzetto.__file__).parent.parent)))
    command = [sys.executable, "-m", "bozzetto", "--version"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode == 0


def test_a_near_tie_is_named(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bozzetto.pipeline.pipeline.ROUNDING, "float32", 1e9)
    assert run("generate", "rose", "--model", tiny_model, "--out", tmp_path, "--compile", "off") == 0
    assert "images 0 hold a choice" in capsys.readouterr().out
    assert manifest(tmp_path)["images"][0]["near_tie"] is True


def test_greedy_decoding_writes_a_valid_manifest(tiny_model, tmp_path):
    assert run("generate", "rose", "--model", tiny_model, "--temperature", 0, "--out", tmp_path) == 0
    assert manifest(tmp_path)["images"][0]["margin"] > 0


def test_the_sheet_holds_every_image(tiny_model, tmp_path):
    assert run("generate", "--model", tiny_model, "--count", 3, "--out", tmp_path) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] >= 3 * 32
    assert np.array_equal(sheet[4:36, 4:36], np.asarray(Image.open(tmp_path / "000000-daisy.png")))


def test_bench_writes_json_and_a_table(tiny_model, tmp_path, capsys):
    path = tmp_path / "b.json"
    assert run("bench", "--model", tiny_model, "--count", 1, "--rounds", 1, "--guidance", "1,2", "--json", path) == 0
    report = json.loads(path.read_text())
    assert {r["guidance"] for r in report["results"]} == {1.0, 2.0}
    assert "tok/pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "none,oracle/exact"], "oracle"),
        (["--methods", "jacobi/lax"], "lax"),
        (["--batch", "1,x"], "'1,x'"),
        (["--batch", "0"], "batch = 0"),
        (["--guidance", ","], "guidances"),
        (["--count", "-1"], "count = -1"),
        (["--threads", "-1"], "threads = -1"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_a_bad_bench_option_is_refused(arguments, named, tiny_model, empty, capsys):
    assert run("bench", "--model", tiny_model, *arguments, "--json", empty / "b.json") == 2
    refused(capsys, empty, named)


def test_bench_refuses_an_unwritable_json_before_measuring(tiny_model, tmp_path, capsys, empty):
    assert run("bench", "--model", tiny_model, "--json", tmp_path) == 2
    refused(capsys, empty, str(tmp_path))


def test_bench_on_a_full_disk_names_the_file_and_leaves_nothing(tiny_model, empty, capsys, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    options = ("--methods", "none", "--count", 1, "--rounds", 1, "--json", empty / "b.json")
    assert run("bench", "--model", tiny_model, *options) == 2
    refused(capsys, empty, "No space left on device", "b.json")


def test_models_lists_what_is_in_a_folder(tiny_model, capsys):
    for folder in (tiny_model, tiny_model.parent):
        assert run("models", folder) == 0
        header, row = capsys.readouterr().out.strip().splitlines()
        named = ["name", "family", "parameters", "image", "tokens", "classes", "sampling", "passes", "by", "where"]
        assert header.split() == named
        assert row.split()[:2] == ["tiny", "llamagen"]
        assert row.split()[4:] == ["32x32", "16", "3", "guidance", "2", "our", "kernels", str(tiny_model)]


def test_models_of_a_missing_folder_is_refused(capsys, empty):
    assert run("models", "nowhere") == 2
    refused(capsys, empty, "nowhere")


def test_train_refuses_a_bad_recipe(tmp_path, capsys, empty):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"out: {empty / 'run'}\nstepz: 3\n")
    for what in ("tokenizer", "target"):
        assert run("train", what, recipe) == 2
        refused(capsys, empty, "stepz", "r.yaml")


def test_train_without_pyarrow_names_the_extra(tmp_path, capsys, empty, monkeypatch):
    recipe = Path(tmp_path / "r.yaml")
    recipe.write_text(f"out: {empty}\ntokenizer: t\ntrain: {{path: a}}\ntest: {{path: a}}\nname: n\n")

    def missing(recipe: object, restart: bool) -> None:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow.parquet")

    monkeypatch.setattr("bozzetto.train.families.train", missing)
    assert run("train", "target", recipe) == 2
    refused(capsys, empty, "bozzetto[train]")


def test_interrupted_training_says_how_to_resume(tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoint.pt").touch()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"out: {tmp_path}\ntokenizer: t\ntrain: {{path: a}}\ntest: {{path: a}}\nname: n\n")

    def interrupted(recipe: object, restart: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bozzetto.train.families.train", interrupted)
    assert run("train", "target", recipe) == 130
    assert f"the same command resumes from {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err
    assert run("train", "target", recipe, "--restart") == 130
    assert "without --restart the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["generate", "--no-such-flag"], ["generate", "--count", "x"], ["paint"], []])
def test_flags_that_cannot_be_parsed_exit_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("verb", ["", "generate", "bench", "models", "train"])
def test_help_explains_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: bozzetto" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"bozzetto {bozzetto.__version__}"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    ended, kept = os.pipe()
    os.close(ended)
    done = subprocess.run([sys.executable, "-m", "bozzetto", "--help"], stdout=kept, stderr=subprocess.PIPE, text=True)
    os.close(kept)
    assert done.returncode == 141 and done.stderr == ""
