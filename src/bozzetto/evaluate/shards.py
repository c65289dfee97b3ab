"""Shards: the files of a folder of samples, and what they say, every byte of it checked.

A shard is an `.npz` of one batch. Its arrays carry the CRC-32 of the zip format, and together a sha256 of their own;
both are checked whenever a shard is read, and so are shapes, types and ranges. A shard that does not pass is as good as
missing: `sample` moves it aside and draws its images again. An image that lies in two shards is taken from the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from bozzetto.common.files import read_json, write_whole
from bozzetto.decoding.images import PassTrace
from bozzetto.errors import UsageError

RUN, ADM = "run.json", "samples.npz"
PARTS = ("total", "draft", "target", "decode")
TRACE = {"committed": np.int16, "accepted": np.int16, "drafted": np.int16, "spent": np.float32}
# By name of an array: its types, and what its axes are.
_ARRAYS: dict[str, tuple[tuple[type, ...], str]] = {
    "index": ((np.int64,), "n"),
    "label": ((np.int64,), "n"),
    "tokens": ((np.int32, np.float32), "nN*"),
    "pixels": ((np.uint8,), "nHW3"),
    **dict.fromkeys(("margin", "moved", "farthest"), ((np.float32,), "n")),
    **{name: ((kind,), "nP") for name, kind in TRACE.items()},
    "seconds": ((np.float64,), "4"),
    "process": ((np.int64,), ""),
    "head": ((np.int64,), "2"),
}
_IMAGE = ("index", "label", "tokens", "pixels", "margin", "moved", "farthest", *TRACE)
_DIGEST = "digest"


class DamagedShard(UsageError):
    """A shard that is not as it was written."""


@dataclass
class Samples:
    """What a run folder holds, in index order. index, label: int64 [n]; tokens: int32 [n, N] or float32 [n, N, D];
    pixels: uint8 [n, H, W, 3]; margin: float32 [n] (NaN where the rule measures none); moved, farthest: float32 [n],
    mean and largest distance of continuous tokens from the target's own; traces: one per image; settings: of run.json;
    batches: one dictionary per shard with its indices, seconds by part, head calls and rows, and the process that made
    it."""

    index: np.ndarray
    label: np.ndarray
    tokens: np.ndarray
    pixels: np.ndarray
    margin: np.ndarray
    moved: np.ndarray
    farthest: np.ndarray
    traces: list[PassTrace]
    settings: dict[str, Any]
    batches: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.index)


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a batch with their digest, whole or not at all."""
    content = {**arrays, _DIGEST: np.array(_digest(arrays))}
    write_whole(path, lambda name: np.savez_compressed(name, **content))  # type: ignore[arg-type]


