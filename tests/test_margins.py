"""Whatever rounding can turn is told by the margin: pictures that come out differently are flagged, few others are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.base import Drafter
from bozzetto.drafters.jacobi import FilledJacobi, Jacobi, SecondGuess
from bozzetto.drafters.small_target import SmallTarget
from bozzetto.laws.categorical import LawSettings, coin_margin
from tabular import TabularTarget
from toys import EXACT_RULES, PLAIN, decode, make_rule, sketched

IMAGES, V, N = 20_000, 6, 5
NOISE, FLAG = 5e-4, 1e-2  # of logits: what rounding does, enlarged until it shows
TARGET, SKETCH = TabularTarget(V, N), TabularTarget(V, N, seed=1)
SKETCH.tables = TARGET.tables + 0.5 * SKETCH.tables

DRAFTERS: dict[str, Callable[[TabularTarget], Drafter]] = {
    "window": lambda _: Jacobi(4),
    "filled": lambda sketch: FilledJacobi(4, SmallTarget(sketch), fresh=1),
    "second": lambda sketch: SecondGuess(4, SmallTarget(sketch), 2, reach=2),
    "chain": lambda sketch: sketched(sketch, "chain-3"),
    "tree": lambda sketch: sketched(sketch, "2x2"),
    "dynamic": lambda sketch: sketched(sketch, "dynamic-7-3-2"),
}
CASES = [("exact", kind) for kind in ("window", "filled", "second", "chain")] + [("block", "chain")]
CASES += [("tree", "tree"), ("tree", "dynamic"), ("traversal", "tree"), ("annealed", "window"), ("annealed", "tree")]
# Not of `lantern` and `grouped`: whose probability may be borrowed has edges of its own, which no margin tells.
CASES += [("cascade", "tree"), ("seed-exact", "window")]


def rounded(target: TabularTarget, seed: int) -> TabularTarget:
    """The same target whose logits come out a little differently."""
    other = TabularTarget(V, N)
    noise = torch.randn(target.tables.shape, generator=torch.Generator().manual_seed(seed))
    other.tables = target.tables + NOISE * noise
    return other


@pytest.mark.parametrize("settings", [PLAIN, LawSettings(guidance=2.0, temperature=0.8)], ids=["plain", "guided"])
@pytest.mark.parametrize(("rule", "kind"), CASES)
def test_what_rounding_turns_is_flagged(rule: str, kind: str, settings: LawSettings) -> None:
    one, other = (
        decode(target, rule, DRAFTERS[kind](sketch), settings=settings, index=range(IMAGES))
        for target, sketch in ((TARGET, SKETCH), (rounded(TARGET, 3), rounded(SKETCH, 4)))
    )
    turned = (one.tokens != other.tokens).any(1)
    assert int(turned.sum()) > 5, "no image turned: the test shows nothing"
    flagged = one.margin < FLAG
    # What is left of two laws that all but agree has large relative errors, which no margin of this size covers.
    assert int((turned & ~flagged).sum()) <= 0.1 * int(turned.sum())
    assert kind == "dynamic" or int(flagged.sum()) < 0.25 * IMAGES


@pytest.mark.parametrize("rule", EXACT_RULES)
def test_greedy_choices_have_a_margin(rule: str) -> None:
    greedy = LawSettings(guidance=2.0, temperature=0.0)
    kind = "chain" if rule == "block" else "tree"
    kind = "window" if rule == "exact" else kind
    near = TabularTarget(V, N)
    near.tables = near.tables.round(decimals=1)  # ties
    one, other = (
        decode(target, rule, DRAFTERS[kind](SKETCH), settings=greedy, labels=torch.arange(2), index=range(2))
        for target in (near, rounded(near, 3))
    )
    turned = (one.tokens != other.tokens).any(1)
    assert bool((one.margin < float("inf")).all())
    assert not bool((turned & (one.margin >= FLAG)).any())


def test_a_coin_is_as_far_from_its_edge_as_the_logarithms_are() -> None:
    u = torch.tensor([0.5, 0.5, 0.5, 0.25], dtype=torch.float64)
    chance = torch.tensor([0.5, 0.0, 2.0, 0.5]).log()
    assert coin_margin(u, chance).tolist() == pytest.approx([0.0, float("inf"), 2 * 0.6931472, 0.6931472], abs=1e-7)


def test_images_that_leave_a_batch_early_have_their_margin() -> None:
    wanted = decode(TARGET, "tree", DRAFTERS["tree"](SKETCH), index=range(6))
    lane = EagerBatch(TARGET, DRAFTERS["tree"](SKETCH), make_rule("tree"), PLAIN)
    lane.admit([ImageRequest(1, 0, index, PLAIN) for index in range(6)])
    found = {}
    while lane.active:
        for image in lane.step():
            found[image.index] = image.margin
    assert [found[index] for index in range(6)] == wanted.margin.tolist()
