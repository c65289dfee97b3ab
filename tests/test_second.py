"""The exactness battery on windows that a drafter helps: it fills the slots that enter, or guesses a second token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import bozzetto
from bozzetto.drafters.base import DraftModel, Observation
from bozzetto.drafters.jacobi import FilledJacobi, Jacobi, SecondGuess
from bozzetto.drafters.small_target import SmallTarget
from bozzetto.drafts import Draft, Verdict
from bozzetto.drafts.tree import comb_tree, make_tree
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings, weighted_draw
from bozzetto.methods.table import read_method
from bozzetto.rules.base import Noise, leading
from bozzetto.rules.exact import Exact
from tabular import TabularTarget
from toys import (
    PLAIN,
    WINDOW_RULES,
    alternating_target,
    cells,
    constant_target,
    decode,
    fit_p_value,
    p_value,
)

IMAGES, ACCEPTABLE, DAMNING = 30_000, 1e-3, 1e-9
V, N = 4, 5
TARGET = TabularTarget(V, N)
NEAR = TabularTarget(V, N)
NEAR.tables = TARGET.tables + 0.7 * torch.randn(TARGET.tables.shape, generator=torch.Generator().manual_seed(5))
FAR = TabularTarget(V, N, seed=1)  # another law, not even close
SETTINGS = [PLAIN, LawSettings(guidance=2.0), LawSettings(top_k=2), LawSettings(guidance=2.0, temperature=0.8, top_k=3)]
Make = Callable[[TabularTarget], Jacobi]
K = 3


class AtOnce(DraftModel):
    """A parallel sketcher of any law: what it says of K places, and what it adds behind a token, is random."""

    at_once = True

    def __init__(self, sketch: TabularTarget):
        self.table = sketch.tables[0, -(V**3) :].view(V, V, V, V)  # any random numbers, of the sketch

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None:
        self.copies = 2 if guided else 1

    def bases(self, seen: Observation) -> Tensor:
        last = seen.verdict.tokens.gather(1, seen.committed[:, None] - 1)[:, 0]
        return self.table[last, seen.committed % V][:, :K].repeat(self.copies, 1, 1)

    def after(self, tokens: Tensor) -> Tensor:
        return self.table[0, 0][tokens].repeat(self.copies, 1, 1)

    def keep(self, rows: Tensor) -> None:
        pass


HELPED: dict[str, Make] = {
    "filled-3": lambda sketch: FilledJacobi(3, SmallTarget(sketch)),
    "filled-5-1": lambda sketch: FilledJacobi(5, SmallTarget(sketch), fresh=1),
    "filled-4-3": lambda sketch: FilledJacobi(4, SmallTarget(sketch), fresh=3),
    "at-once-3": lambda sketch: FilledJacobi(3, AtOnce(sketch)),
    "at-once-5-2": lambda sketch: FilledJacobi(5, AtOnce(sketch), fresh=2),
    "second-2-1": lambda sketch: SecondGuess(2, SmallTarget(sketch), 1),
    "second-4-2": lambda sketch: SecondGuess(4, SmallTarget(sketch), 2),
    "second-5-4": lambda sketch: SecondGuess(5, SmallTarget(sketch), 4),
    "second-3-2-2": lambda sketch: SecondGuess(3, SmallTarget(sketch), 2, reach=2),
    "second-2-1-3": lambda sketch: SecondGuess(2, SmallTarget(sketch), 1, reach=3),
}
CASES = [(rule, kind) for rule in WINDOW_RULES for kind in HELPED]
UNLIKE = ("at-once-3", "at-once-5-2", "second-3-2-2", "second-2-1-3")  # of a law of their own, or deeper than a window
every_case = pytest.mark.parametrize(("rule", "kind"), CASES)
# One of the settings for all cases and two others in turn: every rule and every kind meets all four.
SOME = [
    (*case, SETTINGS[which])
    for number, case in enumerate(CASES)
    for which in (1, *((0, 2, 3)[(number + more) % 3] for more in range(2)))
]


@functools.cache
def big_batch(rule: str, kind: str, settings: LawSettings) -> Tensor:
    return decode(TARGET, rule, HELPED[kind](NEAR), settings=settings, index=range(IMAGES)).tokens


@pytest.mark.parametrize(("rule", "kind", "settings"), SOME)
def test_decoded_images_follow_the_enumerated_law(rule: str, kind: str, settings: LawSettings) -> None:
    assert p_value(big_batch(rule, kind, settings), TARGET.joint(1, settings)) > ACCEPTABLE


@every_case
def test_a_drafter_of_an_unrelated_law_changes_nothing_in_law(rule: str, kind: str) -> None:
    settings = SETTINGS[-1]
    tokens = decode(TARGET, rule, HELPED[kind](FAR), settings=settings, index=range(IMAGES)).tokens
    assert p_value(tokens, TARGET.joint(1, settings)) > ACCEPTABLE


@every_case
def test_batches_of_one_and_three_give_the_big_batchs_tokens(rule: str, kind: str) -> None:
    whole = big_batch(rule, kind, SETTINGS[1])
    for size in (1, 3):
        for index in torch.randperm(IMAGES, generator=torch.Generator().manual_seed(size))[:12].split(size):
            alone = decode(TARGET, rule, HELPED[kind](NEAR), settings=SETTINGS[1], index=index)
            assert torch.equal(alone.tokens, whole[index])


@pytest.mark.parametrize(("rule", "kind"), [case for case in CASES if case[1] not in UNLIKE])
def test_drafts_of_the_targets_own_law_are_never_rejected(rule: str, kind: str) -> None:
    target = constant_target(V, N)
    result = decode(target, rule, HELPED[kind](target), index=range(IMAGES))
    assert p_value(result.tokens, target.joint(1, PLAIN)) > ACCEPTABLE
    assert torch.equal(result.accepted, result.drafted)


@every_case
def test_the_law_holds_when_every_draft_is_rejected(rule: str, kind: str) -> None:
    """Even tokens are followed by odd ones, and the drafter believes the opposite."""
    target, wrong = alternating_target(V, N), alternating_target(V, N)
    wrong.tables = wrong.tables[..., [1, 0, 3, 2]]
    result = decode(target, rule, HELPED[kind](wrong), settings=LawSettings(top_k=2), index=range(IMAGES))
    assert p_value(result.tokens, target.joint(1, LawSettings(top_k=2))) > ACCEPTABLE
    assert int(result.accepted.sum()) == 0 or kind.startswith("at-once")


@every_case
def test_greedy_decoding_follows_the_argmax_path(rule: str, kind: str) -> None:
    greedy = LawSettings(guidance=2.0, temperature=0)
    result = decode(TARGET, rule, HELPED[kind](NEAR), settings=greedy, index=range(50))
    assert bool((cells(result.tokens, V) == TARGET.joint(1, greedy).argmax()).all())


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"s{s.guidance:g}-T{s.temperature:g}-k{s.top_k}")
@pytest.mark.parametrize("kind", HELPED)
def test_seed_exact_windows_give_the_sequential_tokens(kind: str, settings: LawSettings) -> None:
    plain = decode(TARGET, "seed-exact", "none", settings=settings, index=range(500)).tokens
    assert torch.equal(
        decode(TARGET, "seed-exact", HELPED[kind](NEAR), settings=settings, index=range(500)).tokens, plain
    )


@pytest.mark.parametrize("rule", WINDOW_RULES)
def test_second_guesses_gain_tokens_where_the_window_is_wrong(rule: str) -> None:
    """A certain second guess is kept wherever the window's token is not: two tokens in every pass but the first."""
    target = alternating_target(V, N)
    result = decode(target, rule, SecondGuess(2, SmallTarget(target), 1), index=range(2000))
    plain = decode(target, rule, "jacobi", window=2, index=range(2000))
    assert set(plain.passes.tolist()) == {N}
    assert float(result.passes.double().mean()) < 0.8 * N


