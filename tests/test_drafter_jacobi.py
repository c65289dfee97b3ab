"""The Jacobi window: what is carried, what enters, and the law that goes with each draft."""

from __future__ import annotations

import torch

from bozzetto.drafters.base import Observation
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import Verdict
from bozzetto.laws.noise import GumbelField
from toys import start_of

W, V = 4, 3


def seen_once(with_laws: bool = True) -> tuple[Jacobi, Observation, GumbelField]:
    """Image 0 stands at position 0 and commits one token; image 1 stands at 5 and commits three."""
    noise = GumbelField(1, torch.tensor([8, 9]), 16, V)
    noise.fill(16)
    jacobi = Jacobi(W)
    jacobi.begin(start_of(noise, with_laws))
    seen = Observation(
        log_p=torch.randn(2, W, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1),
        verdict=Verdict(torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), torch.tensor([0, 2])),
        committed=torch.tensor([1, 3]),
        longest=3,
        start=torch.tensor([0, 5]),
    )
    jacobi.observe(seen)
    return jacobi, seen, noise


def test_the_first_pass_has_no_drafts() -> None:
    jacobi = Jacobi(W)
    jacobi.begin(start_of(GumbelField(1, torch.tensor([8, 9]), 16, V), True))
    assert jacobi.propose(2, 15).length == 0
    assert jacobi.max_nodes == W - 1


def test_tokens_behind_the_committed_ones_are_carried_with_this_passs_laws() -> None:
    jacobi, seen, _ = seen_once()
    draft = jacobi.propose(2, 15)
    assert draft.tokens[0].tolist() == [1, 2, 0]  # columns 1, 2, 3
    assert torch.equal(draft.log_q[0], seen.log_p[0, 1:])
    assert int(draft.tokens[1, 0]) == 0  # column 3
    assert torch.equal(draft.log_q[1, 0], seen.log_p[1, 3])


def test_entering_positions_are_drawn_from_the_last_law_with_their_own_noise() -> None:
    jacobi, seen, noise = seen_once()
    draft = jacobi.propose(2, 15)
    last = seen.log_p[1, 3]
    for slot, position in ((1, 9), (2, 10)):  # image 1 goes on at position 8
        assert int(draft.tokens[1, slot]) == int((last + noise.table[1, position]).argmax())
        assert torch.equal(draft.log_q[1, slot], last)


def test_laws_are_left_out_when_the_rule_needs_none() -> None:
    with_laws, without = seen_once(True)[0].propose(2, 15), seen_once(False)[0].propose(2, 15)
    assert without.log_q is None
    assert torch.equal(without.tokens, with_laws.tokens)


def test_limit_cuts_and_keep_selects_tokens_and_laws_together() -> None:
    jacobi, _, noise = seen_once()
    whole = jacobi.propose(2, 15)
    cut = jacobi.propose(2, 2)
    assert torch.equal(cut.tokens, whole.tokens[:, :2])
    assert torch.equal(cut.log_q, whole.log_q[:, :2])
    jacobi.keep(torch.tensor([1]))
    noise.keep(torch.tensor([1]))
    kept = jacobi.propose(1, 15)
    assert torch.equal(kept.tokens, whole.tokens[1:])
    assert torch.equal(kept.log_q, whole.log_q[1:])


def test_window_one_never_drafts() -> None:
    jacobi, seen = Jacobi(1), seen_once()[1]
    jacobi.begin(start_of(GumbelField(1, torch.tensor([8, 9]), 16, V), True))
    jacobi.observe(seen)
    assert jacobi.propose(2, 15).length == 0


def test_a_window_that_widens_keeps_the_drafts_it_had() -> None:
    narrow, seen, noise = seen_once()
    before = narrow.propose(2, 15).tokens
    wide = Jacobi(W, lambda live: 7 if live == 1 else W)
    wide.begin(start_of(noise, True))
    wide.observe(seen)
    assert wide.max_nodes == 6
    assert torch.equal(wide.propose(2, 15).tokens, before)
    wide.keep(torch.tensor([1]))
    noise.keep(torch.tensor([1]))
    draft = wide.propose(1, 15)
    assert draft.length == 6
    assert torch.equal(draft.tokens[:, :3], before[1:])
    assert int(draft.tokens[0, 5]) == int((seen.log_p[1, 3] + noise.table[0, 13]).argmax())
