"""Drafted trees and verdicts on them by our kernels, against torch's and against the enumerated law."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import test_exactness_trees as battery
from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.eagle import CachedEagle
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts import CODES, Draft, Verdict
from bozzetto.drafts.tree import chain_tree, static_tree
from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.laws.noise import GumbelField
from bozzetto.methods.shapes import read_shape
from bozzetto.methods.table import RULES
from bozzetto.rules.base import Noise
from bozzetto.rules.cascade import Cascade
from bozzetto.rules.lantern import Lantern, LanternPlusPlus
from bozzetto.rules.neighbours import nearest_codes
from bozzetto.rules.relaxed import Annealed, Grouped
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from tabular import TabularTarget
from test_eagle import LABELS, MODEL, NET, TOKENS, C
from test_parallel import KINDS, SKETCHERS, tiny
from toys import alternating_target, decode, p_value, sketched

V = 50
RELAXED = [
    *(Lantern(k=10), Lantern(k=10, delta=0.6), LanternPlusPlus(lam=4.0), Annealed(), Annealed(4.0, 0.1, 0.2)),
    *(Grouped(), Grouped(3), Cascade(), Cascade(0.2, 0.0, 6.0, 0.3)),
]
DECIDED = [RULES[CODES, name] for name in ("tree", "traversal", "block")] + RELAXED
SHAPES = ["chain-1", "chain-4", "3x2x1", "pruned", "certain"]
PAIRS = [(rule, shape) for rule in DECIDED for shape in SHAPES if rule.trees or shape.startswith("chain")]


def with_kernels(target: TabularTarget) -> TabularTarget:
    other = copy.copy(target)
    other.own = True
    return other


@pytest.mark.parametrize(
    ("rule", "tree", "settings"), [case for case in battery.SOME if case[0] in ("tree", "traversal", "block")]
)
def test_verdicts_follow_the_enumerated_law_and_are_torchs(rule: str, tree: str, settings: LawSettings) -> None:
    drafter = sketched(battery.NEAR, tree)
    tokens = decode(with_kernels(battery.TARGET), rule, drafter, settings=settings, index=range(battery.IMAGES)).tokens
    assert p_value(tokens, battery.TARGET.joint(1, settings)) > battery.ACCEPTABLE
    others = (tokens != battery.big_batch(rule, tree, settings)).any(1)
    assert int(others.sum()) < 10  # coins that all but tie


@pytest.mark.parametrize("rule", ["tree", "traversal", "block"])
def test_the_law_holds_when_all_or_no_drafts_are_kept(rule: str) -> None:
    two, target, wrong = LawSettings(top_k=2), alternating_target(4, 5), alternating_target(4, 5)
    wrong.tables = wrong.tables[..., [1, 0, 3, 2]]
    for drafter, share in ((wrong, 0.0), (target, 1.0)):
        result = decode(with_kernels(target), rule, sketched(drafter, "chain-3"), settings=two, index=range(10000))
        assert p_value(result.tokens, target.joint(1, two)) > battery.ACCEPTABLE
        assert torch.equal(result.accepted, (share * result.drafted).long())


def random_draft(shape: str, batch: int) -> tuple[Draft, Tensor]:
    """A draft and the target's laws, near the draft's own."""
    generator = torch.Generator().manual_seed(len(shape) + batch)
    tree = chain_tree(int(shape[-1]), torch.device("cpu")) if shape.startswith("chain") else None
    if tree is None:
        tree = static_tree(read_shape("3x2x1"), torch.device("cpu"))  # type: ignore[arg-type]
    laws = int(tree.row.max()) + 1
    log_q = law_of(2 * torch.randn(batch, laws, V, generator=generator), LawSettings(top_k=30))
    near = log_q[:, tree.row[0]].clamp_min(-20) + torch.randn(batch, tree.nodes + 1, V, generator=generator)
    tokens = torch.zeros(batch, tree.nodes + 1, dtype=torch.int64)
    for family, width in zip(tree.families, tree.widths, strict=True):
        for node in family[0].tolist():
            noise = -torch.rand(batch, V, generator=generator).log().neg().log()
            kids = tree.child[0, node, :width]
            tokens[:, kids] = (log_q[:, tree.row[0, node]] + noise).topk(width, -1).indices
    if shape == "pruned":
        ends = torch.rand(batch, tree.nodes + 1, generator=generator) < 0.4  # nodes without children
        present = ~torch.cat([ends[:, :1] & False, ends[:, tree.parent[0]]], 1)
        present = (present[:, None] | ~tree.sees).all(2)  # a child never without its parent
        tree = tree.pruned(present)
    hung = None if shape.startswith("chain") else tree
    certain = shape == "certain"
    hidden = torch.randn(batch, tree.nodes + 1, 5, generator=generator) + 0.5
    return Draft(tokens[:, 1:], None if certain else log_q, hung, certain, hidden), law_of(near, LawSettings(top_k=40))


def noise_of(places: int, batch: int, seed: int, slack: float | None) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(batch, places, 2, dtype=torch.float64, generator=generator).clamp(1e-9, 1 - 1e-9)
    table = nearest_codes(torch.randn(V, 8, generator=generator), 12)
    return Noise(None, uniforms, None if slack is None else torch.full((batch,), slack), neighbours=table)


def the_same(ours: Verdict, theirs: Verdict, window: bool) -> None:
    assert torch.equal(ours.accepted, theirs.accepted)
    told = (torch.arange(ours.tokens.shape[1]) <= ours.accepted[:, None]) | window
    assert torch.equal(ours.tokens[told], theirs.tokens[told])
    for name in ("spent", "margin"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-4, rtol=2e-3)
    if theirs.path is not None:
        assert ours.path is not None and torch.equal(ours.path, theirs.path)


@pytest.mark.parametrize(("rule", "shape"), PAIRS, ids=str)
@pytest.mark.parametrize("slack", [None, 0.3, 0.0])
def test_a_verdict_is_torchs(rule: Any, shape: str, slack: float | None) -> None:
    for batch in (1, 3):
        draft, log_p = random_draft(shape, batch)
        for seed in range(40):
            noise = noise_of(draft.length + 1, batch, seed, slack)
            theirs = rule.verify(draft, log_p, noise)
            the_same(rule.verify(draft, log_p, replace(noise, own=True)), theirs, False)


@pytest.mark.parametrize("rule", RELAXED, ids=lambda rule: rule.text)
def test_behind_a_window_places_are_drawn_as_the_exact_rule_draws_them(rule: Any) -> None:
    draft, log_p = random_draft("chain-4", 3)
    draft.window = True
    for seed in range(60):
        noise = noise_of(5, 3, seed, None)
        the_same(rule.verify(draft, log_p, replace(noise, own=True)), rule.verify(draft, log_p, noise), True)


OWN = LlamaGenTarget(MODEL).owned(MODEL)


def proposals(
    tree: str, settings: LawSettings, fixed: bool, rows: Tensor, kernels: bool, kind: str = "eagle"
) -> list[Draft]:
    """Drafts after two observations of true features of a batch."""
    net, form = (NET, CachedEagle) if kind == "eagle" else (tiny(kind), SKETCHERS[kind])
    model = form(net, OWN.embedding, OWN.output)
    if not kernels:
        model.whole = lambda seen: None
    drafter, batch = TreeDrafter("eagle", model, read_shape(tree)), len(rows)
    noise = GumbelField(3, rows, C.length, C.vocab)
    noise.fill(C.length)
    drafter.begin(Start(LABELS[rows], C.length, settings, noise, rows + 7, True, fixed))
    session = OWN.begin(LABELS[rows], settings.guided, 1)
    scores = session.score(torch.cat([TOKENS[rows, :1], TOKENS[rows, :5]], 1), torch.zeros_like(rows))
    found, start = [drafter.propose(batch, C.length)], torch.zeros_like(rows)
    for longest, committed in ((3, torch.tensor([2, 3, 1])), (2, torch.tensor([1, 2, 2]))):
        kept, at = committed[rows], start[:, None] + torch.arange(longest)
        copies = len(scores.features) // batch  # type: ignore[arg-type]
        features = scores.features.gather(1, at.repeat(copies, 1)[..., None].expand(-1, -1, C.dim))  # type: ignore[union-attr]
        tokens = TOKENS[rows].gather(1, at)
        drafter.observe(Observation(None, Verdict(tokens, kept - 1), kept, longest, start, features))
        found.append(drafter.propose(batch, C.length))
        start = start + kept
    return found


@pytest.mark.parametrize("tree", ["chain-3", "2x2x1", "dynamic-7-3-2"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "settings", [LawSettings(), LawSettings(2.0, 0.8, 7), LawSettings(2.0, 0.0)], ids=["plain", "cut", "greedy"]
)
@pytest.mark.parametrize("kind", ["eagle", *KINDS])
def test_a_draft_of_one_call_is_the_one_drawn_level_by_level(
    kind: str, tree: str, fixed: bool, settings: LawSettings
) -> None:
    for rows in (torch.arange(3), torch.tensor([1])):
        pairs = zip(*(proposals(tree, settings, fixed, rows, kernels, kind) for kernels in (True, False)), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours.tokens, theirs.tokens) and ours.certain == theirs.certain
            if theirs.log_q is not None:
                torch.testing.assert_close(ours.log_q.exp(), theirs.log_q.exp(), atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
            if theirs.tree is not None:
                assert ours.tree is not None and torch.equal(ours.tree.parent, theirs.tree.parent)
            if theirs.margin is not None:
                torch.testing.assert_close(ours.margin, theirs.margin, atol=1e-4, rtol=1e-3)


def test_a_drafted_row_has_the_same_bits_in_any_batch() -> None:
    whole = proposals("2x2x1", LawSettings(2.0), False, torch.arange(3), True)
    for row in range(3):
        for one, all_ in zip(
            proposals("2x2x1", LawSettings(2.0), False, torch.tensor([row]), True), whole, strict=True
        ):
            assert torch.equal(one.tokens[0], all_.tokens[row])
            assert one.log_q is None or torch.equal(one.log_q[0], all_.log_q[row])  # type: ignore[index]
