"""Shards that are not as they were written: named, never trusted, drawn again. Folders that several processes fill."""

from __future__ import annotations

import fcntl
import io
import os
import random
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bozzetto
from bozzetto.cli import main as cli
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import SampleRun, batched, method_settings, sample, world_of
from bozzetto.evaluate.shards import (
    DamagedShard,
    Samples,
    read_index,
    read_run,
    read_samples,
    read_shard,
    shard_files,
    write_adm,
    write_shard,
)
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline

SHARD = "shard-000003.npz"


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return bozzetto.load(tiny_model)


def run_in(folder: Path, pipe: Pipeline, batch: int = 3) -> SampleRun:
    return SampleRun(folder, pipe, method_settings("jacobi/seed-exact", GenerateSettings(batch=batch, window=4)))


@pytest.fixture(scope="module")
def whole(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of nine images in three shards."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    sample(run_in(folder, pipe), 9)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def unsigned(arrays: dict[str, np.ndarray], path: Path) -> None:
    """A shard without a digest, as earlier versions wrote them."""
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if k != "digest"})  # type: ignore[arg-type]


def same(a: Samples, b: Samples) -> bool:
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.pixels, b.pixels) and a.traces == b.traces


def changed(name: str, change: Any) -> Any:
    """A mutation: one array is another."""

    def mutate(path: Path) -> None:
        arrays = arrays_of(path)
        arrays[name] = change(arrays[name].copy())
        unsigned(arrays, path)

    return mutate


def put(value: Any, at: Any = 0) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return change


def without(name: str) -> Any:
    return lambda path: unsigned({k: v for k, v in arrays_of(path).items() if k != name}, path)


def header(shape: str, descr: str = "'<i8'") -> Any:
    """index.npy claims another shape or type."""

    def mutate(path: Path) -> None:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
        text = text.ljust((-(len(text) + 11) % 64) + len(text)) + "\n"
        body = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(24)
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, content in {**members, "index.npy": body}.items():
                new.writestr(name, content)

    return mutate


def pickled(path: Path) -> None:
    """An array of objects, which would run code."""
    arrays = arrays_of(path)
    arrays["label"] = np.array([print, print, print], dtype=object)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def replaced(data: bytes) -> Any:
    return lambda path: path.write_bytes(data)


