"""Is a folder in the Hugging Face layout whole? Looked at before transformers reads it, which says little of what it
finds, and takes the memory that config.json asks for before it compares that with the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bozzetto.checkpoints.folders import CONFIG, read_config
from bozzetto.checkpoints.weights import FLOATS, WEIGHT, Held, header_of, open_tensors, weight_files
from bozzetto.common.files import pointer_note
from bozzetto.errors import UsageError

_COUNTS, _MOST = re.compile(r"(num|n)_\w*(layer|block|head)s?|depths?"), 1024


def check_folder(folder: Path, make: Callable[[], nn.Module]) -> None:
    """Raise UsageError naming the file for a shard that is missing, cut, or a Git LFS pointer, for an index that names
    files elsewhere, for weights of a type that is no float's, and for a config.json that describes a larger network
    than the weights could be.

    make: builds the network that config.json describes; it is called on the meta device.
    """
    check_counts(read_config(folder), folder / CONFIG)
    files = weight_files(folder)
    for path in files:
        if path.suffix == ".safetensors":
            with open_tensors(path) as content:  # its header says how long it must be
                check_types(path, header_of(content))
        elif note := pointer_note(path):
            raise UsageError(f"{path}: {note}")
    try:
        with torch.device("meta"):
            wanted = sum(weight.numel() for weight in make().parameters())
    except Exception as error:  # the library's own code on values that it does not check
        raise UsageError(f"{folder / CONFIG}: not a network: {' '.join(str(error).split())[:200]}") from error
    held = sum(path.stat().st_size for path in files)
    if wanted > 2 * held:  # four bits are the fewest that a weight is stored in
        raise UsageError(f"{folder / CONFIG}: describes {wanted} weights, but its files hold {held} bytes")


def check_types(path: Path, held: Mapping[str, Held], allowed: Sequence[str] = FLOATS) -> None:
    """Raise UsageError for weights of types that mean nothing without scales (int8, float8), which transformers 5.24
    casts as they are."""
    for key, (kind, _) in held.items():
        if key.endswith(WEIGHT) and kind not in allowed:
            raise UsageError(f"{path}: weight {key!r} is of type {kind} (allowed: {', '.join(allowed)})")


def check_counts(content: dict[str, Any], source: Path) -> None:
    """A million layers without weights take gigabytes, too."""
    for key, value in content.items():
        if isinstance(value, dict):
            check_counts(value, source)
        elif _COUNTS.fullmatch(key):
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and not 0 <= count <= _MOST:
                    raise UsageError(f"{source}: {key} = {count} is not allowed: 0 to {_MOST}")
