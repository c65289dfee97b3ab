"""The cached decoder of a causal flow model: LlamaGen's cache, continuous tokens in, laws of their heads out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bozzetto.common.checks import Count, Steps
from bozzetto.drafts import VECTORS, Layout
from bozzetto.errors import require
from bozzetto.laws.schedules import FlowSchedule, euler_schedule, flow_schedule, flow_sde_schedule
from bozzetto.targets.annealed import annealed
from bozzetto.targets.base import Scores
from bozzetto.targets.decoder import Inputs
from bozzetto.targets.denoiser import Denoiser
from bozzetto.targets.flow import TIME_SCALE, FlowModel
from bozzetto.targets.heads import FlowLaw, PackedDenoiser
from bozzetto.targets.llamagen_cache import Again, CausalTarget, laid_out


class _Scheduled:
    """What samplers of a causal flow head share. steps: of a token; norm: see EulerSampler."""

    steps: int
    norm = 0

    def __post_init__(self) -> None:
        require(self.norm in (0, 1), "norm", self.norm, "0, 1")
        _ = self.schedule  # raises UsageError

    @property
    def schedule(self) -> FlowSchedule:
        return self.with_steps(self.steps)

    def with_steps(self, steps: int) -> FlowSchedule:
        """The schedule of another number of steps."""
        raise NotImplementedError


@dataclass(frozen=True)
class FlowSampler(_Scheduled):
    """How the head is sampled: see `flow_schedule`. last_steps: steps of the last token (0: as of all the others), see
    targets/annealed.py."""

    steps: Steps = 16
    last_std: Annotated[float, Field(gt=0, lt=1)] = 0.05
    shift: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    last_steps: Count = 0

    def with_steps(self, steps: int) -> FlowSchedule:
        return flow_schedule(steps, self.last_std, self.shift)


@dataclass(frozen=True)
class EulerSampler(_Scheduled):
    """NextStep-1's sampler as it comes with the weights: see `euler_schedule`. norm: 1: every drawn token goes through
    a layer norm before it is fed back and before it is decoded (the chain, and what rules see, is the token before it);
    last_steps: as of FlowSampler."""

    steps: int = 28
    shift: float = 1.0
    last: float = 0.0
    norm: int = 0
    last_steps: int = 0

    def with_steps(self, steps: int) -> FlowSchedule:
        return euler_schedule(steps, self.shift, self.last)


@dataclass(frozen=True)
class FlowSdeSampler(_Scheduled):
    """NextStep-1.1's sampler as in its training repository: see `flow_sde_schedule`; norm, last_steps: as above."""

    steps: int = 30
    shift: float = 1.0
    level: float = 0.8
    norm: int = 0
    last_steps: int = 0

    def with_steps(self, steps: int) -> FlowSchedule:
        return flow_sde_schedule(steps, self.shift, self.level)


class Sampled:
    """What causal targets with a flow head share: the head, sampled in some way, and the laws of its tokens. own:
    whether our kernels run it; time_scale: the denoiser's times at the end of the path."""

    tokens = VECTORS
    own = False
    one_step = False  # a token is one call of a network, not a chain
    stages: Sequence[tuple[FlowSchedule, PackedDenoiser]]  # by known tokens
    time_scale = TIME_SCALE
    length: int
    dtype: torch.dtype

    def denoiser(self, model: Any) -> Denoiser:
        """The network behind the head."""
        return model.head

    @torch.no_grad()
    def use_head(self, net: Denoiser, sampler: Any) -> None:
        """Lay the head out, to be sampled in this way."""
        times = sampler.schedule.time * self.time_scale
        self.head = PackedDenoiser(net, times, self.dtype, self.own)
        self.sample_with(sampler)

    @torch.no_grad()
    def sample_with(self, sampler: Any) -> None:
        """Sample the head in another way; weights are shared."""
        self.sampler, self.schedule = sampler, sampler.schedule
        self.head = self.head.retimed(self.schedule.time * self.time_scale)
        self.stages = annealed(self.head, sampler, self.time_scale, self.length)

    def law(self, features: Tensor, guidance: float, temperature: float, done: int = 0) -> Any:
        """Laws of the tokens at scored places. features [R, W, d], [cond; uncond] rows where guidance is not 1; done:
        tokens that are known."""
        rows, width = features.shape[:2]
        batch = rows if guidance == 1 else rows // 2
        schedule, head = self.stages[min(done, len(self.stages) - 1)]
        return FlowLaw(schedule, head, features.flatten(0, 1), (batch, width), guidance, temperature)


class FlowTarget(Sampled, CausalTarget):
    """A flow model ready to decode in `dtype` with a sampler of its head. token_dim: D; length: N; whole: the model's
    config, of which `config` is the body's."""

    embedding: Any = laid_out("embedding")
    head: Any = laid_out("head")
    stages: Any = laid_out("stages")

    @torch.no_grad()
    def __init__(self, model: FlowModel, sampler: FlowSampler, dtype: torch.dtype = torch.float32, again: Again = None):
        self.config, self.whole = model.config.body, model.config
        self.length, self.token_dim = model.config.length, model.config.token_dim
        self.sampler, self.schedule = sampler, sampler.schedule
        self.positions = model.positions.to(dtype)
        super().__init__(model, dtype, again)

    def lay_out(self, network: FlowModel) -> None:
        super().lay_out(network)
        self.embedding = self.map_of(network.token_embedding)
        self.use_head(self.denoiser(network), self.sampler)

    def conditions_of(self, labels: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.config.classes)])
        return self.conditions(labels) + self.positions[0], None

    def embed(self, inputs: Tensor, start: Tensor, layout: Layout | None) -> Inputs:
        offset = torch.arange(inputs.shape[1], device=inputs.device) if layout is None else layout.depth
        position = (start[:, None] + offset).clamp_max(self.length - 1)
        return Inputs(self.embedding(inputs.to(self.dtype)) + self.positions[position])

    def read_out(self, x: Tensor) -> Scores:
        return Scores(None, x)
