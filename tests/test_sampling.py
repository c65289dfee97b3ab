"""Sampling many images: the same ones for any number of processes, resumable, whole files only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bozzetto
from bozzetto.cli import main as cli
from bozzetto.errors import UsageError
from bozzetto.evaluate import shards
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample, world_of
from bozzetto.evaluate.shards import ADM, RUN, read_run, read_samples, write_adm
from bozzetto.pipeline.pipeline import GenerateSettings
from bozzetto.settings import default_window

METHODS = ["none", "jacobi/seed-exact", "jacobi/exact"]


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return bozzetto.load(tiny_model)


def run_in(folder: Path, pipe, method: str = "jacobi/seed-exact", batch: int = 3, **law) -> SampleRun:
    """A run that has claimed its folder."""
    run = SampleRun(folder, pipe, method_settings(method, GenerateSettings(batch=batch, **law)))
    run.claim()
    return run


@pytest.mark.parametrize("method", METHODS)
def test_images_are_the_same_for_any_number_of_processes(pipe, method, tmp_path):
    for world in (1, 2, 3):
        for rank in range(world):
            sample(run_in(tmp_path / str(world), pipe, method), 10, rank=rank, world=world)
    one, *others = (read_samples(tmp_path / str(world), 10) for world in (1, 2, 3))
    for other in others:
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_the_images_of_the_pipeline(pipe, method, tmp_path):
    run = run_in(tmp_path / "run", pipe, method, batch=4, window=3)
    sample(run, 6)
    found = read_samples(run.folder)
    for image in pipe.generate(count=6, settings=run.settings).images:
        assert np.array_equal(found.pixels[image.index], np.asarray(image.image))
        assert found.traces[image.index] == image.trace
        assert found.label[image.index] == image.label
    assert len(found) == 6 and sum(len(t.committed) for t in found.traces) <= found.tokens.size


def test_an_interrupted_run_resumes_with_another_number_of_processes(pipe, tmp_path, monkeypatch):
    whole = run_in(tmp_path / "whole", pipe)
    sample(whole, 11)
    run, real, calls = run_in(tmp_path / "broken", pipe), SampleRun.draw, []

    def draw(self, indices):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(indices)
        return real(self, indices)

    monkeypatch.setattr(SampleRun, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        sample(run, 11)
    monkeypatch.undo()
    assert run.done() == set(range(6))
    for rank in range(2):
        sample(run_in(run.folder, pipe), 11, rank=rank, world=2)
    assert np.array_equal(read_samples(run.folder).tokens, read_samples(whole.folder).tokens)
    assert sample(run, 11) == 0


def test_a_larger_count_adds_to_the_folder(pipe, tmp_path):
    run = run_in(tmp_path / "run", pipe)
    assert [sample(run, n) for n in (3, 5)] == [3, 2]
    assert len(read_samples(run.folder, 3)) == 3


def test_a_full_disk_leaves_no_half_shard(pipe, tmp_path, monkeypatch):
    run = run_in(tmp_path / "run", pipe)

    def full(name, **arrays):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        sample(run, 3)
    assert [p.name for p in run.folder.iterdir()] == [RUN]


def test_a_folder_holds_one_run_only(pipe, tmp_path):
    run_in(tmp_path / "run", pipe)
    with pytest.raises(UsageError, match=r"guidance = 2.0 there, 3.0 asked"):
        run_in(tmp_path / "run", pipe, guidance=3.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        run_in(tmp_path / "other", pipe)


def test_a_retrained_model_does_not_mix_with_old_samples(pipe, tmp_path, monkeypatch):
    run_in(tmp_path / "run", pipe)
    monkeypatch.setattr(type(pipe), "fingerprint", lambda self: "another")
    with pytest.raises(UsageError, match="weights"):
        run_in(tmp_path / "run", pipe)


def test_an_automatic_window_of_a_coin_flipping_rule_is_fixed_for_the_whole_run(pipe, tmp_path):
    run = run_in(tmp_path / "run", pipe, "jacobi/exact", batch=64)
    assert read_run(run.folder)["settings"]["window"] == run.settings.window == default_window(128, "float32")


@pytest.mark.parametrize("folder", ["missing", "empty", "broken", "foreign"])
def test_what_is_not_a_run_is_refused(folder, tmp_path):
    for name, text in (("broken", "{"), ("foreign", '{"kind": "photographs"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / RUN).write_text(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"run\.json"):
        read_samples(tmp_path / folder)


def test_missing_images_and_damaged_shards_are_named(pipe, tmp_path):
    run = run_in(tmp_path / "run", pipe)
    sample(run, 6)
    with pytest.raises(UsageError, match=r"6 of 9 images; missing: \[6, 7, 8\]"):
        read_samples(run.folder, 9)
    (run.folder / "shard-000000.npz").write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match=r"shard-000000\.npz cannot be read"):
        read_samples(run.folder)


def test_the_adm_file_holds_all_images_in_order(pipe, tmp_path):
    run = run_in(tmp_path / "run", pipe)
    for rank in range(2):
        sample(run, 7, rank=rank, world=2)
    with np.load(write_adm(run.folder, 7), allow_pickle=False) as content:
        assert set(content.files) == {"arr_0", "arr_1"}
        found = read_samples(run.folder)
        assert content["arr_0"].dtype == np.uint8 and np.array_equal(content["arr_0"], found.pixels)
        assert np.array_equal(content["arr_1"], found.label)
    with pytest.raises(UsageError, match=r"missing: \[7\]"):
        write_adm(run.folder, 8, tmp_path / "new.npz")
    assert not (tmp_path / "new.npz").exists()


def test_torchrun_samples_what_one_process_samples(tiny_model, tmp_path):
    options = ["sample", "--model", str(tiny_model), "--count", "9", "--batch", "2", "--npz", "--out"]
    assert cli.main([*options, str(tmp_path / "one")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "-m", "bozzetto", *options, str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("9 images") == 1
    one, two = (np.load(tmp_path / name / ADM)["arr_0"] for name in ("one", "two"))
    assert np.array_equal(one, two)


def test_the_verb_resumes_and_says_how(tiny_model, tmp_path, monkeypatch, capsys):
    options = ["sample", "--model", str(tiny_model), "--count", "6", "--batch", "2", "--out", str(tmp_path / "run")]
    real, calls = SampleRun.draw, []

    def draw(self, indices):
        calls.append(indices)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, indices)

    monkeypatch.setattr(SampleRun, "draw", draw)
    assert cli.main(options) == 130
    assert "the same command goes on from" in capsys.readouterr().err
    assert cli.main(options) == 0
    assert calls == [[0, 1], [2, 3], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--count", "0"], "count = 0"),
        (["--method", "jacobi/"], "unknown method 'jacobi/'"),
        (["--method", "oracle"], "unknown drafter 'oracle'"),
        (["--seed", "-1"], "seed = -1"),
        (["elephant"], "unknown class 'elephant'"),
        (["--batch", "0"], "batch = 0"),
    ],
)
def test_bad_input_writes_nothing(options, said, tiny_model, tmp_path, capsys):
    assert cli.main(["sample", *options, "--model", str(tiny_model), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_world_of_reads_what_torchrun_sets(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_of() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_of() == (2, 4)


def test_run_json_says_where_it_came_from(pipe, tmp_path):
    run = run_in(tmp_path / "run", pipe)
    content = json.loads((run.folder / RUN).read_text(encoding="utf-8"))
    assert content["settings"]["weights"] == pipe.fingerprint() != "unknown"
    assert set(content["provenance"]) == {"command", "commit", "versions", "machine", "time"}
    assert shards.PARTS == ("total", "draft", "target", "decode")