# The comb.


@pytest.mark.parametrize(
    ("chain", "beside", "reach"), [(1, 1, 1), (3, 2, 1), (4, 4, 1), (4, 2, 3), (3, 3, 2), (1, 1, 4)]
)
def test_a_comb_hangs_together_as_its_parents_say(chain: int, beside: int, reach: int) -> None:
    comb = comb_tree(chain, beside, reach, torch.device("cpu"))
    parents = [*range(chain), *range(beside), *range(chain + 1, chain + 1 + beside * (reach - 1))]
    assert comb.parent[0].tolist() == parents
    rank = torch.tensor([[0] * chain + [1] * beside + [0] * beside * (reach - 1)])
    twin = make_tree(comb.parent, rank, comb.row, (), comb.widths)
    for name in ("parent", "depth", "sees", "child", "path"):
        assert torch.equal(getattr(comb, name), getattr(twin, name)), name
    assert comb.max_depth == max(chain, beside + reach - 1) and comb.nodes == chain + beside * reach


def test_a_comb_as_wide_as_the_widest_window_can_be_made() -> None:
    assert comb_tree(127, 64, 2, torch.device("cpu")).nodes == 255


# Deliberately wrong rules: the battery must reject each of them.


def judged(second: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> type[Exact]:
    """`exact`, but second guesses are kept as `second` (p, q, s, y, each at the first place) says, in [0, 1]."""

    @dataclass(frozen=True)
    class Wrong(Exact):
        def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
            if not draft.beside:
                return super().verify(draft, log_p, noise)
            chain, count = draft.chain, draft.beside
            p, q, s = (part.exp() for part in (log_p[:, :count], draft.log_q[:, :count], draft.log_q[:, chain:]))
            share = second(p, q, s, draft.tokens[:, chain:, None])[..., 0]
            # The honest rule keeps where u s(y) < r(y): give it the u that keeps as often as `share` says.
            uniforms = noise.uniforms.clone()
            rest = (p - q).clamp_min(0)
            rest = rest / rest.sum(-1, keepdim=True).clamp_min(1e-9)
            honest = (rest / s).gather(-1, draft.tokens[:, chain:, None])[..., 0]
            kept = uniforms[:, :count, 2] < share
            uniforms[:, :count, 2] = torch.where(kept, honest * 0.5, 1.0)
            return super().verify(draft, log_p, replace(noise, uniforms=uniforms))

    return Wrong


@dataclass(frozen=True)
class BehindTheWindow(Exact):
    """Draws the token behind a second guess from the law behind the window's token."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        if draft.beside:
            chain = draft.chain
            log_p = torch.cat([log_p[:, : chain + 1], log_p[:, 1 : draft.beside + 1]], 1)
        return super().verify(draft, log_p, noise)


@dataclass(frozen=True)
class RedrawWithoutTheSecondGuess(Exact):
    """Where both are refused, draws from norm([p - q]+) and forgets that y was tried."""

    def verify(self, draft: Draft, log_p: Tensor, noise: Noise) -> Verdict:
        right = super().verify(draft, log_p, noise)
        if not draft.beside:
            return right
        chain, count = draft.chain, draft.beside
        tokens, x, y = right.tokens, draft.tokens[:, :count], draft.tokens[:, chain:]
        rest = (log_p[:, :count].exp() - draft.log_q[:, :count].exp()).clamp_min(1e-12)
        redrawn, _ = weighted_draw(rest, noise.uniforms[:, :count, 1])
        old = tokens[:, :count]
        place = torch.arange(count)
        behind = leading(old == x)[:, None] < place  # what is committed there is not of this place's test
        tokens = torch.cat([torch.where((old == x) | (old == y) | behind, old, redrawn), tokens[:, count:]], 1)
        return Verdict(tokens, right.accepted, right.path)


@pytest.mark.parametrize(
    "rule",
    [
        judged(lambda p, q, s, y: (p / s).gather(-1, y)),  # against the whole law
        judged(lambda p, q, s, y: torch.ones_like(p).gather(-1, y)),
        BehindTheWindow,
        RedrawWithoutTheSecondGuess,
    ],
    ids=["second-against-p", "second-always", "behind-the-window", "second-forgotten"],
)
def test_the_battery_rejects_planted_biases(rule: type[Exact]) -> None:
    result = decode(TARGET, rule(), HELPED["second-5-4"](NEAR), index=range(IMAGES))
    counts = torch.bincount(cells(result.tokens, V), minlength=V**N)
    assert fit_p_value(counts, TARGET.joint(1, PLAIN)) < DAMNING


# Names, options and the shipped drafters.


@pytest.mark.parametrize(
    ("method", "rule", "message"),
    [
        ("jacobi:second=model", "exact", "second = 'model' is not allowed: eagle, plane, block, glance"),
        ("jacobi:second=eagle:fill=eagle", "exact", "second = 'eagle' is not allowed with fill = 'eagle'"),
        ("jacobi:fill=eagle:fresh=-1", "exact", "fresh = -1 is not allowed: a whole number from 0 to 128"),
        ("jacobi:fresh=1", "exact", "fresh = 1 is not allowed: 0 without fill"),
        ("jacobi:second=eagle:places=0", "exact", "places = 0 is not allowed: a whole number from 1 to 128"),
        ("jacobi:second=eagle:places=16:reach=9", "exact", "places = 16 with reach = 9 is not allowed: 144 nodes"),
        ("jacobi:second=eagle:reach=0", "exact", "reach = 0 is not allowed: a whole number from 1 to 128"),
        ("jacobi:second=eagle", "grouped", "does not judge second guesses .allowed.*: seed-exact, exact"),
    ],
)
def test_bad_combinations_are_named(method: str, rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_method(method, rule)


@pytest.mark.parametrize("model", ["flowers", "emoji"])
def test_shipped_drafters_guess_and_the_bytes_stay(model: str) -> None:
    pipe = bozzetto.load(model)
    plain = pipe.generate(pipe.classes[:1] or ["a red apple"], seed=4, guidance=2.0, drafter="none")
    drafter = "jacobi:second=eagle:places=6"
    helped = pipe.generate(pipe.classes[:1] or ["a red apple"], seed=4, guidance=2.0, drafter=drafter, window=12)
    assert helped.images[0].sha256 == plain.images[0].sha256
    assert helped.tokens_per_pass > 1.5
