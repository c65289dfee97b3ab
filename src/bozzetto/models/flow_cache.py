"""The cached decoder of a causal flow model: LlamaGen's cache, continuous tokens in, laws of their heads out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bozzetto.checks import Count, Steps
from bozzetto.laws.schedules import FlowSchedule, flow_schedule
from bozzetto.models.annealed import Annealed
from bozzetto.models.base import Scores
from bozzetto.models.denoiser import Denoiser
from bozzetto.models.dense import Dense
from bozzetto.models.flow import TIME_SCALE, FlowModel
from bozzetto.models.heads import FlowLaw, PackedDenoiser
from bozzetto.models.llamagen_cache import CausalSession, CausalTarget


@dataclass(frozen=True)
class FlowSampler:
    """How the head is sampled: see `flow_schedule`. last_steps: steps of the last token (0: as of all the others), see
    models/annealed.py."""

    steps: Steps = 16
    last_std: Annotated[float, Field(gt=0, lt=1)] = 0.05
    shift: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    last_steps: Count = 0

    def __post_init__(self) -> None:
        _ = self.schedule  # raises UsageError

    @property
    def schedule(self) -> FlowSchedule:
        return self.with_steps(self.steps)

    def with_steps(self, steps: int) -> FlowSchedule:
        return flow_schedule(steps, self.last_std, self.shift)


class FlowTarget(CausalTarget):
    """A flow model ready to decode in `dtype` with a sampler of its head. token_dim: D; length: N; narrow: compiled
    layers of the head, where there are."""

    narrow: Any = None
    stages: Annealed[FlowSchedule] | None = None

    @torch.no_grad()
    def __init__(self, model: FlowModel, sampler: FlowSampler, dtype: torch.dtype = torch.float32):
        self.config = model.config.body
        self.length, self.token_dim = model.config.length, model.config.token_dim
        super().__init__(model.blocks, model.norm.weight, model.cls_embedding, model.rope, dtype)
        self.positions = model.positions.to(dtype)
        self.embedding = Dense.of(model.token_embedding, dtype)
        self.sample_with(model, sampler)

    def denoiser(self, model: FlowModel) -> Denoiser:
        """The network behind the head."""
        return model.head

    @torch.no_grad()
    def sample_with(self, model: FlowModel, sampler: FlowSampler) -> None:
        """Sample the head of `model`, which this target was made from, in another way."""
        self.sampler, self.schedule = sampler, sampler.schedule
        kernels = self.narrow is not None
        self.head = PackedDenoiser(model.head, self.schedule.time * TIME_SCALE, self.dtype, kernels)
        self.head.compiled = self.narrow
        if sampler.last_steps:
            at = (sampler.with_steps, lambda schedule: schedule.time * TIME_SCALE)
            self.stages = Annealed(self.head, *at, sampler.last_steps, self.length)

    @torch.no_grad()
    def begin(self, labels: Tensor, guided: bool, max_width: int) -> CausalSession:
        """labels int64 [B] in 0..classes (classes: unconditional); guided: also keep unconditional rows; max_width:
        widest later pass."""
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.config.classes)])
        condition = self.conditions(labels) + self.positions[0]
        return self.session(self, condition, None, 2 if guided else 1, max_width)

    def embed(self, inputs: Tensor, position: Tensor) -> Tensor:
        x = self.embedding(inputs.to(self.dtype))
        return x + self.positions[position.clamp_max(self.length - 1)]

    def read_out(self, x: Tensor) -> Scores:
        return Scores(None, x)

    def law(self, features: Tensor, guidance: float, temperature: float, done: int = 0) -> Any:
        """Laws of the tokens at scored places. features [R, W, d], [cond; uncond] rows where guidance is not 1; done:
        tokens that are known."""
        rows, width = features.shape[:2]
        batch = rows if guidance == 1 else rows // 2
        schedule, head = (self.schedule, self.head) if self.stages is None else self.stages.at(done)
        return FlowLaw(schedule, head, features.flatten(0, 1), (batch, width), guidance, temperature)
