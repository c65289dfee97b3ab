"""KL-16, the autoencoder of published MAR models, from its checkpoint (Li et al., arXiv 2406.11838).

A convolutional autoencoder with 16 latent channels and 16 x 16 pixels per latent (Rombach et al., arXiv 2112.10752).
The network is diffusers' `AutoencoderKL`, the same architecture under other names.
A model folder holds the decoder alone, which is all that generation needs, under diffusers' names: those are a file
format of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bozzetto.autoencoders.decoder import GROUPS, PublishedDecoder, levels_of, renamed
from bozzetto.autoencoders.latents import LatentConfig, LatentDecoder
from bozzetto.common.checks import Layers, Levels, Pixels, Size
from bozzetto.common.extras import needed
from bozzetto.errors import UsageError

# Published part of a key, and the same part in diffusers. Plain replacements, valid in both directions.
_NAMES = (
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    ("encoder.down.", "encoder.down_blocks."),
    ("decoder.up.", "decoder.up_blocks."),
    (".block.", ".resnets."),
    (".attn.", ".attentions."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
    (".norm.", ".group_norm."),  # only attention has a norm without a number
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."),
)
_UP, _ATTENTION = "decoder.up_blocks.", ".attentions."
_DECODER = ("decoder.", "post_quant_conv.")  # what generation needs


@dataclass(frozen=True)
class KL16Config(LatentConfig):
    """channels, multipliers, blocks: width of the first level, the levels' multiples of it, residual blocks per level
    of the encoder (the decoder has one more).

    Raises UsageError for widths that 32 does not divide, or a `downsample` that is not that of the levels.
    """

    image_size: Pixels = 256
    token_dim: Size = 16
    downsample: Size = 16
    channels: Size = 128
    multipliers: Levels = (1, 1, 2, 2, 4)
    blocks: Layers = 2

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 or width % GROUPS for width in self.widths):
            raise UsageError(f"widths of the levels {self.widths} are not allowed: multiples of {GROUPS}")
        if self.downsample != 2 ** (len(self.widths) - 1):
            levels = f"{len(self.widths)} levels give {2 ** (len(self.widths) - 1)}"
            raise UsageError(f"downsample = {self.downsample} is not allowed: {levels}")
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * m for m in self.multipliers)


def kl16_decoder(config: KL16Config) -> PublishedDecoder:
    """float [B, D, h, w] latents -> [B, 3, 16 h, 16 w]. Raises UsageError where diffusers is not installed."""
    return PublishedDecoder(kl16_autoencoder(config))


def kl16_latents(config: KL16Config) -> LatentDecoder:
    """The decoder of KL-16, its weights yet to be loaded (on the meta device it takes no time to make). Raises
    UsageError where diffusers is not installed."""
    return LatentDecoder(config, kl16_decoder(config))


def kl16_autoencoder(config: KL16Config) -> Any:
    """The whole autoencoder, a diffusers AutoencoderKL with random weights.

    Its encoder has attention at the lowest level and in the middle, its decoder in the middle only.
    Raises UsageError where diffusers is not installed.
    """
    with needed("MAR's autoencoder needs", "mar"):
        from diffusers import AutoencoderKL
    levels = len(config.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        latent_channels=config.token_dim,
        norm_num_groups=GROUPS,
        sample_size=config.image_size,
    )


def _turned(key: str, levels: int) -> str:
    """The decoder's levels counted from the other end: published from the pixels, diffusers from the latents."""
    if not key.startswith(_UP):
        return key
    number, _, rest = key[len(_UP) :].partition(".")
    return f"{_UP}{levels - 1 - int(number)}.{rest}" if number.isdecimal() else key


def from_published(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A published state, or a part of it -> the same of diffusers' AutoencoderKL, in its own types.

    Attention there multiplies by matrices [C, C]; published are 1 x 1 convolutions [C, C, 1, 1].
    """
    out = {}
    for key, value in state.items():
        name = _turned(renamed(key, _NAMES), levels)
        is_matrix = _ATTENTION in name and ".to_" in name and value.ndim == 4 and value.shape[2:] == (1, 1)
        out[name] = value[:, :, 0, 0] if is_matrix else value
    return out


def to_published(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    return {
        renamed(_turned(key, levels), _NAMES, back=True): (
            value[:, :, None, None] if _ATTENTION in key and value.ndim == 2 else value
        )
        for key, value in state.items()
    }


def decoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `kl16_decoder` from a published one of any widths, float32."""
    part = from_published(decoder_part(state), len(infer_config(state).widths))
    return {key: value.float() for key, value in part.items()}


def decoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What generation needs of a published state, under its published names."""
    return {key: value for key, value in state.items() if key.startswith(_DECODER)}


def latents_state(state: Mapping[str, Tensor], config: KL16Config, scale: float) -> dict[str, Tensor]:
    """The state of `kl16_latents(config)` from a published one, in its own types; latents = scale * tokens in all
    channels."""
    part = from_published(decoder_part(state), len(config.widths))
    return {
        "scale": torch.full((config.token_dim,), scale),
        "shift": torch.zeros(config.token_dim),
        **{f"decoder.{key}": value for key, value in part.items()},
    }


def infer_config(state: Mapping[str, Tensor], grid: int = 1) -> KL16Config:
    """The config of a published state for pictures of grid x grid latents, from the shapes of its decoder's tensors.

    Raises KeyError, IndexError or ZeroDivisionError for a state that lacks the tensors that tell, UsageError as
    KL16Config does.
    """
    widths, blocks = levels_of(state, "decoder.up.")
    downsample = 2 ** max(len(widths) - 1, 0)
    return KL16Config(
        image_size=grid * downsample,
        token_dim=state["post_quant_conv.weight"].shape[1],
        downsample=downsample,
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=blocks - 1,
    )
