"""Stand-ins of published checkpoints: the files as their authors lay them out, with small random weights.

One module per family; each gives `FAMILIES`, stand-ins by name. tests/test_published.py runs all of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CODES = ("none", "jacobi/seed-exact", "jacobi/exact", "jacobi/lantern:k=3")
VECTORS = ("none", "none/reflection", "jacobi/chains", "jacobi/pathwise:epsilon=0.1")


@dataclass(frozen=True)
class Published:
    """One stand-in.

    write(folder): writes the published files (wrappers, shards, dtypes, tokenizer files) into an empty folder, and
    converts them where `bozzetto convert` is the way -> what --model is given. asked: three prompts or classes.
    reference(folder, text): tokens of the first image in greedy decoding with the authors' guidance, float32, by their
    own implementation (transformers') or a slow one that is written beside the stand-in; folder: what `write` gave.
    Vectors have no greedy choice: theirs are drawn at temperature 1 with the noise of seed 0, and agree up to rounding.
    own: what the authors publish, as fields of OwnSampling, where it is not that of no guidance; source: where.
    options: of LoadSettings, {model} in a text is what `write` gave; methods: what is drawn with; temperature, rule: of
    the comparison with the reference; pictures: whether its tokens become pictures here (else a server says why not).
    """

    write: Callable[[Path], str | Path]
    asked: tuple[str | int, ...]
    reference: Callable[[Path, str], Any]
    own: dict[str, Any]
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = CODES
    temperature: float = 0.0
    rule: str = "auto"
    pictures: bool = True


def families() -> dict[str, Published]:
    """All stand-ins by name."""
    found: dict[str, Published] = {}
    for part in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{part.name}"), "FAMILIES", {})
    return found
