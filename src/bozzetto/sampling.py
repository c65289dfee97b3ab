"""Sampling many images into a folder: by any number of processes, resumable, whole files only.

A run folder holds `run.json` (what is sampled) and shards of one batch each. A process of rank r of W takes the indices
r, r + W, r + 2W, ... and leaves out those that a shard already holds, so no process has to talk to another, and a run
may be resumed by another number of processes. An image depends on its seed and index only (in float32; see README).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from bozzetto.engine.trace import PassTrace
from bozzetto.errors import UsageError
from bozzetto.files import write_text, write_whole
from bozzetto.pipeline import GeneratedImage, GenerateSettings, Pipeline, plan_batches
from bozzetto.provenance import provenance
from bozzetto.registry import split_method, split_spec

RUN, ADM = "run.json", "samples.npz"
PARTS = ("total", "draft", "target", "decode")
_TRACE = {"committed": np.int16, "accepted": np.int16, "drafted": np.int16, "spent": np.float32}
_WARM_UP_PASSES = 4
PROCESS = secrets.randbelow(2**62)  # tells which shards were timed by one process


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

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per target pass, averaged over images."""
        made = self.tokens.shape[0] * self.tokens.shape[1]
        return made / max(1, sum(len(t.committed) for t in self.traces))


_SUFFIXES: dict[str, type] = {
    **dict.fromkeys(("window", "steps", "last_steps", "passes"), int),
    **dict.fromkeys(("guidance_schedule", "compile"), str),
}


_PLAIN = (("compile", "off"), ("deterministic", False), ("negative_prompt", ""))  # what needs no mention


def method_settings(method: str, base: GenerateSettings) -> GenerateSettings:
    """`base` with the drafter and rule of a method: none, or DRAFTER/RULE, and after each @ a setting of its own, such
    as none@passes=64. Raises UsageError for unknown names."""
    name, *own = method.split("@")
    settings: dict[str, Any] = {}
    for part in own:
        key, _, value = part.partition("=")
        if key not in _SUFFIXES:
            allowed = ", ".join(f"@{k}=" for k in _SUFFIXES)
            raise UsageError(f"method {method!r}: '@{part}' is not allowed (allowed: {allowed})")
        try:
            settings[key] = _SUFFIXES[key](value)
        except ValueError as error:
            raise UsageError(f"method {method!r}: {key} = {value!r} is not allowed: a whole number") from error
    drafter, rule = split_method(name)
    return replace(base, drafter=drafter, rule=rule, **settings)


def slug(method: str) -> str:
    """Folder name of a method."""
    return re.sub(r"[^\w.+-]+", "-", method)


