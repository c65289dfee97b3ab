"""Laws, draws and noise by our kernels against torch's."""

from __future__ import annotations

import pytest
import torch

from bozzetto.decoding.advance import Advance, SlotState
from bozzetto.laws.categorical import LawSettings, gumbel_argmax, gumbel_margin, law_of, row_laws
from bozzetto.laws.noise import gumbel_rows
from bozzetto.rules.exact import Exact
from bozzetto.rules.seed_exact import SeedExact
from bozzetto.runtime.laws import gumbel_draw, own_gumbel_rows, own_law_of, own_laws
from bozzetto.runtime.native import library

VOCABS = pytest.mark.parametrize("vocab", [1, 7, 16, 50, 2048])


def logits(rows: int, vocab: int) -> torch.Tensor:
    return 3 * torch.randn(rows, 4, vocab, generator=torch.Generator().manual_seed(vocab))


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours.exp(), theirs.exp(), atol=2e-6, rtol=1e-5)


@VOCABS
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_laws_of_images_with_settings_of_their_own(vocab: int, cut: bool, guided: bool) -> None:
    guidance, temperature = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.7, 1.3])
    cuts = (torch.tensor([0, 5, -1]), torch.tensor([0.9, 0.5, 1.0])) if cut else ()
    given = logits(6 if guided else 3, vocab), guidance, temperature, *cuts
    agree(own_laws(*given), row_laws(*given))


@VOCABS
@pytest.mark.parametrize(
    "settings",
    [
        LawSettings(2.0),
        LawSettings(1.0, 0.8, 5, 0.7),
        LawSettings(3.0, 0.0),
        LawSettings(1.0, 1.0, 0, 0.3),
        LawSettings(2.0, 1.2, 3),
        LawSettings(5, 2, 3, 1),  # whole numbers
    ],
)
def test_laws_of_one_setting(vocab: int, settings: LawSettings) -> None:
    given = logits(4, vocab)
    agree(own_law_of(given, settings), law_of(given, settings))


def test_a_law_does_not_depend_on_the_rows_beside_it() -> None:
    given = logits(3, 2048)
    whole = own_law_of(given, LawSettings(1.0, 0.9, 100, 0.8))
    assert torch.equal(own_law_of(given[1:2, 2:3].contiguous(), LawSettings(1.0, 0.9, 100, 0.8))[0, 0], whole[1, 2])


@VOCABS
def test_draws_are_torchs_to_the_bit(vocab: int) -> None:
    library()
    laws, noise = law_of(logits(2, vocab), LawSettings(top_k=min(vocab, 5))), torch.randn(2, 4, vocab)
    tokens, margins = gumbel_draw(laws, noise)
    assert torch.equal(tokens, gumbel_argmax(laws, noise)) and torch.equal(margins, gumbel_margin(laws, noise))
    one, _ = gumbel_draw(laws[:, :1], noise)  # a law for many places
    assert torch.equal(one, gumbel_argmax(laws[:, :1], noise))


def test_of_equal_numbers_the_first_is_drawn() -> None:
    library()
    laws = torch.zeros(1, 40)
    laws[0, [3, 19, 20]] = 1.0
    assert [part.item() for part in gumbel_draw(laws, torch.zeros(1, 40))] == [3, 0.0]


@VOCABS
def test_noise_is_that_of_the_seeds(vocab: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (50,), generator=torch.Generator().manual_seed(1))
    keys[:2] = torch.tensor([0, -1])
    torch.testing.assert_close(
        own_gumbel_rows(keys, vocab), gumbel_rows(keys, torch.arange(vocab)), atol=1e-6, rtol=1e-6
    )


# What follows a pass of windows (runtime/advance.h): the rules that say exact, by our kernel.


