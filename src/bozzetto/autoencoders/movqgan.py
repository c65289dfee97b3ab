"""The decoder of published MoVQGAN tokenizers (Zheng et al., arXiv 2209.09002; ai-forever's 67M, 102M and 270M).

A convolutional decoder whose norms are scaled and shifted by the codes themselves, place by place. The network is that
of diffusers' `VQModel` with spatial norms; names are KL-16's (autoencoders/kl16.py) but for what is spatial.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bozzetto.autoencoders.decoder import PublishedDecoder
from bozzetto.autoencoders.kl16 import decoder_state, infer_config
from bozzetto.common.extras import needed
from bozzetto.errors import UsageError

CODEBOOK = "quantize.embedding.weight"
SPATIAL = "decoder.norm_out.conv_y.weight"  # no other decoder has it


def movq_decoder(state: Mapping[str, Tensor], source: str | Path) -> PublishedDecoder:
    """The decoder of codes for a published state, its weights yet to be loaded. Raises UsageError naming the file for a
    state of another family, and where diffusers is not installed."""
    if CODEBOOK not in state or SPATIAL not in state:
        raise UsageError(f"{source}: not a MoVQGAN tokenizer (wanted {CODEBOOK}, {SPATIAL}, ...)")
    with needed("MoVQGAN's decoder needs", "hf"):
        from diffusers import VQModel
    config = infer_config(state)
    attended = [f"decoder.up.{n}.attn.0.q.weight" in state for n in range(len(config.widths))]
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
    return PublishedDecoder(
        whole, whole.quant_conv.weight.new_zeros(len(state[CODEBOOK]), config.token_dim), spatial=True
    )


def from_published_movq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state -> that of its decoder, float32."""
    held = decoder_state(state)
    spatial = {name.replace(".group_norm.", ".spatial_norm."): value for name, value in held.items()}
    return {**spatial, "codebook": state[CODEBOOK].float()}