class SampleRun:
    """One folder of samples of one method. method: what it is called (None: as its settings say). Raises UsageError
    where the folder holds samples of something else."""

    def __init__(
        self,
        folder: str | Path,
        pipe: Pipeline,
        settings: GenerateSettings,
        *,
        seed: int = 0,
        classes: str | int | Sequence[str | int] = (),
        method: str | None = None,
    ):
        self.folder, self.pipe, self.seed = Path(folder), pipe, seed
        self.classes = [pipe.classes[i] for i in pipe.labels(classes, settings)]
        settings = pipe.resolve(settings)
        if split_spec(settings.drafter)[0] == "jacobi" and settings.rule != "seed-exact":
            # The window is part of such a rule's law of noise: it must not follow the size of the last batch.
            settings = replace(settings, window=pipe.decoder_for(settings, settings.batch)[1])
        self.settings = settings
        self.method = method or ("none" if settings.sequential else f"{settings.drafter}/{settings.rule}")
        plan_batches([0], 1, seed, 0, settings.batch)  # refuses a seed out of range
        self._check_folder()

    def description(self) -> dict[str, Any]:
        """What fixes the images: everything but the batch size."""
        law = {k: v for k, v in asdict(self.settings).items() if k != "batch" and (k, v) not in _PLAIN}
        model = {"model": self.pipe.name, "weights": self.pipe.fingerprint(), "dtype": self.pipe.dtype}
        grid, size = self.pipe.tokenizer.config.grid, self.pipe.tokenizer.config.image_size
        shape = {"grid": grid, "image_size": size, "class_names": self.pipe.classes}
        drafter = {"drafter_weights": self.pipe.drafter_weights(self.settings.drafter)}
        return {"method": self.method, **model, **drafter, **law, "seed": self.seed, "classes": self.classes, **shape}

    def _check_folder(self) -> None:
        if not (self.folder / RUN).exists():
            if self.folder.is_dir() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise UsageError(f"{self.folder} is not empty and holds no {RUN}: choose another folder")
            return
        mine, theirs = self.description(), read_run(self.folder)["settings"]
        odd = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if odd:
            different = "; ".join(f"{k} = {theirs.get(k)!r} there, {mine.get(k)!r} asked" for k in odd)
            raise UsageError(f"{self.folder} holds samples of another run ({different}): choose another folder")

    def claim(self) -> None:
        """Write run.json, or check that it says the same."""
        self._check_folder()
        if not (self.folder / RUN).exists():
            content = {"kind": "samples", "settings": self.description(), "provenance": provenance()}
            write_text(self.folder / RUN, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def done(self) -> set[int]:
        """Indices that are sampled already."""
        return {int(i) for shard in _shards(self.folder) for i in _load(shard, "index")}

    def pending(self, count: int, rank: int = 0, world: int = 1) -> list[int]:
        """What is left for a process, in order."""
        have = self.done()
        return [i for i in range(rank, count, world) if i not in have]

    def warm_up(self) -> None:
        """A few passes whose results are thrown away, so that the first batch is timed like the others."""
        events = self.pipe.stream(self.classes, count=self.settings.batch, settings=self.settings)
        for _ in islice(events, _WARM_UP_PASSES):
            pass

    def draw(self, indices: Sequence[int]) -> float:
        """Sample one batch and write its shard; returns the seconds it took."""
        result = self.pipe.generate(self.classes, seed=self.seed, indices=indices, settings=self.settings)
        content = _pack(result.images)
        content["seconds"] = np.array([result.seconds[part] for part in PARTS])
        content["process"] = np.int64(PROCESS)
        content["head"] = np.array([result.head_calls, result.head_rows], np.int64)
        path = self.folder / f"shard-{indices[0]:06d}.npz"
        write_whole(path, lambda name: np.savez_compressed(name, **content))  # type: ignore[arg-type]
        return result.seconds["total"]


def sample(run: SampleRun, count: int, *, rank: int = 0, world: int = 1, progress: bool = False) -> int:
    """Sample what is missing of indices 0..count-1 that fall to this rank; returns how many images that were."""
    if count < 1:
        raise UsageError(f"count = {count} is not allowed: a whole number >= 1")
    run.claim()
    left = run.pending(count, rank, world)
    whole = len(range(rank, count, world))
    with tqdm(total=whole, initial=whole - len(left), unit="image", desc="sampling", disable=not progress) as bar:
        for batch in batched(left, run.settings.batch):
            run.draw(batch)
            bar.update(len(batch))
    return len(left)


def world_of() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun tells them; 0 and 1 without it."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return rank, world


@contextlib.contextmanager
def gathered(world: int) -> Iterator[None]:
    """At the end of the block every process waits for the others (torchrun's processes, over gloo)."""
    if world == 1:
        yield
        return
    import torch.distributed as dist

    # The slowest process may need hours longer than the quickest.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def batched(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive lists of at most `size` items."""
    for i in range(0, len(items), size):
        yield list(items[i : i + size])


def _pack(images: Sequence[GeneratedImage]) -> dict[str, np.ndarray]:
    """The arrays of a shard; traces are padded with zeros to the longest."""
    passes = max(len(i.trace.committed) for i in images)
    traces = {
        name: np.array([[*getattr(i.trace, name), *[0] * (passes - len(i.trace.committed))] for i in images], kind)
        for name, kind in _TRACE.items()
    }
    return {
        "index": np.array([i.index for i in images], np.int64),
        "label": np.array([i.label for i in images], np.int64),
        "tokens": _compact(np.stack([i.tokens.numpy() for i in images])),
        "pixels": np.stack([np.asarray(i.image) for i in images]),
        "margin": np.array([np.nan if i.margin is None else i.margin for i in images], np.float32),
        "moved": np.array([i.moved for i in images], np.float32),
        "farthest": np.array([i.farthest for i in images], np.float32),
        **traces,
    }


def _compact(tokens: np.ndarray) -> np.ndarray:
    """Codes as int32; continuous tokens stay float32."""
    return tokens.astype(np.int32) if np.issubdtype(tokens.dtype, np.integer) else tokens


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npz"))


def _load(path: Path, *names: str) -> Any:
    """Arrays of a shard by name (one name: the array itself). Raises UsageError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as content:
            found = [content[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as a shard of samples: {error}") from error
    return found[0] if len(names) == 1 else found


def read_run(folder: str | Path) -> dict[str, Any]:
    """The content of run.json. Raises UsageError where there is none."""
    path = Path(folder) / RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a folder of samples: {RUN} is missing or not valid JSON") from error
    if not isinstance(content, dict) or content.get("kind") != "samples" or "settings" not in content:
        raise UsageError(f"{path} does not describe a run of samples")
    return content


def read_samples(folder: str | Path, count: int | None = None) -> Samples:
    """All samples of a folder, or its images 0..count-1. Raises UsageError where some of them are missing."""
    folder = Path(folder)
    settings = read_run(folder)["settings"]
    rows, batches = _read_shards(folder, count)
    found = np.sort(rows["index"]) if rows else np.zeros(0, np.int64)
    wanted = len(found) if count is None else count
    if not wanted or not np.array_equal(found, np.arange(wanted)):
        missing = sorted(set(range(max(wanted, 1))) - set(found.tolist()))
        raise UsageError(f"{folder} holds {len(found)} of {wanted} images; missing: {missing[:8]} (sample again)")
    order = np.argsort(rows["index"])
    arrays = {k: v[order] for k, v in rows.items() if k not in _TRACE}
    traces = [PassTrace(*_unpadded([rows[name][i] for name in _TRACE])) for i in order]
    return Samples(**arrays, traces=traces, settings=settings, batches=batches)


def _read_shards(folder: Path, count: int | None) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    names = ("index", "label", "tokens", "pixels", "margin", "moved", "farthest", *_TRACE)
    parts: list[list[np.ndarray]] = []
    batches: list[dict[str, Any]] = []
    for shard in _shards(folder):
        *arrays, seconds, process, head = _load(shard, *names, "seconds", "process", "head")
        keep = arrays[0] < (len(arrays[0]) + arrays[0].max() if count is None else count)
        parts.append([a[keep] for a in arrays])
        timing = dict(zip(PARTS, seconds.tolist(), strict=True))
        batches.append({"index": arrays[0].tolist(), "seconds": timing, "process": int(process), "head": head.tolist()})
    if not parts:
        return {}, batches
    longest = max(p[-1].shape[1] for p in parts)
    merged = {}
    for i, name in enumerate(names):
        column = [p[i] for p in parts]
        if name in _TRACE:
            column = [np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in column]
        merged[name] = np.concatenate(column)
    return merged, batches


def _unpadded(rows: list[np.ndarray]) -> list[list[Any]]:
    passes = int((rows[0] > 0).sum())
    return [row[:passes].tolist() for row in rows]


def write_adm(folder: str | Path, count: int, path: str | Path | None = None) -> Path:
    """Write images 0..count-1 as the `.npz` that the usual ImageNet evaluators read (Dhariwal and Nichol's ADM suite):
    arr_0 uint8 [count, H, W, 3], arr_1 int64 [count] class labels. Images pass through memory one shard at a time."""
    folder = Path(folder)
    path = folder / ADM if path is None else Path(path)
    where = {int(i): (shard, row) for shard in _shards(folder) for row, i in enumerate(_load(shard, "index"))}
    missing = [i for i in range(count) if i not in where]
    if missing:
        raise UsageError(f"{folder} holds {count - len(missing)} of {count} images; missing: {missing[:8]}")
    size = _load(where[0][0], "pixels").shape[1:]
    labels = np.zeros(count, np.int64)

    def write(name: str) -> None:
        with zipfile.ZipFile(name, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as out:
                header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
                npy.write_array_header_1_0(out, {**header, "shape": (count, *size)})  # type: ignore[arg-type]
                for i, image, label in _in_order(where, count):
                    out.write(np.ascontiguousarray(image).tobytes())
                    labels[i] = label
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as out:
                npy.write_array(out, labels, allow_pickle=False)  # type: ignore[arg-type]

    write_whole(path, write)
    return path


def _in_order(where: dict[int, tuple[Path, int]], count: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(index, pixels, label) by index. Strided ranks interleave shards: as many stay open as there are ranks."""
    open_shards: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    last = {where[i][0]: i for i in range(count)}
    for i in range(count):
        shard, row = where[i]
        if shard not in open_shards:
            pixels, label = _load(shard, "pixels", "label")
            open_shards[shard] = (pixels, label)
        pixels, label = open_shards[shard]
        yield i, pixels[row], int(label[row])
        if last[shard] == i:
            del open_shards[shard]
