"""Rules for denoising chains: the exact ones reproduce the sequential sampler's law, the others do what they say."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bozzetto.drafts import Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.laws.chain import ChainLaw, Gaussian, Trajectory, log_ratio, sample_trajectory, score_trajectory
from bozzetto.laws.noise import STREAM_VERIFY, fold, image_keys, normal, uniform
from bozzetto.rules import chains, coupling, joint, path_block
from bozzetto.rules.base import Noise, Rule, leading
from bozzetto.rules.chains import Chains
from bozzetto.rules.cspd import Cspd
from bozzetto.rules.joint import Joint
from bozzetto.rules.path_block import PathBlock, finish, weights
from bozzetto.rules.pathwise import Pathwise
from bozzetto.rules.reflection import Coupled, PlainSteps, Reflection
from path_toys import (
    DIM,
    STEPS,
    TARGETS,
    Comparison,
    Decoded,
    ToyLaw,
    ToyModel,
    compare,
    decode,
    draft_chain,
    fixed_noise,
    sequential,
)

IMAGES, FEWER, ACCEPTABLE, DAMNING, WRONG = 60_000, 20_000, 1e-3, 1e-9, 0.15
EXACT: dict[str, Rule] = {rule.name: rule for rule in (Joint(tries=1), PathBlock(), Chains())}
NEAR = Chains(reach=1.0)
ALONE: dict[str, Rule] = {rule.name: rule for rule in (PlainSteps(), Coupled(depth=3), Reflection(depth=3))}
ALL: dict[str, Rule] = {**EXACT, "pathwise": Pathwise(0.3), "cspd": Cspd(), "cspd-released": Cspd("released")}

by_rule = pytest.mark.parametrize("rule", EXACT)


@functools.cache
def plain(target: str, seed: int, length: int = 2) -> Tensor:
    return sequential(TARGETS[target], range(IMAGES), length, seed)


@functools.cache
def floor(target: str, length: int) -> Comparison:
    """Two runs of the sequential sampler against each other."""
    return compare(plain(target, 1, length), plain(target, 2, length))


@functools.cache
def big_batch(rule: str, target: str) -> Decoded:
    model = TARGETS[target]
    return decode(EXACT[rule], model, model.draft(WRONG), range(IMAGES), length=2, drafts=2)


def allowed(tokens: Tensor, target: str) -> float:
    """Energy distance of the floor, for as many tokens."""
    return floor(target, tokens.shape[1]).energy * (IMAGES / len(tokens) + 1) / 2


def assert_same_law(tokens: Tensor, target: str) -> None:
    length = tokens.shape[1]
    got = compare(tokens, plain(target, 1, length))
    assert got.p_value > ACCEPTABLE
    assert got.energy < 4 * allowed(tokens, target)


def assert_other_law(tokens: Tensor, target: str) -> None:
    length = tokens.shape[1]
    got = compare(tokens, plain(target, 1, length))
    assert got.p_value < DAMNING
    assert got.energy > 4 * allowed(tokens, target)


def test_the_floor_is_low_and_the_draft_far_above_it() -> None:
    for target in TARGETS:
        assert floor(target, 1).p_value > ACCEPTABLE
        drafted = sequential(TARGETS[target].draft(WRONG), range(FEWER), 1, seed=4)
        assert_other_law(drafted, target)


@pytest.mark.parametrize("target", ["equal", "unequal"])
@by_rule
def test_two_tokens_over_several_passes_have_the_sequential_law(rule: str, target: str) -> None:
    """Their joint law: the second depends on the first. Chains carry their window on."""
    assert_same_law(big_batch(rule, target).tokens, target)


@pytest.mark.parametrize("target", ["equal-still", "unequal-still"])
@by_rule
def test_the_law_holds_where_the_last_step_adds_no_noise(rule: str, target: str) -> None:
    """There the two token laws have nothing in common, and nothing may be accepted."""
    out = decode(EXACT[rule], TARGETS[target], TARGETS[target].draft(WRONG), range(FEWER), 1, drafts=1)
    assert_same_law(out.tokens, target)
    assert out.accepted == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ALONE)
def test_rules_without_drafts_have_the_sequential_law(rule: str, target: str) -> None:
    if rule == "reflection" and target != "equal":
        return  # it is for equal deviations above 0
    out = decode(ALONE[rule], TARGETS[target], TARGETS[target], range(FEWER), 1, drafts=0)
    assert_same_law(out.tokens, target)


@pytest.mark.parametrize("target", ["equal", "unequal"])
def test_any_reach_is_exact(target: str) -> None:
    out = decode(NEAR, TARGETS[target], TARGETS[target].draft(WRONG), range(FEWER), 1, drafts=1)
    assert_same_law(out.tokens, target)


@by_rule
def test_drafts_with_other_deviations_are_no_problem_for_equal_ones(rule: str) -> None:
    """A draft model may have been sampled at another temperature."""
    target = TARGETS["equal"]
    out = decode(EXACT[rule], target, ToyModel(equal=False, wrong=0.05), range(FEWER), 1, drafts=1)
    assert_same_law(out.tokens, "equal")


@by_rule
def test_without_drafts_the_rules_draw_plain_paths(rule: str) -> None:
    out = decode(EXACT[rule], TARGETS["unequal"], TARGETS["unequal"], range(FEWER), 1, drafts=0)
    assert_same_law(out.tokens, "unequal")
    assert torch.equal(out.passes, torch.ones(FEWER, dtype=torch.int64))


@by_rule
def test_the_law_holds_when_every_draft_is_rejected(rule: str) -> None:
    for target in ("equal", "unequal"):
        model = TARGETS[target]
        out = decode(EXACT[rule], model, model.draft(0.0, apart=9.0), range(FEWER), 1, drafts=1)
        assert out.accepted == 0
        assert_same_law(out.tokens, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ALL)
def test_drafts_of_the_targets_own_law_are_never_rejected(rule: str, target: str) -> None:
    out = decode(ALL[rule], TARGETS[target], TARGETS[target], range(2000), length=3, drafts=2)
    assert out.accepted == out.offered == 4000
    assert set(out.passes.tolist()) == {1}


@pytest.mark.parametrize("target", ["equal", "unequal"])
@by_rule
def test_batches_of_one_and_three_give_the_big_batchs_tokens(rule: str, target: str) -> None:
    whole, model = big_batch(rule, target).tokens, TARGETS[target]
    chosen = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:12]
    for size in (1, 3):
        for index in chosen.split(size):
            assert torch.equal(decode(EXACT[rule], model, model.draft(WRONG), index).tokens, whole[index])


@pytest.mark.parametrize("rule", ["pathwise", "cspd", "cspd-released"])
def test_relaxed_rules_do_not_depend_on_the_batch_either(rule: str) -> None:
    model = TARGETS["unequal"]
    whole = decode(ALL[rule], model, model.draft(0.3), range(3000)).tokens
    for index in torch.arange(100, 112).split(3):
        assert torch.equal(decode(ALL[rule], model, model.draft(0.3), index).tokens, whole[index])


# Deliberately wrong rules: the battery must reject each of them.


def mirrored_without_the_sign(noise: Tensor, draft: Tensor, target: Gaussian, *rest: Tensor) -> tuple[Tensor, Tensor]:
    x, kept = coupling.reflect(noise, draft, target, *rest)
    return torch.where(kept[..., None], x, target.at(noise)), kept


def drawn_from_the_target(draft: Gaussian, target: Gaussian, keys: Tensor) -> Tensor:
    return target.at(normal(fold(keys[:, None], torch.arange(DIM))))


def ratio_without_the_last_step(x: Tensor, top: Gaussian, bottom: Gaussian) -> Tensor:
    whole = log_ratio(x, top, bottom)
    return torch.cat([whole[..., :-1], torch.zeros_like(whole[..., :1])], -1)


def continued_from_the_target(log_w: Tensor, draft: Tensor, target: Gaussian, keys: Tensor) -> Tensor:
    return drawn_from_the_target(target, target, keys)


@dataclass(frozen=True)
class AcceptEverything(Chains):
    def verify(self, draft: Draft, law: ChainLaw, noise: Noise) -> Verdict:
        right = super().verify(draft, law, noise)
        return Verdict(
            torch.cat([draft.tokens, right.tokens[:, -1:]], 1), torch.full_like(right.accepted, draft.length)
        )


@dataclass(frozen=True)
class PlainAfterAReject(Joint):
    def _against(self, draft: Draft, place: Tensor, states: Tensor, target: Gaussian) -> Tensor:
        return torch.full(place.shape, -torch.inf, dtype=torch.float64)


def one_token(rule: Rule, target: str, hot: float = 1.0) -> Tensor:
    model = TARGETS[target]
    return decode(rule, model, model.draft(WRONG, hot=hot), range(FEWER), 1, drafts=1).tokens


@pytest.mark.parametrize(
    ("module", "name", "wrong", "rule", "target"),
    [
        (chains, "reflect", mirrored_without_the_sign, Chains(), "equal"),
        (coupling, "redraw", drawn_from_the_target, Chains(), "unequal"),
        (joint, "log_ratio", ratio_without_the_last_step, Joint(), "unequal"),
        (path_block, "log_ratio", ratio_without_the_last_step, PathBlock(), "equal"),
        (path_block, "excess_draw", continued_from_the_target, PathBlock(), "equal"),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_the_battery_rejects_a_wrong_part(module, name, wrong, rule, target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, wrong)
    assert_other_law(one_token(rule, target), target)


@pytest.mark.parametrize("rule", [AcceptEverything(), PlainAfterAReject(), Cspd("released"), Pathwise(0.3)])
def test_the_battery_rejects_a_wrong_rule(rule: Rule) -> None:
    assert_other_law(one_token(rule, "equal"), "equal")


def test_the_battery_rejects_the_published_rule_where_deviations_differ() -> None:
    """Where they do not, its Sigma is 1 and what is left is a maximal coupling of the last step."""
    assert_same_law(one_token(Cspd(), "equal"), "equal")
    assert_other_law(one_token(Cspd(), "equal", hot=1.1), "equal")
    assert_other_law(one_token(Cspd(), "unequal", hot=1.1), "unequal")


# One pass, looked at closely.


def scene(target: str, wrong: float, drafts: int = 3, images: int = 2000) -> tuple[Draft, ToyLaw, Noise]:
    """Drafts of the draft model with the sequential sampler's noise, the target's laws after them, and noise."""
    model, index = TARGETS[target], torch.arange(images)
    start, before = torch.zeros_like(index), torch.zeros(images, DIM)
    fixed = fixed_noise(index, drafts + 1)
    draft = draft_chain(model.draft(wrong), before, start, fixed[:, :drafts])
    contexts = torch.cat([before[:, None], draft.tokens], 1)
    law = model.law(contexts, torch.arange(drafts + 1).expand(images, -1))
    keys = fold(image_keys(0, STREAM_VERIFY, index)[:, None], torch.arange(drafts + 1))
    return draft, law, Noise(fixed, keys=keys)


def ratios(draft: Draft, law: ToyLaw) -> Tensor:
    """log p / q of every step, [B, M, T], place by place."""
    out = []
    for j in range(draft.length):
        place = torch.arange(len(draft.tokens)) * (draft.length + 1) + j
        path = Trajectory(*(part[:, j] for part in draft.trajectory))
        out.append(log_ratio(path.states[:, 1:], score_trajectory(law, place, path.states), path.kernels()))
    return torch.stack(out, 1)


def own_tokens(law: ToyLaw, noise: Noise) -> Tensor:
    """What the target draws from the shared noise, [B, M + 1, D]."""
    place = torch.arange(len(noise.keys) * noise.keys.shape[1])
    return sample_trajectory(law, place, noise.fixed.flatten(0, 1)).token.view(*noise.keys.shape, DIM)


def test_weights_are_the_running_product_clipped_at_one() -> None:
    log_r = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_r[3, 4] = -torch.inf
    wanted = [torch.zeros(50, dtype=torch.float64)]
    for step in log_r.unbind(1):
        wanted.append((wanted[-1] + step).clamp_max(0))
    assert torch.allclose(weights(log_r), torch.stack(wanted, 1), atol=1e-12)


@pytest.mark.parametrize("target", ["equal", "unequal"])
def test_acceptance_is_what_theory_says_and_in_its_order(target: str) -> None:
    draft, law, noise = scene(target, WRONG, drafts=1, images=20_000)
    log_r = ratios(draft, law)[:, 0]
    log_w = weights(log_r)[:, -1]
    stepwise, whole = log_r.clamp_max(0).sum(-1), log_r.sum(-1)
    assert bool((stepwise <= log_w + 1e-9).all()) and bool((log_w <= whole.clamp_max(0) + 1e-9).all())
    kept = {name: rule.verify(draft, law, noise).accepted.bool() for name, rule in EXACT.items()}
    margin = 5 * 0.5 / math.sqrt(20_000)
    assert float(kept["joint"].double().mean()) == pytest.approx(float(whole.exp().clamp_max(1).mean()), abs=margin)
    assert float(kept["block"].double().mean()) == pytest.approx(float(log_w.exp().mean()), abs=margin)
    assert float(kept["chains"].double().mean()) > float(stepwise.exp().mean()) - margin  # they may also meet again
    assert not bool((kept["block"] & ~kept["joint"]).any())  # with one uniform for both


@by_rule
def test_accepted_tokens_are_the_drafts(rule: str) -> None:
    draft, law, noise = scene("unequal", 0.1)
    verdict = EXACT[rule].verify(draft, law, noise)
    assert verdict.tokens.shape == (2000, 4, DIM)
    for j in range(3):
        same = (verdict.tokens[:, j] == draft.tokens[:, j]).all(-1)
        assert bool(same[verdict.accepted > j].all()) and not bool(same[verdict.accepted == j].any())
    assert set(verdict.accepted.tolist()) == {0, 1, 2, 3}


def test_chains_leave_paths_of_the_targets_law() -> None:
    draft, law, noise = scene("unequal", 0.1)
    verdict = Chains().verify(draft, law, noise)
    flat = verdict.trajectory.states.flatten(0, 1)
    scored = score_trajectory(law, torch.arange(len(flat)), flat)
    assert torch.equal(verdict.trajectory.mean.flatten(0, 1), scored.mean)
    assert torch.equal(verdict.trajectory.std.flatten(0, 1), scored.std)
    noises = (verdict.trajectory.states[:, :, 1:] - verdict.trajectory.mean) / verdict.trajectory.std
    assert float(noises.std()) == pytest.approx(1, abs=0.01) and abs(float(noises.mean())) < 0.01


@pytest.mark.parametrize("tries", [2, 8, 64])
def test_the_number_of_tries_at_once_changes_nothing(tries: int) -> None:
    draft, law, noise = scene("unequal", 0.3)
    assert torch.equal(Joint(tries).verify(draft, law, noise).tokens, Joint(1).verify(draft, law, noise).tokens)


def test_serial_head_calls_of_a_pass() -> None:
    for wrong, most in ((0.0, (1 + STEPS, 1 + STEPS, STEPS)), (0.1, (1 + STEPS * 9, 1 + STEPS, STEPS))):
        for rule, calls in zip(EXACT.values(), most, strict=True):
            draft, law, noise = scene("equal", wrong, images=50)
            rule.verify(draft, law, noise)
            assert law.calls <= calls and (wrong or law.calls == calls)


def test_late_starters_join_at_their_step() -> None:
    _, law, noise = scene("unequal", 0.1, images=40)
    place = torch.arange(40) * 4
    x, step = noise.fixed[:, 1, 0], torch.arange(40) % (STEPS + 1)
    got = finish(law, place, x, step, noise.fixed[:, 2])
    for i in range(40):
        state = x[i : i + 1]
        for k in range(int(step[i]), STEPS):
            state = law.kernel(state, torch.tensor([k]), place[i : i + 1]).at(noise.fixed[i : i + 1, 2, k + 1])
        assert torch.equal(got[i : i + 1], state)


def test_a_residual_that_never_survives_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_MOST_TRIALS", 64)
    monkeypatch.setattr(Joint, "_against", lambda *args: torch.full(args[2].shape, torch.nan, dtype=torch.float64))
    with pytest.raises(UsageError, match="no path survived"):
        Joint().verify(*scene("equal", 1.0, images=5))


@pytest.mark.parametrize("rule", [*EXACT, "cspd"])
def test_drafts_without_paths_are_refused(rule: str) -> None:
    draft, law, noise = scene("equal", 0.1, images=5)
    with pytest.raises(ValueError, match="path"):
        ALL[rule].verify(Draft(draft.tokens), law, noise)


def test_parameters_out_of_range_are_refused() -> None:
    wrong = [
        lambda: Joint(tries=0),
        lambda: Chains(reach=-1.0),
        lambda: Chains(reach=math.nan),
        lambda: Pathwise(-0.1),
        lambda: Pathwise(math.inf),
        lambda: Cspd("other"),
        lambda: Cspd(inner_temperature=-1.0),
        lambda: Cspd(tries=-1),
        lambda: Cspd(last_std=0.0),
    ]
    for make in wrong:
        with pytest.raises(UsageError, match="is not allowed"):
            make()


# Pathwise.


@pytest.mark.parametrize("target", TARGETS)
def test_pathwise_with_epsilon_zero_is_the_sequential_sampler(target: str) -> None:
    model = TARGETS[target]
    out = decode(Pathwise(0.0), model, model.draft(0.1), range(300), length=4, drafts=2, seed=7)
    assert torch.equal(out.tokens, sequential(model, range(300), 4, seed=7))
    assert out.moved == 0
    own = decode(Pathwise(0.0), model, model, range(300), length=4, drafts=2, seed=7)
    assert torch.equal(own.tokens, out.tokens) and int(own.passes.max()) == 2


def test_pathwise_keeps_what_is_within_epsilon_and_nothing_else() -> None:
    draft, law, noise = scene("unequal", 0.2)
    own = own_tokens(law, noise)
    apart = (own[:, :3] - draft.tokens).abs().amax(-1)
    before = torch.zeros(2000, dtype=torch.int64)
    for epsilon in (0.0, 0.1, 0.2, 0.3, 0.5, 5.0):
        verdict = Pathwise(epsilon).verify(draft, law, noise)
        assert torch.equal(verdict.accepted, leading(apart <= epsilon))
        assert bool((verdict.accepted >= before).all())  # more with a larger epsilon, image by image
        before = verdict.accepted
        kept = torch.arange(4) < verdict.accepted[:, None]
        assert torch.equal(verdict.tokens[~kept], own[~kept])
        assert torch.equal(verdict.tokens[:, :3][kept[:, :3]], draft.tokens[kept[:, :3]])
        assert torch.equal(verdict.distance, (verdict.tokens - own).abs().amax(-1))
        assert float(verdict.distance.max()) <= epsilon
    assert bool((before == 3).all())


def test_pathwise_over_a_run_bounds_all_that_is_kept_together() -> None:
    draft, law, noise = scene("unequal", 0.2)
    apart = (own_tokens(law, noise)[:, :3] - draft.tokens).abs()
    for epsilon in (0.0, 0.3, 1.0, 50.0):
        verdict = Pathwise(epsilon, over="run").verify(draft, law, noise)
        together = [[float(apart[b, : n + 1].sum()) for n in range(3)] for b in range(200)]
        assert verdict.accepted[:200].tolist() == [sum(t <= epsilon for t in sums) for sums in together]
        assert bool((verdict.accepted <= Pathwise(epsilon).verify(draft, law, noise).accepted).all())
    assert bool((verdict.accepted == 3).all())


def test_pathwise_bounds_every_committed_token() -> None:
    out = decode(Pathwise(0.2), TARGETS["equal"], TARGETS["equal"].draft(0.15), range(2000), length=4, drafts=3)
    assert 0.15 < out.moved <= 0.2 and 0 < out.accepted < out.offered


# CSpD.


def slow_log_normal(x: Tensor, mean: Tensor, std: Tensor) -> float:
    parts = zip(x.tolist(), mean.tolist(), std.tolist(), strict=True)
    return sum(-(((a - m) / s) ** 2) / 2 - math.log(s) - math.log(2 * math.pi) / 2 for a, m, s in parts)


@pytest.mark.parametrize("target", ["unequal", "unequal-still"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_cspd_accepts_as_published(variant: str, target: str) -> None:
    """The formula, number by number, for one image at a time."""
    images, seen = 40, set()
    draft, law, noise = scene(target, 0.02, images=images)
    rule = Cspd(variant, last_std=0.3)
    verdict, own = rule.verify(draft, law, noise), own_tokens(law, noise)
    heat, sign = (1.0, 1.0) if variant == "paper" else (42.0, -1.0)
    for b in range(images):
        kept = []
        for j in range(3):
            path = sample_trajectory(law, torch.tensor([b * 4 + j]), noise.fixed[b, j][None])
            p_mean, p_std = path.mean[0], path.std[0].clone()
            q_mean, q_std = draft.trajectory.mean[b, j], draft.trajectory.std[b, j].clone()
            for std in (p_std, q_std):
                std[-1] = torch.where(std[-1] == 0, 0.3, std[-1])
            sigma = sum(
                math.log(q) - math.log(p) for q, p in zip(q_std[:-1].flatten(), p_std[:-1].flatten(), strict=True)
            )
            top = slow_log_normal(draft.tokens[b, j], p_mean[-1], heat * p_std[-1])
            bottom = slow_log_normal(draft.tokens[b, j], q_mean[-1], heat * q_std[-1])
            kept.append(float(uniform(fold(noise.keys[b, j], 0))) < math.exp(sign * sigma + top - bottom))
        seen.update(kept)
        first = [*kept, False].index(False)
        assert int(verdict.accepted[b]) == (first if variant == "paper" else 3)
        if variant == "released":
            same = (verdict.tokens[b, :3] == draft.tokens[b]).all(-1)
            assert same.tolist() == kept
        assert torch.equal(verdict.tokens[b, 3], own[b, 3])
    assert seen == {True, False}


def test_the_released_sigma_is_the_papers_inverted() -> None:
    draft, law, noise = scene("unequal", 0.2)
    path = sample_trajectory(law, torch.arange(8000), noise.fixed.flatten(0, 1))
    path = Trajectory(*(part.unflatten(0, (2000, 4))[:, :3] for part in path))
    paper, released = (Cspd(variant).log_sigma(draft.trajectory, path) for variant in ("paper", "released"))
    assert torch.equal(paper, -released) and float(paper.std()) > 0.1
    assert torch.allclose(
        paper, (draft.trajectory.std.log() - path.std.log())[:, :, :-1].double().sum((-1, -2)), atol=1e-5
    )


def test_cspd_falls_back_to_the_targets_own_sample() -> None:
    draft, law, noise = scene("unequal", 0.2)
    own, rows = own_tokens(law, noise), torch.arange(2000)
    share = {}
    for tries in (0, 1, 100):
        verdict = Cspd(tries=tries).verify(draft, law, noise)
        fell = (verdict.tokens == own).all(-1)[rows, verdict.accepted]
        share[tries] = float(fell[verdict.accepted < 3].double().mean())
        assert bool(fell[verdict.accepted == 3].all())
        assert torch.equal(verdict.distance, (verdict.tokens - own).abs().amax(-1))
    assert share[0] == 1 and 0 < share[1] < 0.8 and share[100] < share[1] / 2


def test_cspd_accepts_more_at_the_released_temperature() -> None:
    draft, law, noise = scene("equal-still", 0.1)
    cold, hot = (Cspd(inner_temperature=heat).verify(draft, law, noise) for heat in (0.0, 42.0))
    assert int(cold.accepted.sum()) == 0 < int(hot.accepted.sum())
    assert torch.equal(cold.accepted, Cspd(inner_temperature=1.0).verify(draft, law, noise).accepted)
