"""The diffusion head of a continuous-token model: a small MLP under adaptive layer norm (Li et al., arXiv 2406.11838).

One network call sees one noisy token, its time and the backbone's condition for that token. Parameter names are those
of the published MAR checkpoints (below `diffloss.net`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 256
_EPS = 1e-6


@dataclass(frozen=True)
class DenoiserConfig:
    """token_dim: D, numbers of a token; out_dim: numbers predicted (D, or 2 D with learned variances); condition_dim:
    length of the backbone's condition z; width, depth: channels and residual blocks."""

    token_dim: int
    out_dim: int
    condition_dim: int
    width: int
    depth: int


def time_features(times: Tensor, size: int = _FREQUENCIES, longest: float = 10000.0) -> Tensor:
    """Cosines and sines of times float [R] at `size` / 2 geometric frequencies: float32 [R, size]."""
    half = size // 2
    rates = torch.exp(-math.log(longest) / half * torch.arange(half, dtype=torch.float32, device=times.device))
    angles = times.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def embed_times(mlp: Any, times: Tensor) -> Tensor:
    """What a network is told of times float [R]: an MLP over `time_features`, [R, width]."""
    return mlp(time_features(times).to(mlp[0].weight.dtype))


def _new_block(width: int) -> nn.ModuleDict:
    """x + gate * MLP(scaled and shifted layer norm of x); shift, scale and gate come from the condition."""
    mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
    modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
    return nn.ModuleDict({"in_ln": nn.LayerNorm(width, eps=_EPS), "mlp": mlp, "adaLN_modulation": modulation})


class Denoiser(nn.Module):
    """(noisy token, time, condition) -> prediction. It starts as the zero map."""

    time_embed: Any
    res_blocks: Any
    final_layer: Any  # a linear read-out of the scaled and shifted layer norm

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        width = config.width
        mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embed = nn.ModuleDict({"mlp": mlp})  # its published name
        self.cond_embed = nn.Linear(config.condition_dim, config.width)
        self.input_proj = nn.Linear(config.token_dim, config.width)
        self.res_blocks = nn.ModuleList(_new_block(config.width) for _ in range(config.depth))
        last, modulation = nn.Linear(width, config.out_dim), nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict({"linear": last, "adaLN_modulation": modulation})
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.time_embed.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)
        for block in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """x [R, D], times [R] (0 to 1000), condition [R, C] -> [R, out_dim]."""
        y = embed_times(self.time_embed.mlp, times) + self.cond_embed(condition)
        x = self.input_proj(x)
        for block in self.res_blocks:
            shift, scale, gate = block.adaLN_modulation(y).chunk(3, -1)
            x = x + gate * block.mlp(torch.addcmul(shift, block.in_ln(x), 1 + scale))
        shift, scale = self.final_layer.adaLN_modulation(y).chunk(2, -1)
        normed = F.layer_norm(x, (x.shape[-1],), eps=_EPS)
        return self.final_layer.linear(torch.addcmul(shift, normed, 1 + scale))
