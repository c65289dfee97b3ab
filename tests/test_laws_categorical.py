"""Laws of discrete tokens: the order of the settings, their edge cases, and sampling from a law."""

from __future__ import annotations

import math

import pytest
import torch

from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings, guide, gumbel_argmax, gumbel_margin, inverse_cdf, law_of
from bozzetto.laws.noise import gumbel, image_keys, uniform
from toys import fit_p_value


def slow_law(cond: list[float], uncond: list[float], s: LawSettings) -> list[float]:
    """Probabilities by the book, for one position: guidance, temperature, top-k, top-p."""
    logits = [(u + (c - u) * s.guidance) / s.temperature for c, u in zip(cond, uncond, strict=True)]
    if s.top_k:
        threshold = sorted(logits, reverse=True)[min(s.top_k, len(logits)) - 1]
        logits = [x if x >= threshold else -math.inf for x in logits]
    total = sum(math.exp(x) for x in logits)
    law = [math.exp(x) / total for x in logits]
    kept, mass = [], 0.0
    for token in sorted(range(len(law)), key=lambda v: -law[v]):
        if mass < s.top_p:
            kept.append(token)
            mass += law[token]
    return [law[v] / mass if v in kept else 0.0 for v in range(len(law))]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 4, 7, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.75, 1e-6])
def test_law_equals_the_slow_reference(guidance: float, temperature: float, top_k: int, top_p: float) -> None:
    settings = LawSettings(guidance, temperature, top_k, top_p)
    logits = 2 * torch.randn(2, 3, 2, 7, generator=torch.Generator().manual_seed(0))  # [cond|uncond, B, W, V]
    rows = logits.flatten(0, 1) if settings.guided else logits[0]
    law = law_of(rows, settings).exp()
    assert law.shape == (3, 2, 7)
    for b in range(3):
        for w in range(2):
            wanted = slow_law(logits[0, b, w].tolist(), logits[1, b, w].tolist(), settings)
            assert law[b, w].tolist() == pytest.approx(wanted, abs=1e-5)


def test_guidance_one_is_the_conditional_and_extrapolates_beyond() -> None:
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    assert guide(cond, uncond, 1.0).tolist() == [1.0, 2.0]
    assert guide(cond, uncond, 2.0).tolist() == [2.0, 1.0]


def test_ties_at_the_top_k_threshold_are_all_kept() -> None:
    law = law_of(torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0]]]), LawSettings(top_k=2)).exp()[0, 0]
    assert (law > 0).tolist() == [True, True, True, True, False]
    assert float(law.sum()) == pytest.approx(1)


def test_top_p_always_keeps_the_most_likely_token() -> None:
    law = law_of(torch.tensor([[[0.0, 5.0, 1.0]]]), LawSettings(top_p=1e-9)).exp()
    assert law[0, 0].tolist() == [0.0, 1.0, 0.0]


def test_temperature_zero_is_one_hot_at_the_guided_argmax() -> None:
    cond, uncond = torch.tensor([[[1.0, 2.0, 0.0]]]), torch.tensor([[[0.0, 3.0, 0.0]]])
    law = law_of(torch.cat([cond, uncond]), LawSettings(guidance=3.0, temperature=0)).exp()
    assert law[0, 0].tolist() == [1.0, 0.0, 0.0]


def test_laws_are_float32_whatever_the_logits_are() -> None:
    assert law_of(torch.zeros(1, 1, 3, dtype=torch.bfloat16), LawSettings()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance", 0.5),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(name: str, value: float) -> None:
    with pytest.raises(UsageError) as caught:
        LawSettings(**{name: value})
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


def test_inverse_cdf_never_returns_a_token_of_zero_weight() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1e-30, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0]])
    extremes = torch.tensor([2.0**-54, 0.3, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    drawn = inverse_cdf(weights[:, None].expand(-1, 4, -1), extremes.expand(3, -1))
    assert bool((weights.gather(1, drawn) > 0).all())


def test_inverse_cdf_follows_unnormalised_weights() -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 4.0])
    u = uniform(image_keys(1, 1, torch.arange(50_000)))
    drawn = inverse_cdf(weights.expand(len(u), -1), u)
    assert fit_p_value(torch.bincount(drawn, minlength=4), weights / 8) > 1e-3


def test_gumbel_argmax_follows_the_law_and_its_support() -> None:
    law = torch.tensor([0.5, 0.0, 0.2, 0.25, 0.05])
    keys = image_keys(0, 0, torch.arange(50_000 * 5)).view(-1, 5)
    drawn = gumbel_argmax(law.log(), gumbel(keys))
    counts = torch.bincount(drawn, minlength=5)
    assert int(counts[1]) == 0
    assert fit_p_value(counts, law) > 1e-3


def test_gumbel_margin_is_the_gap_of_the_two_best() -> None:
    log_p, noise = torch.tensor([[0.0, 1.0, 5.0], [0.0, -math.inf, -math.inf]]), torch.tensor([0.5, 0.25, 0.0])
    assert gumbel_margin(log_p, noise).tolist() == [3.75, math.inf]
