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
    (FLOAT, "delta lam nu mu"),
    (ADDRESS, "hidden"),
    (NUMBER, "dim"),
    (ADDRESS, "out accepted way spent margins"),
)
TREE, LANTERN, TRAVERSAL, ANNEALED, GROUPED, CASCADE = range(6)


def own_verdict(
    draft: Draft,
    log_p: Tensor,
    noise: Noise,
    rule: int,
    lenders: int = 0,
    delta: float = 0.0,
    lam: float = 0.0,
    nu: float = 0.0,
    mu: float = 0.0,
) -> Verdict:
    """The verdict of a rule on a draft of at least one node. lenders: how many of a code's neighbours may lend
    (LANTERN), or the size of a group (GROUPED); lam: a LANTERN's lambda, 0 where delta is the most mass; the rest are
    the rule's own."""
    tree, (batch, places, vocab) = draft.shape(), log_p.shape
    trees, levels = len(tree.child), tree.max_depth
    shape = [
        part if len(part) == trees else part.expand(trees, *part.shape[1:])
        for part in (tree.row, tree.path, tree.order, tree.depth)
    ]
    hidden = None if draft.hidden is None else draft.hidden.float().contiguous()
    log_q = None if draft.certain else draft.log_q
    table = None if noise.neighbours is None else noise.neighbours.int()
    given = (log_p, log_q, draft.tokens, tree.child, *shape, noise.uniforms, noise.slack, table)
    held = [None if part is None else part.contiguous() for part in given]
    tokens, accepted = torch.empty(batch, levels + 1, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    path, spent, margins = torch.empty_like(tokens), torch.empty(batch), torch.empty(batch, levels + 1)
    laws, columns = 0 if log_q is None else log_q.shape[1], 0 if table is None else table.shape[1]
    sizes = (torch.get_num_threads(), batch, places - 1, levels, tree.child.shape[2], vocab, laws, trees)
    addresses = map(address_of, (*held, tokens, accepted, path, spent, margins))
    floats = (delta, lam, nu, mu, address_of(hidden), 0 if hidden is None else hidden.shape[-1])
    parts, out = [next(addresses) for _ in held], list(addresses)
    call("bozzetto_judge", _Judged(rule, *sizes, *parts, columns, lenders, int(draft.window), *floats, *out))
    return Verdict(tokens, accepted, None if draft.tree is None else path, spent, margins)
