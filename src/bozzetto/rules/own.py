"""Verdicts on chains and trees of codes as one call of our kernels (runtime/walk.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.rules.base import Noise
from bozzetto.runtime.native import ADDRESS, FLOAT, NUMBER, address_of, call, structure

# `Judged` of walk.h.
_Judged = structure(
    (ctypes.c_int32, "rule"),
    (NUMBER, "threads batch nodes levels most vocab laws trees"),
    (ADDRESS, "law draft tokens child row path order depth uniforms slack neighbours"),
    (NUMBER, "columns near window"),
    (FLOAT, "delta lam"),
    (ADDRESS, "out accepted way spent margins"),
)
TREE, LANTERN, TRAVERSAL = range(3)


def own_verdict(
    draft: Draft,
    log_p: Tensor,
    noise: Noise,
    rule: int,
    lending: tuple[Tensor, int, float, float] | None = None,
) -> Verdict:
    """The verdict of a rule (TREE, LANTERN, TRAVERSAL) on a draft of at least one node. lending: of a LANTERN, its
    table of neighbours, how many of them may lend, the most mass, and lambda (0: none)."""
    tree, (batch, places, vocab) = draft.shape(), log_p.shape
    trees, levels = len(tree.child), tree.max_depth
    shape = [part.expand(trees, *part.shape[1:]) for part in (tree.row, tree.path, tree.order, tree.depth)]
    log_q = None if draft.certain else draft.log_q
    table, near, delta, lam = lending or (None, 0, 0.0, 0.0)
    given = (log_p, log_q, draft.tokens, tree.child, *shape, noise.uniforms, noise.slack, table)
    held = [None if part is None else part.contiguous() for part in given]
    tokens, accepted = torch.empty(batch, levels + 1, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    path, spent, margins = torch.empty_like(tokens), torch.empty(batch), torch.empty(batch, levels + 1)
    laws, columns = 0 if log_q is None else log_q.shape[1], 0 if table is None else table.shape[1]
    sizes = (torch.get_num_threads(), batch, places - 1, levels, tree.child.shape[2], vocab, laws, trees)
    out = map(address_of, (tokens, accepted, path, spent, margins))
    window = int(draft.window)
    call("bozzetto_judge", _Judged(rule, *sizes, *map(address_of, held), columns, near, window, delta, lam, *out))
    return Verdict(tokens, accepted, None if draft.tree is None else path, spent, margins)
