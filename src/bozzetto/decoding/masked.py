"""The decode loop of masked continuous models (MAR): places in a random order, several of them per step if wanted.

A model with bidirectional attention sees the class and the known tokens, in no order and without a cache, so there is
no draft that one pass could verify exactly. What there is:

- rules without a draft model (`plain`, `coupled`): one pass per autoregressive step, speculation inside the head;
- rules over drafts of a smaller model (`cspd`, `pathwise`): a window of autoregressive steps is drafted, then verified,
  in ONE pass that sees none of the drafts (`cspd` as released), or in one pass per drafted step, which sees the drafts
  of the steps before (as published, and `pathwise`).

Tokens of one step see the same context. At the first rejection the rest of that step therefore is the target's own; the
later steps of the window are dropped. Images of equal progress go together, those furthest behind first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bozzetto.decoding.loop import Clock, PassEvent
from bozzetto.decoding.state import BatchResult, DecodeState
from bozzetto.drafters.masked_window import DraftWindow
from bozzetto.drafts import Draft
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.chain import ChainLaw, Trajectory, sample_trajectory
from bozzetto.laws.noise import STREAM_ORDER, STREAM_TOKEN, fold, image_keys, normal_rows
from bozzetto.rules.base import Noise, Rule
from bozzetto.rules.cspd import Cspd
from bozzetto.rules.pathwise import Pathwise
from bozzetto.rules.reflection import Coupled, Plain
from bozzetto.targets.mar_target import MARTarget

# What a draft model has in common with its target: fields of MARConfig and of MARSampler.
_EQUAL_SHAPES = ("token_dim", "grid", "classes")
_EQUAL_CHAINS = ("steps", "noisiest")


def place_order(seed: int, index: Tensor, length: int) -> Tensor:
    """The order in which the places of images int64 [B] are drawn: int64 [B, N], a permutation each."""
    places = torch.arange(length, device=index.device)
    return fold(image_keys(seed, STREAM_ORDER, index)[:, None], places).argsort(1)


@dataclass
class _Images:
    """labels int64 [B]; order int64 [B, N]; noise, keys: int64 [B], of the fixed noise and of the fresh one; tokens:
    float32 [B, N, D]."""

    labels: Tensor
    order: Tensor
    noise: Tensor
    keys: Tensor
    tokens: Tensor

    def rows(self, rows: Tensor) -> _Images:
        return _Images(**{name: value[rows] for name, value in vars(self).items()})

    def with_tokens(self, places: Tensor, tokens: Tensor) -> _Images:
        """With tokens [B, W, D] at places [B, W]."""
        table = self.tokens.scatter(1, places[..., None].expand_as(tokens), tokens)
        return _Images(self.labels, self.order, self.noise, self.keys, table)


@dataclass
class _Outcome:
    """What a round gives: places int64 [B, W] in order; their tokens float32 [B, W, D]; steps: int64 [B], how many to
    commit; passes: of the target; kept: bool [B, W], drafts that stay (None: nothing was drafted); distance: float32
    [B, W], how far tokens are from the target's own (None: not measured)."""

    places: Tensor
    tokens: Tensor
    steps: Tensor
    passes: int
    kept: Tensor | None = None
    distance: Tensor | None = None


class _Meter(Clock):
    """Wall time by part, and the work of the heads."""

    calls = rows = 0

    def count(self, law: ChainLaw) -> None:
        self.calls, self.rows = self.calls + law.calls, self.rows + law.rows