def _digest(arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, in the order in which they count."""
    return sorted(folder.glob("shard-*.npz"))


def read_shard(path: Path, settings: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """All arrays of a shard, checked. settings: those of run.json, which labels and pixels have to fit. Raises
    DamagedShard, and UsageError for one that may not be read."""
    with _damaged(path), zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        arrays = {name: _member(archive, name) for name in _ARRAYS}
        signed = f"{_DIGEST}.npy" in archive.namelist()  # shards of earlier versions are not
        if signed and str(_member(archive, _DIGEST)) != _digest(arrays):
            raise ValueError("its arrays are not those that were written")
        _check_shapes(arrays)
        _check_values(arrays, settings or {}, signed)
    return arrays


def read_index(path: Path) -> list[int]:
    """The indices of a shard's images, without looking at the rest. Raises as `read_shard`."""
    with _damaged(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        index = _member(archive, "index")
        if index.dtype != np.int64 or index.ndim != 1 or not len(index) or (index < 0).any():
            raise ValueError("its index is not a list of numbers of images")
    return [int(i) for i in index]


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    if path.exists() and not os.access(path, os.R_OK):
        raise UsageError(f"{path} cannot be read: permission denied")
    try:
        yield
    except Exception as error:  # zip, deflate and npy each have kinds of their own for broken bytes
        raise DamagedShard(f"{path} cannot be read as a shard of samples: {error or type(error).__name__}") from error


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array. Its header is held against the bytes that are there before anything is made from it."""
    info = archive.getinfo(f"{name}.npy")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"array {name!r} is encrypted or compressed in another way")
    data = io.BytesIO(archive.read(info))  # the whole member, so that its CRC is checked
    size = data.getbuffer().nbytes
    if npy.read_magic(data) != (1, 0):
        raise ValueError(f"array {name!r} has another version of the npy format")
    shape, fortran, kind = npy.read_array_header_1_0(data)
    if kind.hasobject or fortran or size - data.tell() != math.prod(shape) * kind.itemsize or min(shape, default=1) < 0:
        raise ValueError(f"array {name!r} has {size} bytes, which are not {kind} of shape {list(shape)}")
    return np.frombuffer(data.read(), kind).reshape(shape)


def _check_shapes(arrays: dict[str, np.ndarray]) -> None:
    """Types, and axes of one name equally long."""
    sides: dict[str, int] = {}
    for name, (kinds, axes) in _ARRAYS.items():
        array, fixed = arrays[name], axes.rstrip("*")
        fits = array.dtype in kinds and len(fixed) <= array.ndim <= len(axes)
        for axis, side in zip(fixed, array.shape, strict=False):
            fits = fits and side == (int(axis) if axis.isdigit() else sides.setdefault(axis, side)) and side > 0
        if not fits:
            raise ValueError(f"array {name!r} is {array.dtype} {list(array.shape)}")


def _check_values(arrays: dict[str, np.ndarray], settings: dict[str, Any], signed: bool) -> None:
    index, label, tokens = (arrays[name] for name in ("index", "label", "tokens"))
    if len(np.unique(index)) < len(index) or (index < 0).any():
        raise ValueError("an index stands there twice, or is below 0")
    names, asked, size = (settings.get(k) for k in ("class_names", "classes", "image_size"))
    if (label < 0).any() or (isinstance(names, list) and (label >= len(names)).any()):
        raise ValueError("a label is of no class")
    numbers = asked if isinstance(asked, list) and all(type(c) is int for c in asked) else []  # not prompts
    if numbers and [numbers[i % len(numbers)] for i in index.tolist()] != label.tolist():
        raise ValueError("labels are not those of its images")
    width, height = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if isinstance(width, int) and arrays["pixels"].shape[1:3] != (height, width):
        raise ValueError(f"pixels are {list(arrays['pixels'].shape)}, the run's are {width} x {height}")
    finite = ["moved", "farthest", "spent", "seconds", *(["tokens"] if tokens.dtype == np.float32 else [])]
    if not all(np.isfinite(arrays[name]).all() for name in finite):
        raise ValueError("numbers that are not finite")
    if tokens.dtype != np.float32 and (tokens < 0).any():
        raise ValueError("a token below 0")
    made, kept = arrays["committed"], arrays["accepted"]
    if (made < 0).any() or (kept < 0).any() or (kept > made).any() or (arrays["drafted"] < 0).any():
        raise ValueError("traces that no decoding leaves")
    sums = made.sum(1, dtype=np.int64)
    # Earlier versions cut traces of masked models with drafts short.
    if (sums > tokens.shape[1]).any() or (signed and (sums < tokens.shape[1]).any()):
        raise ValueError("a trace does not add up to the tokens of its image")


def read_run(folder: str | Path) -> dict[str, Any]:
    """The content of run.json; its `settings` are a mapping. Raises UsageError where there is none."""
    path = Path(folder) / RUN
    try:
        content = read_json(path)
    except UsageError as error:
        raise UsageError(f"{folder} is not a folder of samples: {RUN} is missing or not valid JSON: {error}") from error
    if content.get("kind") != "samples" or not isinstance(content.get("settings"), dict):
        raise UsageError(f"{path} does not describe a run of samples")
    if not isinstance(content["settings"].get("method"), str):
        raise UsageError(f"{path}: settings do not name a method")
    return content


def held(folder: Path) -> set[int]:
    """Indices of the images in the shards whose index can be read."""
    found: set[int] = set()
    for shard in shard_files(folder):
        with contextlib.suppress(DamagedShard):
            found.update(read_index(shard))
    return found


def read_samples(folder: str | Path, count: int | None = None) -> Samples:
    """All samples of a folder, or its images 0..count-1. Raises UsageError where some of them are missing, naming the
    damaged shards."""
    folder = Path(folder)
    settings = read_run(folder)["settings"]
    parts, batches, damaged = _read_shards(folder, count, settings)
    found = np.concatenate([p["index"] for p in parts]) if parts else np.zeros(0, np.int64)
    wanted = count if count is not None else int(found.max(initial=-1)) + 1
    if not wanted or len(found) < wanted or (count is None and damaged):
        raise UsageError(_incomplete(folder, set(found.tolist()), wanted, damaged))
    if len({(p["tokens"].dtype, p["tokens"].shape[1:], p["pixels"].shape[1:]) for p in parts}) > 1:
        raise UsageError(f"{folder} holds images of several sizes or kinds of token: they are not of one run")
    order = np.argsort(found)
    arrays = {k: np.concatenate([p[k] for p in parts])[order] for k in _IMAGE if k not in TRACE}
    traces = [trace for p in parts for trace in _traces(p)]
    return Samples(**arrays, traces=[traces[i] for i in order], settings=settings, batches=batches)


def _incomplete(folder: Path, found: set[int], wanted: int, damaged: Sequence[str] = ()) -> str:
    missing = list(islice((i for i in range(wanted) if i not in found), 8))
    said = f"{folder} holds {len(found)} of {wanted} images; missing: {missing} (sample again)"
    return "; ".join([said, *damaged])


def _read_shards(
    folder: Path, count: int | None, settings: dict[str, Any]
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, Any]], list[str]]:
    """Arrays of every shard with wanted images, each image once; a dictionary about each whole shard; what is wrong
    with the others."""
    parts: list[dict[str, np.ndarray]] = []
    batches: list[dict[str, Any]] = []
    damaged: list[str] = []
    seen: set[int] = set()
    for shard in shard_files(folder):
        try:
            if count is not None and min(read_index(shard)) >= count:
                continue
            arrays = read_shard(shard, settings)
        except DamagedShard as error:
            damaged.append(str(error))
            continue
        index = [int(i) for i in arrays["index"]]
        keep = [i not in seen and (count is None or i < count) for i in index]
        seen.update(i for i, kept in zip(index, keep, strict=True) if kept)
        parts.append({name: arrays[name][np.array(keep)] for name in _IMAGE})
        timing = dict(zip(PARTS, arrays["seconds"].tolist(), strict=True))
        head, process = arrays["head"].tolist(), int(arrays["process"])
        if all(keep):
            batches.append({"index": index, "seconds": timing, "process": process, "head": head})
    return parts, batches, damaged


def _traces(part: dict[str, np.ndarray]) -> Iterator[PassTrace]:
    """One per image, without what fills the rows up."""
    for row in zip(*(part[name] for name in TRACE), strict=True):
        passes = int((row[0] > 0).sum())
        yield PassTrace(*(column[:passes].tolist() for column in row))


def write_adm(folder: str | Path, count: int, path: str | Path | None = None) -> Path:
    """Write images 0..count-1 as the `.npz` that the usual ImageNet evaluators read (Dhariwal and Nichol's ADM suite):
    arr_0 uint8 [count, H, W, 3], arr_1 int64 [count] class labels. Images pass through memory one shard at a time.
    Raises UsageError for missing images and damaged shards; then nothing is written."""
    folder = Path(folder)
    path = folder / ADM if path is None else Path(path)
    where: dict[int, tuple[Path, int]] = {}
    for shard in shard_files(folder):
        with contextlib.suppress(DamagedShard):
            for row, i in enumerate(read_index(shard)):
                where.setdefault(i, (shard, row))
    if any(i not in where for i in range(min(count, len(where) + 1))):
        raise UsageError(_incomplete(folder, {i for i in where if i < count}, count))
    settings = read_run(folder)["settings"]
    size = read_shard(where[0][0], settings)["pixels"].shape[1:]
    labels = np.zeros(count, np.int64)

    def write(name: str) -> None:
        with zipfile.ZipFile(name, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as out:
                header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
                npy.write_array_header_1_0(out, {**header, "shape": (count, *size)})  # type: ignore[arg-type]
                for i, image, label in _in_order(where, count, settings):
                    out.write(np.ascontiguousarray(image).tobytes())
                    labels[i] = label
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as out:
                npy.write_array(out, labels, allow_pickle=False)  # type: ignore[arg-type]

    write_whole(path, write)
    return path


def _in_order(
    where: dict[int, tuple[Path, int]], count: int, settings: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(index, pixels, label) by index. Strided ranks interleave shards: as many stay open as there are ranks."""
    open_shards: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    last = {where[i][0]: i for i in range(count)}
    for i in range(count):
        shard, row = where[i]
        if shard not in open_shards:
            arrays = read_shard(shard, settings)
            open_shards[shard] = (arrays["pixels"], arrays["label"])
        pixels, label = open_shards[shard]
        yield i, pixels[row], int(label[row])
        if last[shard] == i:
            del open_shards[shard]
