"""The two kinds of token that the loop decodes: codes of a codebook, and vectors with a denoising chain.

A kind says what the noise is, what a pass's law is, what a rule is given and what is recorded beside the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.state import DecodeState, own_commit
from bozzetto.drafters.base import gather_rows
from bozzetto.drafts import VECTORS, Draft, Verdict
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings, greedy_margin, law_of
from bozzetto.laws.noise import GumbelField, NoiseField, NormalField, fold, uniform
from bozzetto.rules.base import Noise, Rule
from bozzetto.runtime.laws import own_gumbel_rows, own_law_of, own_uniforms
from bozzetto.targets.base import Scores, Target
from bozzetto.targets.flow_cache import FlowTarget


def along(path: Tensor | None, values: Tensor, count: int) -> Tensor:
    """The first `count` places of the accepted path. values [R, M + 1, ...], R a multiple of B -> [R, count, ...]."""
    if path is None:
        return values[:, :count]
    return gather_rows(values, path[:, :count])


def _place_keys(state: DecodeState, places: int) -> Tensor:
    """Fresh keys int64 [B, places], one per scored place, also where several stand at one position."""
    place = torch.arange(places, device=state.count.device)
    return fold(fold(state.keys, state.passes)[:, None], state.count[:, None] + place)


@dataclass
class CodeKind:
    """Tokens of a codebook. budget, neighbours: see `EagerBatch`; noisy: whether drafts are drawn with the fixed noise,
    whatever the rule asks for."""

    target: Target
    rule: Rule
    settings: LawSettings
    budget: float | None = None
    neighbours: Tensor | None = None
    noisy: bool = True

    def __post_init__(self) -> None:
        # A relaxed rule makes its greedy choice from the plain law.
        self.greedy = self.settings.temperature == 0 and bool(self.rule.bias)
        self.scored = LawSettings(guidance=self.settings.guidance) if self.greedy else self.settings
        self.lead: Tensor | None = None  # in greedy decoding: margins of the choices at the scored places

    def begin(self, seed: int | Tensor, index: Tensor) -> GumbelField:
        """Fixed noise of the images int64 [B]."""
        whole = own_gumbel_rows if self.target.own else None
        return GumbelField(seed, index, self.target.length, self.target.vocab, whole)

    def blank(self, batch: int, device: torch.device) -> Tensor:
        """Tokens [B, N, ...] before there are any."""
        return torch.zeros(batch, self.target.length, dtype=torch.int64, device=device)

    def fill(self, noise: NoiseField, upto: Sequence[int]) -> None:
        """Make fixed noise available for positions < upto of each image."""
        if self.rule.needs_fixed or self.noisy:
            noise.fill(upto)

    def law(self, scores: Scores, done: int) -> Tensor:
        """The laws at the scored places. done: tokens of the image that is furthest."""
        if scores.logits is None:
            raise UsageError("this target draws continuous tokens: a rule for codes cannot verify them")
        if self.settings.temperature == 0 and not self.greedy:
            self.lead = greedy_margin(scores.logits, self.settings)
        return (own_law_of if self.target.own else law_of)(scores.logits, self.scored)

    def given(self, noise: NoiseField, state: DecodeState, draft: Draft) -> Noise:
        """What the rule may use besides draft and law."""
        fixed = uniforms = slack = None
        if self.rule.needs_fixed:
            place = torch.arange(draft.length + 1, device=state.count.device)
            fixed = noise.rows(state.count[:, None] + (place if draft.tree is None else draft.tree.depth))
        if self.rule.needs_uniforms:
            uniforms = self._uniforms(state, draft.length + 1, 2 + 2 * draft.reach if draft.beside else 2)
        if self.budget is not None:
            slack = (self.budget - state.spent).clamp_min(0)
        return Noise(fixed, uniforms, slack, self.greedy, neighbours=self.neighbours, own=self.target.own)

    def _uniforms(self, state: DecodeState, places: int, per: int) -> Tensor:
        if self.target.own:
            return own_uniforms(state.keys, state.passes, state.count, places, per)
        keys = _place_keys(state, places)
        return uniform(fold(keys[..., None], torch.arange(per, device=keys.device)))

    def commit(self, state: DecodeState, draft: Draft, verdict: Verdict) -> tuple[DecodeState, Tensor]:
        """Append what a verdict decided; returns the new state and how many tokens each image got, int64 [B]."""
        near, drawn = verdict.margin, draft.margin
        if self.lead is not None:  # margins of the choices that are kept; how they were drafted does not matter
            near = along(verdict.path, self.lead[..., None], verdict.tokens.shape[1])[..., 0]
            place = torch.arange(near.shape[1], device=near.device)
            near, drawn = near.masked_fill(place > verdict.accepted[:, None], torch.inf), None
        if self.target.own:
            return own_commit(state, draft.depth, verdict, near, drawn)
        others = {}
        if near is not None:
            place = torch.arange(near.shape[1], device=near.device)
            outside = state.count[:, None] + place >= state.length
            others["margin"] = torch.minimum(state.margin, near.masked_fill(outside, torch.inf).amin(1))
            if drawn is not None:
                others["margin"] = torch.minimum(others["margin"], drawn)
        if verdict.spent is not None:
            others["spent"] = state.spent + verdict.spent
        return state.append(draft, verdict, **others)


@dataclass
class VectorKind:
    """Continuous tokens of a causal model; methods as of CodeKind."""

    target: FlowTarget
    rule: Rule
    settings: LawSettings

    def __post_init__(self) -> None:
        check_continuous(self.settings)

    def begin(self, seed: int | Tensor, index: Tensor) -> NormalField:
        return NormalField(seed, index, self.target.length, self.target.schedule.steps, self.target.token_dim)

    def blank(self, batch: int, device: torch.device) -> Tensor:
        return torch.zeros(batch, self.target.length, self.target.token_dim, device=device)

    def fill(self, noise: NoiseField, upto: Sequence[int]) -> None:
        noise.fill(upto)

    def law(self, scores: Scores, done: int) -> Any:
        assert scores.features is not None
        return self.target.law(scores.features, self.settings.guidance, self.settings.temperature, done)

    def given(self, noise: NoiseField, state: DecodeState, draft: Draft) -> Noise:
        place = torch.arange(draft.length + 1, device=state.count.device)
        fixed = noise.rows(state.count[:, None] + place) if self.rule.needs_fixed else None
        return Noise(fixed, keys=_place_keys(state, draft.length + 1) if self.rule.needs_uniforms else None)

    def commit(self, state: DecodeState, draft: Draft, verdict: Verdict) -> tuple[DecodeState, Tensor]:
        moved = {}
        if verdict.distance is not None:
            place = torch.arange(verdict.distance.shape[1], device=state.count.device)
            behind = place > torch.minimum(verdict.accepted, state.length - state.count - 1)[:, None]
            far = verdict.distance.masked_fill(behind, 0.0)
            moved = {"moved": state.moved + far.sum(1), "farthest": torch.maximum(state.farthest, far.amax(1))}
        if not self.target.own:
            return state.append(draft, verdict, **moved)
        found, committed = own_commit(state, draft.depth, verdict, None, None)
        return replace(found, **moved), committed


def check_continuous(law: LawSettings) -> None:
    """Raise UsageError for what a law of continuous tokens cannot have."""
    if law.filtered:
        raise UsageError(
            "continuous tokens have no top-k, no top-p and no greedy choice: top_k = 0, top_p = 1, temperature > 0 "
            f"are allowed (given: {law.top_k}, {law.top_p:g}, {law.temperature:g})"
        )


def kind_of(target: Any, rule: Any, settings: LawSettings, *more: Any) -> CodeKind | VectorKind:
    """The kind of a target's tokens. more: what `CodeKind` is given besides. Raises UsageError for a rule of the other
    kind."""
    vectors = target.tokens == VECTORS
    if target.tokens != rule.tokens:
        drawn = "continuous tokens" if vectors else "codes"
        raise UsageError(f"rule {rule.name!r} is not allowed here: the model draws {drawn}")
    return VectorKind(target, rule, settings) if vectors else CodeKind(target, rule, settings, *more)
