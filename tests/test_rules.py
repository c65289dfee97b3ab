"""Rules on single verifications: the law of their output, acceptance rates, run lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bozzetto.drafts import Draft
from bozzetto.laws.categorical import gumbel_argmax, weighted_draw
from bozzetto.laws.noise import fold, gumbel, image_keys, uniform
from bozzetto.rules.base import Noise, Rule, leading
from bozzetto.rules.exact import Exact, residual
from bozzetto.rules.seed_exact import SeedExact
from toys import WINDOW_RULES, fit_p_value, make_rule

TRIALS, V = 60_000, 5
P = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
AFTER = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.5])
LAWS_Q = {
    "equal": P,
    "mixed": torch.tensor([0.1, 0.5, 0.1, 0.1, 0.2]),
    "disjoint": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
    "narrow": torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]),
}


def one_position(rule: Rule, q: Tensor, coupled: bool) -> tuple[Draft, Tensor, Tensor]:
    """Verify TRIALS drafts x ~ q of one position. Returns draft, tokens [TRIALS, 2], accepted [TRIALS]."""
    keys = image_keys(5, 0, torch.arange(TRIALS))
    positions = fold(keys[:, None], torch.arange(2))
    noise = Noise(
        gumbel(fold(positions[..., None], torch.arange(V))),
        uniform(fold(positions[..., None], torch.arange(100, 102))),
    )
    free, _ = weighted_draw(q.expand(TRIALS, V), uniform(fold(keys, 99)))
    tokens = gumbel_argmax(q.log(), noise.fixed[:, 0]) if coupled else free
    draft = Draft(tokens[:, None], q.log().expand(TRIALS, 1, V))
    verdict = rule.verify(draft, torch.stack([P, AFTER]).log().expand(TRIALS, 2, V), noise)
    return draft, verdict.tokens, verdict.accepted


@pytest.mark.parametrize("q", LAWS_Q.values(), ids=LAWS_Q)
def test_exact_turns_drafts_of_q_into_tokens_of_p_and_accepts_one_minus_tv(q: Tensor) -> None:
    draft, tokens, accepted = one_position(Exact(), q, coupled=False)
    counts = torch.bincount(tokens[:, 0], minlength=V)
    assert int(counts[P == 0].sum()) == 0
    assert fit_p_value(counts, P) > 1e-3
    overlap = float(torch.minimum(P, q).sum())
    assert float(accepted.double().mean()) == pytest.approx(overlap, abs=4 * 0.5 / TRIALS**0.5)
    assert bool((tokens[:, 0] == draft.tokens[:, 0])[accepted == 1].all())
    assert fit_p_value(torch.bincount(tokens[:, 1], minlength=V), AFTER) > 1e-3  # the bonus token


@pytest.mark.parametrize("q", LAWS_Q.values(), ids=LAWS_Q)
def test_seed_exact_gives_p_and_agrees_at_least_as_often_as_the_gumbel_coupling_bound(q: Tensor) -> None:
    _, tokens, accepted = one_position(SeedExact(), q, coupled=True)
    assert fit_p_value(torch.bincount(tokens[:, 0], minlength=V), P) > 1e-3
    tv = 1 - float(torch.minimum(P, q).sum())
    assert float(accepted.double().mean()) >= (1 - tv) / (1 + tv) - 4 * 0.5 / TRIALS**0.5


def test_exact_keeps_every_draft_of_an_equal_law() -> None:
    assert bool((one_position(Exact(), P, coupled=False)[2] == 1).all())


def test_residual_is_the_positive_part_or_p_where_the_laws_agree() -> None:
    q = LAWS_Q["mixed"]
    both = residual(P.log().expand(2, V), torch.stack([q, P]).log())
    assert both[0].tolist() == pytest.approx([0.3, 0.0, 0.1, 0.0, 0.0], abs=1e-6)
    assert both[1].tolist() == pytest.approx(P.tolist())


def test_exact_redraws_behind_a_reject_but_counts_up_to_it() -> None:
    """Drafts 0 0 0 under laws that allow, forbid, allow token 0: one accepted, three coupled tokens."""
    sure, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    draft = Draft(torch.zeros(1, 3, dtype=torch.int64), sure.expand(1, 3, 2))
    noise = Noise(torch.zeros(1, 4, 2), torch.full((1, 4, 2), 0.5, dtype=torch.float64))
    verdict = Exact().verify(draft, torch.stack([sure, other, sure, other])[None], noise)
    assert verdict.tokens.tolist() == [[0, 1, 0, 1]]
    assert verdict.accepted.tolist() == [1]


@pytest.mark.parametrize("missing", ["law", "uniforms"])
def test_exact_refuses_drafts_without_law_or_uniforms(missing: str) -> None:
    log_q = None if missing == "law" else torch.zeros(1, 1, 2)
    uniforms = None if missing == "uniforms" else torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="exact"):
        Exact().verify(
            Draft(torch.zeros(1, 1, dtype=torch.int64), log_q),
            torch.zeros(1, 2, 2),
            Noise(torch.zeros(1, 2, 2), uniforms),
        )


def test_seed_exact_accepts_the_leading_run_of_argmax_tokens() -> None:
    best = torch.tensor([[2, 0, 1, 1]])  # argmax at the three drafted positions and the one after
    log_p = torch.nn.functional.one_hot(best, 3).float().expand(5, -1, -1)
    drafts = torch.tensor([[2, 0, 1], [2, 0, 0], [2, 1, 1], [0, 0, 1], [1, 1, 0]])
    verdict = SeedExact().verify(Draft(drafts), log_p, Noise(torch.zeros(5, 4, 3)))
    assert verdict.accepted.tolist() == [3, 2, 1, 0, 0]
    assert torch.equal(verdict.tokens, best.expand(5, -1))


def test_leading_counts_the_run_of_true_from_the_left() -> None:
    agree = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    assert leading(agree).tolist() == [3, 1, 0]
    assert leading(agree[:, :0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", WINDOW_RULES)
def test_an_empty_draft_gets_the_gumbel_token_and_names_match_the_registry(name: str) -> None:
    rule = make_rule(name)
    log_p, noise = torch.randn(6, 1, V).log_softmax(-1), torch.randn(6, 1, V)
    empty = Draft(torch.empty(6, 0, dtype=torch.int64))
    verdict = rule.verify(empty, log_p, Noise(noise, torch.full((6, 1, 2), 0.5, dtype=torch.float64)))
    assert torch.equal(verdict.tokens, gumbel_argmax(log_p, noise))
    assert verdict.accepted.tolist() == [0] * 6
    assert rule.name == name
