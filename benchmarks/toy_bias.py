"""The law that one decision of a rule gives, found without sampling, and its distance from the target's law.

    python benchmarks/toy_bias.py [--json FILE]

A decision is a node with C drafted children. For every ordered choice of children (its probability is that of drawing
without replacement from q) the probability of keeping each child, once the earlier ones were refused, is found by
bisection on its uniform, and the law after all were refused by bisection on the boundaries of the redraw. Only the
rules' public `verify` is used. Laws: softmax of 1.5 times normal noise over 8 tokens, q a noisy copy.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.drafts.tree import static_tree
from bozzetto.registry import make_rule
from bozzetto.rules.base import Rule, RuleNoise
from bozzetto.rules.lantern import Lantern
from bozzetto.rules.neighbours import nearest_codes

VOCAB, LAWS, ROUNDS = 8, 5, 32
RULES = (
    ["tree", "traversal"]
    + [f"lantern:k=3:delta={d}:residual={r}" for d in (0.1, 0.3) for r in ("paper", "optimal", "released")]
    + [f"lantern++:k=3:lambda={m}:residual={r}" for m in (2, 5) for r in ("paper", "optimal", "released")]
    + ["grouped:group=2", "grouped:group=4", "annealed:delta=2", "annealed:delta=5"]
    + ["cascade:alike=0.3:raise_by=0", "cascade:alike=0.3:raise_by=0.1"]
)
SETTINGS = (("one drawn child", 1, False), ("three drawn children", 3, False), ("three certain children", 3, True))


class Node:
    """One decision for every ordered choice of children at once."""

    def __init__(self, rule: Rule, p: Tensor, q: Tensor, children: int, certain: bool, slack: float | None = None):
        vocab = len(p)
        likely = [tuple(q.argsort(descending=True)[:children].tolist())]
        tuples = likely if certain else list(itertools.permutations(range(vocab), children))
        self.rule, self.children, self.slack = rule, children, slack
        self.tokens = torch.tensor(tuples)
        self.chance = torch.ones(len(tuples), dtype=torch.float64)
        if not certain:
            left = torch.ones_like(self.chance)
            for rank in range(children):
                qx = q.double()[self.tokens[:, rank]]
                self.chance *= torch.where(left > 1e-12, qx / left.clamp_min(1e-12), 0.0)
                left = left - qx
            possible = self.chance > 0
            self.tokens, self.chance = self.tokens[possible], self.chance[possible]
        count = len(self.tokens)
        tree = static_tree(((children,),), torch.device("cpu"))
        hidden = torch.randn(vocab, 4, generator=torch.Generator().manual_seed(9))
        states = torch.cat([torch.zeros(count, 1, 4), hidden[self.tokens]], 1)
        log_q = None if certain else q.log().expand(count, 1, vocab)
        self.draft = Draft(self.tokens, log_q, tree, certain, states)
        self.log_p = p.log().expand(count, children + 1, vocab)

    def verdict(self, tests: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """accepted, first token, int64 [T] each; tests float64 [T, C], draw float64 [T]."""
        found = self.whole_verdict(tests, draw)
        return found.accepted, found.tokens[:, 0]

    def whole_verdict(self, tests: Tensor, draw: Tensor) -> Verdict:
        """All that the rule says."""
        uniforms = torch.full((len(tests), self.children + 1, 2), 0.5, dtype=torch.float64)
        uniforms[:, 1:, 0], uniforms[:, 0, 1] = tests, draw
        slack = None if self.slack is None else torch.full((len(tests),), self.slack)
        return self.rule.verify(self.draft, self.log_p, RuleNoise(None, uniforms, slack))

    def recorded(self, keep: Tensor) -> float:
        """Mean over draws and coins of the bias that the rule records. keep: float64 [T, C]."""
        total, left = 0.0, self.chance.clone()
        refused = torch.full(self.tokens.shape, 1 - 1e-12, dtype=torch.float64)
        middle = torch.full_like(left, 0.5)
        for rank in range(self.children):
            tests = refused.clone()
            tests[:, rank] = 0.0
            spent = self.whole_verdict(tests, middle).spent
            if spent is None:
                return 0.0
            taken = left * keep[:, rank]
            total += float((taken * spent).sum())
            left = left - taken
        spent = self.whole_verdict(refused, middle).spent
        return total + float((left * (0 if spent is None else spent)).sum())

    def keeping(self) -> Tensor:
        """Probability of keeping each child once the earlier ones were refused: float64 [T, C]."""
        out = torch.zeros(self.tokens.shape, dtype=torch.float64)
        for rank in range(self.children):
            low, high = torch.zeros(len(out), dtype=torch.float64), torch.ones(len(out), dtype=torch.float64)
            for _ in range(ROUNDS):
                middle = (low + high) / 2
                tests = torch.full(self.tokens.shape, 1 - 1e-12, dtype=torch.float64)
                tests[:, rank] = middle
                accepted, token = self.verdict(tests, torch.full_like(middle, 0.5))
                kept = (accepted > 0) & (token == self.tokens[:, rank])
                low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
            out[:, rank] = high
        return out

    def after(self) -> Tensor:
        """Law of the token once all children were refused: float64 [T, V]."""
        vocab = self.log_p.shape[-1]
        edges = [torch.zeros(len(self.tokens), dtype=torch.float64)]
        refused = torch.full(self.tokens.shape, 1 - 1e-12, dtype=torch.float64)
        for token in range(vocab - 1):
            low, high = torch.zeros_like(edges[0]), torch.ones_like(edges[0])
            for _ in range(ROUNDS):
                middle = (low + high) / 2
                below = self.verdict(refused, middle)[1] <= token
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            edges.append(high)
        edges.append(torch.ones_like(edges[0]))
        return torch.diff(torch.stack(edges, 1), dim=1)


def output_law(
    rule: Rule, p: Tensor, q: Tensor, children: int, certain: bool, slack: float | None = None
) -> tuple[Tensor, float]:
    """Law of the token of a decision, float64 [V], and the probability that a child is kept. p, q: float [V]."""
    node = Node(rule, p, q, children, certain, slack)
    keep, rest = node.keeping(), node.after()
    law, left = torch.zeros(len(p), dtype=torch.float64), node.chance.clone()
    for rank in range(children):
        taken = left * keep[:, rank]
        law.index_add_(0, node.tokens[:, rank], taken)
        left = left - taken
    # A decision that always keeps a child has no law afterwards.
    law += torch.where(left[:, None] > 1e-9, left[:, None] * rest, 0.0).sum(0)
    return law, 1 - float(left.sum())


def mean_record(rule: Rule, p: Tensor, q: Tensor, children: int, certain: bool) -> float:
    """What the rule records for a decision as the bound of its bias, on average."""
    node = Node(rule, p, q, children, certain)
    return node.recorded(node.keeping())


def toy_rule(spec: str) -> Rule:
    """A rule with the neighbours of a random codebook, if it needs them."""
    rule = make_rule(spec)
    if isinstance(rule, Lantern):
        codebook = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(7))
        rule = replace(rule, neighbours=nearest_codes(codebook, rule.columns))
    return rule


def toy_laws(number: int) -> tuple[Tensor, Tensor]:
    """p and q, float32 [V] each."""
    random = torch.Generator().manual_seed(number)
    logits = 1.5 * torch.randn(VOCAB, generator=random)
    return logits.softmax(0), (logits + 0.8 * torch.randn(VOCAB, generator=random)).softmax(0)


def measure(specs: Sequence[str] = RULES) -> list[dict[str, object]]:
    """TV(output, p), recorded bound and share of kept drafts of every rule, means over the toy laws."""
    rows = []
    for spec in specs:
        rule, row = toy_rule(spec), {"rule": spec}
        for name, children, certain in SETTINGS:
            far, kept, bound = [], [], []
            for number in range(LAWS):
                p, q = toy_laws(number)
                law, share = output_law(rule, p, q, children, certain)
                far.append(float((law - p.double()).abs().sum() / 2))
                kept.append(share)
                bound.append(mean_record(rule, p, q, children, certain))
            row[name] = {"tv": sum(far) / LAWS, "bound": sum(bound) / LAWS, "kept": sum(kept) / LAWS}
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """The table of docs/bias.md."""
    names = [name for name, _, _ in SETTINGS]
    lines = ["| rule | " + " | ".join(f"{n}: TV | bound | kept" for n in names) + " |"]
    lines.append("|---" * (1 + 3 * len(names)) + "|")
    for row in rows:
        cells = [f"{row[n]['tv']:.3f} | {row[n]['bound']:.3f} | {row[n]['kept']:.2f}" for n in names]  # type: ignore[index]
        lines.append(f"| `{row['rule']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure()
    print(markdown(found))
    if options.json:
        from bozzetto.files import write_text

        write_text(options.json, json.dumps(found, indent=1) + "\n")
