"""The ceiling probe measures 1 - TV between successive laws and changes no token."""

import torch

from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.evaluate.bench import CeilingProbe
from bozzetto.laws.categorical import LawSettings
from bozzetto.rules.seed_exact import SeedExact
from tabular import TabularTarget

_LABELS, _INDEX = torch.zeros(50, dtype=torch.int64), torch.arange(50)


def _probed(target: TabularTarget, window: int) -> tuple[CeilingProbe, torch.Tensor]:
    probe = CeilingProbe(window, target.length)
    result = EagerBatch(target, probe, SeedExact(), LawSettings()).run(_LABELS, 3, _INDEX)
    return probe, result.tokens


def test_the_probe_changes_no_token() -> None:
    target = TabularTarget(4, 5)
    _, tokens = _probed(target, 3)
    plain = EagerBatch(target, Jacobi(3), SeedExact(), LawSettings()).run(_LABELS, 3, _INDEX)
    assert torch.equal(tokens, plain.tokens)


def test_laws_that_ignore_their_prefix_never_change() -> None:
    target = TabularTarget(4, 5)
    target.tables[:] = torch.randn(4)
    probe, _ = _probed(target, 3)
    assert torch.allclose(probe.by_offset(), torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_laws_that_flip_with_the_token_before_have_ceiling_zero() -> None:
    target = TabularTarget(2, 4)
    for n in range(target.length):
        last = torch.arange(2**n) % 2  # the last token of each prefix; the next one is always the other
        favoured = 1 - last if n else last
        rows = slice(int(target.offsets[n]), int(target.offsets[n + 1]))
        target.tables[:, rows] = 80.0 * torch.nn.functional.one_hot(favoured, 2)
    probe, _ = _probed(target, 2)
    assert float(probe.by_offset()[0]) < 1e-6
