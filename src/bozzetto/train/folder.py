"""Run folders of training: what a run is made from, its checkpoint, its metrics.

A run is taken up again only with what it was begun with: run.json holds the recipe and digests of the pictures and
weights that it reads, and a number of its own, which every other file of the run carries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bozzetto.checkpoints.folders import TOKENIZER_WEIGHTS
from bozzetto.checkpoints.weights import WEIGHTS, save_tensors
from bozzetto.common.files import digest, read_json, write_text, write_whole
from bozzetto.data import ImageSet
from bozzetto.errors import UsageError
from bozzetto.pipeline.pipeline import model_folder
from bozzetto.train.pictures import DataSource

RUN, CHECKPOINT, METRICS = "run.json", "checkpoint.pt", "metrics.jsonl"
# What may change between two starts of a run: where it lies, and how long, how often and how fast it works.
FREE = {"out", "steps", "evaluate_every", "save_every", "patience", "compile"}
# What a recipe names by path; it may move as long as its content stays.
CONTENT = {"train", "test", "tokenizer", "tiny", "model", "init"}


def data_digest(*sets: ImageSet, captions: object = None) -> str:
    """16 hex digits of pictures, labels, class names and captions."""
    total = hashlib.sha256(repr((captions, *[(s.images.shape, s.classes) for s in sets])).encode())
    for s in sets:
        total.update(np.ascontiguousarray(s.images).data)
        total.update(np.ascontiguousarray(s.labels, dtype=np.int64).data)
    return total.hexdigest()[:16]


class RunFolder:
    """A folder with run.json, checkpoint.pt (resumable state), metrics.jsonl and sample sheets.

    recipe: a dataclass with `out`; data: digests of the pictures; restart: put an earlier run aside. Raises UsageError
    for weights that are missing, and for a checkpoint of a run that was made from anything else.
    """

    def __init__(self, recipe: Any, data: Mapping[str, str], restart: bool = False):
        self.path = Path(recipe.out)
        self.checkpoint = self.path / CHECKPOINT
        files = _weights(recipe)
        if restart:
            self._put_aside(recipe)
        fresh = {
            "id": secrets.token_hex(8),
            "kind": type(recipe).__name__,
            "recipe": dataclasses.asdict(recipe),
            "made_from": {**data, **{name: digest(path) for name, path in files.items()}},
        }
        self.id = self._claim(recipe, json.loads(json.dumps(fresh)))

    def _claim(self, recipe: Any, fresh: dict[str, Any]) -> str:
        """Write run.json and return the run's number: the one that stands there, if this run was begun before."""
        try:
            old = read_json(self.path / RUN)
        except UsageError:  # missing or damaged
            old = {}
        changed = _changes(recipe, old, fresh)
        if not changed:
            fresh["id"] = old["id"]
        elif self.checkpoint.exists():  # without one nothing has been trained yet
            raise UsageError(
                f"{self.path}: this run was begun with something else: {'; '.join(changed)}. Undo that, choose another "
                "`out`, or start anew with --restart, which puts the old folder aside"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / RUN, json.dumps(fresh, indent=2) + "\n")
        return str(fresh["id"])

    def _put_aside(self, recipe: Any) -> None:
        """Rename an earlier run's folder to the first free of `out`.1, `out`.2, ..."""
        whole = Path(os.path.abspath(self.path))
        if not any((whole / name).exists() for name in (RUN, CHECKPOINT)):
            return
        for name in _inputs(recipe):
            if Path(name).resolve().is_relative_to(whole.resolve()):
                raise UsageError(f"{self.path} cannot be put aside: the recipe reads {name}. Choose another `out`")
        spare = next(s for n in itertools.count(1) if not (s := whole.with_name(f"{whole.name}.{n}")).exists())
        whole.rename(spare)
        print(f"put aside: {spare}")

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint whole or not at all."""
        write_whole(self.checkpoint, lambda p: torch.save({"run": self.id, **state}, p))

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None. Read without executing pickled code; raises UsageError for a damaged one."""
        if not self.checkpoint.exists():
            return None
        with self.reading():
            with zipfile.ZipFile(self.checkpoint) as parts:  # torch does not compare checksums
                if broken := parts.testzip():
                    raise ValueError(f"{broken} has another checksum")
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if saved["run"] != self.id:
                raise ValueError("it is another run's")
            return dict(saved)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What goes wrong inside is a UsageError about the checkpoint."""
        try:
            yield
        except Exception as error:  # torch and zipfile raise many unrelated types for a damaged file
            raise UsageError(
                f"{self.checkpoint}: this checkpoint cannot be used ({str(error) or type(error).__name__}). Put back a "
                f"copy of it, or start anew with --restart, which puts the folder with all that is in it aside"
            ) from error

    def keep(self, name: str, tables: dict[str, Tensor]) -> None:
        """Write tensors that are costly to make again, whole or not at all."""
        notes = {"run": self.id, "sha256": _tables_digest(tables)}
        save_tensors(self.path / name, tables, notes)

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """What `keep` wrote in this run; None: nothing, another run's, or damaged."""
        try:
            with safe_open(self.path / name, framework="pt") as f:
                notes = f.metadata() or {}
                tables = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        fits = notes.get("run") == self.id and notes.get("sha256") == _tables_digest(tables)
        return tables if fits else None

    def log(self, **figures: object) -> None:
        """Append one JSON line to metrics.jsonl."""
        record = {"time": round(time.time(), 1), **figures}
        with open(self.path / METRICS, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
            f.flush()
            os.fsync(f.fileno())


def _weights(recipe: Any) -> dict[str, Path]:
    """Files of the weights that a recipe reads. Raises UsageError for one that is missing."""
    tiny, tokenizer, model, init = (getattr(recipe, name, "") for name in ("tiny", "tokenizer", "model", "init"))
    found = {f"tiny ({part})": Path(tiny) / f"taef2_{part}.pth" for part in ("encoder", "decoder") if tiny}
    if tokenizer:
        found["tokenizer"] = Path(tokenizer) / TOKENIZER_WEIGHTS
    if model:
        found["model"] = model_folder(model) / WEIGHTS
        tokens = model_folder(model) / TOKENIZER_WEIGHTS
        found |= {"model (tokenizer)": tokens} if tokens.is_file() else {}
    if init:
        found["init"] = Path(init) / WEIGHTS
    for name, path in found.items():
        if not path.is_file():
            raise UsageError(f"{name}: weights not found: {path}")
    return found


def _inputs(recipe: Any) -> Iterator[str]:
    """Paths that a recipe reads."""
    for name in CONTENT:
        value = getattr(recipe, name, "")
        for part in value if isinstance(value, list) else [value]:
            path = part.path if isinstance(part, DataSource) else part
            if path:
                yield path


def _changes(recipe: Any, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two run.json files, beyond what is free to."""
    if not all(isinstance(old.get(name), dict) for name in ("recipe", "made_from")) or not old.get("id"):
        return [f"its {RUN} is missing or damaged"]
    if old.get("kind") != new["kind"]:
        return [f"it holds a run of a {old.get('kind')}, not of a {new['kind']}"]
    before = {field.name: old["recipe"].get(field.name, field.default) for field in dataclasses.fields(recipe)}
    now = {name: new["recipe"][name] for name in before if name not in FREE | CONTENT}
    found = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before[name] != now[name]]
    sources = {**old["made_from"], **new["made_from"]}
    changed = [name for name in sources if old["made_from"].get(name) != new["made_from"].get(name)]
    return found + [f"what {name} holds is not what it was" for name in changed]


def _tables_digest(tables: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tables):
        total.update(f"{name} {tables[name].dtype} {tuple(tables[name].shape)}".encode())
        total.update(tables[name].contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
