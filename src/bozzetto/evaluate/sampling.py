"""Sampling many images into a folder: by any number of processes, resumable, whole files only.

A run folder holds `run.json` (what is sampled) and shards of one batch each. A process of rank r of W takes the indices
r, r + W, r + 2W, ... and leaves out those that a whole shard already holds, so no process has to talk to another, and a
run may be resumed by another number of processes. A run of one process has the folder to itself; those of torchrun
share it. An image depends on its seed and index only (in float32; see README).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bozzetto.checkpoints.own_sampling import SAMPLING, OwnSampling
from bozzetto.common.classes import labels_of
from bozzetto.common.files import write_text
from bozzetto.common.staging import locked
from bozzetto.common.terminal import note
from bozzetto.errors import UsageError, brief, check_number
from bozzetto.evaluate.provenance import provenance
from bozzetto.evaluate.shards import (
    PARTS,
    RUN,
    TRACE,
    DamagedShard,
    read_index,
    read_run,
    read_shard,
    shard_files,
    write_shard,
)
from bozzetto.methods.table import split_method
from bozzetto.pipeline.pipeline import GeneratedImage, GenerateSettings, Pipeline, plan_batches
from bozzetto.runtime.graphs import AUTO

WARM_UP_PASSES = 4
_MOST = 10**12  # images of a run
PROCESS = secrets.randbelow(2**62)  # tells which shards were timed by one process

_SUFFIXES: dict[str, type] = {
    **dict.fromkeys(("window", "steps", "last_steps", "passes"), int),
    **dict.fromkeys(("guidance_schedule", "compile"), str),
}
# What needs no mention.
PLAIN = (("compile", "off"), ("deterministic", False), ("negative_prompt", ""), ("quality_words", False))


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


def own_for(pipe: Pipeline, folders: Iterable[Path]) -> OwnSampling:
    """What is taken where nothing is asked for: the model's own values, or those that were the same for all models
    where one of these folders is of a version that knew no others."""
    early = any((folder / RUN).exists() and SAMPLING not in read_run(folder) for folder in folders)
    return OwnSampling(source="the version that began the folder") if early else pipe.own


def as_begun(pipe: Pipeline, settings: GenerateSettings, folders: Sequence[Path]) -> GenerateSettings:
    """With what is not asked for: the law of `own_for`; passes as those of a folder that was begun, else as suits."""
    begun = [read_run(folder)["settings"] for folder in folders if (folder / RUN).exists()]
    asked = begun[0].get("compile", "off") if settings.compile == AUTO and begun else settings.compile
    return replace(settings.with_own(own_for(pipe, folders)), compile=pipe.runner.mode(asked))


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
        pipe.need_pictures()
        own, asked = own_for(pipe, [self.folder]), pipe.sampling(settings)["asked"]
        settings = as_begun(pipe, settings, [self.folder])
        self.sampling = {**pipe.sampling(settings), "asked": asked, "source": own.source}
        labels = pipe.labels(classes, settings)
        # What asks for the same in any process: a prompt has a number in this one only, a name may be of two classes.
        self.classes: list[str | int] = [pipe.classes[i] for i in labels] if pipe.takes_prompts else list(labels)
        settings = pipe.resolve(settings)
        if settings.follows_window:
            # The window is part of such a rule's law of noise: it must not follow the size of the last batch.
            settings = replace(settings, window=pipe.window(settings))
        self.settings = settings
        self.method = method or ("none" if settings.sequential else settings.method)
        plan_batches([0], 1, seed, 0, settings.batch)  # refuses a seed out of range
        self._check_folder()

    def description(self) -> dict[str, Any]:
        """What fixes the images: everything but the batch size."""
        law = {k: v for k, v in self.settings.plain().items() if k != "batch" and (k, v) not in PLAIN}
        model = {"model": self.pipe.name, "weights": self.pipe.fingerprint(), "dtype": self.pipe.dtype}
        grid, size = (pair[0] if pair[0] == pair[1] else list(pair) for pair in (self.pipe.grid, self.pipe.size))
        shape = {"grid": grid, "image_size": size, "class_names": self.pipe.classes}
        drafter = {"drafter_weights": self.pipe.drafter_weights(self.settings.drafter)}
        return {"method": self.method, **model, **drafter, **law, "seed": self.seed, "classes": self.classes, **shape}

    def _check_folder(self) -> None:
        if not (self.folder / RUN).exists():
            if self.folder.is_dir() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise UsageError(f"{self.folder} is not empty and holds no {RUN}: choose another folder")
            return
        mine, theirs = self.description(), self._in_our_words(read_run(self.folder)["settings"])
        odd = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if odd:
            different = "; ".join(f"{k} = {brief(theirs.get(k))} there, {brief(mine.get(k))} asked" for k in odd)
            if "weights" in odd and theirs.get("weights") == "unknown":
                different += "; an earlier version did not note the weights, so nobody knows whether they are these"
            raise UsageError(f"{self.folder} holds samples of another run ({different}): choose another folder")

    def _in_our_words(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """Settings of earlier versions, which put classes down by names without capitals."""
        names, classes = theirs.get("class_names"), theirs.get("classes")
        if self.pipe.takes_prompts or names != [name.lower() for name in self.pipe.classes]:
            return theirs
        with contextlib.suppress(UsageError, TypeError):
            classes = labels_of(self.pipe.classes, classes) if isinstance(classes, list) else classes
        return {**theirs, "class_names": self.pipe.classes, "classes": classes}

    def claim(self) -> None:
        """Write run.json, or check that it says the same."""
        self._check_folder()
        if not (self.folder / RUN).exists():
            content = {"kind": "samples", "settings": self.description(), SAMPLING: self.sampling}
            content |= {"provenance": provenance()}
            write_text(self.folder / RUN, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def alone(self, world: int = 1) -> Iterator[None]:
        """Nobody else samples into the folder meanwhile, but for the other processes where there are several. Raises
        UsageError where somebody does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, shared=world > 1) as held:
            if held is False:  # where there are no locks: what is drawn twice does no harm
                way = "wait until it has finished, or choose another folder"
                raise UsageError(f"another process is sampling into {self.folder}: {way}")
            yield

    def done(self, rank: int = 0, world: int = 1) -> set[int]:
        """Indices that are sampled already. Shards with images of this rank are read to the last byte; a damaged one is
        moved aside, with a note, so that its images count as missing."""
        found: set[int] = set()
        settings = self.description()
        for shard in shard_files(self.folder):
            seen = _state(shard)
            try:
                index = read_index(shard)
                if any(i % world == rank for i in index):
                    read_shard(shard, settings)
                found.update(index)
            except DamagedShard as error:
                if seen is not None and seen == _state(shard):  # not replaced by another process meanwhile
                    os.replace(shard, shard.with_name(f"damaged-{shard.name}"))
                    note(f"note: {error}; moved to damaged-{shard.name}, its images are drawn again")
        return found

    def pending(self, count: int) -> list[int]:
        """What is left, in order."""
        have = self.done()
        return [i for i in range(count) if i not in have]

    def warm_up(self) -> None:
        """A few passes whose results are thrown away, so that the first batch is timed like the others."""
        events = self.pipe.stream(self.classes, count=self.settings.batch, settings=self.settings)
        for _ in islice(events, WARM_UP_PASSES):
            pass

    def draw(self, indices: Sequence[int]) -> float:
        """Sample one batch and write its shard, but for images that another process has drawn meanwhile; returns the
        seconds it took."""
        indices = self._untaken(list(indices))
        if not indices:
            return 0.0
        result = self.pipe.generate(self.classes, seed=self.seed, indices=indices, settings=self.settings)
        content = _pack(result.images)
        content["seconds"] = np.array([result.seconds[part] for part in PARTS])
        content["process"] = np.array(PROCESS, np.int64)
        content["head"] = np.array([result.head_calls, result.head_rows], np.int64)
        write_shard(self._path(indices), content)
        return result.seconds["total"]

    def _path(self, indices: Sequence[int]) -> Path:
        return self.folder / f"shard-{indices[0]:06d}.npz"

    def _untaken(self, indices: list[int]) -> list[int]:
        """What is left when no shard is to be written over."""
        while indices and (path := self._path(indices)).exists():
            try:
                taken = set(read_index(path))
            except DamagedShard:
                break
            if indices[0] not in taken:  # a shard under another's name
                break
            indices = [i for i in indices if i not in taken]
        return indices


