"""The decode loop of masked continuous models (MAR): places in a random order, several of them per step if wanted.

A model with bidirectional attention sees the class and the known tokens, in no order and without a cache, so there is
no draft that one pass could verify exactly. What there is:

- rules without a draft model (`plain`, `coupled`): one pass per autoregressive step, speculation inside the head;
- rules over drafts of a smaller model (`cspd`, `pathwise`): a window of autoregressive steps is drafted, then verified,
  in ONE pass that sees none of the drafts (`cspd` as released), or in one pass per drafted step, which sees the drafts
  of the steps before (as published, and `pathwise`).

Tokens of one step see the same context. At the first rejection the rest of that step therefore is the target's own; the
later steps of the window are dropped.

Images of equal progress share a pass: how many places it draws, and how many it sees, is what their step says. So
those that entered together go together, those furthest behind first; they take turns with those that entered before or
after, and share passes with them only where their steps are equal. (That the later ones catch up first would cost the
earlier ones their time, and on a processor gain none: flowers-mar draws as many images a second one by one as four at a
time.)
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.batch import RowBatch
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.kinds import check_continuous
from bozzetto.decoding.state import DecodeState
from bozzetto.drafts import Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.chain import ChainLaw, Trajectory, sample_trajectory
from bozzetto.laws.noise import STREAM_ORDER, STREAM_TOKEN, fold, image_keys, normal_rows
from bozzetto.methods.options import SmallerMasked
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.reflection import PlainSteps
from bozzetto.targets.mar_target import MARTarget

# What a draft model has in common with its target: fields of MARConfig and of MARSampler.
_EQUAL_SHAPES = ("token_dim", "grid", "classes")
_ROWS = ("labels", "noise", "order", "rank")  # of a batch, besides its state
_EQUAL_CHAINS = ("steps", "noisiest")


def place_order(seed: int | Tensor, index: Tensor, length: int) -> Tensor:
    """The order in which the places of images int64 [B] are drawn: int64 [B, N], a permutation each."""
    places = torch.arange(length, device=index.device)
    return fold(image_keys(seed, STREAM_ORDER, index)[:, None], places).argsort(1)


class MaskedBatch(RowBatch):
    """Images decoded with one masked target, rule and law.

    rule: `plain`, `coupled`, or with a drafter `cspd`, `pathwise`; drafter: a smaller MAR of the same tokens; drafts:
    how it is used. The target's sampler says how many autoregressive steps there are.
    """

    def __init__(
        self,
        target: MARTarget,
        rule: Rule,
        settings: LawSettings,
        drafter: MARTarget | None = None,
        drafts: SmallerMasked | None = None,
        slots: int = 1 << 30,
    ):
        _check(target, rule, settings, drafter)
        self.drafts, self.last = drafts or SmallerMasked(), target.sampler.passes
        super().__init__(target, slots, 1 if drafter is None else self.drafts.length)
        self.rule, self.settings, self.drafter = rule, settings, drafter
        self.starts = [0, *accumulate(target.counts(self.last))]  # [steps + 1]: step s draws from starts[s] on
        self.guidances = target.guidances(settings.guidance, self.last)
        self.alone = self.last if drafter is None else round(self.drafts.prefill * self.last)
        self.blind = rule.blind

    @torch.no_grad()
    def begin(self, labels: Tensor, seed: int | Tensor, index: Tensor) -> None:
        target, device = self.target, index.device
        blank = torch.zeros(len(index), target.length, target.token_dim, device=device)
        self.state = DecodeState.new(seed, index, blank)
        self.counts, self.steps, self.turns, self.turn = *([0] * len(index) for _ in range(3)), 0
        self.labels, self.noise = labels, image_keys(seed, STREAM_TOKEN, index)  # of the fixed noise
        self.order = place_order(seed, index, target.length)
        self.rank, self.begins = self.order.argsort(1), torch.tensor(self.starts, device=device)

    @torch.no_grad()
    def advance(self) -> None:
        """A pass, or those of a window of drafts, of those images, of the ones whose turn it is, that are furthest
        behind."""
        self.meter.resume()
        next_, self.turn = min(self.turns), self.turn + 1
        first = min(step for step, turn in zip(self.steps, self.turns, strict=True) if turn == next_)
        self.turns = [self.turn if turn == next_ else turn for turn in self.turns]
        behind = [i for i, step in enumerate(self.steps) if step == first]
        rows = torch.tensor(behind, device=self.begins.device)
        drawn = self._alone(rows, first) if first < self.alone else self._drafted(rows, first)
        for i, done in zip(behind, self._commit(rows, first, *drawn).tolist(), strict=True):
            self.steps[i] = done
        self.counts = [self.starts[step] for step in self.steps]
        self.over, self.told = [i for i in behind if self.steps[i] == self.last], self.state.told(False)
        self.meter.lap("draft")

    @torch.no_grad()
    def keep(self, going: list[int]) -> None:
        self.counts, self.steps, self.turns = (
            [part[i] for i in going] for part in (self.counts, self.steps, self.turns)
        )
        rows = torch.tensor(going, dtype=torch.int64, device=self.begins.device)
        self.state = self.state.keep(rows)
        for name in _ROWS:
            setattr(self, name, vars(self)[name][rows])

    @torch.no_grad()
    def join(self, other: MaskedBatch) -> None:
        self.state = self.state.join(other.state)
        self.counts, self.steps, self.turn = self.counts + other.counts, self.steps + other.steps, self.turn + 1
        self.turns = self.turns + [self.turn] * len(other.turns)
        for name in _ROWS:
            setattr(self, name, torch.cat([vars(batch)[name] for batch in (self, other)]))

    def known_of(self, image: ImageRequest) -> Tensor:
        if image.tokens is not None:
            return torch.ones(self.target.length, dtype=torch.bool, device=self.target.device)
        part, row = self._of(image)
        return part.rank[row] < image.count

    def _places(self, rows: Tensor, first: int, last: int) -> Tensor:
        """Places that steps first..last - 1 of these images int64 [B] draw, int64 [B, W]."""
        return self.order[rows, self.starts[first] : self.starts[last]]

    def _features(self, model: MARTarget, rows: Tensor, tokens: Tensor, first: int, last: int) -> Tensor:
        """ONE pass: features [copies B, W, C] of the places of steps first..last - 1, with the tokens before
        known. tokens: of these images, float32 [B, N, D]."""
        places, known = self._places(rows, first, last), self.order[rows, : self.starts[first]]
        features = model.features(self.labels[rows], tokens, known, places, self.settings.guided)
        return features.unflatten(0, (-1, places.shape[1]))

    def _law(self, model: MARTarget, features: Tensor, batch: int, scale: float | Tensor, done: int = 0) -> ChainLaw:
        shape = (batch, features.shape[1])
        return model.law(features.flatten(0, 1), shape, scale, self.settings.temperature, done)

    def _fixed(self, rows: Tensor, places: Tensor) -> Tensor:
        """The fixed noise of places, [B, W, T + 1, D]."""
        return normal_rows(self.noise[rows], places, self.target.schedule.steps, self.target.token_dim)

    def _fresh(self, rows: Tensor, places: Tensor) -> Tensor:
        """Keys [B, W] of places, whenever they are drawn. (A test of a place that was dropped has decided nothing, so
        the key may be used again.)"""
        return fold(self.state.keys[rows][:, None], places)

    def _alone(self, rows: Tensor, step: int) -> tuple[Tensor, int, Verdict, None]:
        """One step by the target: its places int64 [B, W], passes and what it drew there."""
        places = self._places(rows, step, step + 1)
        features = self._features(self.target, rows, self.state.tokens[rows], step, step + 1)
        self.meter.lap("target")
        law = self._law(self.target, features, len(places), self.guidances[step], self.starts[step])
        sampler: Any = self.rule if self.rule.alone else PlainSteps()
        tokens = sampler.sample(law, self._fixed(rows, places).flatten(0, 1), self._fresh(rows, places).flatten())
        self.meter.count(law)
        return places, 1, Verdict(tokens.unflatten(0, places.shape), torch.zeros_like(places[:, 0])), None

    def _draft(self, rows: Tensor, first: int, last: int) -> tuple[Draft, Tensor]:
        """Steps first..last - 1 by the drafter, one after another, with the noise of the target's own sampler; and the
        tokens of these images with them."""
        assert self.drafter is not None
        drawn, tokens = [], self.state.tokens[rows]
        for step in range(first, last):
            places = self._places(rows, step, step + 1)
            features = self._features(self.drafter, rows, tokens, step, step + 1)
            law = self._law(self.drafter, features, len(places), self.guidances[step])
            trajectory = sample_trajectory(law, None, self._fixed(rows, places).flatten(0, 1))
            self.meter.count(law)
            drawn.append(Trajectory(*(part.unflatten(0, places.shape) for part in trajectory)))
            new = drawn[-1].token
            tokens = tokens.scatter(1, places[..., None].expand_as(new), new)
        trajectory = Trajectory(*(torch.cat(parts, 1) for parts in zip(*drawn, strict=True)))
        return Draft(trajectory.token, trajectory=trajectory), tokens

    def _drafted(self, rows: Tensor, first: int) -> tuple[Tensor, int, Verdict, Draft]:
        """A window of steps from `first` on, drafted and verified: its places int64 [B, W], passes, the verdict and the
        draft."""
        last = min(self.last, first + self.drafts.length)
        draft, filled = self._draft(rows, first, last)
        self.meter.lap("draft")
        if self.blind:
            parts = [self._features(self.target, rows, self.state.tokens[rows], first, last)]
        else:
            parts = [self._features(self.target, rows, filled, step, step + 1) for step in range(first, last)]
        self.meter.lap("target")
        places, scales = self._places(rows, first, last), self._scales(first, last, rows.device)
        # A rule verifies the place after the drafts too; a window ends without one, so its last place stands in.
        spare = torch.arange(draft.length + 1, device=places.device).clamp_max(draft.length - 1)
        law = self._law(self.target, torch.cat(parts, 1)[:, spare], len(places), scales[spare].repeat(len(places)))
        at = places[:, spare]
        noise = Noise(self._fixed(rows, at), keys=self._fresh(rows, at))
        verdict = self.rule.verify(draft, law, noise)
        self.meter.count(law)
        return places, len(parts), verdict, draft

    def _commit(
        self, rows: Tensor, first: int, places: Tensor, passes: int, verdict: Verdict, draft: Draft | None
    ) -> Tensor:
        """Note the round of the images `rows` int64 [B] that began at step `first`; returns the steps that they then
        have done, int64 [B]."""
        state, self.places, self.meter.passes = self.state, places.shape[1], self.meter.passes + passes
        # The step of the first rejected place is the last one that is committed.
        ahead = self.begins[first:-1] - self.begins[first]
        steps = first + (ahead <= verdict.accepted.clamp_max(self.places - 1)[:, None]).sum(1)
        count = self.begins[steps]
        fresh = torch.arange(self.places, device=rows.device) < (count - state.count[rows])[:, None]
        owner, tokens = rows[:, None].expand_as(fresh), verdict.tokens[:, : self.places]
        new = vars(state).copy()
        new["tokens"] = state.tokens.index_put((owner[fresh], places[fresh]), tokens[fresh])
        new["count"] = state.count.index_put((rows,), count)
        new["passes"] = state.passes.index_add(0, rows, torch.full_like(rows, passes))
        if draft is not None:
            kept = (tokens == draft.tokens).all(-1)
            new["drafted"] = state.drafted.index_add(0, rows, torch.full_like(rows, self.places))
            new["accepted"] = state.accepted.index_add(0, rows, (kept & fresh).sum(1))
        if verdict.distance is not None:
            moved = verdict.distance[:, : self.places].masked_fill(~fresh, 0.0)
            new["moved"] = state.moved.index_add(0, rows, moved.sum(1))
            new["farthest"] = state.farthest.index_put((rows,), torch.maximum(state.farthest[rows], moved.amax(1)))
        self.state = DecodeState(**new)
        return steps

    def _scales(self, first: int, last: int, device: torch.device) -> Tensor:
        """Guidance at each place of steps first..last - 1, float32 [W]."""
        counts = [self.starts[step + 1] - self.starts[step] for step in range(first, last)]
        scales = torch.tensor(self.guidances[first:last], dtype=torch.float32)
        return scales.repeat_interleave(torch.tensor(counts)).to(device)


def _check(target: MARTarget, rule: Rule, settings: LawSettings, drafter: MARTarget | None) -> None:
    """Raises UsageError for what does not go together."""
    check_continuous(settings)
    drafted = not rule.alone
    if not rule.masked:
        raise UsageError(f"rule {rule.name!r} is not allowed for a masked model: plain, coupled, cspd, pathwise")
    if drafted != (drafter is not None):
        needs = "verifies drafts: it needs a draft model" if drafted else "needs no draft model: none is allowed"
        raise UsageError(f"rule {rule.name!r} {needs}")
    if drafter is None:
        return
    shapes = [(name, getattr(target.config, name), getattr(drafter.config, name)) for name in _EQUAL_SHAPES]
    chains = [(name, getattr(target.sampler, name), getattr(drafter.sampler, name)) for name in _EQUAL_CHAINS]
    for name, ours, theirs in shapes + chains:
        if ours != theirs:
            raise UsageError(f"the draft model has {name} = {theirs}, the target {ours}: they must be equal")
