"""Relaxed rules: what they borrow is bounded, what they cost is what they say, and without a budget they are exact."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto.drafts import Draft
from bozzetto.drafts.tree import static_tree
from bozzetto.engine.loop import BatchResult, Decoder
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.models.tabular import TabularTarget
from bozzetto.registry import make_rule
from bozzetto.rules.base import Rule, RuleNoise
from bozzetto.rules.lantern import Lantern
from bozzetto.rules.neighbours import nearest_codes
from bozzetto.rules.relaxed import Annealed, Grouped, KeepingRule
from toys import PLAIN, sketched

_SPEC = importlib.util.spec_from_file_location("toy_bias", Path(__file__).parent.parent / "benchmarks" / "toy_bias.py")
assert _SPEC and _SPEC.loader
toy_bias = importlib.util.module_from_spec(_SPEC)
sys.modules["toy_bias"] = toy_bias
_SPEC.loader.exec_module(toy_bias)
toy_bias.ROUNDS = 22  # of bisection: far below the tolerances here
output_law, mean_record = toy_bias.output_law, toy_bias.mean_record
toy_rule, toy_laws = toy_bias.toy_rule, toy_bias.toy_laws

SETTINGS = [(1, False), (2, False), (3, True)]
each_setting = pytest.mark.parametrize(("children", "certain"), SETTINGS, ids=["drawn", "two drawn", "certain"])
RELAXED = [
    "lantern:k=3:delta=0.2",
    "lantern:k=3:delta=0.2:residual=optimal",
    "lantern++:k=3:lambda=3",
    "grouped:group=3",
    "annealed:delta=3",
    "cascade:alike=0.3:raise_by=0.1",
]
HARMLESS = [
    "lantern:k=3:delta=0",
    "lantern++:k=3:lambda=1",
    "lantern++:k=3:lambda=1:residual=optimal",
    "grouped:group=1",
    "annealed:delta=1",
    "cascade:alike=1:raise_by=0",
]


def distance(law: Tensor, p: Tensor) -> float:
    return float((law - p.double()).abs().sum() / 2)


# One decision, enumerated.


@each_setting
@pytest.mark.parametrize("rule", ["tree", "traversal", *HARMLESS])
def test_exact_rules_and_relaxed_ones_without_leave_give_the_targets_law(
    rule: str, children: int, certain: bool
) -> None:
    p, q = toy_laws(1)
    assert distance(output_law(toy_rule(rule), p, q, children, certain)[0], p) < 1e-5


@pytest.mark.parametrize("rule", ["tree", "traversal"])
@each_setting
def test_the_law_is_exact_at_the_edges_of_the_supports(rule: str, children: int, certain: bool) -> None:
    p, q = toy_laws(2)
    some, others = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 1.0, 1, 1, 1])
    for a, b in ((p, p), (p * some, q), (p, q * some), (p * some, q * others), (p * some, q * some)):
        law, kept = output_law(toy_rule(rule), a / a.sum(), b / b.sum(), children, certain)
        assert distance(law, a / a.sum()) < 1e-5
        if a is p and b is p and not certain:
            assert kept > 1 - 1e-6


@each_setting
@pytest.mark.parametrize("rule", RELAXED)
def test_a_relaxed_rule_is_biased_and_keeps_more(rule: str, children: int, certain: bool) -> None:
    if rule.startswith("cascade") and children == 1:
        rule = "cascade:alike=0.3:raise_by=0.3"  # one child has no siblings to pool with
    found = [(toy_laws(n), output_law(toy_rule(rule), *toy_laws(n), children, certain)) for n in range(3)]
    exact = [output_law(toy_rule("tree"), *toy_laws(n), children, certain)[1] for n in range(3)]
    assert max(distance(law, p) for (p, _), (law, _) in found) > 0.01
    assert sum(kept for _, (_, kept) in found) > sum(exact)


@each_setting
@pytest.mark.parametrize("rule", RELAXED)
def test_without_a_budget_left_every_relaxed_rule_is_exact(rule: str, children: int, certain: bool) -> None:
    p, q = toy_laws(3)
    assert distance(output_law(toy_rule(rule), p, q, children, certain, slack=0.0)[0], p) < 1e-5


@each_setting
@pytest.mark.parametrize("rule", [*RELAXED, "lantern:k=3:delta=0.2:residual=released"])
def test_what_a_rule_records_bounds_its_bias(rule: str, children: int, certain: bool) -> None:
    for number in range(3):
        p, q = toy_laws(number)
        law, _ = output_law(toy_rule(rule), p, q, children, certain)
        assert distance(law, p) <= mean_record(toy_rule(rule), p, q, children, certain) + 1e-5


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("rule", ["lantern:k=3:delta=0.3", "lantern++:k=3:lambda=3"])
def test_no_residual_has_less_bias_than_the_optimal_one(rule: str, number: int) -> None:
    p, q = toy_laws(number)
    far = {r: distance(output_law(toy_rule(f"{rule}:residual={r}"), p, q, 1, False)[0], p) for r in _RESIDUALS}
    assert far["optimal"] <= min(far.values()) + 1e-6


_RESIDUALS = ("paper", "optimal", "released")


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.5])
def test_lantern_with_one_child_stays_within_delta_and_with_many_it_need_not(delta: float) -> None:
    rule, flat = toy_rule(f"lantern:k=3:delta={delta}"), torch.full((8,), 1 / 8)
    for number in range(4):
        p, q = toy_laws(number)
        assert distance(output_law(rule, p, q, 1, True)[0], p) <= delta + 1e-6
    if delta == 0.2:
        assert distance(output_law(rule, flat, flat, 6, True)[0], flat) > delta


@pytest.mark.parametrize("rule", [Grouped(3), Annealed(3.0, mu=0.2)])
def test_the_bias_that_a_rule_reports_is_that_of_the_enumerated_law(rule: KeepingRule) -> None:
    for number in range(4):
        p, q = toy_laws(number)
        _, _, bias = rule.decide(p[None], q[None], 1, torch.tensor([torch.inf]))
        assert float(bias) == pytest.approx(distance(output_law(rule, p, q, 1, False)[0], p), abs=1e-5)


def test_candidates_borrow_at_most_their_budget_and_improbable_neighbours_are_free() -> None:
    random = torch.Generator().manual_seed(0)
    codes = nearest_codes(torch.randn(64, 4, generator=random), 40)
    p = (2 * torch.randn(64, 64, generator=random)).softmax(-1)
    p[:, ::2] = 0
    p = p / p.sum(-1, keepdim=True)
    x, limitless = torch.arange(64), torch.full((64,), torch.inf)
    own = p.gather(1, x[:, None])[:, 0]
    for delta in (0.0, 0.1, 0.4):
        mass, near, inside = Lantern(40, delta).borrowed(p, x, codes, limitless)
        assert float(mass.max()) <= delta
        assert torch.allclose(mass, (p.gather(1, near) * inside).sum(1), atol=1e-6)
        free = p.gather(1, near).cumsum(1) == 0
        assert bool(inside[free].all())
        tight = Lantern(40, delta).borrowed(p, x, codes, torch.full((64,), 0.03))[0]
        assert float(tight.max()) <= 0.03
    for factor in (1.0, 2.0, 5.0):
        mass = make_rule(f"lantern++:k=40:lambda={factor}").borrowed(p, x, codes, limitless)[0]
        assert bool((own + mass <= factor * own + 1e-6).all())


def decision(rule: Rule, p: Tensor, tokens: list[int], log_q: Tensor | None) -> Tensor:
    """Law after all children were refused, [V]: draws on a fine grid of uniforms."""
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    count, children = len(grid), len(tokens)
    uniforms = torch.full((count, children + 1, 2), 1 - 1e-12, dtype=torch.float64)
    uniforms[:, 0, 1] = grid
    tree = static_tree(((children,),), torch.device("cpu"))
    law = None if log_q is None else log_q.expand(count, 1, -1)
    draft = Draft(torch.tensor([tokens]).expand(count, -1), law, tree, certain=law is None)
    found = rule.verify(draft, p.log().expand(count, children + 1, -1), RuleNoise(None, uniforms))
    assert int(found.accepted.sum()) == 0
    return torch.bincount(found.tokens[:, 0], minlength=len(p)) / count


def test_the_released_residual_does_what_the_released_code_does() -> None:
    """Codes on a line: the neighbours of 0 are 1, 2, 3. Only 1 fits into the budget; k = 2, so 1, 2 and 3 go."""
    line = torch.stack([torch.cos(torch.arange(6) * 0.3), torch.sin(torch.arange(6) * 0.3)], 1)
    p = torch.tensor([0.1, 0.05, 0.3, 0.2, 0.15, 0.2])
    table = nearest_codes(line, 3)
    assert table[0].tolist() == [1, 2, 3]
    released = Lantern(2, 0.1, "released", table)
    kept = p * torch.tensor([0, 0, 0, 0, 1, 1])
    assert torch.allclose(decision(released, p, [0], None), kept / kept.sum(), atol=1e-3)
    paper = p * torch.tensor([0, 0, 1, 1, 1, 1])
    assert torch.allclose(decision(replace(released, residual="paper"), p, [0], None), paper / paper.sum(), atol=1e-3)
    # Drawn: at the neighbours the draft's law is dropped, so that their whole probability stays.
    q = torch.tensor([0.5, 0.04, 0.16, 0.1, 0.1, 0.1])
    drawn = torch.tensor([0.0, 0.05, 0.3, 0.2, 0.05, 0.1])
    assert torch.allclose(decision(released, p, [0], q.log()), drawn / drawn.sum(), atol=1e-3)
    # Nothing left: a uniform law.
    narrow = torch.tensor([0.6, 0.05, 0.35, 0, 0, 0])
    assert torch.allclose(decision(released, narrow, [0], None), torch.full((6,), 1 / 6), atol=1e-3)


# Whole images, through the loop.

V = 6
TARGET = TabularTarget(V, 5)
NEAR = TabularTarget(V, 5)
NEAR.tables = TARGET.tables + 0.7 * torch.randn(TARGET.tables.shape, generator=torch.Generator().manual_seed(5))
CODES = torch.randn(V, 3, generator=torch.Generator().manual_seed(4))


def run(
    spec: str, tree: str = "2x2", budget: float | None = None, settings: LawSettings = PLAIN, count: int = 3000
) -> BatchResult:
    rule = make_rule(spec)
    if isinstance(rule, Lantern):
        rule = replace(rule, neighbours=nearest_codes(CODES, rule.columns))
    index = torch.arange(count)
    return Decoder(TARGET, sketched(NEAR, tree), rule, settings, budget).run(torch.ones_like(index), 0, index)


WITHOUT_HIDDEN = [r for r in RELAXED if not r.startswith("cascade")]


@pytest.mark.parametrize("tree", ["chain-3", "2x2", "dynamic-7-3-2"])
@pytest.mark.parametrize("rule", WITHOUT_HIDDEN)
def test_an_image_never_overdraws_its_budget(rule: str, tree: str) -> None:
    exact, some, free = (run(rule, tree, budget) for budget in (0.0, 0.3, None))
    assert float(exact.spent.max()) == 0
    assert 0 < float(some.spent.max()) <= 0.3 + 1e-5
    assert float(free.spent.mean()) > float(some.spent.mean())
    assert int(free.accepted.sum()) > 0.99 * int(exact.accepted.sum())


@pytest.mark.parametrize("rule", [r for r in WITHOUT_HIDDEN if "optimal" not in r])
def test_a_spent_budget_gives_the_tokens_of_the_exact_rule(rule: str) -> None:
    same = (run(rule, budget=0.0).tokens == run("tree").tokens).all(1)
    assert float(same.double().mean()) > 0.999  # sums in another order may differ by a rounding


@pytest.mark.parametrize("rule", ["tree", "traversal"])
def test_exact_rules_spend_nothing(rule: str) -> None:
    assert float(run(rule).spent.max()) == 0


@pytest.mark.parametrize("rule", [*RELAXED])
def test_batches_of_one_and_three_give_the_big_batchs_tokens(rule: str) -> None:
    settings = LawSettings(guidance=2.0, top_k=4)
    made = make_rule(rule)
    if isinstance(made, Lantern):
        made = replace(made, neighbours=nearest_codes(CODES, 3))

    def decoded(index: Tensor) -> BatchResult:
        return Decoder(TARGET, sketched(NEAR, "2x2"), made, settings, 1.0).run(torch.ones_like(index), 0, index)

    whole = decoded(torch.arange(40))
    for index in (torch.tensor([7]), torch.tensor([3, 30, 21])):
        alone = decoded(index)
        assert torch.equal(alone.tokens, whole.tokens[index])
        assert torch.allclose(alone.spent, whole.spent[index], atol=1e-5)


@pytest.mark.parametrize("tree", ["chain-3", "2x2", "dynamic-7-3-2"])
@pytest.mark.parametrize("rule", WITHOUT_HIDDEN)
def test_greedy_relaxed_decoding_keeps_at_least_what_the_exact_rule_keeps(rule: str, tree: str) -> None:
    greedy = LawSettings(guidance=2.0, temperature=0)
    relaxed, exact = (run(r, tree, settings=greedy, count=20) for r in (rule, "tree"))
    assert int(relaxed.passes.sum()) <= int(exact.passes.sum())


@pytest.mark.parametrize("rule", [r for r in HARMLESS if not r.startswith("cascade")])
def test_greedy_decoding_without_leave_follows_the_argmax_path(rule: str) -> None:
    greedy = LawSettings(guidance=2.0, temperature=0)
    assert torch.equal(run(rule, settings=greedy, count=20).tokens, run("tree", settings=greedy, count=20).tokens)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("lantern:delta=-0.1", "delta = -0.1 is not allowed: a number from 0 to 1"),
        ("lantern:delta=1.5", "delta = 1.5 is not allowed"),
        ("lantern:delta=nan", "delta = nan is not allowed"),
        ("lantern:k=0", "k = 0 is not allowed: a whole number >= 1"),
        ("lantern:residual=nonsense", "residual = 'nonsense' is not allowed: paper, optimal, released"),
        ("lantern++:lambda=0.5", "lambda = 0.5 is not allowed: a number >= 1"),
        ("grouped:group=0", "group = 0 is not allowed"),
        ("annealed:delta=0.5", "delta = 0.5 is not allowed: a number >= 1"),
        ("cascade:alike=2", "alike = 2.0 is not allowed: a number from -1 to 1"),
        ("cascade:raise_by=2", "raise_by = 2.0 is not allowed"),
    ],
)
def test_numbers_out_of_range_are_refused_with_what_is_allowed(rule: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_rule(rule)
    assert message in str(caught.value)


def test_every_relaxed_rule_says_what_bounds_its_bias() -> None:
    from toys import RELAXED_RULES

    assert all(make_rule(name).bias for name in RELAXED_RULES)