class MaskedDecoder:
    """Decodes batches of images with one target, rule and law.

    rule: `plain`, `coupled`, or with a drafter `cspd`, `pathwise`; drafter: a smaller MAR of the same tokens; window:
    how it is used. The target's sampler says how many autoregressive steps there are.
    """

    def __init__(
        self,
        target: MARTarget,
        rule: Rule,
        settings: LawSettings,
        drafter: MARTarget | None = None,
        window: DraftWindow | None = None,
    ):
        _check(target, rule, settings, drafter)
        self.target, self.rule, self.settings, self.drafter = target, rule, settings, drafter
        self.window = window or DraftWindow()
        self.passes = target.sampler.passes
        self.starts = [0, *accumulate(target.counts(self.passes))]  # [passes + 1]: step s draws from starts[s] on
        self.guidances = target.guidances(settings.guidance, self.passes)
        self.alone = self.passes if drafter is None else round(self.window.prefill * self.passes)
        self.blind = isinstance(rule, Cspd) and rule.variant == "released"

    def run(self, labels: Tensor, seed: int, index: Tensor) -> BatchResult:
        """Decode to the end. labels, index: int64 [B] (index: the images' numbers, which with the seed fix them)."""
        for _ in self.stream(labels, seed, index):
            pass
        return self.result

    @torch.no_grad()
    def stream(self, labels: Tensor, seed: int, index: Tensor) -> Iterator[PassEvent]:
        """Decode and yield an event whenever tokens are committed: after each pass of the target, or after the passes
        of a window; afterwards `self.result` holds the batch's result."""
        target, device = self.target, index.device
        state = DecodeState.new(seed, index, torch.zeros(len(index), target.length, target.token_dim, device=device))
        order = place_order(seed, index, target.length)
        rank, starts = order.argsort(1), torch.tensor(self.starts, device=device)
        noise = image_keys(seed, STREAM_TOKEN, index)
        steps, number, meter = [0] * len(index), 0, _Meter(target.device)
        while min(steps, default=self.passes) < self.passes:
            began, first = time.perf_counter(), min(steps)
            behind = [i for i, step in enumerate(steps) if step == first]
            rows = torch.tensor(behind, device=device)
            images = _Images(labels, order, noise, state.keys, state.tokens).rows(rows)
            outcome = self._alone(images, first, meter) if first < self.alone else self._drafted(images, first, meter)
            state = _commit(state, rows, outcome, starts[first + outcome.steps])
            for i, more in zip(behind, outcome.steps.tolist(), strict=True):
                steps[i] += more
            meter.lap("draft")
            number += outcome.passes
            whole = (state.tokens, state.count, state.accepted, state.drafted, state.spent)
            known, width = rank < state.count[:, None], outcome.places.shape[1]
            yield PassEvent(*whole, number, width, time.perf_counter() - began, known)
            meter.resume()
        names = ("tokens", "passes", "drafted", "accepted", "margin", "spent", "moved", "farthest")
        figures = {name: getattr(state, name) for name in names}
        self.result = BatchResult(**figures, head_calls=meter.calls, head_rows=meter.rows, seconds=meter.seconds())

    def _places(self, images: _Images, first: int, last: int) -> Tensor:
        """Places that steps first..last - 1 draw, int64 [B, W]."""
        return images.order[:, self.starts[first] : self.starts[last]]

    def _features(self, model: MARTarget, images: _Images, first: int, last: int) -> Tensor:
        """ONE pass: features [copies B, W, C] of the places of steps first..last - 1, with the tokens before
        known."""
        places, known = self._places(images, first, last), images.order[:, : self.starts[first]]
        features = model.features(images.labels, images.tokens, known, places, self.settings.guided)
        return features.unflatten(0, (-1, places.shape[1]))

    def _law(self, model: MARTarget, features: Tensor, batch: int, scale: float | Tensor, done: int = 0) -> ChainLaw:
        shape = (batch, features.shape[1])
        return model.law(features.flatten(0, 1), shape, scale, self.settings.temperature, done)

    def _fixed(self, images: _Images, places: Tensor) -> Tensor:
        """The fixed noise of places, [B, W, T + 1, D]."""
        return normal_rows(images.noise, places, self.target.schedule.steps, self.target.token_dim)

    def _fresh(self, images: _Images, places: Tensor) -> Tensor:
        """Keys [B, W] of places, whenever they are drawn. (A test of a place that was dropped has decided nothing, so
        the key may be used again.)"""
        return fold(images.keys[:, None], places)

    def _alone(self, images: _Images, step: int, meter: _Meter) -> _Outcome:
        """One step by the target."""
        places = self._places(images, step, step + 1)
        features = self._features(self.target, images, step, step + 1)
        meter.lap("target")
        law = self._law(self.target, features, len(places), self.guidances[step], self.starts[step])
        sampler = self.rule if isinstance(self.rule, Plain | Coupled) else Plain()
        tokens = sampler.sample(law, self._fixed(images, places).flatten(0, 1), self._fresh(images, places).flatten())
        meter.count(law)
        return _Outcome(places, tokens.unflatten(0, places.shape), torch.ones_like(places[:, 0]), 1)

    def _draft(self, images: _Images, first: int, last: int, meter: _Meter) -> tuple[Draft, _Images]:
        """Steps first..last - 1 by the drafter, one after another, with the noise of the target's own sampler; and the
        images with these tokens."""
        assert self.drafter is not None
        paths = []
        for step in range(first, last):
            places = self._places(images, step, step + 1)
            features = self._features(self.drafter, images, step, step + 1)
            law = self._law(self.drafter, features, len(places), self.guidances[step])
            path = sample_trajectory(law, None, self._fixed(images, places).flatten(0, 1))
            meter.count(law)
            paths.append(Trajectory(*(part.unflatten(0, places.shape) for part in path)))
            images = images.with_tokens(places, paths[-1].token)
        path = Trajectory(*(torch.cat(parts, 1) for parts in zip(*paths, strict=True)))
        return Draft(path.token, trajectory=path), images

    def _drafted(self, images: _Images, first: int, meter: _Meter) -> _Outcome:
        """A window of steps from `first` on: drafted, then verified."""
        last = min(self.passes, first + self.window.draft_length)
        draft, filled = self._draft(images, first, last, meter)
        meter.lap("draft")
        if self.blind:
            parts = [self._features(self.target, images, first, last)]
        else:
            parts = [self._features(self.target, filled, step, step + 1) for step in range(first, last)]
        meter.lap("target")
        places, scales = self._places(images, first, last), self._scales(first, last, images.order.device)
        # A rule verifies the place after the drafts too; a window ends without one, so its last place stands in.
        spare = torch.arange(draft.length + 1, device=places.device).clamp_max(draft.length - 1)
        law = self._law(self.target, torch.cat(parts, 1)[:, spare], len(places), scales[spare].repeat(len(places)))
        at = places[:, spare]
        noise = Noise(self._fixed(images, at), keys=self._fresh(images, at))
        verdict = self.rule.verify(draft, law, noise)
        meter.count(law)
        tokens = verdict.tokens[:, :-1]
        # The step of the first rejected place is the last one that is committed.
        ahead = torch.tensor(self.starts[first:last], device=places.device) - self.starts[first]
        steps = (ahead <= verdict.accepted[:, None]).sum(1)
        distance = None if verdict.distance is None else verdict.distance[:, :-1]
        return _Outcome(places, tokens, steps, len(parts), (tokens == draft.tokens).all(-1), distance)

    def _scales(self, first: int, last: int, device: torch.device) -> Tensor:
        """Guidance at each place of steps first..last - 1, float32 [W]."""
        counts = [self.starts[step + 1] - self.starts[step] for step in range(first, last)]
        scales = torch.tensor(self.guidances[first:last], dtype=torch.float32)
        return scales.repeat_interleave(torch.tensor(counts)).to(device)


