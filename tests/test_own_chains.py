"""Chains of denoising heads by our kernels, against torch's: whole, coupled, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.gaussian import CachedGaussian, GaussianConfig, GaussianDrafter
from bozzetto.drafts import Draft, Verdict
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.chain import ChainLaw, Trajectory
from bozzetto.laws.gaussian import gaussian_chain
from bozzetto.laws.noise import NormalField, fold, image_keys
from bozzetto.laws.noise import normal as normal_of
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.chains import Chains
from bozzetto.rules.cspd import Cspd
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.engine import LinearMap
from bozzetto.runtime.gauss import own_gaussian
from bozzetto.runtime.native import call
from bozzetto.targets.drift import DriftTarget
from bozzetto.targets.heads import FlowLaw, PackedDenoiser
from test_drift import MODEL as DRIFT
from test_heads import CONDITION, KINDS, NETS, D, Law, normal, schedule_of, times_of
from test_path_sketch import SCHEDULE, random_sketch

NEAR = {torch.float32: 2e-5, torch.bfloat16: 0.05}
DTYPES = [torch.float32, torch.bfloat16]
STEPS = 6


def laws(kind: type[Law], guidance: float, dtype: torch.dtype, batch: int, width: int = 3) -> tuple[Any, Any]:
    """A law of torch's and the same of our kernels."""
    made = []
    for own in (False, True):
        head = PackedDenoiser(NETS[kind], times_of(kind), dtype, own)
        condition = normal(1, 3, width, CONDITION)[:batch].flatten(0, 1)
        condition = condition if guidance == 1 else torch.cat([condition, normal(2, *condition.shape)])
        made.append(kind(schedule_of(kind), head, condition, (batch, width), guidance, 0.9))
    return made[0], made[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 1.0), (1, 2.0), (3, 2.0), (1, 3)])
def test_whole_chains_are_torchs(kind: type[Law], dtype: torch.dtype, batch: int, guidance: float) -> None:
    plain, own = laws(kind, guidance, dtype, batch)
    noise = normal(5, batch * 3, STEPS + 1, D)
    wanted, found = plain.run(noise), own.run(noise)
    for name in ("states", "mean", "std"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours - theirs).norm() <= NEAR[dtype] * theirs.norm()
    assert (own.calls, own.rows) == (plain.calls, plain.rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_place_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    noise = normal(5, 9 * 3, STEPS + 1, D)[:9]
    _, many = laws(FlowLaw, 1.0, dtype, 3)
    _, one = laws(FlowLaw, 1.0, dtype, 1)
    assert torch.equal(one.run(noise[:3]).states, many.run(noise).states[:3])


def drafts(law: ChainLaw, batch: int, how: str) -> Draft:
    """Two drafted paths per image: `near` or `far` from what the law draws, with its deviations, its `own`, or these
    with `other` deviations."""
    noise = normal(7, batch, 3, STEPS + 1, D)
    path = law.run(noise.flatten(0, 1))
    path = Trajectory(*(part.unflatten(0, (batch, 3))[:, :2] for part in path))
    if how != "own":
        off = {"near": 0.02, "far": 30.0, "other": 0.0}[how] * normal(8, *path.mean.shape)
        states = torch.cat([path.states[:, :, :1], path.states[:, :, 1:] + off], 2)
        path = Trajectory(states, path.mean + off, path.std * (1.02 if how == "other" else 1.0))
    return Draft(path.token, trajectory=path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 1.0), (1, 2.0), (3, 2.0)])
@pytest.mark.parametrize("rule", [Chains(), Cspd(), Cspd("released"), Cspd("released", 1.0, 1)])
def test_verdicts_are_torchs(rule: Rule, dtype: torch.dtype, batch: int, guidance: float) -> None:
    """Whether no draft is kept, all are, or some."""
    accepted = []
    for how in ("near", "far", "own", "other"):
        plain, own = laws(FlowLaw, guidance, dtype, batch)
        draft, keys = drafts(plain, batch, how), fold(torch.arange(batch)[:, None], torch.arange(3))
        noise = Noise(normal(7, batch, 3, STEPS + 1, D), keys=keys)
        wanted, found = rule.verify(draft, plain, noise), rule.verify(draft, own, noise)
        if dtype == torch.float32 or how == "far":
            assert torch.equal(found.accepted, wanted.accepted)
            assert (found.tokens - wanted.tokens).norm() <= 5 * NEAR[dtype] * wanted.tokens.norm()
        accepted.append(float(found.accepted.float().mean()))
        if how in ("near", "own"):
            _, one = laws(FlowLaw, 1.0, dtype, 1)
            many = rule.verify(draft, own, noise) if guidance == 1 else None
            assert many is None or torch.equal(rule.verify(draft, one, noise).tokens, many.tokens)
    if rule.exact:
        assert accepted[1] == 0 and (dtype != torch.float32 or accepted[2] == 2)


