"""Laws of discrete tokens: the order of the settings, their edge cases, and sampling from a law."""

from __future__ import annotations

import math

import pytest
import torch

from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings, guide, gumbel_argmax, gumbel_margin, law_of, row_laws, weighted_draw
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


def test_a_weighted_draw_never_returns_a_token_of_zero_weight() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1e-30, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0]])
    extremes = torch.tensor([2.0**-54, 0.3, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    drawn, _ = weighted_draw(weights[:, None].expand(-1, 4, -1), extremes.expand(3, -1))
    assert bool((weights.gather(1, drawn) > 0).all())


def test_a_weighted_draw_follows_unnormalised_weights() -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 4.0])
    u = uniform(image_keys(1, 1, torch.arange(50_000)))
    drawn, _ = weighted_draw(weights.expand(len(u), -1), u)
    assert fit_p_value(torch.bincount(drawn, minlength=4), weights / 8) > 1e-3


@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 16, 17, 50])
def test_a_weighted_draw_fits_vocabularies_of_any_size(vocab: int) -> None:
    weights = torch.rand(vocab, generator=torch.Generator().manual_seed(vocab)) + 0.1
    u = uniform(image_keys(2, 1, torch.arange(50_000)))
    counts = torch.bincount(weighted_draw(weights.expand(len(u), -1), u)[0], minlength=vocab)
    assert len(counts) == vocab
    assert vocab == 1 or fit_p_value(counts, weights / weights.sum()) > 1e-3


def test_rounding_of_the_weights_hardly_ever_changes_a_weighted_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = (2 * torch.randn(4000, 2048, generator=generator)).log_softmax(-1)
    rounded = log_p + 1e-6 * torch.randn(log_p.shape, generator=generator)
    u = uniform(image_keys(3, 1, torch.arange(len(log_p))))
    plain, other = weighted_draw(log_p.exp(), u), weighted_draw(rounded.exp(), u)
    assert torch.equal(plain[0], other[0])


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


MIXED = [
    LawSettings(),
    LawSettings(guidance=2.5),
    LawSettings(guidance=4.0, temperature=0.6, top_k=5),
    LawSettings(temperature=1.7, top_p=0.8),
    LawSettings(guidance=1.5, temperature=0.9, top_k=9, top_p=0.6),
    LawSettings(guidance=3.0, temperature=0),
    LawSettings(temperature=0),
    LawSettings(top_k=1),
    LawSettings(top_k=23),
    LawSettings(guidance=2.0, top_k=1000, top_p=0.5),
    LawSettings(top_p=1e-6),
]


def laws_by_rows(logits: torch.Tensor, settings: list[LawSettings], filtered: bool = True) -> torch.Tensor:
    """`row_laws` under these settings, which writes greedy choices as a top-k of -1."""
    guidance, temperature, top_p = (
        torch.tensor(values)
        for values in zip(*((s.guidance, s.temperature or 1.0, s.top_p) for s in settings), strict=True)
    )
    top_k = torch.tensor([s.top_k if s.temperature else -1 for s in settings])
    return row_laws(logits, guidance, temperature, *([top_k, top_p] if filtered else []))


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("copies", [1, 2])
def test_laws_of_mixed_rows_are_those_of_each_row_alone(copies: int, spread: float) -> None:
    settings = [s for s in MIXED if copies == 2 or not s.guided]
    batch = len(settings)
    logits = spread * torch.randn(copies * batch, 3, 23, generator=torch.Generator().manual_seed(copies))
    found = laws_by_rows(logits, settings)
    assert found.shape == (batch, 3, 23)
    for row, s in enumerate(settings):
        alone = logits[[row, batch + row]] if s.guided else logits[[row]]
        wanted = law_of(alone, s)[0]
        assert torch.equal(found[row] > -math.inf, wanted > -math.inf), s
        assert torch.allclose(found[row], wanted, atol=1e-5), s


def test_laws_of_rows_without_filters_leave_nothing_out() -> None:
    settings = [s for s in MIXED if s.temperature and not s.top_k and s.top_p == 1] + [LawSettings(1.5, 0.7)]
    logits = torch.randn(2 * len(settings), 2, 23, generator=torch.Generator().manual_seed(3))
    plain = laws_by_rows(logits, settings, filtered=False)
    assert torch.equal(plain, laws_by_rows(logits, settings))
    assert bool(torch.isfinite(plain).all())


def test_a_row_without_guidance_has_the_same_law_among_guided_ones_to_the_bit() -> None:
    logits = 3 * torch.randn(6, 2, 23, generator=torch.Generator().manual_seed(4))
    among = laws_by_rows(logits, [LawSettings(), LawSettings(2.0), LawSettings(top_k=5)])
    alone = laws_by_rows(logits[:3], [LawSettings(), LawSettings(), LawSettings(top_k=5)])
    assert torch.equal(among[[0, 2]], alone[[0, 2]])


def test_ties_at_the_threshold_of_a_row_are_all_kept() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).expand(2, 1, 5)
    found = laws_by_rows(logits, [LawSettings(top_k=2), LawSettings(top_p=0.6)])
    assert (found[:, 0] > -math.inf).tolist() == [[True, True, True, True, False]] * 2


def test_choices_and_margins_are_the_same_in_their_compiling_form(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(5)
    log_p = (2 * torch.randn(6, 4, 23, generator=made)).log_softmax(-1)
    log_p[:3] = log_p[:3].masked_fill(torch.rand(3, 4, 23, generator=made) < 0.7, -math.inf)
    log_p[3] = -math.inf
    log_p[3, :, 7] = 0.0  # one possible token: its margin is infinite
    noise = gumbel(image_keys(0, 0, torch.arange(log_p.numel()))).view(log_p.shape)
    noise[4], log_p[4] = 0.0, 0.0  # a tie: the first one
    plain = gumbel_argmax(log_p, noise), gumbel_margin(log_p, noise)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, theirs in zip((gumbel_argmax(log_p, noise), gumbel_margin(log_p, noise)), plain, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert plain[1][3].tolist() == [math.inf] * 4 and plain[1][4].tolist() == [0.0] * 4
