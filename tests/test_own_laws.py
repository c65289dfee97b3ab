"""Laws, draws and noise by our kernels against torch's."""

from __future__ import annotations

import pytest
import torch

from bozzetto.laws.categorical import LawSettings, gumbel_argmax, gumbel_margin, law_of, row_laws
from bozzetto.laws.noise import gumbel_rows
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
