"""Relaxed rules: what they cost is what they say, a budget is never overdrawn, and without leave they are exact."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import Draft, Verdict
from bozzetto.drafts.tree import static_tree
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.shapes import read_shape
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.exact import Exact
from bozzetto.rules.lantern import Lantern
from bozzetto.rules.neighbours import nearest_codes
from bozzetto.rules.relaxed import Annealed, Grouped, KeepingRule
from tabular import TabularTarget
from toys import PLAIN, RELAXED_RULES, cells, fit_p_value, make_rule, sketched

_SPEC = importlib.util.spec_from_file_location("toy_bias", Path(__file__).parent.parent / "benchmarks" / "toy_bias.py")
assert _SPEC and _SPEC.loader
toy_bias = importlib.util.module_from_spec(_SPEC)
sys.modules["toy_bias"] = toy_bias
_SPEC.loader.exec_module(toy_bias)
vars(toy_bias)["ROUNDS"] = 26  # of bisection: far below the tolerances here
enumerated, distance = toy_bias.enumerate_decisions, toy_bias.distance

SETTINGS = [(1, False), (2, False), (3, True)]
each_setting = pytest.mark.parametrize(("children", "certain"), SETTINGS, ids=["drawn", "two drawn", "certain"])
RELAXED = [
    "lantern:k=3:delta=0.2",
    "lantern:k=3:delta=0.2:residual=optimal",
    "lantern++:k=3:lambda=3",
    "grouped:group=3",
    "annealed:delta=3",
    "cascade:alike=0.3:raise_by=0.3",
]
RELEASED = "lantern:k=3:delta=0.2:residual=released"
HARMLESS = [
    "lantern:k=3:delta=0",
    "lantern:k=3:delta=0:residual=optimal",
    "lantern++:k=3:lambda=1",
    "lantern++:k=3:lambda=1:residual=optimal",
    "grouped:group=1",
    "annealed:delta=1",
    "cascade:alike=1:raise_by=0",
]
TREES = ["chain-3", "2x2", "dynamic-7-3-2"]
ROUNDING = 1e-6
P, Q = (torch.stack(laws) for laws in zip(*map(toy_bias.toy_laws, range(4)), strict=True))


def test_every_relaxed_rule_is_tested_here_and_says_what_bounds_its_bias() -> None:
    assert {make_rule(rule).name for rule in RELAXED} == set(RELAXED_RULES)
    assert all(make_rule(name).bias for name in RELAXED_RULES)


# One decision, enumerated.


@pytest.mark.parametrize(("children", "certain"), [*SETTINGS, (3, False)])
@pytest.mark.parametrize("rule", ["exact", "block", "tree", "traversal", *HARMLESS])
def test_exact_rules_and_relaxed_ones_without_leave_give_the_targets_law(
    rule: str, children: int, certain: bool
) -> None:
    made = make_rule(rule)
    if made.trees or children == 1:
        assert float(distance(enumerated(made, P, Q, children, certain).law, P).max()) < ROUNDING


@pytest.mark.parametrize("rule", ["exact", "block", "tree", "traversal"])
@each_setting
def test_the_law_is_exact_at_the_edges_of_the_supports(rule: str, children: int, certain: bool) -> None:
    made = make_rule(rule)
    some = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])  # fewer than there are children
    for a, b in ((P, P), (P * some, Q), (P, Q * some), (P * some, Q * (1 - some)), (P * some, Q * some)):
        p, q = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        if made.trees or children == 1:
            found = enumerated(made, p, q, children, certain)
            assert float(distance(found.law, p).max()) < ROUNDING
            assert a is not b or certain or float(found.kept.min()) > 1 - ROUNDING


@each_setting
@pytest.mark.parametrize("rule", [*RELAXED, RELEASED])
def test_a_relaxed_rule_keeps_more_and_is_biased_by_no_more_than_it_records(
    rule: str, children: int, certain: bool
) -> None:
    found, exact = (enumerated(make_rule(r), P, Q, children, certain) for r in (rule, "tree"))
    far = distance(found.law, P)
    assert bool((far <= found.bound + ROUNDING).all())
    assert float(far.max()) > 0.01
    assert float(found.kept.sum()) > float(exact.kept.sum())
    assert float(exact.bound.max()) == 0


@each_setting
@pytest.mark.parametrize("rule", [*RELAXED, RELEASED, "lantern++:k=3:lambda=3:residual=released"])
def test_a_budget_bounds_the_distance_and_an_empty_one_leaves_none(rule: str, children: int, certain: bool) -> None:
    for slack in (0.0, 0.05):
        found = enumerated(make_rule(rule), P, Q, children, certain, slack)
        assert float(found.bound.max()) <= slack
        assert float(distance(found.law, P).max()) <= slack + ROUNDING


@pytest.mark.parametrize("rule", ["lantern:k=3:delta=0.3", "lantern++:k=3:lambda=3"])
def test_no_residual_has_less_bias_than_the_optimal_one_for_one_drawn_child(rule: str) -> None:
    p, q = (torch.stack(laws) for laws in zip(*map(toy_bias.toy_laws, range(40)), strict=True))
    found = {r: enumerated(make_rule(f"{rule}:residual={r}"), p, q, 1, False) for r in ("paper", "optimal", "released")}
    far = {r: distance(f.law, p) for r, f in found.items()}
    assert all(torch.allclose(f.kept, found["paper"].kept, atol=ROUNDING) for f in found.values())
    assert bool((far["optimal"] <= torch.minimum(far["paper"], far["released"]) + ROUNDING).all())
    assert float((far["released"] - far["optimal"]).max()) > 0.01


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.5])
def test_lantern_with_one_certain_child_moves_exactly_the_borrowed_mass_so_at_most_delta(delta: float) -> None:
    rule, x = make_rule(f"lantern:k=3:delta={delta}"), Q.argmax(1)
    mass, near, inside = rule.borrowed(P, x, toy_bias.near(rule), torch.full((4,), torch.inf))
    moved = P.scatter(1, near, P.gather(1, near) * ~inside).scatter_add(1, x[:, None], mass[:, None])
    law = enumerated(rule, P, Q, 1, True).law
    assert torch.allclose(law, moved.double(), atol=ROUNDING)
    assert float(distance(law, P).max()) <= delta + ROUNDING


def test_lantern_with_a_drawn_child_or_with_several_certain_ones_can_go_beyond_delta() -> None:
    flat, rule = torch.full((1, 8), 1 / 8), make_rule("lantern:k=3:delta=0.2")
    narrow = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]]) / 4
    drawn = enumerated(rule, flat, narrow, 1, False)  # each of the four borrows one code and is always kept
    assert float(distance(drawn.law, flat)) == pytest.approx(0.5, abs=ROUNDING)
    certain = enumerated(rule, flat, flat, 2, True)  # both borrow one code
    assert float(distance(certain.law, flat)) == pytest.approx(0.25, abs=ROUNDING)


@pytest.mark.parametrize("rule", [Grouped(3), Annealed(3.0, mu=0.2)])
def test_the_bias_that_a_rule_reports_is_that_of_the_enumerated_law(rule: KeepingRule) -> None:
    keep, _, bias = rule.decide(P, Q, 1, torch.full((4,), torch.inf))
    assert torch.allclose(bias.double(), distance(enumerated(rule, P, Q, 1, False).law, P), atol=ROUNDING)
    if isinstance(rule, Annealed):
        assert torch.allclose(bias, (Q * keep - P).clamp_min(0).sum(1), atol=ROUNDING)


def after_refusals(rule: Rule, p: Tensor, tokens: list[int], log_q: Tensor | None, table: Tensor) -> Tensor:
    """Law after all children were refused, [V]: draws on a fine grid of uniforms."""
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    count, children = len(grid), len(tokens)
    uniforms = torch.full((count, children + 1, 2), 1 - 1e-12, dtype=torch.float64)
    uniforms[:, 0, 1] = grid
    tree = static_tree(((children,),), torch.device("cpu"))
    law = None if log_q is None else log_q.expand(count, 1, -1)
    draft = Draft(torch.tensor([tokens]).expand(count, -1), law, tree, certain=law is None)
    with toy_bias.monotone_redraws():
        found = rule.verify(draft, p.log().expand(count, children + 1, -1), Noise(None, uniforms, neighbours=table))
    assert int(found.accepted.sum()) == 0
    return torch.bincount(found.tokens[:, 0], minlength=len(p)) / count


def test_the_released_residual_does_what_the_released_code_does() -> None:
    """Codes on a line: the neighbours of 0 are 1, 2, 3. Only 1 fits into the budget; k = 2, so 1, 2 and 3 go."""
    line = torch.stack([torch.cos(torch.arange(6) * 0.3), torch.sin(torch.arange(6) * 0.3)], 1)
    p = torch.tensor([0.1, 0.05, 0.3, 0.2, 0.15, 0.2])
    table = nearest_codes(line, 3)
    assert table[0].tolist() == [1, 2, 3]
    released = Lantern(2, 0.1, "released")
    kept = p * torch.tensor([0, 0, 0, 0, 1, 1])
    assert torch.allclose(after_refusals(released, p, [0], None, table), kept / kept.sum(), atol=1e-3)
    paper = p * torch.tensor([0, 0, 1, 1, 1, 1]) / 0.85
    assert torch.allclose(after_refusals(replace(released, residual="paper"), p, [0], None, table), paper, atol=1e-3)
    # Drawn: at the neighbours the draft's law is dropped, so that their whole probability stays.
    q = torch.tensor([0.5, 0.04, 0.16, 0.1, 0.1, 0.1])
    drawn = torch.tensor([0.0, 0.05, 0.3, 0.2, 0.05, 0.1])
    assert torch.allclose(after_refusals(released, p, [0], q.log(), table), drawn / drawn.sum(), atol=1e-3)
    # Nothing left: a uniform law.
    narrow = torch.tensor([0.6, 0.05, 0.35, 0, 0, 0])
    assert torch.allclose(after_refusals(released, narrow, [0], None, table), torch.full((6,), 1 / 6), atol=1e-3)
    # Neighbours without probability count as used: even delta = 0 is not exact once a child has been refused.
    assert (
        float(distance(enumerated(make_rule("lantern:k=3:delta=0:residual=released"), P, Q, 3, True).law, P).max())
        > 0.1
    )


# Greedy decisions on random certain trees.

V, IMAGES = 6, 1000
CODES = torch.randn(V, 3, generator=torch.Generator().manual_seed(4))


def near(rule: Rule) -> Tensor | None:
    return nearest_codes(CODES, rule.columns) if rule.columns else None


def greedy_verdict(spec: str, shape: str, slack: float | None = None) -> Verdict:
    random = torch.Generator().manual_seed(0)
    tree = static_tree(read_shape(shape), torch.device("cpu"))  # type: ignore[arg-type]
    log_p = (0.7 * torch.randn(IMAGES, tree.nodes + 1, V, generator=random)).log_softmax(-1)
    ranked = (log_p + 0.7 * torch.randn(log_p.shape, generator=random)).argsort(-1, descending=True)
    rank = (tree.child[0, tree.parent[0]] == torch.arange(1, tree.nodes + 1)[:, None]).long().argmax(1)
    hidden = torch.randn(IMAGES, tree.nodes + 1, 4, generator=random)
    draft = Draft(ranked[:, tree.parent[0], rank], None, tree, certain=True, hidden=hidden)
    uniforms, rule = torch.full((IMAGES, tree.nodes + 1, 2), 0.5, dtype=torch.float64), make_rule(spec)
    if rule.exact:
        log_p = torch.full_like(log_p, -torch.inf).scatter(-1, log_p.argmax(-1, keepdim=True), 0.0)
    left = None if slack is None else torch.full((IMAGES,), slack)
    return rule.verify(draft, log_p, Noise(None, uniforms, left, not rule.exact, neighbours=near(rule)))


@pytest.mark.parametrize("shape", ["1x1x1", "2x2", "3x1x2"])
@pytest.mark.parametrize("rule", RELAXED)
def test_greedy_choices_stay_within_the_slack_and_keep_a_child_wherever_the_exact_rule_does(
    rule: str, shape: str
) -> None:
    exact, free = greedy_verdict("tree", shape), greedy_verdict(rule, shape)
    assert int(free.accepted.sum()) > int(exact.accepted.sum())
    assert bool(((free.accepted > 0) | (exact.accepted == 0)).all())
    if shape == "1x1x1":
        assert bool((free.accepted >= exact.accepted).all())
    assert free.spent is not None and float(free.spent.max()) > 0.2
    for slack in (0.0, 0.3, 0.8):
        found = greedy_verdict(rule, shape, slack)
        assert found.spent is not None and float(found.spent.max()) <= slack + ROUNDING
        if slack == 0:
            assert same_tokens(found, exact)


def same_tokens(a: Verdict, b: Verdict) -> bool:
    shown = torch.arange(a.tokens.shape[1]) <= b.accepted[:, None]
    return torch.equal(a.accepted, b.accepted) and torch.equal(a.tokens[shown], b.tokens[shown])


@pytest.mark.parametrize("shape", ["1x1x1", "2x2", "3x1x2"])
@pytest.mark.parametrize("rule", HARMLESS)
def test_greedy_choices_without_leave_follow_the_argmax_path(rule: str, shape: str) -> None:
    assert same_tokens(greedy_verdict(rule, shape), greedy_verdict("tree", shape))


# Whole images, through the loop.

TARGET = TabularTarget(V, 5, labels=12)
NEAR = TabularTarget(V, 5, labels=12)
NEAR.tables = TARGET.tables + 1.5 * torch.randn(TARGET.tables.shape, generator=torch.Generator().manual_seed(5))
GREEDY = LawSettings(guidance=2.0, temperature=0)
FITTING = [(r, t) for r in RELAXED for t in TREES if not (t.startswith("dynamic") and make_rule(r).needs_hidden)]


def run(
    spec: str,
    tree: str = "2x2",
    budget: float | None = None,
    settings: LawSettings = PLAIN,
    index: Tensor | range = range(2000),
) -> DecodeState:
    index = torch.as_tensor(index if isinstance(index, Tensor) else list(index))
    rule = make_rule(spec)
    batch = EagerBatch(TARGET, sketched(NEAR, tree), rule, settings, budget, neighbours=near(rule))
    return batch.run(index % 12, 0, index)


@pytest.mark.parametrize(("rule", "tree"), FITTING)
def test_an_image_never_overdraws_its_budget_and_a_larger_one_saves_passes(rule: str, tree: str) -> None:
    exact, found = run("tree", tree), {budget: run(rule, tree, budget) for budget in (0.0, 0.1, 0.5, 1e9)}
    passes = [int(r.passes.sum()) for r in found.values()]
    assert passes == sorted(passes, reverse=True) and passes[0] > passes[-1]
    for budget, result in found.items():
        assert float(result.spent.max()) <= budget + ROUNDING
    assert float(exact.spent.max()) == 0
    assert 0 < float(found[0.1].spent.mean()) < float(found[0.5].spent.mean()) <= float(found[1e9].spent.mean())
    same = (found[0.0].tokens == exact.tokens).all(1)
    assert float(same.double().mean()) > 0.999  # sums in another order may differ by a rounding
    assert torch.equal(run(rule, tree, None).tokens, found[1e9].tokens)


@pytest.mark.parametrize(("rule", "tree"), FITTING)
def test_greedy_images_take_no_more_passes_than_the_exact_rules(rule: str, tree: str) -> None:
    exact, free, none = (run(r, tree, b, GREEDY, range(12)) for r, b in (("tree", None), (rule, None), (rule, 0.0)))
    assert int(free.passes.sum()) <= int(exact.passes.sum())
    assert torch.equal(none.tokens, exact.tokens) and float(none.spent.max()) == 0


@pytest.mark.parametrize("rule", RELAXED)
def test_batches_of_one_and_three_give_the_big_batchs_tokens(rule: str) -> None:
    settings = LawSettings(guidance=2.0, top_k=4)
    whole = run(rule, budget=1.0, settings=settings, index=range(40))
    for index in (torch.tensor([7]), torch.tensor([3, 30, 21])):
        alone = run(rule, budget=1.0, settings=settings, index=index)
        assert torch.equal(alone.tokens, whole.tokens[index])
        assert torch.allclose(alone.spent, whole.spent[index], atol=1e-5)


# Windows that are carried on.

WINDOWED = [rule for rule in RELAXED if make_rule(rule).window]


def run_window(
    spec: str | Rule, budget: float | None = None, settings: LawSettings = PLAIN, count: int = 2000
) -> DecodeState:
    rule = make_rule(spec) if isinstance(spec, str) else spec
    index = torch.arange(count)
    return EagerBatch(TARGET, Jacobi(4), rule, settings, budget, neighbours=near(rule)).run(index % 12, 0, index)


@pytest.mark.parametrize("rule", [rule for rule in HARMLESS if make_rule(rule).window])
@pytest.mark.parametrize("settings", [PLAIN, LawSettings(guidance=2.0, top_k=4)], ids=["plain", "guided"])
def test_a_window_without_leave_follows_the_enumerated_law(rule: str, settings: LawSettings) -> None:
    index, wanted = torch.full((12_000,), 3), TARGET.joint(3, settings)
    made = make_rule(rule)
    decoder = EagerBatch(TARGET, Jacobi(3), made, settings, neighbours=near(made))
    tokens = decoder.run(index, 0, torch.arange(12_000)).tokens
    assert fit_p_value(torch.bincount(cells(tokens, V), minlength=V**5), wanted) > 1e-4


@pytest.mark.parametrize("rule", WINDOWED)
def test_a_window_never_overdraws_a_budget_and_a_larger_one_saves_passes(rule: str) -> None:
    found = [run_window(rule, budget) for budget in (0.0, 0.5, 1e9)]
    passes = [int(result.passes.sum()) for result in found]
    assert passes == sorted(passes, reverse=True) and passes[0] > passes[-1]
    for result, budget in zip(found, (0.0, 0.5, 1e9), strict=True):
        assert float(result.spent.max()) <= budget + ROUNDING


@pytest.mark.parametrize("rule", WINDOWED)
def test_what_stands_behind_a_refused_token_has_the_law_that_goes_with_it(rule: str) -> None:
    """The next draft is certain to be drawn from the laws it carries, whatever leave the rule had."""
    rows, generator = 40_000, torch.Generator().manual_seed(0)
    log_p, log_q = (3 * torch.randn(2, 3, V, generator=generator)).log_softmax(-1)
    drafted = log_q[:2].exp().multinomial(rows, replacement=True, generator=generator).T
    uniforms = torch.rand(rows, 3, 2, dtype=torch.float64, generator=generator)
    draft = Draft(drafted, log_q[:2].expand(rows, -1, -1), window=True)
    made = make_rule(rule)
    verdict = made.verify(draft, log_p.expand(rows, -1, -1), Noise(None, uniforms, neighbours=near(made)))
    for place in (1, 2):
        there = verdict.tokens[verdict.accepted < place, place]
        assert fit_p_value(torch.bincount(there, minlength=V), log_p[place].exp()) > 1e-4


@pytest.mark.parametrize("rule", WINDOWED)
def test_greedy_windows_without_slack_draw_the_argmax_path(rule: str) -> None:
    assert torch.equal(run_window(rule, 0.0, GREEDY, 12).tokens, run_window(Exact(), None, GREEDY, 12).tokens)