def test_normal_noise_is_torchs() -> None:
    keys = fold(torch.arange(40)[:, None], torch.arange(7)).flatten()
    found, wanted = torch.empty(len(keys), 50), normal_of(fold(keys[:, None], torch.arange(50)))
    call("bozzetto_normal", keys, len(keys), 50, found)
    assert int((found != wanted).sum()) <= 1  # float64 rounds otherwise now and then
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_drift_variants_one_step_is_torchs(dtype: torch.dtype, guidance: float) -> None:
    """Its condition is of an odd length: the features and the entropy."""
    plain, own = DriftTarget(DRIFT), DriftTarget(DRIFT, dtype).owned(DRIFT.flow)
    features = normal(1, 2 if guidance != 1 else 1, 3, DRIFT.flow.config.dim + 1)
    noise = normal(2, 3, 2, DRIFT.flow.config.token_dim)
    wanted, found = (t.law(features, guidance, 0.9).run(noise).token for t in (plain, own))
    assert (found - wanted).norm() <= NEAR[dtype] * wanted.norm()


# Chains of Gaussians, and drafts from them.

CPU = torch.device("cpu")
SAMPLER = SCHEDULE.ancestry(CPU), SCHEDULE.std.float()


def test_chains_of_gaussians_are_torchs() -> None:
    centre, noise = normal(1, 7, 3), normal(2, 7, 6, 3)
    law = gaussian_chain(centre, torch.full_like(centre, 0.7), *SAMPLER, (7, 1))
    found = own_gaussian(centre, torch.full_like(centre, 0.49), (*SAMPLER, None, None), noise)
    for ours, theirs in zip(found, law.sample(noise), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def drafted(batch: int, guidance: float, dtype: torch.dtype, own: bool) -> Draft:
    """What a random drafter proposes behind five committed tokens, of which the first image has two."""
    torch.manual_seed(4)
    copies, weight = 1 if guidance == 1 else 2, 0.3 * torch.randn(16, 3)
    embedding = (LinearMap if own else Dense)(weight, None, dtype)
    sketcher = CachedGaussian(random_sketch(GaussianConfig(16, 2, 24, 3, 3, 16)), embedding)
    drafter = GaussianDrafter(sketcher, 3, *SAMPLER, 3)
    keys, noise = image_keys(0, 2, torch.arange(batch)), NormalField(0, torch.arange(batch), 9, 5, 3)
    settings = LawSettings(guidance=guidance, temperature=0.8)
    drafter.begin(Start(torch.zeros(batch, dtype=torch.int64), 9, settings, noise, keys, with_laws=True))
    count = torch.full((batch,), 5)
    count[0] = 2
    tokens, features = normal(5, 3, 5, 3)[:batch], normal(6, 3, 5, 16)[:batch]
    features = torch.cat([features, features.flip(1)][:copies]).to(dtype)
    drafter.observe(Observation(None, Verdict(tokens, count - 1), count, 5, torch.zeros_like(count), features))
    return drafter.propose(batch, 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 1.0), (1, 2.5), (3, 2.5)])
@torch.no_grad()
def test_drafts_from_gaussians_and_their_laws_are_torchs(batch: int, guidance: float, dtype: torch.dtype) -> None:
    wanted, found = (drafted(batch, guidance, dtype, own) for own in (False, True))
    assert wanted.trajectory is not None and found.trajectory is not None and found.law is not None
    near = {"atol": 3 * NEAR[dtype], "rtol": 3 * NEAR[dtype]}
    torch.testing.assert_close(found.tokens, wanted.tokens, **near)
    for ours, theirs in zip(found.trajectory, wanted.trajectory, strict=True):
        torch.testing.assert_close(ours, theirs, **near)
    states, mean = found.trajectory.states.flatten(0, 1), found.trajectory.mean.flatten(0, 1)
    for step in range(5):  # the law is the one the paths were drawn from
        torch.testing.assert_close(
            found.law.all_places(states[:, step], step).mean, mean[:, step], atol=1e-5, rtol=1e-5
        )
    if batch > 1 and dtype == torch.float32:
        assert torch.equal(drafted(1, guidance, dtype, True).tokens, found.tokens[:1])
