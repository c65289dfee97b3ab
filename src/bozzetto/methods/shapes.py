"""Trees of drafts as they are written."""

from __future__ import annotations

import math
import re

from bozzetto.drafters.tree import Dynamic, Shape
from bozzetto.drafts.tree import SHAPES
from bozzetto.errors import UsageError, require

MOST_NODES = 128
_LONGEST = 300  # characters of a tree that the cache holds


def read_shape(text: str) -> Shape | Dynamic:
    """A tree as written: a published name; `chain-L`; `AxBxC`, children per node level by level; `dynamic` or
    `dynamic-NODES-DEPTH-BEAM` (NODES counts the root, as published). Raises UsageError."""
    if text in SHAPES:
        return SHAPES[text]
    require(len(text) <= _LONGEST, "tree", text, f"the cache holds {MOST_NODES} nodes at most")
    shape: Shape | Dynamic | None = None
    if found := re.fullmatch(r"chain-(\d+)", text):
        _check_nodes(text, int(found[1]))  # before a huge one is built
        shape = ((1,),) * int(found[1])
    elif re.fullmatch(r"\d+(x\d+)*", text):
        widths = list(map(int, text.split("x")))
        levels = [math.prod(widths[:depth]) for depth in range(len(widths) + 1)]
        _check_nodes(text, sum(levels[1:]))
        shape = tuple((width,) * above for width, above in zip(widths, levels[:-1], strict=True))
    elif text == "dynamic":
        shape = Dynamic()
    elif found := re.fullmatch(r"dynamic-(\d+)-(\d+)-(\d+)", text):
        shape = Dynamic(int(found[1]) - 1, int(found[2]), int(found[3]))
    if shape is None:
        names = ", ".join(SHAPES)
        raise UsageError(f"tree = {text!r} is not allowed: {names}, chain-5, 4x2x1, dynamic or dynamic-59-5-10")
    _check_shape(text, shape)
    return shape


def nodes_of(shape: Shape | Dynamic) -> int:
    """Drafted nodes."""
    return shape.nodes if isinstance(shape, Dynamic) else sum(map(sum, shape))


def _check_shape(text: str, shape: Shape | Dynamic) -> None:
    nodes = nodes_of(shape)
    if isinstance(shape, Dynamic):
        fine, nodes = min(shape.nodes, shape.depth, shape.beam) >= 1, max(nodes, shape.depth * shape.beam)
    else:
        fine = nodes >= 1 and all(min(level, default=0) >= 0 < sum(level) for level in shape)
    if not fine:
        raise UsageError(f"tree = {text!r} is not allowed: every number is 1 or more")
    _check_nodes(text, nodes)


def _check_nodes(text: str, nodes: int) -> None:
    if nodes > MOST_NODES:
        raise UsageError(f"tree = {text!r} is not allowed: {nodes} nodes, the cache holds {MOST_NODES} at most")
