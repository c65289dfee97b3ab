"""The drafter network of continuous tokens: the target's next feature, then a Gaussian law of the next token.

An EAGLE layer (drafters/eagle.py) predicts the target's next feature from its features and tokens so far; a small
read-out turns that into a Gaussian whose axes are the same for all tokens. The Gaussian's denoising chain is known in
closed form (laws/gaussian.py), so a drafted token costs one layer and no call of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Grid, Size
from bozzetto.drafters.eagle import EagleConfig, EagleNet
from bozzetto.drafters.sketch import EagleLayerCache
from bozzetto.runtime.dense import Dense
from bozzetto.targets.flow import FlowConfig

_LARGEST_LOG = 3.0  # of a token's deviation: more says nothing


@dataclass(frozen=True)
class SketchConfig:
    """dim, heads, ffn: of the layer (dim is the target's); token_dim: D; grid: the target's; width: of the read-out's
    hidden layer."""

    dim: Size
    heads: Size
    ffn: Size
    token_dim: Size
    grid: Grid
    width: Size = 512

    def __post_init__(self) -> None:
        _ = self.layer  # raises UsageError for a shape that a layer cannot have

    @property
    def layer(self) -> EagleConfig:
        """The layer's config; there is no codebook."""
        return EagleConfig(self.dim, self.heads, self.ffn, 1, self.grid)


def sketch_config(target: FlowConfig) -> SketchConfig:
    """A drafter with a layer of the target's shape."""
    body = target.body
    return SketchConfig(body.dim, body.heads, body.ffn, target.token_dim, target.grid)


class PathSketch(nn.Module):
    """The trainable part; tokens are embedded by the target, frozen."""

    def __init__(self, config: SketchConfig):
        super().__init__()
        self.config = config
        self.body = EagleNet(config.layer)
        self.hidden = nn.Linear(config.dim, config.width)
        self.readout = nn.Linear(config.width, 2 * config.token_dim)
        self.basis = nn.Parameter(torch.eye(config.token_dim))  # rows are the axes
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def gaussian(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted features [..., d] -> centre, variance along the axes, float32 [..., D]."""
        centre, log_std = self.readout(F.silu(self.hidden(features))).float().chunk(2, -1)
        return centre, bounded(log_std)


def nearest_rotation(basis: Tensor) -> Tensor:
    """The orthogonal matrix nearest to [D, D]: stored axes are rounded, and drafts whose axes are not orthogonal would
    not have the deviations that they claim."""
    left, _, right = torch.linalg.svd(basis.double())
    return (left @ right).float()


def bounded(log_std: Tensor) -> Tensor:
    """Variance of a log deviation, kept in bounds."""
    return (2 * _LARGEST_LOG * torch.tanh(log_std / _LARGEST_LOG)).exp()


class PathSketcher(EagleLayerCache):
    """The cached drafter, computing in the dtype of `embedding`, the target's map from tokens to inputs."""

    @torch.no_grad()
    def __init__(self, net: PathSketch, embedding: Dense):
        super().__init__(net.body, embedding.dtype)
        self.embedding = embedding
        self.hidden, self.readout = Dense.of(net.hidden, self.dtype), Dense.of(net.readout, torch.float32)
        self.basis = nearest_rotation(net.basis.detach().float())

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens.to(self.dtype))

    def gaussian(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `PathSketch.gaussian`."""
        centre, log_std = self.readout(self.hidden.silu(features).float()).chunk(2, -1)
        return centre, bounded(log_std)
