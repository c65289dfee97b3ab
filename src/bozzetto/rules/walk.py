"""Walking down a drafted tree: one judge per rule decides between the children of a node, or what is drawn instead.

All images of a batch walk in step, one level at a time and, inside a level, one sibling at a time; whoever has stopped
waits. There is no loop over images or over the nodes of the tree, and nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import coin_margin, weighted_draw
from bozzetto.rules.base import Noise
from bozzetto.rules.exact import couple
from bozzetto.rules.own import own_verdict


@dataclass
class Children:
    """A node's children, as its judge sees them. p: float32 [B, V], the target's law there; q: [B, V], the law the
    children were drawn from without replacement, None where the draft is certain; tokens: int64 [B, C] in draw order;
    present: bool [B, C]; u: float64 [B, C], a fresh uniform each; depth: of the children, from 1; slack: float32 [B];
    node, kids: int64 [B], [B, C], scored indices of the parent and of the children."""

    p: Tensor
    q: Tensor | None
    tokens: Tensor
    present: Tensor
    u: Tensor
    depth: int
    slack: Tensor
    node: Tensor
    kids: Tensor


@dataclass
class Judgement:
    """pick: int64 [B], rank of the child that is kept, -1 for none; rest: [B, V] >= 0, what to draw from if none is;
    spent: float32 [B], bound of the bias that this decision cost; margin: float32 [B], of its coins (inf: none)."""

    pick: Tensor
    rest: Tensor
    spent: Tensor
    margin: Tensor


Judge = Callable[[Children], Judgement]  # a rule at one node


class Child(NamedTuple):
    """A node's child when its turn comes: rank; x: int64 [B, 1], its token; p, q: as in Children, with what its elder
    siblings have left of them; px, qx: [B], of x; u: float64 [B]; left: float32 [B], of the budget."""

    rank: int
    x: Tensor
    p: Tensor
    q: Tensor | None
    px: Tensor
    qx: Tensor
    u: Tensor
    left: Tensor


# A child -> a coin float64 [B] and the chance [B] that it has to stay below, the law [B, V] after a reject, and the
# bias [B] that the decision costs.
Decide = Callable[[Child], tuple[Tensor, Tensor, Tensor, Tensor]]


def siblings(family: Children, decide: Decide) -> Judgement:
    """The children of a node one by one, in draw order, until one is kept."""
    p, q = family.p, family.q
    pick, spent, margin = torch.full_like(family.node, -1), torch.zeros_like(family.slack), no_coin(family)
    for rank in range(family.tokens.shape[1]):
        if nobody(family.present[:, rank] & (pick < 0)):
            break
        x = family.tokens[:, rank, None]
        px = p.gather(1, x)[:, 0]
        qx = torch.ones_like(px) if q is None else q.gather(1, x)[:, 0]
        tried = family.present[:, rank] & (qx > 0) & (pick < 0)
        coin, chance, rest, cost = decide(Child(rank, x, p, q, px, qx, family.u[:, rank], family.slack - spent))
        stays, margin = toss(coin, chance, tried, margin)
        pick = torch.where(stays, rank, pick)
        spent = torch.where(tried, spent + cost, spent)
        failed = (tried & ~stays)[:, None]
        p, q = torch.where(failed, rest, p), q if q is None else torch.where(failed, without(q, x), q)
    return Judgement(pick, p, spent, margin)


def exact_rest(child: Child) -> Tensor:
    """What the exact rule goes on with after a reject: norm([p - q]+), without the token where the draft is certain."""
    p, q = child.p, child.q
    return normalised(p.scatter(1, child.x, 0.0) if q is None else (p - q).clamp_min(0), p)


def walk(draft: Draft, log_p: Tensor, noise: Noise, judge: Judge, kernel: tuple[Any, ...] | None = None) -> Verdict:
    """Follow kept children from the root; draw the rule's own token where the walk ends. kernel: what ours is told
    of the judge (rules/own.py), where they have it.

    In a window the places behind that are drawn as the exact rule draws them, from the target's law given the old
    context: whatever leave the judge had, the next draft has exactly the law it says it has.
    """
    if noise.uniforms is None or (draft.length and draft.log_q is None and not draft.certain):
        raise ValueError("this rule needs fresh uniforms and the draft's law")
    if kernel is not None and noise.own and draft.length:
        return own_verdict(draft, log_p, noise, *kernel)
    batch, device = len(log_p), log_p.device
    rows = torch.arange(batch, device=device)
    node = torch.zeros(batch, dtype=torch.int64, device=device)
    spent = torch.zeros(batch, device=device)
    slack = torch.full_like(spent, torch.inf) if noise.slack is None else noise.slack
    rest, going, path = log_p[:, 0].exp(), torch.ones_like(node, dtype=torch.bool), [node]
    coins = [torch.full_like(spent, torch.inf)] * (draft.depth + 1)  # margins by level
    if draft.length:
        tree = draft.shape()
        tokens = torch.nn.functional.pad(draft.tokens, (1, 0))
        child, row = (part.expand(batch, *part.shape[1:]) for part in (tree.child, tree.row))
        for depth, width in enumerate(tree.widths, 1):
            kids = child[rows, node][:, :width]
            q = None if draft.log_q is None or draft.certain else draft.log_q[rows, row[rows, node]].exp()
            present = (kids > 0) & going[:, None]
            u = noise.uniforms[..., 0].gather(1, kids)
            p = log_p[rows, node].exp() if depth > 1 else rest
            found = judge(Children(p, q, tokens.gather(1, kids), present, u, depth, slack - spent, node, kids))
            moved = going & (found.pick >= 0)
            rest = torch.where(going[:, None], found.rest, rest)
            spent = torch.where(going, spent + found.spent, spent)
            coins[depth - 1] = found.margin.masked_fill(~going, torch.inf)
            node = torch.where(moved, kids.gather(1, found.pick.clamp_min(0)[:, None])[:, 0], node)
            going = moved
            path.append(node)
            if nobody(going):
                path += [node] * (tree.max_depth - depth)
                break
        # Who has kept a child at every level draws from the law there.
        rest = torch.where(going[:, None], log_p[rows, node].exp(), rest)
        depths = tree.depth.expand(batch, -1)
        accepted = depths[rows, node]
    else:
        accepted, tokens = node, torch.zeros_like(node)[:, None]
    margin = torch.stack(coins, 1)
    if noise.greedy:
        own = rest.argmax(-1)
    else:
        own, near = weighted_draw(rest, noise.uniforms[rows, node, 1])
        margin = margin.scatter_reduce(1, accepted[:, None], near[:, None], "amin")
    way = torch.stack(path, 1)
    drafted = torch.nn.functional.pad(tokens.gather(1, way)[:, 1:], (0, 1))
    out = drafted.scatter(1, accepted[:, None], own[:, None])
    if draft.window and draft.length:
        behind = torch.arange(out.shape[1], device=device) > accepted[:, None]
        tokens, further = _behind(draft, log_p, noise)
        out, margin = torch.where(behind, tokens, out), torch.where(behind, further, margin)
    return Verdict(out, accepted, None if draft.tree is None else way, spent, margin)


def _behind(draft: Draft, log_p: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """A token of every place of a chain given what was drafted before it, int64 [B, M + 1], and the margins."""
    if noise.greedy:
        return log_p.argmax(-1), torch.full_like(log_p[..., 0], torch.inf)
    if draft.log_q is None or noise.uniforms is None:
        raise ValueError("a window needs the draft's laws and fresh uniforms")
    # Of the walk's uniforms: those of later nodes, and the root's, for which there is no test.
    tokens, _, margins = couple(draft.tokens, log_p[:, :-1], draft.log_q, noise.uniforms[:, 1:])
    after, margin = weighted_draw(log_p[:, -1].exp(), noise.uniforms[:, 0, 0])
    return torch.cat([tokens, after[:, None]], 1), torch.cat([margins, margin[:, None]], 1)


def toss(u: Tensor, chance: Tensor, tried: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """Who of those tried bool [B] stays, u < chance [B], and the smaller of `margin` and that of the coins thrown."""
    coin = coin_margin(u, chance.double().log())
    return tried & (u < chance), torch.where(tried, torch.minimum(margin, coin), margin)


def no_coin(family: Children) -> Tensor:
    """The margin [B] of a decision without coins."""
    return torch.full_like(family.slack, torch.inf)


def step_bias(x: Tensor, keep: Tensor, rest: Tensor, keep_exact: Tensor, rest_exact: Tensor) -> Tensor:
    """Total variation [B] between what a relaxed and the exact decision make of a drafted token x int64 [B, 1], from
    their keeping probabilities [B] and laws after a reject [B, V].

    The exact decision, averaged over the draw of x, gives the target's law. So the mean of this over draws, summed over
    the decisions of a token, bounds the distance of the token's law from the target's.
    """
    apart = (1 - keep)[:, None] * rest - (1 - keep_exact)[:, None] * rest_exact
    return apart.scatter_add(1, x, (keep - keep_exact)[:, None]).abs().sum(1) / 2


def greedy_choice(family: Children, keep: Tensor) -> Judgement:
    """No coin is thrown: the first child whose probability of being kept, keep [B, C], is 1 / 2 or more, or that is the
    likeliest token. Keeping another one costs what that probability exceeds the child's own by."""
    best = family.tokens == family.p.argmax(1, keepdim=True)
    cost = torch.where(best, 0.0, (keep - family.p.gather(1, family.tokens)).clamp_min(0))
    fine = family.present & (best | ((keep >= 0.5) & (cost <= family.slack[:, None])))
    rank = fine.long().argmax(1)
    kept = fine.any(1)
    spent = torch.where(kept, cost.gather(1, rank[:, None])[:, 0], 0.0)
    return Judgement(torch.where(kept, rank, -1), family.p, spent, no_coin(family))


def nobody(mask: Tensor) -> bool:
    """Whether no row is left, where finding out costs nothing: a GPU would have to be waited for."""
    return mask.device.type == "cpu" and not bool(mask.any())


def without(q: Tensor, token: Tensor) -> Tensor:
    """q [B, V] without a token int64 [B, 1], normalised (zeros where nothing is left)."""
    rest = q.scatter(1, token, 0.0)
    return rest / rest.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)


def normalised(rest: Tensor, otherwise: Tensor) -> Tensor:
    """rest [B, V] >= 0 as a law; `otherwise` where it is zero (an event of probability zero, up to rounding)."""
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp_min(torch.finfo(rest.dtype).tiny), otherwise)
