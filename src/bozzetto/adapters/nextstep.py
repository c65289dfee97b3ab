"""Language models that draw continuous tokens with a flow-matching head, as NextStep-1 does (arXiv 2508.10711).

The decoder is any transformers language model; image tokens come in through a linear map and their laws go out through
a small denoiser conditioned on the hidden state. The sampler is our stochastic one with few steps (laws/schedules.py):
a density is what speculation needs, and the deterministic solver has none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bozzetto.adapters.prompted import PromptedTarget, Shape
from bozzetto.laws.schedules import FlowSchedule
from bozzetto.models.base import Scores
from bozzetto.models.denoiser import Denoiser
from bozzetto.models.flow import TIME_SCALE
from bozzetto.models.flow_cache import FlowSampler
from bozzetto.models.heads import FlowLaw, PackedDenoiser


class LanguageFlowTarget(PromptedTarget):
    """body: a transformers decoder in evaluation mode; image_in: tokens [.., D] -> [.., d]; head: the denoiser, with d
    numbers of condition; length: N; sampler: of the head."""

    schedule: FlowSchedule

    @torch.no_grad()
    def __init__(self, body: Any, image_in: nn.Module, head: Denoiser, length: int, sampler: FlowSampler):
        text = body.config
        super().__init__(body, text.num_hidden_layers, length, text.max_position_embeddings)
        self.image_in, self.token_dim = image_in, head.config.token_dim
        self.config = Shape(0, length, text.hidden_size)
        self.word_rows = body.get_input_embeddings()
        self.sampler, self.schedule = sampler, sampler.schedule
        self.head = PackedDenoiser(head, self.schedule.time * TIME_SCALE, self.dtype)

    @property
    def grid(self) -> int:
        """Tokens per side of the picture."""
        return math.isqrt(self.length)

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.image_in(tokens.to(self.dtype))

    def read_out(self, hidden: Tensor, number: Tensor) -> Scores:
        return Scores(None, hidden)

    def law(self, features: Tensor, guidance: float, temperature: float, done: int = 0) -> FlowLaw:
        """Laws of the tokens at scored places. features [R, W, d], [cond; uncond] rows where guidance is not 1."""
        rows, width = features.shape[:2]
        batch = rows if guidance == 1 else rows // 2
        return FlowLaw(self.schedule, self.head, features.flatten(0, 1), (batch, width), guidance, temperature)
