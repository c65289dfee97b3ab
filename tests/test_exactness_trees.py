"""The exactness battery on drafted chains and trees: every rule that declares `exact`, against the enumerated law."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bozzetto.drafts import CODES, Draft, Verdict
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import RULES
from bozzetto.rules.base import Noise
from bozzetto.rules.traversal import Traversal
from bozzetto.rules.tree import TreeRejection
from tabular import TabularTarget
from toys import EXACT_RULES, PLAIN, alternating_target, cells, constant_target, decode, p_value, sketched

IMAGES, ACCEPTABLE, DAMNING = 30_000, 1e-3, 1e-9
V, N = 4, 5
TARGET = TabularTarget(V, N)
SKETCH = TabularTarget(V, N, seed=1)  # another law, not even close
NEAR = TabularTarget(V, N)
NEAR.tables = TARGET.tables + 0.7 * torch.randn(TARGET.tables.shape, generator=torch.Generator().manual_seed(5))
SHAPES = ["chain-3", "2x2", "3x1x2", "dynamic-6-3-2", "chain-4 stop=0.35", "2x2x1 stop=0.3"]
GUIDED = LawSettings(guidance=2.0, top_k=3)
SETTINGS = [
    PLAIN,
    LawSettings(guidance=2.0),
    LawSettings(top_k=2),
    LawSettings(guidance=2.0, temperature=0.8, top_p=0.9),
]


def fitting(rule: str, tree: str) -> bool:
    return RULES[CODES, rule].trees or (tree.startswith("chain") and ("stop" not in tree or rule == "block"))


CASES = [(rule, tree) for rule in EXACT_RULES for tree in SHAPES if fitting(rule, tree)]
every_case = pytest.mark.parametrize(("rule", "tree"), CASES)
# One of the settings for all cases and two others in turn.
SOME = [
    (*case, SETTINGS[which])
    for number, case in enumerate(CASES)
    for which in (1, *((0, 2, 3)[(number + more) % 3] for more in range(2)))
]


@functools.cache
def big_batch(rule: str, tree: str, settings: LawSettings) -> Tensor:
    return decode(TARGET, rule, sketched(NEAR, tree), settings=settings, index=range(IMAGES)).tokens


@pytest.mark.parametrize(("rule", "tree", "settings"), SOME)
def test_decoded_images_follow_the_enumerated_law(rule: str, tree: str, settings: LawSettings) -> None:
    assert p_value(big_batch(rule, tree, settings), TARGET.joint(1, settings)) > ACCEPTABLE


@every_case
def test_a_drafter_of_an_unrelated_law_changes_nothing_in_law(rule: str, tree: str) -> None:
    tokens = decode(TARGET, rule, sketched(SKETCH, tree), settings=GUIDED, index=range(IMAGES)).tokens
    assert p_value(tokens, TARGET.joint(1, GUIDED)) > ACCEPTABLE


@every_case
def test_batches_of_one_and_three_give_the_big_batchs_tokens(rule: str, tree: str) -> None:
    whole = big_batch(rule, tree, SETTINGS[1])
    for size in (1, 3):
        for index in torch.randperm(IMAGES, generator=torch.Generator().manual_seed(size))[:12].split(size):
            alone = decode(TARGET, rule, sketched(NEAR, tree), settings=SETTINGS[1], index=index)
            assert torch.equal(alone.tokens, whole[index])


@pytest.mark.parametrize("rule", EXACT_RULES)
def test_chains_of_the_targets_own_law_are_never_rejected(rule: str) -> None:
    result = decode(TARGET, rule, sketched(TARGET, "chain-3"), index=range(IMAGES))
    assert p_value(result.tokens, TARGET.joint(1, PLAIN)) > ACCEPTABLE
    assert torch.equal(result.accepted, result.drafted)


@pytest.mark.parametrize("rule", ["tree", "traversal", "seed-exact"])
def test_first_siblings_of_the_targets_own_law_are_always_kept(rule: str) -> None:
    result = decode(constant_target(V, N), rule, sketched(constant_target(V, N), "3x2"), index=range(2000))
    assert torch.equal(result.accepted, result.drafted)


@every_case
def test_the_law_holds_when_every_draft_is_rejected(rule: str, tree: str) -> None:
    """Even tokens are followed by odd ones; the drafter believes the opposite, with equal laws elsewhere."""
    target, wrong = alternating_target(V, N), alternating_target(V, N)
    wrong.tables = wrong.tables[..., [1, 0, 3, 2]]
    result = decode(target, rule, sketched(wrong, tree), settings=LawSettings(top_k=2), index=range(IMAGES))
    assert p_value(result.tokens, target.joint(1, LawSettings(top_k=2))) > ACCEPTABLE
    if (rule, tree) != (
        "seed-exact",
        "3x1x2",
    ):  # a third child of a law of two tokens is any token, perhaps the right one
        assert int(result.accepted.sum()) == 0


@pytest.mark.parametrize("rule", [rule for rule in EXACT_RULES if RULES[CODES, rule].trees])
def test_a_tree_that_covers_the_support_always_finds_a_child(rule: str) -> None:
    """Two tokens are possible and both are drafted: the residual of the last sibling is empty."""
    two = LawSettings(top_k=2)
    result = decode(TARGET, rule, sketched(TARGET, "2x2"), settings=two, index=range(IMAGES))
    assert p_value(result.tokens, TARGET.joint(1, two)) > ACCEPTABLE
    if rule in ("tree", "traversal"):
        assert torch.equal(result.accepted, result.drafted)


@every_case
def test_greedy_decoding_follows_the_argmax_path(rule: str, tree: str) -> None:
    greedy = LawSettings(guidance=2.0, temperature=0)
    result = decode(TARGET, rule, sketched(NEAR, tree), settings=greedy, index=range(20))
    assert bool((cells(result.tokens, V) == TARGET.joint(1, greedy).argmax()).all())
    assert int(result.accepted.sum()) > 0


def test_seed_exact_trees_give_the_sequential_tokens() -> None:
    for settings in SETTINGS:
        plain = decode(TARGET, "seed-exact", "none", settings=settings, index=range(500)).tokens
        for tree in SHAPES:
            result = decode(TARGET, "seed-exact", sketched(NEAR, tree), settings=settings, index=range(500))
            assert torch.equal(result.tokens, plain)
            assert int(result.accepted.sum()) > 0


def test_block_keeps_more_than_token_by_token_and_traversal_equals_it_on_chains() -> None:
    kept = {}
    for rule in ("tree", "exact", "block", "traversal"):
        result = decode(TARGET, rule, sketched(NEAR, "chain-3"), index=range(IMAGES))
        kept[rule] = result.tokens.numel() / int(result.passes.sum())
    assert kept["block"] == kept["traversal"] > 1.01 * kept["tree"]
    assert abs(kept["tree"] - kept["exact"]) < 0.02


# Deliberately wrong rules: the battery must reject each of them.


@dataclass(frozen=True)
class SiblingsWithReplacement(TreeRejection):
    """Verifies siblings as if each had been drawn from the whole law."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        from bozzetto.rules import walk

        kept = walk.without
        walk.without = lambda q, token: q
        try:
            return super().verify(draft, log_p, noise)
        finally:
            walk.without = kept


@dataclass(frozen=True)
class OneUniform(TreeRejection):
    """For all nodes."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        shared = noise.uniforms[:, :1].expand_as(noise.uniforms)
        return super().verify(draft, log_p, Noise(noise.fixed, shared))


@dataclass(frozen=True)
class ParentsFirst(Traversal):
    """Accepts the shallowest node instead of the first in post-order."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        tree = draft.shape()
        upside_down = replace(tree, order=torch.where(tree.depth > 0, tree.depth, 10**6))
        return super().verify(Draft(draft.tokens, draft.log_q, upside_down), log_p, noise)


@pytest.mark.parametrize("wrong", [SiblingsWithReplacement(), OneUniform(), ParentsFirst()], ids=repr)
def test_the_battery_rejects_a_wrong_rule(wrong: TreeRejection) -> None:
    result = decode(TARGET, wrong, sketched(NEAR, "3x2"), index=range(IMAGES))
    assert p_value(result.tokens, TARGET.joint(1, PLAIN)) < DAMNING