def _state(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from one that took its place; None where it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def check_count(count: int) -> None:
    """Raise UsageError for a number of images out of range."""
    check_number("count", count, 1, _MOST, f"a whole number from 1 to {_MOST}", whole=True)


def sample(run: SampleRun, count: int, *, rank: int = 0, world: int = 1, progress: bool = False) -> int:
    """Sample what is missing of indices 0..count-1 that fall to this rank; returns how many images that were."""
    check_count(count)
    with run.alone(world):
        run.claim()
        have, mine = run.done(rank, world), range(rank, count, world)
        there = sum(i in mine for i in have)
        left = (i for i in mine if i not in have)
        with tqdm(total=len(mine), initial=there, unit="image", desc="sampling", disable=not progress) as bar:
            for batch in batched(left, run.settings.batch):
                run.draw(batch)
                bar.update(len(batch))
    return len(mine) - there


def world_of() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun tells them; 0 and 1 without it. Raises UsageError
    for what is no rank of so many processes, which would sample nothing, or a part as if it were the whole."""
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)}
    if not given:
        return 0, 1
    said = ", ".join(f"{name} = {value!r}" for name, value in given.items())
    if len(given) == 2 and all(value.isdecimal() and len(value) < 10 for value in given.values()):
        rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
        if rank < world:
            return rank, world
    raise UsageError(f"{said} in the environment is not allowed: both, whole numbers, RANK from 0 to WORLD_SIZE - 1")


@contextlib.contextmanager
def gathered(world: int) -> Iterator[None]:
    """At the end of the block every process waits for the others (torchrun's processes, over gloo)."""
    if world == 1:
        yield
        return
    import torch.distributed as dist

    try:
        # The slowest process may need hours longer than the quickest.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    except (ValueError, RuntimeError) as error:  # no address of the others, or nobody there
        raise UsageError(
            f"WORLD_SIZE = {world} in the environment, but the processes do not find each other "
            f"({str(error).splitlines()[0]}): start them with torchrun, or unset it"
        ) from error
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    """Consecutive lists of at most `size` items."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


def _pack(images: Sequence[GeneratedImage]) -> dict[str, np.ndarray]:
    """The arrays of a shard; traces are padded with zeros to the longest."""
    passes, tokens = max(len(i.trace.committed) for i in images), np.stack([i.tokens.numpy() for i in images])
    traces = {
        name: np.array([[*getattr(i.trace, name), *[0] * (passes - len(i.trace.committed))] for i in images], kind)
        for name, kind in TRACE.items()
    }
    return {
        "index": np.array([i.index for i in images], np.int64),
        "label": np.array([i.label for i in images], np.int64),
        "tokens": tokens if tokens.dtype.kind == "f" else tokens.astype(np.int32),
        "pixels": np.stack([np.asarray(i.image) for i in images]),
        "margin": np.array([np.nan if i.margin is None else i.margin for i in images], np.float32),
        "moved": np.array([i.moved for i in images], np.float32),
        "farthest": np.array([i.farthest for i in images], np.float32),
        **traces,
    }
