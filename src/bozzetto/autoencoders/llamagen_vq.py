"""LlamaGen's tokenizers VQ-16 and VQ-8 (Sun et al., arXiv 2406.06525) from their published checkpoints.

A convolutional VQGAN (Esser et al., arXiv 2012.09841) with 8-dim unit codes (Yu et al., arXiv 2110.04627). The two
networks are those of transformers' `JanusVQVAE`, the same architecture under other names. Stored folders keep the
published names, so that they outlive a renaming in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.autoencoders.decoder import GROUPS, SquareConfig, levels_of, renamed
from bozzetto.common.checks import Layers, Levels, Pixels, Size
from bozzetto.common.extras import needed
from bozzetto.errors import require

# Published part of a key, and the same part here. Plain replacements, valid in both directions.
MODULES = (
    ("encoder.conv_blocks.", "encoder.down."),
    ("decoder.conv_blocks.", "decoder.up."),
    (".res.", ".block."),
    (".mid.0.", ".mid.block_1."),
    (".mid.1.", ".mid.attn_1."),
    (".mid.2.", ".mid.block_2."),
)
_NAMES = (*MODULES, ("quantize.embedding.weight", "codebook"))
USED = "quantize.codebook_used"  # the last 65536 codes of the tokenizer's own training; of no use here


@dataclass(frozen=True)
class LlamaGenVQConfig(SquareConfig):
    """codes: codebook size V; code_dim: length of a code vector; channels, multipliers, blocks: width of the first
    level, the levels' multiples of it, residual blocks per level; latent: channels between the networks and the codes;
    image_size: side of the pictures in pixels."""

    codes: Size = 16384
    code_dim: Size = 8
    channels: Size = 128
    multipliers: Levels = (1, 1, 2, 2, 4)
    blocks: Layers = 2
    latent: Size = 256
    image_size: Pixels = 256

    def __post_init__(self) -> None:
        require(self.channels % GROUPS == 0, "channels", self.channels, f"a multiple of {GROUPS}")
        super().__post_init__()

    @property
    def downsample(self) -> int:
        """Pixels per token and side: 16 for VQ-16, 8 for VQ-8."""
        return 2 ** (len(self.multipliers) - 1)


class LlamaGenVQ(nn.Module):
    """encode: [B, 3, H, W] in [0, 1] -> int64 [B, h*w]; decode: int64 [B, h*w] -> [B, 3, H, W] in [0, 1].

    Raises UsageError where transformers is not installed.
    """

    encodes = True
    codebook: Tensor  # [V, code_dim], unit rows

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__()
        self.config = config
        networks = _networks(config)
        self.encoder, self.decoder = networks.encoder, networks.decoder
        self.quant_conv, self.post_quant_conv = networks.quant_conv, networks.post_quant_conv
        self.register_buffer("codebook", F.normalize(torch.randn(config.codes, config.code_dim), dim=-1))

    def encode(self, images: Tensor) -> Tensor:
        latent = self.quant_conv(self.encoder(2 * images - 1))
        unit = F.normalize(latent.flatten(2).transpose(1, 2).float(), dim=-1)  # [B, h*w, code_dim]
        return (unit @ self.codebook.t()).argmax(-1)  # of unit vectors the nearest has the largest cosine

    def decode(self, tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        codes = F.embedding(tokens, self.codebook).transpose(1, 2).unflatten(2, (side, side))
        return ((self.decoder(self.post_quant_conv(codes)) + 1) / 2).clamp(0, 1)

    def forget_encoder(self) -> None:
        """Keep what `decode` needs."""
        del self.encoder, self.quant_conv

    def published_state(self) -> dict[str, Tensor]:
        """The state under its published names."""
        return {renamed(key, _NAMES, back=True): value for key, value in self.state_dict().items()}


def _networks(config: LlamaGenVQConfig) -> Any:
    """The two networks and the convolutions beside the codes, with random weights."""
    with needed("LlamaGen's tokenizer needs", "llamagen"):
        from transformers import JanusVQVAE
    return JanusVQVAE(hosted_config(config, num_embeddings=1))  # the codebook is our own


def hosted_config(config: LlamaGenVQConfig, **besides: int) -> Any:
    """The same config as transformers has it, a JanusVQVAEConfig. besides: more of its fields."""
    from transformers import JanusVQVAEConfig

    return JanusVQVAEConfig(
        embed_dim=config.code_dim,
        latent_channels=config.latent,
        base_channels=config.channels,
        channel_multiplier=list(config.multipliers),
        num_res_blocks=config.blocks,
        **besides,
    )


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names -> those of LlamaGenVQ, codes of unit length, float32, without the record of used codes."""
    out = {renamed(key, _NAMES): value.float() for key, value in state.items() if key != USED}
    if "codebook" in out:
        out["codebook"] = F.normalize(out["codebook"], dim=-1)
    return out


def infer_config(state: Mapping[str, Tensor], image_size: int = 0) -> LlamaGenVQConfig:
    """The config of a published state, from the shapes of its tensors. image_size: 0 for pictures of one token.

    Raises KeyError for a state that lacks the tensors that tell.
    """
    codes, code_dim = state["quantize.embedding.weight"].shape
    widths, blocks = levels_of(state, "encoder.conv_blocks.", "res")
    channels = len(state["encoder.conv_in.weight"])
    return LlamaGenVQConfig(
        codes=codes,
        code_dim=code_dim,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        latent=len(state["post_quant_conv.weight"]),
        image_size=image_size or 2 ** max(len(widths) - 1, 0),
    )
