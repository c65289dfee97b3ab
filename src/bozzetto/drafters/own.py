"""Drafting a tree level by level as one call of our kernels (runtime/sketch.h)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafts.tree import static_tree
from bozzetto.laws.categorical import LawSettings
from bozzetto.runtime.engine import MapStruct
from bozzetto.runtime.native import ADDRESS, FLOAT, NUMBER, address_of, call, structure

# `Sketch` of sketch.h.
_Sketch = structure(
    (ADDRESS, "network layers"),
    (MapStruct, "fc output"),
    (ADDRESS, "table tokens features start committed bases before"),
    (MapStruct, "to_logits"),
    (NUMBER, "half places"),
    (NUMBER, "threads batch copies longest vocab levels beam greedy"),
    (FLOAT, "guidance temperature top_p"),
    (NUMBER, "top_k"),
    (ADDRESS, "counts widths nodes parents sees children keys"),
    (ADDRESS, "fixed"),
    (NUMBER, "length room"),
    (ADDRESS, "drawn laws margins"),
    (NUMBER, "candidates"),
    (ADDRESS, "scores mothers"),
)


@functools.cache
def _static_levels(shape: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """What sketch.h asks about the levels of a static tree."""
    tree = static_tree(shape, torch.device("cpu"))
    families = [family[0].tolist() for family in tree.families]
    fed = [node for family in families for node in family]
    number = {node: i for i, node in enumerate(fed)}
    parents = [0, *(number[int(tree.parent[0, node - 1])] for node in fed[1:])]
    sees, upto = [torch.zeros(0, dtype=torch.bool)], 1
    for family in families[1:]:
        upto += len(family)
        sees.append(tree.sees[0][family][:, fed[1:upto]].flatten())
    children = [tree.child[0, f, :width].flatten() for f, width in zip(families, tree.widths, strict=True)]
    counts, widths = torch.tensor([len(f) for f in families]), torch.tensor(tree.widths)
    return counts, widths, torch.tensor(fed), torch.tensor(parents), torch.cat(sees), torch.cat(children)


Given = tuple[dict[str, Any], Observation, LawSettings, int, int]


def _sketch(given: Given, levels: Sequence[Tensor], **more: Any) -> None:
    model, seen, settings, copies, vocab = given
    held = [part.contiguous() for part in (seen.verdict.tokens[:, : seen.longest], seen.start, seen.committed)]
    s = _Sketch(
        threads=torch.get_num_threads(), batch=len(seen.start), copies=copies, longest=seen.longest, vocab=vocab
    )
    s.levels, s.guidance, s.temperature, s.top_p = len(levels[0]), settings.guidance, 1.0, 1.0
    if settings.temperature:  # else the plain law, which can be ranked
        s.temperature, s.top_p, s.top_k = settings.temperature, settings.top_p, settings.top_k
    names = ("tokens", "start", "committed", "counts", "widths", "nodes", "parents", "sees", "children")
    for name, value in {**dict(zip(names, [*held, *levels], strict=False)), **model, **more}.items():
        setattr(s, name, address_of(value) if isinstance(value, Tensor) else value)
    call("bozzetto_sketch", s)


def sketch_static(
    given: Given, shape: tuple[tuple[int, ...], ...], keys: Tensor, fixed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A static tree drawn level by level. given: what `DraftModel.whole` says, what the last pass taught, the law's
    settings, rows per image, V; keys: int64 [B], of the draws of this pass; fixed: Gumbel noise [B, N, V] by position
    in their place (greedy: neither) -> tokens int64 [B, M + 1] behind one for the root, the laws float32
    [B, I, V], margins float32 [B]."""
    levels, (batch, vocab, greedy) = _static_levels(shape), (len(keys), given[-1], not given[2].temperature)
    tokens = torch.zeros(batch, sum(map(sum, shape)) + 1, dtype=torch.int64)
    laws, margins, room = torch.empty(batch, len(levels[2]), vocab), torch.empty(batch), tokens.shape[1]
    length = 0 if fixed is None else fixed.shape[1]
    noise = {"keys": keys.contiguous(), "fixed": fixed, "length": length, "greedy": int(greedy)}
    _sketch(given, levels, **noise, drawn=tokens, laws=laws, margins=margins, room=room)
    return tokens, laws, margins


def sketch_dynamic(given: Given, depth: int, beam: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The candidates of a dynamic tree (`TreeDrafter._dynamic`): tokens int64 [B, P], joint log-probabilities [B, P],
    the expanded nodes by level, int64 [B, n], margins [B]. given: as in `sketch_static`."""
    batch, counts = len(given[1].start), [1]
    for _ in range(depth - 1):
        counts.append(min(beam, counts[-1] * beam))
    pool = sum(counts) * beam
    tokens, scores = torch.empty(batch, pool, dtype=torch.int64), torch.empty(batch, pool)
    mothers, margins = torch.empty(batch, sum(counts), dtype=torch.int64), torch.empty(batch)
    out = {"drawn": tokens, "scores": scores, "mothers": mothers, "margins": margins, "candidates": pool}
    _sketch(given, [torch.tensor(counts)], **out, beam=beam)
    return tokens, scores, list(mothers.split(counts, 1)), margins
