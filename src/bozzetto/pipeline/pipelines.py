"""Pipelines by kind of token: codes, continuous tokens of a causal model, of a masked one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bozzetto.checkpoints.folders import FLOW, MASKED, Tokenizer, load_target
from bozzetto.checkpoints.own_sampling import HEAD
from bozzetto.checkpoints.weights import WEIGHTS
from bozzetto.common.files import digest
from bozzetto.common.hub import fetched
from bozzetto.decoding.batch import Batch
from bozzetto.decoding.fused import fused_key, fuses, make_fused
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.masked import MaskedBatch
from bozzetto.drafts import CODES, VECTORS
from bozzetto.errors import UsageError
from bozzetto.methods.options import Drafting
from bozzetto.methods.resources import Resources, VectorResources
from bozzetto.methods.table import USUAL_RULES
from bozzetto.pipeline.conditions import Classes
from bozzetto.pipeline.pipeline import Pipeline, model_files
from bozzetto.rules.reflection import Plain
from bozzetto.runtime.graphs import Compiler
from bozzetto.settings import GenerateSettings
from bozzetto.targets.compiled_cache import compile_target
from bozzetto.targets.compiled_head import CompiledNarrow
from bozzetto.targets.llamagen import LlamaGen
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from bozzetto.targets.mar import MAR
from bozzetto.targets.mar_target import MARSampler, MARTarget

DRAFT = "draft"  # the folder of a masked model's own draft model, inside its own


class _CausalPipeline(Pipeline):
    """What causal targets share: their passes can be compiled. network: reads what `target` was made from again."""

    network: Callable[[], Any] | None
    compiled: dict[tuple[str, bool], Any]

    def target_in(self, mode: str, deterministic: bool = False) -> Any:
        """The target with its passes compiled as asked; each is made once. Raises UsageError where there is nothing to
        compile."""
        if mode == "off":
            return self.target
        if (mode, deterministic) not in self.compiled:
            if self.network is None:
                raise UsageError(f"compile = {mode!r} is not allowed here: {self.name} is not a network")
            target = copy.copy(self.target)
            compile_target(target, self.network(), mode, _say, deterministic)
            self.compiled[mode, deterministic] = target
        return self.compiled[mode, deterministic]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class CodePipeline(_CausalPipeline):
    """A target that draws codes of a codebook. compiled: where its compiled twins are kept."""

    default_methods = ("none", "jacobi/seed-exact", "jacobi/exact")
    default_rules = USUAL_RULES

    def __init__(
        self,
        name: str,
        target: LlamaGenTarget,
        tokenizer: Tokenizer,
        conditions: Classes,
        dtype: str,
        folder: Path | None = None,
        network: Callable[[], LlamaGen] | None = None,
        compiled: dict[tuple[str, bool], Any] | None = None,
    ):
        super().__init__(name, target, tokenizer, conditions, dtype, folder)
        self.network, self.compiled = network, {} if compiled is None else compiled
        self.resources = Resources(target, tokenizer.codebook, folder)

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        settings = super().resolve(settings).with_method("jacobi", self.default_rules)
        if settings.rule.tokens != CODES:
            raise UsageError(f"rule {settings.rule.text!r} is for continuous tokens: {self.name} draws codes")
        self.refuse_negative(settings)
        for option in ("steps", "last_steps", "passes", "guidance_schedule"):
            if getattr(settings, option):
                raise UsageError(f"{option} is not allowed here: {self.name} draws codes, without a denoising head")
        return settings

    def fuses(self, settings: GenerateSettings, closed: bool = True) -> bool:
        return fuses(settings) and not (closed and settings.compile == "off")

    def batch_key(self, settings: GenerateSettings, seed: int, closed: bool = True) -> Hashable:
        if not self.fuses(settings, closed):
            return super().batch_key(settings, seed)
        return fused_key(settings, self.target.length, self.dtype)

    def make_batch(self, settings: GenerateSettings, closed: bool = True) -> Batch:
        settings = self.resolve(settings)
        target = self.target_in(settings.compile, settings.deterministic)
        if self.fuses(settings, closed):
            return make_fused(settings, target, self.dtype, self.resources.filler(settings.drafter, target))
        window = settings.window_for(settings.batch, target.length, self.dtype)
        widen = None
        if settings.any_window:
            widen = partial(settings.window_for, length=target.length, dtype=self.dtype)
        drafter, rule = settings.drafter.make(window, widen, self.resources, self.target), settings.verifier
        near = self.resources.neighbours(rule.columns) if rule.columns else None
        return EagerBatch(target, drafter, rule, settings.law, settings.tv_budget, settings.batch, window, near)


class FlowPipeline(_CausalPipeline):
    """A causal target that draws continuous tokens. network: reads what it was made from again; base: folder of the
    model that a drift variant is one of; tuned: see VectorResources."""

    default_drafter = "jacobi"

    def __init__(
        self,
        name: str,
        target: Any,
        tokenizer: Any,
        conditions: Classes,
        dtype: str,
        folder: Path | None,
        network: Callable[[], Any] | None,
        base: Path | None = None,
        tuned: bool = False,
    ):
        self.network, self.compiled = network, {}
        super().__init__(name, target, tokenizer, conditions, dtype, folder)
        self.resources = VectorResources(target, name, folder, base, tuned)
        exact = () if target.one_step else ("none/reflection", "jacobi/chains")  # one call has no density
        rules = ("pathwise", "pathwise") if target.one_step else ("chains", "joint")
        self.default_methods: tuple[str, ...] = ("none", *exact, "jacobi/pathwise:epsilon=0.1")
        self.default_rules = {"none": "plain", "jacobi": rules[0], "sketch": rules[1]}

    def _fingerprint(self) -> str:
        if self.folder is None or self.resources.base is None:
            return super()._fingerprint()
        return digest(*model_files(self.folder), *model_files(self.resources.base))

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        for option in ("steps", "last_steps") if self.target.one_step else ():
            if (count := getattr(settings, option)) > 1:
                raise UsageError(f"{option} = {count} is not allowed here: {self.name} draws a token in one step")
        settings = super().resolve(settings)
        self.refuse_negative(settings)
        settings = vector_settings(self.name, settings, self.default_drafter, self.default_rules)
        for option in ("passes", "guidance_schedule"):
            if getattr(settings, option):
                raise UsageError(f"{option} is not allowed here: {self.name} is causal, not masked")
        _check_annealed(settings)
        rule = settings.rule
        if self.target.one_step and not (rule.fixed_noise or rule.sequential):
            raise UsageError(
                f"rule {rule.text!r} is not allowed here: {self.name} maps noise to a token and has no density "
                "(plain, pathwise)"
            )
        if rule.isotropic and not self.target.schedule.moving:
            raise UsageError(
                f"rule {rule.text!r} is not allowed here: the sampler's last step adds no noise (coupled is)"
            )
        return settings

    def head_sampling(self, settings: GenerateSettings) -> dict[str, Any]:
        return {"steps": settings.steps or self.target.sampler.steps}

    def blank_inputs(self, labels: Tensor) -> Tensor:
        return torch.zeros(len(labels), 1, self.target.token_dim, device=labels.device)

    def make_batch(self, settings: GenerateSettings, closed: bool = True) -> Batch:
        settings = self.resolve(settings)
        rule, target = settings.rule, self.target_in(settings.compile, settings.deterministic)
        window = settings.window_for(settings.batch, target.length, self.dtype, rule.widest)
        asked = {n: getattr(settings, n) for n in ("steps", "last_steps") if getattr(settings, n)}
        if asked and asked != {"steps": target.sampler.steps}:
            target = copy.copy(target)
            target.sample_with(replace(target.sampler, **asked))
        drafter = settings.drafter.make(window, None, self.resources, target)
        return EagerBatch(target, drafter, rule, settings.law, None, settings.batch, drafter.max_nodes + 1)


class MaskedPipeline(Pipeline):
    """A masked target that draws continuous tokens. sampler: the model's."""

    default_methods = ("none", "none@passes=64", "none/coupled")
    default_rules: ClassVar = {"none": "coupled", "model": "cspd"}

    def __init__(
        self,
        name: str,
        target: MARTarget,
        tokenizer: Any,
        conditions: Classes,
        dtype: str,
        folder: Path,
    ):
        self.sampler, self.own_folder = target.sampler, folder
        self.made: dict[tuple[str, MARSampler, str], MARTarget] = {}
        super().__init__(name, target, tokenizer, conditions, dtype, folder)
        self.resources: Any = self

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        settings = super().resolve(settings)
        if settings.compile == "default" or settings.deterministic:
            asked = "deterministic" if settings.deterministic else f"compile = {settings.compile!r}"
            raise UsageError(
                f"{asked} is not allowed here: {self.name} is masked; off, or max, which compiles its head"
            )
        self.refuse_negative(settings)
        settings = vector_settings(self.name, settings, "none", self.default_rules)
        _check_annealed(settings)
        return settings

    def head_sampling(self, settings: GenerateSettings) -> dict[str, Any]:
        sampler = self.sampler_for(settings)
        return {name: getattr(sampler, name) for name in HEAD}

    def sampler_for(self, settings: GenerateSettings) -> MARSampler:
        """The model's sampler with what the settings change."""
        names = ("steps", "last_steps", "passes", "guidance_schedule")
        asked = {name: getattr(settings, name) for name in names if getattr(settings, name)}
        return replace(self.sampler, **asked)

    def make_batch(self, settings: GenerateSettings, closed: bool = True) -> Batch:
        settings = self.resolve(settings)
        asked: Any = settings.drafter
        if not asked.masked:
            raise UsageError(f"drafter {asked.text!r} is not allowed here: {self.name} is masked (none, model)")
        sampler, rule = self.sampler_for(settings), settings.rule
        target = self._target("", sampler, settings.compile)
        if not asked.drafts:
            return MaskedBatch(target, rule, settings.law, slots=settings.batch)
        drafter = self._target(str(self._draft_folder(asked.folder)), sampler, settings.compile)
        return MaskedBatch(target, rule, settings.law, drafter, asked, settings.batch)

    def weights(self, drafter: Drafting) -> Path | None:
        """As of `Resources`."""
        return self._draft_folder(drafter.folder) / WEIGHTS if drafter.smaller else None

    def _draft_folder(self, folder: str) -> Path:
        """Where a smaller model lies; "": the model's own. Raises UsageError where there is none."""
        if folder:
            return fetched(folder)
        if self.folder is None or not (self.folder / DRAFT).is_dir():
            raise UsageError(f"{self.name} comes without a smaller model (write model:folder=DIR)")
        return self.folder / DRAFT

    def _target(self, folder: str, sampler: MARSampler, mode: str = "off") -> MARTarget:
        """The model ("") or a smaller one, with a sampler, and its head compiled as asked; each is made once."""
        if not folder and sampler == self.sampler and mode == "off":
            return self.target
        if (folder, sampler, mode) not in self.made:
            target = self._sampled(folder, sampler)
            if mode != "off":
                net = self._network(folder).diffloss.net
                target.use_compiled(CompiledNarrow(net, target.dtype, Compiler(mode, _say)))
            self.made[folder, sampler, mode] = target
        return self.made[folder, sampler, mode]

    def _sampled(self, folder: str, sampler: MARSampler) -> MARTarget:
        """Targets of one folder share its weights."""
        if not folder:
            return self.target.with_sampler(sampler)
        known = next((target for (name, *_), target in self.made.items() if name == folder), None)
        if known is not None:
            return known.with_sampler(sampler)
        return MARTarget(self._network(folder), sampler, self.target.dtype)

    def _network(self, folder: str) -> MAR:
        """What a target is made from, read for it."""
        source = Path(folder) if folder else self.own_folder
        smaller = load_target(source, FLOW, MASKED, dtype=self.target.dtype, device=self.target.device)
        if not isinstance(smaller, MAR):
            raise UsageError(f"{folder}: a draft model of a masked target is masked too (family 'mar')")
        return smaller

    def bare_passes(self, labels: Tensor, settings: GenerateSettings) -> Iterator[object]:
        settings = settings.with_own(self.own)
        sampler = self.sampler_for(settings)
        target, done = self._target("", sampler), 0
        tokens = torch.zeros(len(labels), target.length, target.token_dim, device=labels.device)
        order = torch.arange(target.length, device=labels.device).expand(len(labels), -1)
        for count in target.counts(sampler.passes):
            known, places = order[:, :done], order[:, done : done + count]
            yield target.features(labels, tokens, known, places, settings.law.guided)
            done += count


def _check_annealed(settings: GenerateSettings) -> None:
    if settings.last_steps and settings.drafter.drafts:
        raise UsageError(f"last_steps is not allowed with drafts: drafter {settings.drafter.text!r} (allowed: none)")


def vector_settings(name: str, settings: GenerateSettings, drafter: str, rules: Mapping[str, str]) -> GenerateSettings:
    """Settings for a model of continuous tokens: `auto` replaced, the sequential sampler as `none/plain`."""
    settings = settings.with_method(drafter, rules)
    if settings.sequential:
        settings = replace(settings, rule=Plain.name)
    if settings.rule.tokens != VECTORS:
        raise UsageError(f"rule {settings.rule.text!r} is for codes: {name} draws continuous tokens")
    if settings.tv_budget is not None:
        raise UsageError(f"tv_budget is not allowed here: {name} draws continuous tokens")
    return settings
