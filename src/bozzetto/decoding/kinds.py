"""The two kinds of token that the loop decodes: codes of a codebook, and vectors with a denoising chain.

A kind says what the noise is, what a pass's law is, what a rule is given and what is recorded beside the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.base import Observation, gather_rows
from bozzetto.drafts import VECTORS, Draft
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings, greedy_margin, gumbel_margin, law_of
from bozzetto.laws.noise import GumbelField, NoiseField, NormalField, fold, uniform
from bozzetto.rules.base import Noise, Rule
from bozzetto.runtime.laws import own_law_of, own_uniforms
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

    def begin(self, seed: int, index: Tensor) -> GumbelField:
        """Fixed noise of the images int64 [B]."""
        return GumbelField(seed, index, self.target.length, self.target.vocab)

    def blank(self, batch: int, device: torch.device) -> Tensor:
        """Tokens [B, N, ...] before there are any."""
        return torch.zeros(batch, self.target.length, dtype=torch.int64, device=device)

    def fill(self, noise: NoiseField, upto: int) -> None:
        """Make fixed noise available for positions < upto."""
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

    def record(
        self, state: DecodeState, draft: Draft, seen: Observation, given: Noise, fresh: Tensor
    ) -> dict[str, Tensor]:
        """New values of the state's statistics. fresh: bool [B, longest], which tokens were committed."""
        out, verdict = {}, seen.verdict
        inf, gaps = float("inf"), None
        if self.lead is not None:
            gaps = along(verdict.path, self.lead[..., None], seen.longest)[..., 0]
        elif self.rule.seed_exact and given.fixed is not None and seen.log_p is not None:
            gaps = gumbel_margin(*(along(verdict.path, part, seen.longest) for part in (seen.log_p, given.fixed)))
        if gaps is not None:
            out["margin"] = torch.minimum(state.margin, gaps.masked_fill(~fresh, inf).amin(1))
        elif verdict.margin is not None:
            place = torch.arange(verdict.margin.shape[1], device=state.count.device)
            outside = state.count[:, None] + place >= self.target.length
            margin = torch.minimum(state.margin, verdict.margin.masked_fill(outside, inf).amin(1))
            out["margin"] = margin if draft.margin is None else torch.minimum(margin, draft.margin)
        if verdict.spent is not None:
            out["spent"] = state.spent + verdict.spent
        return out


@dataclass
class VectorKind:
    """Continuous tokens of a causal model; methods as of CodeKind."""

    target: FlowTarget
    rule: Rule
    settings: LawSettings

    def __post_init__(self) -> None:
        check_continuous(self.settings)

    def begin(self, seed: int, index: Tensor) -> NormalField:
        return NormalField(seed, index, self.target.length, self.target.schedule.steps, self.target.token_dim)

    def blank(self, batch: int, device: torch.device) -> Tensor:
        return torch.zeros(batch, self.target.length, self.target.token_dim, device=device)

    def fill(self, noise: NoiseField, upto: int) -> None:
        noise.fill(upto)

    def law(self, scores: Scores, done: int) -> Any:
        assert scores.features is not None
        return self.target.law(scores.features, self.settings.guidance, self.settings.temperature, done)

    def given(self, noise: NoiseField, state: DecodeState, draft: Draft) -> Noise:
        place = torch.arange(draft.length + 1, device=state.count.device)
        fixed = noise.rows(state.count[:, None] + place) if self.rule.needs_fixed else None
        return Noise(fixed, keys=_place_keys(state, draft.length + 1) if self.rule.needs_uniforms else None)

    def record(
        self, state: DecodeState, draft: Draft, seen: Observation, given: Noise, fresh: Tensor
    ) -> dict[str, Tensor]:
        verdict = seen.verdict
        if verdict.distance is None:
            return {}
        moved = verdict.distance[:, : seen.longest].masked_fill(~fresh, 0.0)
        return {"moved": state.moved + moved.sum(1), "farthest": torch.maximum(state.farthest, moved.amax(1))}


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
