"""The decoder of published MoVQGAN tokenizers (Zheng et al., arXiv 2209.09002; ai-forever's 67M, 102M and 270M).

A convolutional decoder whose norms are scaled and shifted by the codes themselves, place by place. The network is that
of diffusers' `VQModel` with spatial norms; names are KL-16's (autoencoders/kl16.py) but for what is spatial.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.autoencoders.kl16 import KL16Config, decoder_config, decoder_part, from_published
from bozzetto.errors import UsageError

CODES = "quantize.embedding.weight"
SPATIAL = "decoder.norm_out.conv_y.weight"  # no other decoder has it


class MoVQDecoder(nn.Module):
    """int64 [B, h, w] codes -> [B, 3, H, W] in [0, 1] where it is trained; as many pixels per code as the levels say.

    config: widths and blocks; attended: per level from the pixels on, whether it has attention; codes: of the codebook.
    Raises UsageError where diffusers is not installed.
    """

    codebook: Tensor  # [V, D]

    def __init__(self, config: KL16Config, attended: list[bool], codes: int):
        super().__init__()
        try:
            from diffusers import VQModel
        except ImportError as error:
            raise UsageError("MoVQGAN's decoder needs diffusers: pip install 'bozzetto[hf]'") from error
        blocks = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)]
        whole = VQModel(
            down_block_types=("DownEncoderBlock2D",) * len(blocks),
            up_block_types=tuple(blocks),
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            latent_channels=config.token_dim,
            num_vq_embeddings=1,
            norm_type="spatial",
        )
        self.decoder, self.post_quant_conv = whole.decoder, whole.post_quant_conv
        self.codebook = nn.Parameter(whole.quant_conv.weight.new_zeros(codes, config.token_dim), requires_grad=False)

    def forward(self, codes: Tensor) -> Tensor:
        drawn = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
        return (self.decoder(self.post_quant_conv(drawn), drawn) + 1) / 2


def recognise_movq(state: Mapping[str, Tensor], source: str | Path) -> tuple[KL16Config, list[bool], int]:
    """What a MoVQDecoder for a published state is made of. Raises UsageError naming the file for a state of another
    family."""
    if CODES not in state or SPATIAL not in state:
        raise UsageError(f"{source}: not a MoVQGAN tokenizer (wanted {CODES}, {SPATIAL}, ...)")
    config = decoder_config(state)
    attended = [f"decoder.up.{n}.attn.0.q.weight" in state for n in range(len(config.widths))]
    return config, attended, len(state[CODES])


def from_published_movq(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A published state -> that of a MoVQDecoder, float32."""
    held = {key: value.float() for key, value in decoder_part(state).items()}
    named = {name.replace(".group_norm.", ".spatial_norm."): v for name, v in from_published(held, levels).items()}
    return {**named, "codebook": state[CODES].float()}
