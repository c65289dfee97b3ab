"""NextStep-1 (arXiv 2508.10711): a language model that draws continuous tokens with a flow-matching head.

The decoder is transformers' Llama or Qwen2; image tokens come in through a linear map, and a small denoiser that is
told the hidden state draws them. A token is a patch of an autoencoder's latents. Layouts, samplers and prompts are
those of the published repository (stepfun-ai/NextStep-1) and of the model pages; no code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.adapters.pictures import PictureConfig
from bozzetto.adapters.prompted import PromptedTarget, Shape
from bozzetto.targets.base import Scores
from bozzetto.targets.denoiser import Denoiser, DenoiserConfig
from bozzetto.targets.flow_cache import Sampled

_EPS = 1e-6  # of the norm of drawn tokens


class NextStepParts(nn.Module):
    """All but the decoder, under the published names. token_dim: D; hidden: d; width, depth: of the head."""

    def __init__(self, token_dim: int, hidden: int, width: int, depth: int):
        super().__init__()
        self.image_in_projector = nn.Linear(token_dim, hidden)
        self.image_out_projector = nn.Linear(hidden, hidden)
        self.image_head = nn.ModuleDict({"net": Denoiser(DenoiserConfig(token_dim, token_dim, hidden, width, depth))})


@dataclass(frozen=True)
class _Grid(Shape):
    """columns: tokens in a row of the picture."""

    columns: int = 1

    @property
    def grid(self) -> int:
        return self.columns


class NextStepTarget(Sampled, PromptedTarget):
    """body: a transformers decoder in evaluation mode; parts: in its dtype; rows, columns: of tokens; sampler: of the
    head (flow_cache.py); positions: [N, d], added to the hidden states that tokens are drawn from (None: nothing
    is).

    Tokens here are those that the chain ends in. Where the sampler has a norm, what is fed back and decoded is a
    function of them, `settled`: rules compare laws of the tokens before it, and what follows depends on these through
    the same function for draft and target, so that the law of whole pictures is the same.
    """

    time_scale = 1.0

    @torch.no_grad()
    def __init__(self, body: Any, parts: NextStepParts, rows: int, columns: int, sampler: Any, positions: Any = None):
        text = body.config
        super().__init__(body, text.num_hidden_layers, rows * columns, text.max_position_embeddings)
        self.parts = parts
        self.image_in, self.image_out = parts.image_in_projector, parts.image_out_projector
        self.token_dim = self.image_in.in_features
        self.config = _Grid(0, self.length, text.hidden_size, columns)
        self.word_rows = body.get_input_embeddings()
        self.positions = None if positions is None else positions.to(self.device, self.dtype)
        self.use_head(self.denoiser(parts), sampler)

    def denoiser(self, model: NextStepParts) -> Any:
        return model.image_head["net"]

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def settled(self, tokens: Tensor) -> Tensor:
        """What is fed back and decoded of tokens [..., D]."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS) if self.sampler.norm else tokens

    def embed(self, tokens: Tensor) -> Tensor:
        return self.image_in(self.settled(tokens).to(self.dtype))

    def read_out(self, hidden: Tensor, number: Tensor) -> Scores:
        if self.positions is not None:
            hidden = hidden + self.positions[number.clamp_max(self.length - 1)]
        return Scores(None, self.image_out(hidden))


def grid_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Sines and cosines of column and row in raster order, float32 [rows columns, dim]; the first half of the numbers
    tells the column."""
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1).float()  # [.., dim / 2]
    return torch.cat([one[:columns].repeat(rows, 1), one[:rows].repeat_interleave(columns, 0)], 1)


class NextStepPictures:
    """What a pipeline asks of a tokenizer: float [B, N, D] tokens of a target to [B, 3, H, W] in [0, 1].

    decoder: latents [B, C, h, w] -> [B, 3, H, W] in [-1, 1]; scale, shift: latents = tokens / scale + shift; factor:
    pixels per latent and side. A token holds the p x p latents of a patch, channel by channel.
    """

    def __init__(
        self,
        target: NextStepTarget,
        decoder: Callable[[Tensor], Tensor],
        patch: int,
        factor: int,
        scale: float = 1.0,
        shift: float = 0.0,
    ):
        self.target, self.decoder, self.patch = target, decoder, patch
        self.scale, self.shift = scale, shift
        columns = target.config.grid
        self.config = PictureConfig.of(target.length // columns, columns, patch * factor)

    def latents(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, C, h, w]."""
        p, grid = self.patch, (self.config.rows, self.config.columns)
        x = self.target.settled(tokens).unflatten(2, (-1, p, p)).unflatten(1, grid)  # [B, row, column, C, p, p]
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return x / self.scale + self.shift

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return ((self.decoder(self.latents(tokens)) + 1) / 2).clamp(0, 1)
