"""MoVQGAN's decoder against an explicit reference that reads the published names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto.adapters.pictures import movqgan_decoder
from bozzetto.autoencoders.kl16 import KL16Config
from bozzetto.errors import UsageError
from test_kl16 import SlowKL, published_state

CODES, DIM = 16, 4
SMALL = KL16Config(image_size=8, token_dim=DIM, downsample=2, channels=32, multipliers=(1, 2), blocks=1)


def movq_state(config: KL16Config = SMALL, codes: int = CODES, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint in the published layout with random weights: every norm of the decoder has a scale and a shift that
    are maps of the codes, and the lowest level has attention."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, inner: int, outer: int) -> None:
        state[f"{name}.weight"] = torch.randn(outer, inner, 1, 1, generator=draw) / inner**0.5
        state[f"{name}.bias"] = torch.randn(outer, generator=draw)

    plain = published_state(config, seed)
    low = len(config.widths) - 1
    for n in range(config.blocks + 1):
        for part in ("q", "k", "v", "proj_out"):
            conv(f"decoder.up.{low}.attn.{n}.{part}", config.widths[low], config.widths[low])
        plain[f"decoder.up.{low}.attn.{n}.norm.weight"] = torch.randn(config.widths[low], generator=draw)
        plain[f"decoder.up.{low}.attn.{n}.norm.bias"] = torch.randn(config.widths[low], generator=draw)
    for name, value in plain.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("decoder.") and ("norm" in stem.rpartition(".")[2]):
            state[f"{stem}.norm_layer.{kind}"] = value
            if kind == "weight":
                conv(f"{stem}.conv_y", config.token_dim, len(value))
                conv(f"{stem}.conv_b", config.token_dim, len(value))
        elif not name.startswith("encoder.conv_out") and not name.startswith("quant_conv"):
            state[name] = value
    conv("quant_conv", config.token_dim, config.token_dim)
    state["quantize.embedding.weight"] = torch.randn(codes, config.token_dim, generator=draw)
    state["ema_decoder.decay"] = torch.tensor(0.9999)  # beside the weights, and of no use
    return state


class SlowMoVQ(SlowKL):
    zq: Tensor

    def norm(self, name: str, x: Tensor) -> Tensor:
        plain = super().norm(f"{name}.norm_layer", x)
        near = self.zq.repeat_interleave(x.shape[1] // self.zq.shape[1], 1)
        near = near.repeat_interleave(x.shape[2] // self.zq.shape[2], 2)
        return plain * self.conv(f"{name}.conv_y", near) + self.conv(f"{name}.conv_b", near)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [h, w] -> [3, H, W]."""
        self.zq = self.w["quantize.embedding.weight"][codes].permute(2, 0, 1)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", self.zq), padding=1)
        x = self.middle("decoder", x)
        for n in reversed(range(len(self.c.multipliers))):
            for j in range(self.c.blocks + 1):
                x = self.res(f"decoder.up.{n}.block.{j}", x)
                if f"decoder.up.{n}.attn.{j}.q.weight" in self.w:
                    x = self.attention(f"decoder.up.{n}.attn.{j}", x)
            if n > 0:
                x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = self.conv(f"decoder.up.{n}.upsample.conv", x, padding=1)
        return self.end("decoder", x)


def test_decoding_equals_the_explicit_reference() -> None:
    state = movq_state()
    codes = torch.randint(CODES, (2, 2, 3), generator=torch.Generator().manual_seed(1))  # two rows, three columns
    with torch.no_grad():
        made = movqgan_decoder(state, Path("here"))(codes)
    assert made.shape == (2, 3, 4, 6)
    for image, tokens in zip(made, codes, strict=True):
        wanted = (SlowMoVQ(state, SMALL).decode(tokens) + 1) / 2
        torch.testing.assert_close(image.double(), wanted, atol=1e-4, rtol=1e-4)


def test_the_published_sizes_are_read_off() -> None:
    """movqgan_270M: 256 channels, levels of 1, 2, 2 and 4 times that, two blocks, attention where 256 pixels are 32."""
    big = KL16Config(image_size=8, token_dim=4, downsample=8, channels=32, multipliers=(1, 2, 2, 4), blocks=2)
    decoder = movqgan_decoder(movq_state(big), Path("here"))
    assert sum(part.numel() for name, part in decoder.named_parameters() if "attentions" in name) > 0
    assert len(decoder.decoder.up_blocks[0].attentions) == 3 and not hasattr(decoder.decoder.up_blocks[1], "attentions")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("quantize.embedding.weight"), "not a MoVQGAN tokenizer"),
        (lambda state: state.pop("decoder.norm_out.conv_y.weight"), "not a MoVQGAN tokenizer"),
        (lambda state: state.pop("decoder.conv_out.weight"), "conv_out"),
    ],
)
def test_other_states_are_refused(change: object, match: str) -> None:
    state = movq_state()
    change(state)  # type: ignore[operator]
    with pytest.raises(UsageError, match=match):
        movqgan_decoder(state, Path("here.ckpt"))
