"""Methods as they are written: what the grammar gives, and which errors name what."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bozzetto.common.written import spelled
from bozzetto.drafters.tree import Dynamic
from bozzetto.drafts import CODES, VECTORS
from bozzetto.drafts.tree import SHAPES
from bozzetto.errors import UsageError
from bozzetto.methods.options import CodeWindow, Trained
from bozzetto.methods.shapes import read_shape
from bozzetto.methods.table import DRAFTERS, RULES, named, read_drafter, read_method, split_method
from bozzetto.rules.lantern import Lantern, LanternPlusPlus
from bozzetto.settings import GenerateSettings
from toys import make_drafter, make_rule


def test_a_method_is_a_drafter_and_a_rule_with_options() -> None:
    drafter, rule = split_method("eagle:tree=dynamic/lantern:k=500:delta=0.2")
    assert read_drafter(drafter).tree == "dynamic"
    made = make_rule(rule)
    assert made == Lantern(k=500, delta=0.2, residual="paper")
    assert make_rule("lantern++:k=10:lambda=2") == LanternPlusPlus(k=10, lam=2.0)
    assert split_method("jacobi") == ("jacobi", "seed-exact")
    assert split_method("model:folder=a/b:tree=2x2/tree") == ("model:folder=a/b:tree=2x2", "tree")


def test_shapes_are_read_by_name_or_rule() -> None:
    assert read_shape("chain-3") == ((1,), (1,), (1,))
    assert read_shape("3x2x1") == ((3,), (2, 2, 2), (1,) * 6)
    assert read_shape("dynamic") == Dynamic(58, 5, 10)
    assert read_shape("dynamic-59-5-10") == Dynamic(58, 5, 10)
    assert all(read_shape(name) == shape for name, shape in SHAPES.items())
    assert read_drafter("eagle:tree=extend-57").nodes == 57
    assert read_drafter("eagle:tree=dynamic").nodes == 58
    assert read_drafter("jacobi").nodes is None


@pytest.mark.parametrize(
    ("drafter", "rule", "named"),
    [
        ("nonsense", "tree", ["unknown drafter 'nonsense'", "eagle"]),
        ("eagle", "nonsense", ["unknown rule 'nonsense'", *named(RULES, CODES)]),
        ("eagle:odd=1", "tree", ["unknown option 'odd'", "tree, folder, stop"]),
        (
            "jacobi:tree=dynamic",
            "exact",
            ["unknown option 'tree'", "allowed: fill, fresh, second, places, reach, folder"],
        ),
        ("eagle", "lantern:neighbours=3", ["unknown option 'neighbours'", "k, delta, residual"]),
        ("eagle", "lantern++:delta=3", ["unknown option 'delta'", "k, residual, lambda"]),
        ("eagle:tree", "tree", ["'tree' is not allowed", "key=value"]),
        ("eagle:tree=", "tree", ["'tree=' is not allowed", "key=value"]),
        ("eagle", "lantern:=3", ["'=3' is not allowed", "key=value"]),
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
        ("jacobi", "cascade", ["'cascade' does not carry a window on", "seed-exact, exact, lantern"]),
        ("eagle:tree=2x2", "block", ["verifies chains only", "'2x2'"]),
        ("eagle:tree=2x2", "exact", ["verifies chains only", "'2x2'"]),
        ("eagle:tree=dynamic", "block", ["verifies chains only", "'dynamic'"]),
        ("eagle:tree=dynamic", "cascade", ["needs a fixed tree", "'dynamic'"]),
    ],
)
def test_what_does_not_exist_or_fit_is_named_with_what_is_allowed(drafter: str, rule: str, named: list[str]) -> None:
    for check in (read_method, lambda d, r: GenerateSettings(d, r)):
        with pytest.raises(UsageError) as caught:
            check(drafter, rule)
        assert all(text in str(caught.value) for text in named), str(caught.value)


def test_what_fits_passes() -> None:
    for drafter in ("eagle", "eagle:tree=1x1x1", "model:folder=a"):
        for rule in set(named(RULES, CODES)):
            read_method(drafter, rule)
    for tree in (*SHAPES, "dynamic", "4x2x1"):
        for rule, kind in named(RULES, CODES).items():
            if kind.trees and not (kind.needs_hidden and tree == "dynamic"):
                read_method(f"eagle:tree={tree}", rule)
    for rule in named(RULES, CODES):
        read_method("none", rule)


def test_drafters_and_rules_say_what_they_need() -> None:
    assert make_drafter("none").max_nodes == 0
    for rule, columns in (("tree", 0), ("lantern:k=7", 7), ("lantern++:k=7:residual=released", 8)):
        assert make_rule(rule).columns == columns


def test_a_method_is_read_once_and_written_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GenerateSettings("eagle:tree=chain-05:stop=0.10", "lantern:k=0500")
    assert (settings.drafter, settings.rule) == (Trained("eagle", "chain-05", stop=0.1), Lantern(500))
    monkeypatch.setattr("bozzetto.methods.table.split_spec", None)  # nothing is read again
    again = replace(settings, batch=4)
    assert again.drafter is settings.drafter and again.rule is settings.rule
    assert again.method == "eagle:tree=chain-05:stop=0.10/lantern:k=0500"
    assert json.loads(json.dumps(again.plain()))["drafter"] == "eagle:tree=chain-05:stop=0.10"
    made = GenerateSettings(CodeWindow(fill="glance", fresh=2), LanternPlusPlus(k=3, lam=1.5))
    assert made.method == "jacobi:fill=glance:fresh=2/lantern++:k=3:lambda=1.5"


def test_every_drafter_and_rule_reads_what_it_writes() -> None:
    for table, read in ((DRAFTERS, read_drafter), (RULES, make_rule)):
        for (tokens, name), row in table.items():
            assert row.name == name
            if name != "model" or tokens == VECTORS:  # a smaller model of codes is always named
                assert read(spelled(row), tokens) == row


@pytest.mark.parametrize("method", ["/tree", "eagle/"])
def test_half_a_method_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match="DRAFTER/RULE"):
        split_method(method)


@pytest.mark.parametrize("budget", [-0.1, float("inf"), float("nan")])
def test_a_budget_is_a_finite_number_from_zero(budget: float) -> None:
    with pytest.raises(UsageError, match=r"tv_budget = .* is not allowed: a number >= 0"):
        GenerateSettings(tv_budget=budget)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("lantern:delta=-0.1", "delta = -0.1 is not allowed: a number from 0 to 1"),
        ("lantern:delta=1.5", "delta = 1.5 is not allowed"),
        ("lantern:delta=nan", "delta = nan is not allowed"),
        ("lantern:k=0", "k = 0 is not allowed: a whole number >= 1"),
        ("lantern:residual=nonsense", "residual = 'nonsense' is not allowed: paper, optimal, released"),
        ("lantern++:lambda=0.5", "lambda = 0.5 is not allowed: a number >= 1"),
        ("lantern++:lambda=inf", "lambda = inf is not allowed: a number >= 1"),
        ("grouped:group=0", "group = 0 is not allowed: a whole number from 1 to"),
        ("annealed:delta=0.5", "delta = 0.5 is not allowed: a number >= 1"),
        ("cascade:alike=2", "alike = 2.0 is not allowed: a number from -1 to 1"),
        ("annealed:nu=-1", "nu = -1.0 is not allowed: a number >= 0"),
        ("annealed:mu=nan", "mu = nan is not allowed: a number"),
        ("cascade:raise_by=2", "raise_by = 2.0 is not allowed: a number from 0 to 1"),
        ("cascade:kl=nan", "kl = nan is not allowed: a number >= 0"),
    ],
)
def test_numbers_out_of_range_are_refused_with_what_is_allowed(rule: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_rule(rule)
    assert message in str(caught.value)


def test_every_method_says_in_a_sentence_what_it_does() -> None:
    unsaid = [key for table in (DRAFTERS, RULES) for key, row in table.items() if not row.about.endswith(".")]
    assert not unsaid and all(len(row.about) <= 160 for table in (DRAFTERS, RULES) for row in table.values())
    lossy = [rule for rule in RULES.values() if not rule.exact]
    assert all("model's own law" not in rule.about and "as before" not in rule.about for rule in lossy)
