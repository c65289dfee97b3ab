"""Drafted trees: which node hangs on which, what it may see, and where it stands. Pure tensors.

Scored indices: 0 is the root (the last committed token, or the condition), node j of the draft is j + 1; parents come
before their children. A chain is the tree in which every node has one child.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bozzetto.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """Where the inputs of a pass go, where they stand and what they see, when they are not a plain run.

    slot: int64 [b, W], cache slots counted from the start of the pass; depth: int64 [b, W], positions counted from
    there; sees: bool [b, W, S], the slots after the start that each input attends to, its own included (everything
    before the start is seen). b is the batch size, or 1 when all images share the shape.
    """

    slot: Tensor
    depth: Tensor
    sees: Tensor

    def copied(self, copies: int) -> Layout:
        """Of a batch `copies` times as large; what all images share stays as it is."""
        return Layout(*(t if len(t) == 1 else t.repeat(copies, *[1] * (t.ndim - 1)) for t in vars(self).values()))


def link(slot: int, device: torch.device) -> Layout:
    """The next input of a chain, `slot` after the first: it sees those before."""
    at = torch.full((1, 1), slot, device=device)
    return Layout(at, at, torch.ones(1, 1, slot + 1, dtype=torch.bool, device=device))


@dataclass(frozen=True)
class Tree:
    """parent: int64 [b, M], scored index of each node's parent; depth: int64 [b, M + 1]; sees: bool [b, M + 1, M + 1],
    [i, j]: j is i or an ancestor of i; child: int64 [b, M + 2, C], scored indices of the children in draw order (0:
    none; the last row has none); path: int64 [b, M + 1, D + 1], the way from the root to each node, padded with the
    node; order: int64 [b, M + 1], smaller is earlier in post-order; row: int64 [b, M + 1], row of the draft's laws that
    the children of a node were drawn from; families: per depth, int64 [b, I], the nodes that may have children (M + 1:
    nobody); widths: most children of a node at each depth, known to the host. b is B, or 1 for a shape all share."""

    parent: Tensor
    depth: Tensor
    sees: Tensor
    child: Tensor
    path: Tensor
    order: Tensor
    row: Tensor
    families: tuple[Tensor, ...]
    widths: tuple[int, ...]

    @property
    def nodes(self) -> int:
        """Drafted nodes, M."""
        return self.parent.shape[1]

    @property
    def max_depth(self) -> int:
        return len(self.widths)

    def layout(self) -> Layout:
        """The tree as inputs of one pass, the root first."""
        slot = torch.arange(self.nodes + 1, device=self.depth.device)[None]
        return Layout(slot, self.depth, self.sees)

    def pruned(self, present: Tensor) -> Tree:
        """The same nodes, of which only some may be kept: bool [B, M + 1], a child never without its parent."""
        child = self.child.expand(len(present), -1, -1)
        there = present.gather(1, child.flatten(1)).view_as(child)
        return replace(self, child=torch.where(there, child, 0))


def make_tree(parent: Tensor, rank: Tensor, row: Tensor, families: Sequence[Tensor], widths: Sequence[int]) -> Tree:
    """A tree from parents int64 [b, M] and ranks int64 [b, M] among siblings; the rest as in Tree. No host sync."""
    b, m = parent.shape
    device, deepest, most = parent.device, len(widths), max(widths, default=1)
    if (most + 1) ** deepest >= 2**62:
        raise UsageError(f"a tree of depth {deepest} with {most} children is too large")
    up = torch.cat([torch.zeros(b, 1, dtype=torch.int64, device=device), parent], 1)  # the root is its own parent
    own = torch.arange(m + 1, device=device).expand(b, -1)
    away = torch.zeros_like(up)  # depth of each node
    at, line = own, [own]
    for _ in range(deepest):
        away = away + (at > 0)
        at = up.gather(1, at)
        line.append(at)
    # line[s] is the ancestor s steps up; the way from the root is that list read from its end.
    steps = torch.stack(line, -1)
    level = torch.arange(deepest + 1, device=device)
    path = steps.gather(2, (away[..., None] - level).clamp_min(0))
    sees = torch.zeros(b, m + 1, m + 1, dtype=torch.bool, device=device).scatter_(2, path, True)
    child = torch.zeros(b, m + 2, most, dtype=torch.int64, device=device)
    child.view(b, -1).scatter_(1, parent * most + rank, own[:, 1:])
    ranks = torch.cat([torch.zeros(b, 1, dtype=torch.int64, device=device), rank], 1)
    digits = ranks.gather(1, path[..., 1:].reshape(b, -1)).view(b, m + 1, deepest)
    # Post-order is the order of the rank words, where a missing letter comes after every rank.
    digits = torch.where(level[1:] <= away[..., None], digits, most)
    order = torch.zeros_like(up)
    for d in range(deepest):
        order = order * (most + 1) + digits[..., d]
    return Tree(parent, away, sees, child, path, order, row, tuple(families), tuple(widths))


@functools.cache
def static_tree(shape: tuple[tuple[int, ...], ...], device: torch.device) -> Tree:
    """A fixed tree from children per node, level by level in breadth-first order (missing ends count as zeros)."""
    parents: list[int] = []
    ranks: list[int] = []
    families, widths = [], []
    level, next_node = [0], 1
    for counts in shape:
        below: list[int] = []
        for node, count in zip(level, [*counts, *[0] * len(level)], strict=False):
            below += list(range(next_node, next_node + count))
            parents += [node] * count
            ranks += list(range(count))
            next_node += count
        families.append([node for node, count in zip(level, counts, strict=False) if count])
        widths.append(max(counts))
        level = below
    rows = [0] * next_node
    for number, node in enumerate(n for family in families for n in family):
        rows[node] = number

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)[None]

    return make_tree(tensor(parents), tensor(ranks), tensor(rows), [tensor(f) for f in families], widths)


@functools.cache
def chain_tree(length: int, device: torch.device) -> Tree:
    """A chain of `length` nodes."""
    return static_tree(((1,),) * length, device)


@functools.cache
def comb_tree(chain: int, beside: int, reach: int, device: torch.device) -> Tree:
    """A chain of `chain` nodes with a branch of `reach` nodes beside each of its first `beside` ones; the branches come
    behind it, level by level. Post-order and families are those of no walk: rules read combs place by place."""
    place, step = torch.arange(beside, device=device), torch.arange(reach, device=device)[:, None]
    depth = torch.cat([torch.arange(chain + 1, device=device), (place + 1 + step).flatten()])
    deepest = max(chain, beside + reach - 1)
    level = torch.arange(deepest + 1, device=device)
    own = torch.arange(len(depth), device=device)[:, None]
    # A branch beside place j hangs on node j of the chain; further up it is the branch itself.
    stem = torch.cat([level[: chain + 1], place.repeat(reach)])[:, None]
    back = (depth[:, None] - level).clamp_min(0)  # levels up from the node
    path = torch.where(level <= stem, level, own - back * beside)
    path = torch.where(own <= chain, torch.minimum(level, own), path)
    sees = torch.zeros(len(depth), len(depth), dtype=torch.bool, device=device).scatter_(1, path, True)
    parent = path.gather(1, (depth[:, None] - 1).clamp_min(0))[1:, 0]
    child = torch.zeros(len(depth) + 1, 2, dtype=torch.int64, device=device)
    second = (parent < own[1:, 0] - 1) & (parent < beside) & (own[1:, 0] > chain)
    child[parent, second.long()] = own[1:, 0]
    none = torch.zeros_like(depth)[None]
    widths = tuple(2 if d < beside else 1 for d in range(deepest))
    return Tree(parent[None], depth[None], sees[None], child[None], path[None], none, none, (), widths)


# Published shapes as children per node and level. mc-sim-25 and medusa-63: EAGLE (arXiv 2401.15077) after Medusa
# (arXiv 2401.10774); extend-57, balanced-25 and reverse-25: the LANTERN project (arXiv 2410.03355).
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "mc-sim-25": ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,)),
    "balanced-25": ((3,), (3, 3, 2), (3, 2, 0, 2, 2), (3,), (2,)),
    "reverse-25": ((3,), (2, 1, 1), (3, 2, 1), (3, 2), (4, 3)),
    "extend-57": ((5,), (4, 3, 3, 2, 1), (4, 3, 3, 2, 2, 1, 0, 1), (4, 3, 2, 1, 2, 1, 0, 1), (3, 2, 0, 0, 2, 1, 0, 1)),
    "medusa-63": (
        (10,),
        (10, 5, 2, 2, 1, 1, 1, 1),
        (9, 4, 2, 1, 1, 1, 0, 0, 0, 0, 3, 1, 0, 0, 0, 1),
        (4, 1, 1, 0, 0, 0, 0, 0, 0, 1),
    ),
}
