"""KL-16 against an explicit reference that reads the published names, against diffusers, and its 312 tensors."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.autoencoders.kl16 import (
    KL16Config,
    decoder_part,
    from_published,
    infer_config,
    kl16_autoencoder,
    kl16_latents,
    latents_state,
    to_published,
)
from bozzetto.autoencoders.latents import KL16, LatentDecoder
from bozzetto.checkpoints.folders import load_latents, write_tokenizer
from bozzetto.checkpoints.weights import fill, load_strict
from bozzetto.errors import UsageError
from test_llamagen_vq import Slow

SMALL = KL16Config(image_size=16, token_dim=6, downsample=4, channels=32, multipliers=(1, 1, 2), blocks=2)
LEVELS = len(SMALL.widths)


# The published layout, from its description.


def published_shapes(c: KL16Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a published checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inner: int, outer: int, size: int) -> None:
        shapes.update({f"{name}.weight": (outer, inner, size, size), f"{name}.bias": (outer,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def res(name: str, inner: int, outer: int) -> None:
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", inner, outer, 3)
        norm(f"{name}.norm2", outer)
        conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(side: str, width: int) -> None:
        res(f"{side}.mid.block_1", width, width)
        attention(f"{side}.mid.attn_1", width)
        res(f"{side}.mid.block_2", width, width)

    width, last = c.channels, len(c.widths) - 1
    conv("encoder.conv_in", 3, width, 3)
    for n, level in enumerate(c.widths):
        for j in range(c.blocks):
            res(f"encoder.down.{n}.block.{j}", width, level)
            width = level
            if n == last:
                attention(f"encoder.down.{n}.attn.{j}", width)
        if n < last:
            conv(f"encoder.down.{n}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * c.token_dim, 3)
    conv("decoder.conv_in", c.token_dim, width, 3)
    middle("decoder", width)
    for n in reversed(range(len(c.widths))):  # level 0 is that of the pixels
        for j in range(c.blocks + 1):
            res(f"decoder.up.{n}.block.{j}", width, c.widths[n])
            width = c.widths[n]
        if n > 0:
            conv(f"decoder.up.{n}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    conv("quant_conv", 2 * c.token_dim, 2 * c.token_dim, 1)
    conv("post_quant_conv", c.token_dim, c.token_dim, 1)
    return shapes


def published_state(c: KL16Config, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with random weights under which every part matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:  # keep the scale of what flows through
            state[name] = noise / (shape[1] * shape[2] * shape[3]) ** 0.5
        else:
            state[name] = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
    return state


def small_latents(state: dict[str, Tensor], scale: float = 1.0) -> LatentDecoder:
    """Made on the meta device, as the store does."""
    with torch.device("meta"):
        latents = kl16_latents(SMALL)
    fill(latents, latents_state(state, SMALL, scale))
    return latents.eval().requires_grad_(False)


# The slow reference: one image, float64, on the parts that the VQ tokenizer's reference has too.


class SlowKL(Slow):
    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.attention(f"{side}.mid.attn_1", self.res(f"{side}.mid.block_1", x))
        return self.res(f"{side}.mid.block_2", x)

    def decode(self, latent: Tensor) -> Tensor:
        """[D, h, w] -> [3, H, W], not clamped, in [-1, 1] for a trained network."""
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", latent.double()), padding=1)
        x = self.middle("decoder", x)
        for n in reversed(range(len(self.c.multipliers))):
            for j in range(self.c.blocks + 1):
                x = self.res(f"decoder.up.{n}.block.{j}", x)
            if n > 0:
                x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = self.conv(f"decoder.up.{n}.upsample.conv", x, padding=1)
        return self.end("decoder", x)

    def encode(self, image: Tensor) -> Tensor:
        """[3, H, W] in [-1, 1] -> [2 D, h, w], means and log variances."""
        x = self.conv("encoder.conv_in", image.double(), padding=1)
        for n in range(len(self.c.multipliers)):
            for j in range(self.c.blocks):
                x = self.res(f"encoder.down.{n}.block.{j}", x)
                if f"encoder.down.{n}.attn.{j}.q.weight" in self.w:
                    x = self.attention(f"encoder.down.{n}.attn.{j}", x)
            if n < len(self.c.multipliers) - 1:  # one row and column of zeros at the far ends only
                x = self.conv(f"encoder.down.{n}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x)))


STATE = published_state(SMALL)
LATENTS = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))


def as_tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def test_decoding_equals_the_explicit_reference() -> None:
    fast = small_latents(STATE).decode(as_tokens(LATENTS))
    assert fast.shape == (2, 3, 16, 16)
    for b in range(2):
        slow = SlowKL(STATE, SMALL).decode(LATENTS[b])
        assert torch.allclose(fast[b].double(), ((slow + 1) / 2).clamp(0, 1), atol=1e-5)
        assert float(slow.std()) > 0.2
    assert float(((fast > 0) & (fast < 1)).float().mean()) > 0.5  # most pixels are not clamped


def test_the_encoders_weights_are_where_they_belong() -> None:
    """Strictly, attention included: what a converter drops here goes unnoticed until somebody trains."""
    whole = kl16_autoencoder(SMALL)
    load_strict(whole, from_published(STATE, LEVELS), "published")
    images = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) - 1
    with torch.no_grad():
        posterior = whole.eval().encode(images).latent_dist
    for b in range(2):
        mean, log_variance = SlowKL(STATE, SMALL).encode(images[b]).chunk(2)
        assert torch.allclose(posterior.mean[b].double(), mean, atol=1e-5)
        assert torch.allclose(posterior.logvar[b].double(), log_variance, atol=1e-5)


def test_decoding_equals_diffusers_on_weights_of_its_own() -> None:
    torch.manual_seed(3)
    theirs = kl16_autoencoder(SMALL).eval().requires_grad_(False)
    latents = small_latents(to_published(theirs.state_dict(), LEVELS))
    wanted = (theirs.decode(LATENTS).sample + 1) / 2
    assert torch.equal(latents.decode(as_tokens(LATENTS)), wanted.clamp(0, 1))


def test_tokens_are_latents_over_the_scale() -> None:
    scaled = small_latents(STATE, scale=4.0).decode(as_tokens(LATENTS) / 4)
    assert torch.allclose(scaled, small_latents(STATE).decode(as_tokens(LATENTS)), atol=1e-6)


def test_other_picture_sizes_than_the_configured_one_decode_too() -> None:
    assert small_latents(STATE).decode(torch.zeros(1, 36, 6)).shape == (1, 3, 24, 24)


def test_published_names_come_back() -> None:
    there = from_published(STATE, LEVELS)
    again = to_published(there, LEVELS)
    assert set(again) == set(STATE)
    for name, value in again.items():
        assert torch.equal(value, STATE[name]), name
        assert set(to_published(from_published({name: STATE[name]}, LEVELS), LEVELS)) == {name}


def test_the_published_checkpoint_is_consumed_exactly() -> None:
    """312 tensors; the decoder with the convolution before it has 166 of them."""
    config, shapes = KL16Config(), published_shapes(KL16Config())
    with torch.device("meta"):
        whole, latents = kl16_autoencoder(config), kl16_latents(config)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert len(shapes) == 312
    assert sum(value.numel() for value in state.values()) == 66_456_019
    there = from_published(state, 5)
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in whole.state_dict().items()}
    assert sum(".attentions." in name for name in there if name.startswith("encoder.down_blocks")) == 20
    assert infer_config(state, 16) == latents.config == config
    mine = {k: v.shape for k, v in latents_state(state, config, 1.0).items()}
    assert mine == {k: v.shape for k, v in latents.state_dict().items()}
    assert len(decoder_part(state)) == len(mine) - 2 == 166


def test_a_folder_gives_the_decoder_back_rounded_to_float16(tmp_path: Path) -> None:
    latents = small_latents(STATE, scale=4.0)
    write_tokenizer(tmp_path, KL16, SMALL, latents.state_dict(), {})
    again = load_latents(tmp_path)
    assert isinstance(again.config, KL16Config)
    assert again.config == SMALL
    assert not again.training
    for key, value in latents.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.half().float()), key
    tokens = as_tokens(LATENTS)
    assert torch.allclose(again.decode(tokens), latents.decode(tokens), atol=0.02)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = small_latents(STATE).state_dict()
    write_tokenizer(tmp_path, KL16, SMALL, {k: v for k, v in state.items() if "attentions" not in k}, {})
    with pytest.raises(UsageError, match=r"missing key .*attentions.0"):
        load_latents(tmp_path)
    write_tokenizer(tmp_path, "latent-other", SMALL, state, {})
    with pytest.raises(UsageError, match=r"'latent-other' .allowed: 'latent-tiny', 'latent-kl16'"):
        load_latents(tmp_path)
    content = {"kind": KL16, "config": {**dataclasses.asdict(SMALL), "depth": 3}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="unknown config key 'depth'"):
        load_latents(tmp_path)


def test_configs_that_no_network_has_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(48, 96\).*multiples of 32"):
        KL16Config(channels=48, multipliers=(1, 2), downsample=2)
    with pytest.raises(UsageError, match=r"downsample = 16 .*2 levels give 2"):
        KL16Config(multipliers=(1, 2))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "diffusers":
            raise ModuleNotFoundError(name, name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"bozzetto\[mar\]"):
        kl16_latents(SMALL)
