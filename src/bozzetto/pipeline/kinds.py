"""Kinds of token: what settings come to with each, and the batch that decodes it."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from bozzetto.checkpoints.own_sampling import HEAD
from bozzetto.checkpoints.weights import name_of
from bozzetto.decoding.batch import Batch
from bozzetto.decoding.fused import fused_key, fuses, make_fused
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.masked import MaskedBatch
from bozzetto.drafts import CODES, VECTORS
from bozzetto.errors import UsageError
from bozzetto.methods.resources import MaskedResources, Resources, VectorResources
from bozzetto.methods.table import AUTO, USUAL_RULES
from bozzetto.pipeline.runner import Runner
from bozzetto.rules.reflection import PlainSteps
from bozzetto.settings import GenerateSettings
from bozzetto.targets.mar_target import MARSampler

_CALLED = {CODES: "codes", VECTORS: "continuous tokens"}
_UNSET = GenerateSettings()

# Places of continuous tokens in a pass of our kernels, on a processor without a matrix unit: a place more costs a third
# of a token alone, all of it arithmetic of the head.
_WIDEST_OWN = 3


class TokenKind:
    """What the three kinds share. runner: of the target; resources: its drafters (methods/resources.py).

    default_methods: what a comparison takes; default_drafter, default_rules: what `auto` stands for, the rule by the
    drafter's name; foreign: options that mean nothing here, and what the model is that they do not; in_order: whether
    tokens are drawn one after the other, line by line.
    """

    default_methods: tuple[str, ...]
    default_drafter: str
    default_rules: Mapping[str, str]
    foreign: ClassVar[Mapping[str, str]]
    in_order: ClassVar[bool] = True

    def __init__(self, runner: Runner, resources: Any):
        self.runner, self.resources = runner, resources
        self.target, self.name, self.dtype = runner.target, runner.name, name_of(runner.target.dtype)

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        """Settings with the model's own values -> with `auto` replaced. Raises UsageError for a method or an option of
        another kind of token."""
        tokens = self.target.tokens
        settings = replace(settings, compile=self.runner.mode(settings.compile))
        settings = settings.with_method(self.usual_drafter(settings), self.default_rules)
        if tokens == VECTORS and settings.sequential:
            settings = replace(settings, rule=PlainSteps.name)
        rule, drafter = settings.rule, settings.drafter
        if rule.tokens != tokens:
            raise UsageError(f"rule {rule.text!r} is for {_CALLED[rule.tokens]}: {self.name} draws {_CALLED[tokens]}")
        for option, why in self.foreign.items():
            if getattr(settings, option) != getattr(_UNSET, option):
                raise UsageError(f"{option} is not allowed here: {self.name} {why}")
        if settings.last_steps and drafter.drafts:
            raise UsageError(f"last_steps is not allowed with drafts: drafter {drafter.text!r} (allowed: none)")
        return settings

    def usual_drafter(self, settings: GenerateSettings) -> str:
        """What the drafter `auto` stands for."""
        return self.default_drafter

    def make_batch(self, settings: GenerateSettings, closed: bool) -> Batch:
        """Of resolved settings: see Pipeline.make_batch."""
        raise NotImplementedError

    def fuses(self, settings: GenerateSettings, closed: bool) -> bool:
        """See Pipeline.fuses."""
        return False

    def batch_key(self, settings: GenerateSettings, seed: int, closed: bool) -> Hashable:
        """See Pipeline.batch_key."""
        return (settings,)

    def head_sampling(self, settings: GenerateSettings) -> dict[str, Any]:
        """Of resolved settings: steps, passes and guidance schedule, where there are."""
        return {}

    def blank_inputs(self, labels: Tensor) -> Tensor:
        """Any token for each of B images, [B, 1, ...]."""
        shape = (len(labels), 1) if self.target.tokens == CODES else (len(labels), 1, self.target.token_dim)
        return torch.zeros(shape, dtype=labels.dtype if len(shape) == 2 else None, device=labels.device)

    @torch.no_grad()
    def bare_passes(self, labels: Tensor, settings: GenerateSettings) -> Iterator[object]:
        """See Pipeline.bare_passes."""
        target = self.runner.target_in(settings.compile)
        session, start = target.begin(labels, settings.law.guided, 1), torch.zeros_like(labels)
        inputs = self.blank_inputs(labels)
        for number in range(self.target.length):
            yield session.score(inputs, start, number)
            start = start + 1


class Codes(TokenKind):
    """Codes of a codebook, from a causal target."""

    resources: Resources
    default_methods = ("none", "jacobi/seed-exact", "jacobi/exact")
    default_drafter = "jacobi"
    default_rules = USUAL_RULES
    foreign = MappingProxyType(
        dict.fromkeys(("steps", "last_steps", "passes", "guidance_schedule"), "draws codes, without a denoising head")
    )

    def fuses(self, settings: GenerateSettings, closed: bool) -> bool:
        return fuses(settings) and not (closed and settings.compile == "off")

    def batch_key(self, settings: GenerateSettings, seed: int, closed: bool) -> Hashable:
        if not self.fuses(settings, closed):
            return super().batch_key(settings, seed, closed)
        return fused_key(settings, self.target.length, self.dtype)

    def make_batch(self, settings: GenerateSettings, closed: bool) -> Batch:
        target = self.runner.target_in(settings.compile)
        resources = self.resources.of(target)
        if self.fuses(settings, closed):
            return make_fused(settings, target, self.dtype, resources.filler(settings.drafter))
        window = settings.window_for(settings.batch, target.length, self.dtype)
        widen = None
        if settings.any_window:
            widen = partial(settings.window_for, length=target.length, dtype=self.dtype)
        drafter, rule = settings.drafter.make(window, widen, resources, target), settings.verifier
        near = resources.neighbours(rule.columns) if rule.columns else None
        return EagerBatch(target, drafter, rule, settings.law, settings.tv_budget, settings.batch, window, near)


class CausalVectors(TokenKind):
    """Continuous tokens of a causal target. A target of one step (a drift variant) has no density; under a sampler
    whose last step adds no noise drafts of whole tokens are hardly ever kept."""

    resources: VectorResources
    foreign = MappingProxyType(
        {"tv_budget": "draws continuous tokens"}
        | dict.fromkeys(("passes", "guidance_schedule"), "is causal, not masked")
    )

    def __init__(self, runner: Runner, resources: VectorResources):
        super().__init__(runner, resources)
        exact: tuple[str, ...] = ()
        drafter, rules = "jacobi", {"none": "plain", "jacobi": "pathwise", "sketch": "pathwise"}
        if not self.target.one_step and self.target.schedule.moving:
            exact, rules = (
                ("none/reflection", "jacobi/chains"),
                {"none": "plain", "jacobi": "chains", "sketch": "joint"},
            )
        elif not self.target.one_step:
            exact, drafter, rules = ("none/coupled",), "none", {"none": "coupled", "jacobi": "pathwise"}
        self.default_methods = ("none", *exact, "jacobi/pathwise:epsilon=0.1")
        self.default_drafter, self.default_rules = drafter, rules

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        settings, target = super().resolve(settings), self.target
        rule = settings.rule
        for option in ("steps", "last_steps") if target.one_step else ():
            if (count := getattr(settings, option)) > 1:
                raise UsageError(f"{option} = {count} is not allowed here: {self.name} draws a token in one step")
        if target.one_step and not (rule.sequential or (rule.fixed_noise and not rule.needs_law)):
            raise UsageError(
                f"rule {rule.text!r} is not allowed here: {self.name} maps noise to a token and has no density "
                "(plain, pathwise)"
            )
        if rule.isotropic and not target.schedule.moving:
            raise UsageError(
                f"rule {rule.text!r} is not allowed here: the sampler's last step adds no noise (coupled is)"
            )
        return settings

    def usual_drafter(self, settings: GenerateSettings) -> str:
        """Sequential where our kernels draw: there each drafted place costs its share of the head (docs/log.md)."""
        asked = settings.compile == "off" or settings.rule is not AUTO
        return self.default_drafter if asked else "none"

    def batch_key(self, settings: GenerateSettings, seed: int, closed: bool) -> Hashable:
        lasts = settings.last_steps or getattr(self.target.sampler, "last_steps", 0)
        return (settings, seed) if lasts else super().batch_key(settings, seed, closed)  # `EagerBatch.joins`

    def head_sampling(self, settings: GenerateSettings) -> dict[str, Any]:
        return {"steps": settings.steps or self.target.sampler.steps}

    def make_batch(self, settings: GenerateSettings, closed: bool) -> Batch:
        rule, target = settings.rule, self.runner.target_in(settings.compile)
        widest = min(rule.widest, _WIDEST_OWN) if target.own else rule.widest
        window = settings.window_for(settings.batch, target.length, self.dtype, widest)
        resources = self.resources.of(target)
        asked = {n: getattr(settings, n) for n in ("steps", "last_steps") if getattr(settings, n)}
        if asked and asked != {"steps": target.sampler.steps}:
            target = copy.copy(target)
            target.sample_with(replace(target.sampler, **asked))
        drafter = settings.drafter.make(window, None, resources, target)
        return EagerBatch(target, drafter, rule, settings.law, None, settings.batch, drafter.max_nodes + 1)


class MaskedVectors(TokenKind):
    """Continuous tokens of a masked target."""

    resources: MaskedResources
    default_methods = ("none", "none@passes=64", "none/coupled")
    default_drafter = "none"
    default_rules = MappingProxyType({"none": "plain", "model": "cspd"})  # `coupled` costs more than it saves
    foreign = MappingProxyType({"tv_budget": "draws continuous tokens"})
    in_order = False

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        if settings.deterministic:
            raise UsageError(f"deterministic is not allowed here: {self.name} is masked")
        return super().resolve(settings)

    def head_sampling(self, settings: GenerateSettings) -> dict[str, Any]:
        sampler = self._sampler(settings)
        return {name: getattr(sampler, name) for name in HEAD}

    def _sampler(self, settings: GenerateSettings) -> MARSampler:
        """The model's sampler with what the settings change."""
        asked = {name: getattr(settings, name) for name in (*HEAD, "last_steps") if getattr(settings, name)}
        return replace(self.target.sampler, **asked)

    def make_batch(self, settings: GenerateSettings, closed: bool) -> Batch:
        asked: Any = settings.drafter
        if not asked.masked:
            raise UsageError(f"drafter {asked.text!r} is not allowed here: {self.name} is masked (none, model)")
        sampler, made = self._sampler(settings), self.resources.target_with
        target = made(sampler, settings.compile)
        if not asked.drafts:
            return MaskedBatch(target, settings.rule, settings.law, slots=settings.batch)
        drafter = made(sampler, settings.compile, self.resources.smaller(asked.folder))
        return MaskedBatch(target, settings.rule, settings.law, drafter, asked, settings.batch)

    @torch.no_grad()
    def bare_passes(self, labels: Tensor, settings: GenerateSettings) -> Iterator[object]:
        sampler = self._sampler(settings)
        target, done = self.resources.target_with(sampler), 0
        tokens = torch.zeros(len(labels), target.length, target.token_dim, device=labels.device)
        order = torch.arange(target.length, device=labels.device).expand(len(labels), -1)
        for count in target.counts(sampler.passes):
            known, places = order[:, :done], order[:, done : done + count]
            yield target.features(labels, tokens, known, places, settings.law.guided)
            done += count
