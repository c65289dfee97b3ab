"""Methods as they are written: what the grammar gives, and which errors name what."""

from __future__ import annotations

import pytest

from bozzetto.drafters.grow import Dynamic
from bozzetto.drafts.tree import SHAPES
from bozzetto.errors import UsageError
from bozzetto.registry import RULES, check_method, drafter_options, make_rule, read_shape, split_method, tree_nodes
from bozzetto.rules.lantern import LanternPlusPlus
from bozzetto.settings import GenerateSettings


def test_a_method_is_a_drafter_and_a_rule_with_options() -> None:
    drafter, rule = split_method("eagle:tree=dynamic/lantern:k=500:delta=0.2")
    assert drafter_options(drafter)[1].tree == "dynamic"
    made = make_rule(rule)
    assert (made.name, made.k, made.delta, made.residual) == ("lantern", 500, 0.2, "paper")
    assert make_rule("lantern++:k=10:lambda=2") == LanternPlusPlus(k=10, lam=2.0)
    assert split_method("jacobi") == ("jacobi", "seed-exact")
    assert split_method("model:folder=a/b:tree=2x2/tree") == ("model:folder=a/b:tree=2x2", "tree")


def test_shapes_are_read_by_name_or_rule() -> None:
    assert read_shape("chain-3") == ((1,), (1,), (1,))
    assert read_shape("3x2x1") == ((3,), (2, 2, 2), (1,) * 6)
    assert read_shape("dynamic") == Dynamic(58, 5, 10)
    assert read_shape("dynamic-59-5-10") == Dynamic(58, 5, 10)
    assert all(read_shape(name) == shape for name, shape in SHAPES.items())
    assert tree_nodes("eagle:tree=extend-57") == 57
    assert tree_nodes("eagle:tree=dynamic") == 58
    assert tree_nodes("jacobi") is None


@pytest.mark.parametrize(
    ("drafter", "rule", "named"),
    [
        ("nonsense", "tree", ["unknown drafter 'nonsense'", "eagle"]),
        ("eagle", "nonsense", ["unknown rule 'nonsense'", *RULES]),
        ("eagle:odd=1", "tree", ["unknown option 'odd'", "tree, folder"]),
        ("jacobi:tree=dynamic", "exact", ["unknown option 'tree'", "allowed: none"]),
        ("eagle", "lantern:neighbours=3", ["unknown option 'neighbours'", "k, delta, residual"]),
        ("eagle", "lantern++:delta=3", ["unknown option 'delta'", "k, residual, lambda"]),
        ("eagle:tree", "tree", ["'tree' is not allowed", "key=value"]),
        ("eagle", "lantern:k=many", ["k = 'many' is not allowed: a whole number"]),
        ("eagle", "lantern:delta=much", ["delta = 'much' is not allowed: a number"]),
        ("model:tree=2x2", "tree", ["option 'folder' is missing"]),
        ("eagle:tree=odd", "tree", ["tree = 'odd' is not allowed", "mc-sim-25", "chain-5"]),
        ("eagle:tree=20x20x20", "tree", ["tree = '20x20x20'", "the cache holds 128"]),
        ("eagle:tree=chain-500", "tree", ["500 nodes, the cache holds 128 at most"]),
        ("eagle:tree=dynamic-500-5-10", "tree", ["499 nodes", "128 at most"]),
        ("eagle:tree=chain-0", "tree", ["tree = 'chain-0' is not allowed"]),
        ("eagle:tree=0x1", "tree", ["tree = '0x1' is not allowed"]),
        ("eagle:tree=dynamic-1-5-10", "tree", ["tree = 'dynamic-1-5-10' is not allowed"]),
        ("jacobi", "tree", ["'tree' does not carry a window on", "seed-exact, exact"]),
        ("eagle:tree=2x2", "block", ["verifies chains only", "'2x2'"]),
        ("eagle:tree=2x2", "exact", ["verifies chains only"]),
        ("eagle:tree=dynamic", "cascade", ["needs a fixed tree"]),
    ],
)
def test_what_does_not_exist_or_fit_is_named_with_what_is_allowed(drafter: str, rule: str, named: list[str]) -> None:
    for check in (check_method, lambda d, r: GenerateSettings(d, r)):
        with pytest.raises(UsageError) as caught:
            check(drafter, rule)
        assert all(text in str(caught.value) for text in named), str(caught.value)


@pytest.mark.parametrize("method", ["/tree", "eagle/"])
def test_half_a_method_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match="DRAFTER/RULE"):
        split_method(method)


@pytest.mark.parametrize("budget", [-0.1, float("inf"), float("nan")])
def test_a_budget_is_a_finite_number_from_zero(budget: float) -> None:
    with pytest.raises(UsageError, match=r"tv_budget = .* is not allowed: a number >= 0"):
        GenerateSettings(tv_budget=budget)
