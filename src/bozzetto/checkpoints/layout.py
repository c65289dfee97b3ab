"""Files of weights of a folder in the Hugging Face layout: one, or shards with their index."""

from __future__ import annotations

from pathlib import Path

from bozzetto.checkpoints.store import WEIGHTS
from bozzetto.common.checks import clipped
from bozzetto.common.files import read_json
from bozzetto.errors import UsageError

_INDEX, _PICKLE = ".index.json", "pytorch_model.bin"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read. Raises UsageError where there are none, for an index that is damaged or
    that names files elsewhere, and for shards that are missing."""
    for name in (WEIGHTS, _PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}{_INDEX}").is_file():
            return _shards(index)
    raise UsageError(f"{folder}: no weights ({WEIGHTS} or its shards with {WEIGHTS}{_INDEX})")


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"{index}: weight_map is {clipped(shards)} (allowed: names of weights with their files)")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise UsageError(f"{index}: {clipped(name)} is not allowed: the name of a file in this folder")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UsageError(f"{index.parent}: {', '.join(missing[:4])} missing ({len(missing)} of {len(files)} shards)")
    return files
