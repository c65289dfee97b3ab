"""The law that one decision of a rule gives, found without sampling, and its distance from the target's law.

    python benchmarks/toy_bias.py [--json FILE]

A decision is a node with C drafted children. For every ordered choice of children (its probability is that of drawing
without replacement from q) the probability of keeping each child, once the earlier ones were refused, is found by
bisection on its uniform, and the law after all were refused by bisection on the boundaries of the redraw, which walks
along the cumulative distribution here. Else only the rules' public `verify` is used. Laws: softmax of 1.5 times normal
noise over 8 tokens, q a noisy copy.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.drafts.tree import static_tree
from bozzetto.methods.table import read_method
from bozzetto.rules import exact, traversal, walk
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.neighbours import nearest_codes

VOCAB, LAWS, ROUNDS = 8, 5, 30
REFUSED = 1 - 1e-12  # a test that nothing passes but what is always kept
RULES = (
    ["exact", "block", "tree", "traversal"]
    + [f"lantern:k=3:delta={d}:residual={r}" for d in (0.1, 0.3) for r in ("paper", "optimal", "released")]
    + [f"lantern++:k=3:lambda={m}:residual={r}" for m in (2, 5) for r in ("paper", "optimal", "released")]
    + ["grouped:group=2", "grouped:group=4", "annealed:delta=2", "annealed:delta=5"]
    + ["cascade:alike=0.3:raise_by=0", "cascade:alike=0.3:raise_by=0.1"]
)
SETTINGS = (("one drawn child", 1, False), ("three drawn children", 3, False), ("three certain children", 3, True))


@dataclass
class Found:
    """law: float64 [L, V], of the token; kept: [L], probability that a child is kept; bound: [L], what the rule records
    as the bound of its bias, on average."""

    law: Tensor
    kept: Tensor
    bound: Tensor


def enumerate_decisions(
    rule: Rule, p: Tensor, q: Tensor, children: int, certain: bool, slack: float | None = None
) -> Found:
    """One decision under each of the laws p, q float32 [L, V]; slack: what is left of a budget of bias."""
    node = _Node(rule, p, q, children, certain, slack)
    keep, rest = node.bisected()
    shares, left = [], torch.ones(len(node.chance), dtype=torch.float64)
    for rank in range(children):
        shares.append(left * keep[:, rank])
        left = left - shares[-1]
    share = torch.stack([*shares, left], 1) * node.chance[:, None]  # [T, C + 1]: how the decision ends
    law = torch.zeros(p.shape, dtype=torch.float64)
    law.index_put_((node.which[:, None], node.tokens), share[:, :-1], accumulate=True)
    # A decision that always keeps a child has no law afterwards.
    law.index_add_(0, node.which, torch.where(left[:, None] > 1e-9, share[:, -1:] * rest, 0.0))
    refused, bound = torch.zeros(2, len(p), dtype=torch.float64)
    refused.index_add_(0, node.which, share[:, -1])
    bound.index_add_(0, node.which, (share * node.spent()).sum(1))
    return Found(law, 1 - refused, bound)


def output_law(rule: Rule, p: Tensor, q: Tensor, children: int, certain: bool, slack: float | None = None) -> Tensor:
    """Law of the token of a decision, float64 [V]. p, q: float32 [V]."""
    return enumerate_decisions(rule, p[None], q[None], children, certain, slack).law[0]


def distance(law: Tensor, p: Tensor) -> Tensor:
    """Total variation between laws [..., V]."""
    return (law - p.double()).abs().sum(-1) / 2


@contextlib.contextmanager
def monotone_redraws() -> Iterator[None]:
    """Rules redraw so that a larger uniform gives a later token; their own redraw hashes its uniform."""
    with contextlib.ExitStack() as stack:
        for module in (exact, traversal, walk):
            stack.enter_context(mock.patch.object(module, "weighted_draw", _along_the_sum))
        yield


def _along_the_sum(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    total = weights.double().cumsum(-1)
    found = torch.searchsorted(total, (u * total[..., -1])[..., None], right=True).squeeze(-1)
    return found.clamp_max(weights.shape[-1] - 1), torch.full(u.shape, torch.inf)


class _Node:
    """One decision for every law and every ordered choice of children at once. tokens: int64 [T, C]; which: int64 [T],
    the law; chance: float64 [T]."""

    def __init__(self, rule: Rule, p: Tensor, q: Tensor, children: int, certain: bool, slack: float | None):
        laws, vocab = p.shape
        self.rule, self.children, self.slack, self.vocab = rule, children, slack, vocab
        if certain:
            self.tokens = q.argsort(dim=1, descending=True)[:, :children]
            self.which = torch.arange(laws)
            self.chance = torch.ones(laws, dtype=torch.float64)
        else:
            tuples = torch.tensor(list(itertools.permutations(range(vocab), children)))
            chance = _drawn(q.double(), tuples)
            self.which, row = (chance > 0).nonzero(as_tuple=True)
            self.tokens, self.chance = tuples[row], chance[self.which, row]
        self.tree = static_tree(((children,),), torch.device("cpu")) if rule.trees else None
        self.log_p, self.log_q = p.log()[self.which], None if certain else q.log()[self.which]
        self.certain = certain
        states = F.normalize(torch.randn(vocab, 4, generator=torch.Generator().manual_seed(9)), dim=-1)
        self.hidden = torch.cat([torch.zeros(1, 4), states])  # of the root, then of every token

    def verdict(self, tests: Tensor, draw: Tensor) -> Verdict:
        """What the rule says in J cases: tests float64 [J, T, C], draw float64 [J, T]; rows are case by case."""
        cases, count = draw.shape
        uniforms = torch.full((cases * count, self.children + 1, 2), 0.5, dtype=torch.float64)
        uniforms[:, 1:, 0], uniforms[:, 0, 1] = tests.flatten(0, 1), draw.flatten()
        if self.tree is None:
            uniforms[:, 0, 0] = uniforms[:, 1, 0]  # `exact` tests the first draft with the first uniform
        tokens = self.tokens.repeat(cases, 1)
        log_q = None if self.log_q is None else self.log_q.repeat(cases, 1)[:, None]
        hidden = self.hidden[F.pad(tokens + 1, (1, 0))]
        draft = Draft(tokens, log_q, self.tree, self.certain, hidden)
        log_p = self.log_p.repeat(cases, 1)[:, None].expand(-1, self.children + 1, -1)
        slack = None if self.slack is None else torch.full((len(tokens),), self.slack)
        with monotone_redraws():
            return self.rule.verify(
                draft, log_p, Noise(torch.zeros_like(log_p), uniforms, slack, neighbours=near(self.rule))
            )

    def bisected(self) -> tuple[Tensor, Tensor]:
        """Probability of keeping each child once the earlier ones were refused, float64 [T, C], and the law of the
        token once all were refused, float64 [T, V]."""
        count, edges = len(self.tokens), self.vocab - 1
        cases = self.children + edges
        low = torch.zeros(cases, count, dtype=torch.float64)
        high, tests = torch.ones_like(low), torch.full((cases, *self.tokens.shape), REFUSED, dtype=torch.float64)
        draw = torch.full_like(low, 0.5)
        rank, token = torch.arange(self.children), torch.arange(edges)[:, None]
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            tests[rank, :, rank], draw[self.children :] = middle[: self.children], middle[self.children :]
            verdict = self.verdict(tests, draw)
            first = verdict.tokens[:, 0].view(cases, count)
            kept = (verdict.accepted.view(cases, count) > 0)[: self.children] & (
                first[: self.children] == self.tokens.T
            )
            below = torch.cat([kept, first[self.children :] <= token])
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        bounds = F.pad(F.pad(high[self.children :].T, (1, 0)), (0, 1), value=1.0)
        return high[: self.children].T, bounds.diff(dim=1)

    def spent(self) -> Tensor:
        """What the rule records when each child is kept, and when none is: float64 [T, C + 1]."""
        count, cases = len(self.tokens), self.children + 1
        tests = torch.full((cases, *self.tokens.shape), REFUSED, dtype=torch.float64)
        rank = torch.arange(self.children)
        tests[rank, :, rank] = 0.0
        found = self.verdict(tests, torch.full((cases, count), 0.5, dtype=torch.float64)).spent
        return torch.zeros(count, cases).double() if found is None else found.view(cases, count).T.double()


def _drawn(q: Tensor, tuples: Tensor) -> Tensor:
    """Probability [L, T] of drawing each tuple [T, C] without replacement from q [L, V]; where nothing of q is left,
    any other token comes next."""
    chance = torch.ones(len(q), len(tuples), dtype=torch.float64)
    left = q[:, None].repeat(1, len(tuples), 1)
    for rank in range(tuples.shape[1]):
        x = tuples[:, rank].expand(len(q), -1)
        total = left.sum(-1)
        share = left.gather(2, x[..., None])[..., 0] / total.clamp_min(1e-300)
        chance = chance * torch.where(total > 0, share, 1 / (q.shape[1] - rank))
        left = left.scatter(2, x[..., None], 0.0)
    return chance


def near(rule: Rule) -> Tensor | None:
    """The neighbours of a random codebook, if the rule needs them."""
    codebook = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(7))
    return nearest_codes(codebook, rule.columns) if rule.columns else None


def toy_laws(number: int) -> tuple[Tensor, Tensor]:
    """p and q, float32 [V] each."""
    random = torch.Generator().manual_seed(number)
    logits = 1.5 * torch.randn(VOCAB, generator=random)
    return logits.softmax(0), (logits + 0.8 * torch.randn(VOCAB, generator=random)).softmax(0)


def measure(specs: Sequence[str] = RULES) -> list[dict[str, Any]]:
    """TV(output, p), recorded bound and share of kept drafts of every rule, means over the toy laws; None where a rule
    verifies chains only."""
    p, q = (torch.stack(laws) for laws in zip(*map(toy_laws, range(LAWS)), strict=True))
    rows = []
    for spec in specs:
        _, rule = read_method("auto", spec)
        row: dict[str, Any] = {"rule": spec}
        for name, children, certain in SETTINGS:
            row[name] = None
            if rule.trees or children == 1:
                found = enumerate_decisions(rule, p, q, children, certain)
                values = {"tv": distance(found.law, p), "bound": found.bound, "kept": found.kept}
                row[name] = {key: float(value.mean()) for key, value in values.items()}
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/bias.md."""
    names = [name for name, _, _ in SETTINGS]
    lines = ["| rule | " + " | ".join(f"{n}: TV | bound | kept" for n in names) + " |"]
    lines.append("|---" * (1 + 3 * len(names)) + "|")
    for row in rows:
        cells = (row[n] for n in names)
        shown = ["- | - | -" if c is None else f"{c['tv']:.3f} | {c['bound']:.3f} | {c['kept']:.2f}" for c in cells]
        lines.append(f"| `{row['rule']}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure()
    print(markdown(found))
    if options.json:
        from bozzetto.common.files import write_text

        write_text(options.json, json.dumps(found, indent=1) + "\n")