MUTATIONS = {
    "index twice": changed("index", put(4)),
    "index below 0": changed("index", put(-1)),
    "index of another": changed("index", lambda a: a + 1),
    "index of floats": changed("index", lambda a: a.astype(np.float32)),
    "no images": changed("index", lambda a: a[:0]),
    "label of another class": changed("label", lambda a: (a + 1) % 3),
    "label of no class": changed("label", put(99)),
    "pixels of another size": changed("pixels", lambda a: a[:, ::2, ::2]),
    "pixels of floats": changed("pixels", lambda a: a.astype(np.float32)),
    "grey pixels": changed("pixels", lambda a: a[..., 0]),
    "fewer pixels": changed("pixels", lambda a: a[:1]),
    "tokens of floats that are no numbers": changed("tokens", lambda a: np.full(a.shape, np.nan, np.float32)),
    "tokens below 0": changed("tokens", put(-5)),
    "fewer tokens": changed("tokens", lambda a: a[:, :7]),
    "traces too short": changed("committed", lambda a: a * 0),
    "traces below 0": changed("accepted", lambda a: a - 1),
    "spent nothing finite": changed("spent", put(np.inf)),
    "seconds of nothing": changed("seconds", lambda a: a[:2]),
    "moved nan": changed("moved", put(np.nan)),
    **{f"without {name}": without(name) for name in ("index", "pixels", "tokens", "head", "spent")},
    "a shape of terabytes": header("(1000000000000,)"),
    "a shape of many axes": header("(9999999, 9999999, 9999999)"),
    "a negative shape": header("(-3,)"),
    "a header of code": header("__import__('os')"),
    "a type of objects": header("(3,)", "'|O'"),
    "a type of nothing": header("(3,)", "'<q99'"),
    "objects": pickled,
    "empty": replaced(b""),
    "text": replaced(b"version https://git-lfs.github.com/spec/v1\n"),
    "zeros": replaced(bytes(4000)),
    "an empty archive": replaced(b"PK\x05\x06" + bytes(18)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_shard_is_named_and_drawn_again(name, folder, whole, pipe, capsys):
    MUTATIONS[name](folder / SHARD)
    with pytest.raises(UsageError, match=r"shard-000003\.npz cannot be read as a shard of samples"):
        read_samples(folder)
    with pytest.raises(UsageError, match=r"missing: \[3|shard-000003\.npz cannot"):
        write_adm(folder, 9)
    assert not (folder / "samples.npz").exists()
    assert sample(run_in(folder, pipe), 9) == 3
    assert f"moved to damaged-{SHARD}" in capsys.readouterr().err
    assert same(read_samples(folder, 9), read_samples(whole, 9)) and sample(run_in(folder, pipe), 9) == 0


def test_three_hundred_damaged_shards_are_noticed(whole, tmp_path):
    """Cut anywhere, with bits turned over, with bytes of nought: what is read is what was written, or nothing is."""
    source, path, rng = (whole / SHARD).read_bytes(), tmp_path / SHARD, random.Random(0)
    settings, right, noticed = read_run(whole)["settings"], read_shard(whole / SHARD), 0
    for number in range(300):
        data = bytearray(source)
        if number % 3 == 0:
            data = data[: rng.randrange(len(data))]
        elif number % 3 == 1:
            for _ in range(rng.choice((1, 1, 2, 50))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(data))
            data[at : at + rng.choice((1, 16, 4096))] = bytes(rng.choice((0, 16)))
        path.write_bytes(data)
        try:
            found = read_shard(path, settings)
        except DamagedShard as error:
            assert SHARD in str(error)
            noticed += 1
        else:  # a byte that says nothing, such as the date of a file in the archive
            assert all(np.array_equal(found[k], right[k], equal_nan=k == "margin") for k in right)
    assert noticed > 250


def test_pixels_that_another_program_wrote_anew_are_noticed(folder):
    """A valid archive with valid checksums: the digest is of the arrays."""
    arrays = arrays_of(folder / SHARD)
    arrays["pixels"][0, 0, 0] ^= 1
    np.savez_compressed(folder / SHARD, **arrays)
    with pytest.raises(DamagedShard, match="not those that were written"):
        read_shard(folder / SHARD)
    unsigned(arrays_of(folder / SHARD), folder / SHARD)
    assert len(read_samples(folder)) == 9  # of earlier versions, which signed nothing


def test_the_verb_draws_damaged_images_again_and_writes_the_file_for_evaluators(folder, whole, tiny_model, capsys):
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 2] ^= 255
    (folder / SHARD).write_bytes(data)
    options = ["--model", str(tiny_model), "--count", "9", "--method", "jacobi/seed-exact", "--window", "4"]
    assert cli.main(["sample", *options, "--npz", "--out", str(folder)]) == 0
    assert f"{folder / SHARD} cannot be read" in capsys.readouterr().err
    with np.load(folder / "samples.npz") as made:
        assert np.array_equal(made["arr_0"], read_samples(whole).pixels)


def test_folders_where_batches_of_two_sizes_met_are_read_and_completed(pipe, whole, tmp_path, capsys):
    """Two commands at a time once wrote images twice and over each other's shards."""
    folder = tmp_path / "run"
    for batch in (3, 4):
        sample(run_in(tmp_path / str(batch), pipe, batch), 9)
        for shard in shard_files(tmp_path / str(batch)):
            folder.mkdir(exist_ok=True)
            shutil.copy(shard, folder)
    shutil.copy(whole / "run.json", folder)
    (folder / "shard-000006.npz").unlink()
    assert sum(len(read_index(shard)) for shard in shard_files(folder)) > len(read_samples(folder))
    assert same(read_samples(folder, 9), read_samples(whole, 9)) and sample(run_in(folder, pipe, 2), 9) == 0
    with np.load(write_adm(folder, 9)) as made:
        assert np.array_equal(made["arr_0"], read_samples(whole).pixels)
    (folder / "shard-000008.npz").unlink()
    with pytest.raises(UsageError, match=r"holds 8 of 9 images; missing: \[8\]"):
        read_samples(folder, 9)
    assert sample(run_in(folder, pipe, 2), 9) == 1 and same(read_samples(folder, 9), read_samples(whole, 9))


def test_a_folder_has_one_sampler_and_its_lock_goes_with_the_process(pipe, tmp_path):
    run = run_in(tmp_path / "run", pipe)
    with run.alone(), pytest.raises(UsageError, match="another process is sampling into"):
        sample(run_in(tmp_path / "run", pipe, 4), 9)
    with run.alone(2):
        assert sample(run, 4, rank=1, world=2) == 2  # processes of one run share the folder
        with pytest.raises(UsageError, match="another process"):
            sample(run, 4)
    assert sample(run, 4) == 2 and len(read_samples(tmp_path / "run")) == 4
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_simultaneous_processes_write_over_nothing(pipe, whole, tmp_path, monkeypatch):
    """One after the other, in the worst order: both planned before either wrote."""
    one, two = run_in(tmp_path / "run", pipe, 3), run_in(tmp_path / "run", pipe, 4)
    one.claim()
    plans = [(run, list(batched(run.pending(9), run.settings.batch))) for run in (one, two)]
    for (first, mine), (second, theirs) in (plans, plans[::-1]):
        for batch in mine:
            first.draw(batch)
        for batch in theirs:
            assert second.draw(batch) >= 0
    index = [i for shard in shard_files(one.folder) for i in read_index(shard)]
    assert sorted(set(index)) == list(range(9)) and same(read_samples(one.folder), read_samples(whole))


def test_a_file_system_without_locks_does_no_harm(pipe, tmp_path, monkeypatch):
    def none(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    assert sample(run_in(tmp_path / "run", pipe), 4) == 4


def test_a_shard_without_permission_is_an_error_and_stays(pipe, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != SHARD)
    with pytest.raises(UsageError, match="permission denied"):
        sample(run_in(folder, pipe), 9)
    assert (folder / SHARD).exists()


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "5", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "x"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "1.0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "9" * 5000},
        {"WORLD_SIZE": "4"},
        {"RANK": "1"},
    ],
)
def test_what_is_no_rank_is_refused(given, tiny_model, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sample", "--model", str(tiny_model), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in given) and not (tmp_path / "run").exists()


def test_processes_that_cannot_find_each_other_are_an_error(tiny_model, tmp_path, monkeypatch, capsys):
    """torch 2.13 raises ValueError where MASTER_ADDR is missing."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_of() == (0, 2)
    assert cli.main(["sample", "--model", str(tiny_model), "--out", str(tmp_path / "run")]) == 2
    assert "start them with torchrun" in capsys.readouterr().err


def test_a_count_of_a_million_millions_begins_at_once(pipe, tmp_path, monkeypatch):
    began = threading.Event()

    def draw(self: SampleRun, indices: list[int]) -> float:
        assert indices == [0, 1, 2]
        began.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(SampleRun, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        sample(run_in(tmp_path / "run", pipe), 10**12)
    assert began.is_set()
    for count in (0, 10**12 + 1, 10**40):
        with pytest.raises(UsageError, match=f"count = {count} is not allowed"):
            sample(run_in(tmp_path / "run", pipe), count)
    with pytest.raises(UsageError, match=r"holds 0 of 1000000000000 images; missing: \[0, 1"):
        write_adm(tmp_path / "run", 10**12)


def test_a_shard_says_what_it_holds(tmp_path, whole):
    arrays = {k: v for k, v in arrays_of(whole / SHARD).items() if k != "digest"}
    write_shard(tmp_path / SHARD, arrays)
    assert read_index(tmp_path / SHARD) == [3, 4, 5]
    buffer = io.BytesIO((tmp_path / SHARD).read_bytes())
    assert set(np.load(buffer).files) == {*arrays, "digest"}
