"""The exactness battery: every rule that declares `exact` must reproduce the enumerated law of a toy target."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bozzetto.drafters.base import Observation
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import LawSettings, gumbel_argmax, weighted_draw
from bozzetto.rules.base import Noise, leading
from bozzetto.rules.exact import Exact, residual
from tabular import TabularTarget
from toys import PLAIN, WINDOW_RULES, alternating_target, cells, constant_target, decode, p_value

IMAGES, ACCEPTABLE, DAMNING = 40_000, 1e-3, 1e-9
V, N = 4, 5
EXACT_RULES = WINDOW_RULES
TARGET = TabularTarget(V, N)
WINDOWS = [1, 2, 4, N]
GRID = [LawSettings(guidance=g, top_k=k) for g in (1.0, 2.0) for k in (0, 3)]
SHAPED = LawSettings(guidance=2.0, temperature=0.8, top_k=3, top_p=0.9)


@functools.cache
def big_batch(rule: str, window: int, settings: LawSettings) -> Tensor:
    return decode(TARGET, rule, window=window, settings=settings, index=range(IMAGES)).tokens


def describe(settings: LawSettings) -> str:
    return f"s{settings.guidance:g}-T{settings.temperature:g}-k{settings.top_k}-p{settings.top_p:g}"


@pytest.mark.parametrize("settings", [*GRID, LawSettings(temperature=0.7, top_p=0.8), SHAPED], ids=describe)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rule", EXACT_RULES)
def test_decoded_images_follow_the_enumerated_law(rule: str, window: int, settings: LawSettings) -> None:
    law = TARGET.joint(1, settings)
    assert p_value(big_batch(rule, window, settings), law) > ACCEPTABLE


@pytest.mark.parametrize("settings", [PLAIN, LawSettings(guidance=2.0, top_k=3)], ids=describe)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rule", EXACT_RULES)
def test_batches_of_one_and_three_give_the_big_batchs_tokens(rule: str, window: int, settings: LawSettings) -> None:
    whole = big_batch(rule, window, settings)
    chosen = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(window))[:24]
    for size in (1, 3):
        for index in chosen.split(size):
            alone = decode(TARGET, rule, window=window, settings=settings, index=index)
            assert torch.equal(alone.tokens, whole[index])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rule", EXACT_RULES)
def test_drafts_of_the_targets_own_law_are_never_rejected(rule: str, window: int) -> None:
    target = constant_target(V, N)
    result = decode(target, rule, window=window, index=range(IMAGES))
    assert p_value(result.tokens, target.joint(1, PLAIN)) > ACCEPTABLE
    assert torch.equal(result.accepted, result.drafted)
    assert set(result.passes.tolist()) == {1 + -(-(N - 1) // window)}  # the first pass has no drafts


@pytest.mark.parametrize("rule", EXACT_RULES)
def test_greedy_decoding_of_a_constant_law_accepts_everything(rule: str) -> None:
    target, greedy = constant_target(V, N), LawSettings(temperature=0)
    result = decode(target, rule, window=4, settings=greedy, index=range(50))
    assert bool((result.tokens == target.tables[1, 0].argmax()).all())
    assert set(result.passes.tolist()) == {2}


@pytest.mark.parametrize("rule", EXACT_RULES)
def test_greedy_decoding_follows_the_argmax_path(rule: str) -> None:
    greedy = LawSettings(guidance=2.0, temperature=0)
    result = decode(TARGET, rule, window=4, settings=greedy, index=range(50))
    assert bool((cells(result.tokens, V) == TARGET.joint(1, greedy).argmax()).all())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rule", EXACT_RULES)
def test_the_law_holds_when_every_draft_is_rejected(rule: str, window: int) -> None:
    target = alternating_target(V, N)
    result = decode(target, rule, window=window, index=range(IMAGES))
    assert p_value(result.tokens, target.joint(1, PLAIN)) > ACCEPTABLE
    assert int(result.accepted.sum()) == 0
    assert set(result.passes.tolist()) == {N}


# Deliberately wrong rules and drafters: the battery must reject each of them.


@dataclass(frozen=True)
class AcceptEverything(Exact):
    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        after = gumbel_argmax(log_p[:, -1:], noise.fixed[:, -1:])
        return Verdict(torch.cat([draft.tokens, after], 1), torch.full_like(after[:, 0], draft.length))


@dataclass(frozen=True)
class CommitPastTheFirstReject(Exact):
    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        right = super().verify(draft, log_p, noise)
        return Verdict(right.tokens, torch.full_like(right.accepted, draft.length))


@dataclass(frozen=True)
class RedrawFromTheTarget(Exact):
    """On a reject draws from p instead of norm([p - q]+)."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        right = super().verify(draft, log_p, noise)
        if draft.length == 0:
            return right
        redrawn, _ = weighted_draw(log_p[:, :-1].exp(), noise.uniforms[:, :-1, 1])
        tokens = right.tokens.clone()
        tokens[:, :-1] = torch.where(tokens[:, :-1] == draft.tokens, draft.tokens, redrawn)
        return Verdict(tokens, leading(tokens[:, :-1] == draft.tokens))


@dataclass(frozen=True)
class RedrawWithTheNoiseOfTheDraft(Exact):
    """On a reject the fixed noise decides that drew the draft as it entered the window."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        right = super().verify(draft, log_p, noise)
        if draft.length == 0:
            return right
        redrawn = gumbel_argmax(residual(log_p[:, :-1], draft.log_q).log(), noise.fixed[:, :-1])
        tokens = right.tokens.clone()
        kept = (
            noise.uniforms[:, :-1, 0]
            < (log_p[:, :-1].gather(-1, draft.tokens[..., None]) - draft.log_q.gather(-1, draft.tokens[..., None]))
            .squeeze(-1)
            .exp()
        )
        tokens[:, :-1] = torch.where(kept, draft.tokens, redrawn)
        return Verdict(tokens, right.accepted)


class KeepStaleLaw(Jacobi):
    """Kept tokens go on with the law they were first drawn from (the deviation found in released code)."""

    def propose(self, batch: int, limit: int) -> Draft:
        self.proposed = super().propose(batch, limit)
        return self.proposed

    def observe(self, seen: Observation) -> None:
        old = self.proposed
        if old.length:
            kept = (seen.verdict.tokens[:, : old.length] == old.tokens)[..., None]
            mixed = torch.where(kept, old.log_q, seen.log_p[:, : old.length])
            seen = replace(seen, log_p=torch.cat([mixed, seen.log_p[:, old.length :]], 1))
        super().observe(seen)


@pytest.mark.parametrize(
    "wrong", [AcceptEverything(), CommitPastTheFirstReject(), RedrawFromTheTarget(), RedrawWithTheNoiseOfTheDraft()]
)
def test_the_battery_rejects_a_wrong_rule(wrong: Exact) -> None:
    result = decode(TARGET, wrong, window=4, index=range(IMAGES))
    assert p_value(result.tokens, TARGET.joint(1, PLAIN)) < DAMNING


def test_the_battery_rejects_a_drafter_that_keeps_stale_laws() -> None:
    result = decode(TARGET, "exact", KeepStaleLaw(4), index=range(IMAGES))
    assert p_value(result.tokens, TARGET.joint(1, PLAIN)) < DAMNING


def test_the_battery_rejects_another_labels_law() -> None:
    assert p_value(big_batch("exact", 4, PLAIN), TARGET.joint(0, PLAIN)) < DAMNING


def test_residual_of_equal_laws_is_the_law_itself() -> None:
    log_p = torch.randn(3, V).log_softmax(-1)
    assert torch.equal(residual(log_p, log_p), log_p.exp())