def slots(batch: int, logits: torch.Tensor, log_q: torch.Tensor, seed: int, drafted: bool = True) -> SlotState:
    """Windows of images whose drafts were drawn from log_q [W - 1, V]."""
    made, (width, vocab) = torch.Generator().manual_seed(seed), logits.shape[-2:]
    drafts = torch.multinomial(log_q.exp(), batch, True, generator=made).T
    noise = -torch.empty(batch, 2 * width, vocab).exponential_(generator=made).log()
    whole, ones = torch.zeros(batch, dtype=torch.int64), torch.ones(batch)
    return SlotState(
        inputs=torch.cat([whole[:, None], drafts], 1),
        count=whole.clone(),
        drafted=whole + (width - 1 if drafted else 0),
        guidance=2 * ones,
        temperature=0.8 * ones,
        top_k=whole.clone(),
        top_p=ones.clone(),
        keys=torch.randint(2**62, (batch,), generator=made),
        passes=whole.clone(),
        noise=noise,
        tokens=torch.zeros(batch, 4 * width, dtype=torch.int64),
        laws=log_q.expand(batch, -1, -1).contiguous(),
        kept=torch.zeros(batch, 1, 1, 1),
    )


def advanced(rule: Exact | SeedExact, given: SlotState, logits: torch.Tensor, own: bool) -> list[torch.Tensor]:
    width = logits.shape[1]
    found = Advance(rule, 3 * width, width, False, None, own)(logits, None, *given.tensors())
    return [*found, given.tokens]


def some_laws(kind: str, copies: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [copies, 3, V] of a pass, its laws [3, V], and the laws [2, V] that drafts come from."""
    made = torch.Generator().manual_seed(vocab + copies)
    given = 2 * torch.randn(copies, 3, vocab, generator=made)
    if kind == "rejected":
        given[..., 0] = -1e4  # never drawn, always drafted
    settings = torch.full((1,), 2.0), torch.full((1,), 0.8)
    log_p = row_laws(given, *settings)[0]
    other = torch.randn(2, vocab, generator=made).log_softmax(-1)
    certain = torch.full((2, vocab), -torch.inf).index_fill_(1, torch.tensor([0]), 0.0)
    return given, log_p, {"other": other, "accepted": log_p[:2], "rejected": certain}[kind]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("kind", ["other", "accepted", "rejected"])
def test_tokens_of_coupled_windows_have_the_targets_law(kind: str, copies: int) -> None:
    batch, vocab = 60_000, 5
    given, log_p, log_q = some_laws(kind, copies, vocab)
    logits = given.repeat_interleave(batch, 0)
    found = advanced(Exact(), slots(batch, logits, log_q, 7), logits, True)
    tokens, accepted = found[-1][:, :3], found[4][1]
    pairs = torch.bincount((tokens[:, 0] * vocab + tokens[:, 1]) * vocab + tokens[:, 2], minlength=vocab**3)
    p = log_p.double().exp()
    wanted = batch * torch.einsum("a,b,c->abc", *p).flatten()
    seen = wanted > 5
    chi = ((pairs - wanted).square() / wanted)[seen].sum() + (pairs[~seen].sum() - wanted[~seen].sum()).abs()
    freedom = int(seen.sum())
    assert chi < freedom + 6 * (2 * freedom) ** 0.5 + 30
    assert kind == "other" or bool((accepted == (2 if kind == "accepted" else 0)).all())


@pytest.mark.parametrize("rule", [Exact(), SeedExact()], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("drafted", [True, False])
def test_what_follows_a_pass_is_torchs(rule: Exact | SeedExact, batch: int, copies: int, drafted: bool) -> None:
    for seed in range(40):
        given, _, log_q = some_laws("other", copies, 50)
        logits = given.repeat_interleave(batch, 0)
        both = [advanced(rule, slots(batch, logits, log_q, seed, drafted), logits, own) for own in (True, False)]
        for found in both:  # what is not committed and no draft is written again before anybody reads it
            behind = torch.arange(found[-1].shape[1]) >= (3 if drafted else found[1][:, None])
            found[-1] = found[-1].masked_fill(behind, 0)
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
