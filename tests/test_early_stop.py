"""How far a drafter goes: it stops where drafts are not likely to be reached, learns, and asks no other image."""

from __future__ import annotations

import pytest
import torch

from bozzetto.drafters.early_stop import EarlyStop, flatness_of
from bozzetto.drafts import Verdict
from bozzetto.errors import UsageError
from bozzetto.methods.table import read_method
from tabular import TabularTarget
from toys import constant_target, decode, sketched

V = 8
UNIFORM, CERTAIN = torch.full((V,), 1 / V).log(), torch.eye(V)[0].log()
CPU = torch.device("cpu")


def level(early: EarlyStop, mother: int, *laws: torch.Tensor) -> bool:
    """One more link of a chain, drawn from a law per image."""
    return early.go_on(torch.tensor([mother]), torch.tensor([[mother + 1]]), flatness_of(torch.stack(laws)[:, None]))


def verdict(*accepted: int, places: int = 4) -> Verdict:
    return Verdict(torch.zeros(len(accepted), places, dtype=torch.int64), torch.tensor(accepted))


def test_flat_laws_end_a_draft_and_sharp_ones_do_not() -> None:
    early = EarlyStop(2, 0.5, CPU)
    early.begin(3)
    assert level(early, 0, UNIFORM, CERTAIN)
    assert early.open[:, 1].tolist() == [False, True] and early.present[:, 1].all()
    assert level(early, 1, CERTAIN, CERTAIN)
    assert early.present[:, 2].tolist() == [False, True]
    assert not level(early, 2, CERTAIN, UNIFORM)


def test_what_a_law_is_worth_is_learnt_for_every_image_from_its_own_drafts() -> None:
    early = EarlyStop(2, 0.5, CPU)
    for _ in range(40):
        early.begin(3)
        for depth in range(3):
            level(early, depth, UNIFORM, UNIFORM)
        early.observe(verdict(1, 0))
    share = early.kept / early.tried
    assert share[0, -1] > 0.4 and share[1, -1] < 0.1
    assert (share[0, :-1] - share[1, :-1]).abs().max() == 0
    kept = share[1].clone()
    early.keep(torch.tensor([1]))
    assert torch.equal((early.kept / early.tried)[0], kept)


def test_places_without_drafts_teach_nothing() -> None:
    early = EarlyStop(1, 0.9, CPU)
    before = early.kept / early.tried
    early.begin(0)  # the first pass
    early.observe(verdict(0, places=1))
    early.begin(3)
    level(early, 0, UNIFORM)
    level(early, 1, CERTAIN)  # nothing is drafted there: the first link is not likely enough
    early.observe(verdict(1))
    after = early.kept / early.tried
    assert torch.allclose(after[0, 0], before[0, 0]) and after[0, -1] > before[0, -1]


def test_a_stop_saves_drafts_that_would_be_refused_and_keeps_those_of_the_targets_own_law() -> None:
    target, other = TabularTarget(4, 5), TabularTarget(4, 5, seed=1)
    whole, short = (
        decode(target, "block", sketched(other, tree), index=range(300)) for tree in ("chain-4", "chain-4 stop=0.5")
    )
    assert short.passes.float().mean() < 1.15 * whole.passes.float().mean()
    same = constant_target(4, 5)
    sure = [
        decode(same, "block", sketched(same, tree), index=[i])
        for i in range(40)
        for tree in ("chain-4", "chain-4 stop=0.01")
    ]
    assert [r.passes.item() for r in sure[::2]] == [r.passes.item() for r in sure[1::2]]
    alone = [decode(target, "block", sketched(other, "chain-4 stop=0.5"), index=[i]) for i in range(40)]
    assert sum(r.drafted.item() for r in alone) < 0.8 * int(whole.drafted[:40].sum())


@pytest.mark.parametrize(
    ("drafter", "rule", "told"),
    [
        ("eagle:stop=1", "block", "stop = 1 is not allowed"),
        ("eagle:stop=-0.1", "block", "stop = -0.1 is not allowed"),
        ("eagle:tree=dynamic:stop=0.5", "tree", "chooses its nodes itself"),
        ("eagle:stop=0.5", "exact", "chains of one length"),
        ("model:folder=x:stop=2", "tree", "stop = 2 is not allowed"),
    ],
)
def test_a_stop_that_cannot_be_is_refused(drafter: str, rule: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_method(drafter, rule)