def _commit(state: DecodeState, rows: Tensor, outcome: _Outcome, count: Tensor) -> DecodeState:
    """The state after a round of the images `rows` int64 [b], which then have `count` int64 [b] tokens."""
    width = outcome.places.shape[1]
    fresh = torch.arange(width, device=rows.device) < (count - state.count[rows])[:, None]
    owner = rows[:, None].expand_as(fresh)
    new = vars(state).copy()
    new["tokens"] = state.tokens.index_put((owner[fresh], outcome.places[fresh]), outcome.tokens[fresh])
    new["count"] = state.count.index_put((rows,), count)
    new["passes"] = state.passes.index_add(0, rows, torch.full_like(rows, outcome.passes))
    if outcome.kept is not None:
        new["drafted"] = state.drafted.index_add(0, rows, torch.full_like(rows, width))
        new["accepted"] = state.accepted.index_add(0, rows, (outcome.kept & fresh).sum(1))
    if outcome.distance is not None:
        moved = outcome.distance.masked_fill(~fresh, 0.0)
        new["moved"] = state.moved.index_add(0, rows, moved.sum(1))
        new["farthest"] = state.farthest.index_put((rows,), torch.maximum(state.farthest[rows], moved.amax(1)))
    return DecodeState(**new)


def _check(target: MARTarget, rule: Rule, settings: LawSettings, drafter: MARTarget | None) -> None:
    """Raises UsageError for what does not go together."""
    if settings.temperature <= 0 or settings.top_k or settings.top_p != 1:
        raise UsageError(
            "continuous tokens have no top-k, no top-p and no greedy choice: top_k = 0, top_p = 1, temperature > 0 "
            f"are allowed (given: {settings.top_k}, {settings.top_p:g}, {settings.temperature:g})"
        )
    drafted = isinstance(rule, Cspd | Pathwise)
    if rule.isotropic or not (drafted or isinstance(rule, Plain | Coupled)):
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
