"""LlamaGen's tokenizer against an explicit reference that reads the published names; its 344 published tensors."""

from __future__ import annotations

import builtins

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.autoencoders.llamagen_vq import USED, LlamaGenVQ, LlamaGenVQConfig, from_published, infer_config
from bozzetto.checkpoints.weights import load_strict
from bozzetto.errors import UsageError

SMALL = LlamaGenVQConfig(codes=12, code_dim=8, channels=32, multipliers=(1, 1, 2), blocks=2, latent=16, image_size=16)
VQ_16, VQ_8 = LlamaGenVQConfig(), LlamaGenVQConfig(multipliers=(1, 2, 2, 4))


# The published layout, from its description.


def published_shapes(c: LlamaGenVQConfig) -> dict[str, tuple[int, ...]]:
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

    def network(side: str, levels: list[int], blocks: int, first: int, ends: tuple[int, int], resample: str) -> None:
        conv(f"{side}.conv_in", ends[0], first, 3)
        width, lowest = first, c.channels * c.multipliers[-1]
        for n, level in enumerate(levels):
            for j in range(blocks):
                res(f"{side}.conv_blocks.{n}.res.{j}", width, level)
                width = level
                if n == (len(levels) - 1 if side == "encoder" else 0):
                    attention(f"{side}.conv_blocks.{n}.attn.{j}", width)
            if n < len(levels) - 1:
                conv(f"{side}.conv_blocks.{n}.{resample}.conv", width, width, 3)
        res(f"{side}.mid.0", lowest, lowest)
        attention(f"{side}.mid.1", lowest)
        res(f"{side}.mid.2", lowest, lowest)
        norm(f"{side}.norm_out", width)
        conv(f"{side}.conv_out", width, ends[1], 3)

    levels = [c.channels * m for m in c.multipliers]
    network("encoder", levels, c.blocks, c.channels, (3, c.latent), "downsample")
    network("decoder", levels[::-1], c.blocks + 1, levels[-1], (c.latent, 3), "upsample")
    conv("quant_conv", c.latent, c.code_dim, 1)
    conv("post_quant_conv", c.code_dim, c.latent, 1)
    return {**shapes, "quantize.embedding.weight": (c.codes, c.code_dim), USED: (65536,)}


def published_state(c: LlamaGenVQConfig, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with random weights under which every part matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:  # keep the scale of what flows through
            state[name] = noise / (shape[1] * shape[2] * shape[3]) ** 0.5
        else:
            state[name] = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
    state[USED] = torch.zeros(65536)
    return state


def small_tokenizer(state: dict[str, Tensor]) -> LlamaGenVQ:
    model = LlamaGenVQ(SMALL)
    load_strict(model, from_published(state), "published")
    return model.eval().requires_grad_(False)


# The slow reference: one image, float64, group norm and attention written out.


class Slow:
    def __init__(self, state: dict[str, Tensor], config: LlamaGenVQConfig):
        self.w, self.c = {name: value.double() for name, value in state.items()}, config

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x[None], self.w[f"{name}.weight"], self.w[f"{name}.bias"], **how)[0]

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        gain, bias = (self.w[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return groups.view(x.shape) * gain + bias

    def res(self, name: str, x: Tensor) -> Tensor:
        h = x
        for n in ("1", "2"):
            h = self.norm(f"{name}.norm{n}", h)
            h = self.conv(f"{name}.conv{n}", h * torch.sigmoid(h), padding=1)
        skip = self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x
        return skip + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(1) for part in ("q", "k", "v"))  # [C, h*w]
        out = torch.empty_like(v)
        for at in range(q.shape[1]):
            weights = torch.softmax((q[:, at, None] * k).sum(0) / len(q) ** 0.5, 0)
            out[:, at] = (v * weights).sum(1)
        return x + self.conv(f"{name}.proj_out", out.view(x.shape))

    def middle(self, side: str, x: Tensor) -> Tensor:
        return self.res(f"{side}.mid.2", self.attention(f"{side}.mid.1", self.res(f"{side}.mid.0", x)))

    def level(self, name: str, x: Tensor, blocks: int) -> Tensor:
        for j in range(blocks):
            x = self.res(f"{name}.res.{j}", x)
            if f"{name}.attn.{j}.q.weight" in self.w:
                x = self.attention(f"{name}.attn.{j}", x)
        return x

    def end(self, side: str, x: Tensor) -> Tensor:
        h = self.norm(f"{side}.norm_out", x)
        return self.conv(f"{side}.conv_out", h * torch.sigmoid(h), padding=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [h*w] -> [3, H, W], not clamped, in [-1, 1] for a trained network."""
        side, rows = int(len(tokens) ** 0.5), self.w["quantize.embedding.weight"]
        x = torch.stack([rows[t] / rows[t].norm() for t in tokens.tolist()], 1).view(-1, side, side)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", x), padding=1)
        x = self.middle("decoder", x)
        for n in range(len(self.c.multipliers)):
            x = self.level(f"decoder.conv_blocks.{n}", x, self.c.blocks + 1)
            if n < len(self.c.multipliers) - 1:
                x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = self.conv(f"decoder.conv_blocks.{n}.upsample.conv", x, padding=1)
        return self.end("decoder", x)

    def encode(self, image: Tensor) -> list[int]:
        """[3, H, W] in [-1, 1] -> the nearest unit code of each cell."""
        x = self.conv("encoder.conv_in", image.double(), padding=1)
        for n in range(len(self.c.multipliers)):
            x = self.level(f"encoder.conv_blocks.{n}", x, self.c.blocks)
            if n < len(self.c.multipliers) - 1:  # one row and column of zeros at the far ends only
                x = self.conv(f"encoder.conv_blocks.{n}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.conv("quant_conv", self.end("encoder", self.middle("encoder", x))).flatten(1)
        rows = self.w["quantize.embedding.weight"]
        unit = rows / rows.norm(dim=1, keepdim=True)
        return [int(((unit - z / z.norm()) ** 2).sum(1).argmin()) for z in x.t()]


STATE = published_state(SMALL)
MODEL = small_tokenizer(STATE)
TOKENS = torch.randint(SMALL.codes, (2, SMALL.grid**2), generator=torch.Generator().manual_seed(1))


def test_decoding_equals_the_explicit_reference() -> None:
    fast = MODEL.decode(TOKENS)
    assert fast.shape == (2, 3, 16, 16)
    for b in range(2):
        slow = Slow(STATE, SMALL).decode(TOKENS[b])
        assert torch.allclose(fast[b].double(), ((slow + 1) / 2).clamp(0, 1), atol=1e-5)
        assert float(slow.std()) > 0.2
    assert float(((fast > 0) & (fast < 1)).float().mean()) > 0.5  # most pixels are not clamped


def test_encoding_equals_the_explicit_reference() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    tokens = MODEL.encode(images)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [Slow(STATE, SMALL).encode(2 * image - 1) for image in images]
    assert len(tokens.unique()) > 3


def test_other_picture_sizes_than_the_configured_one_decode_too() -> None:
    tokens = torch.randint(SMALL.codes, (1, 64), generator=torch.Generator().manual_seed(3))
    assert MODEL.decode(tokens).shape == (1, 3, 32, 32)


def test_codes_have_unit_length() -> None:
    raw = STATE["quantize.embedding.weight"]
    assert not torch.allclose(raw.norm(dim=1), torch.ones(SMALL.codes), atol=0.1)
    assert torch.allclose(MODEL.codebook.norm(dim=1), torch.ones(SMALL.codes))


def test_published_names_come_back() -> None:
    again = MODEL.published_state()
    assert set(again) == set(published_shapes(SMALL)) - {USED}
    for name, value in again.items():
        if name != "quantize.embedding.weight":
            assert torch.equal(value, STATE[name]), name


@pytest.mark.parametrize(
    ("config", "tensors", "count", "downsample"), [(VQ_16, 344, 71_883_403, 16), (VQ_8, 300, 70_109_835, 8)]
)
def test_published_sizes_have_the_published_tensors(
    config: LlamaGenVQConfig, tensors: int, count: int, downsample: int
) -> None:
    shapes = published_shapes(config)
    with torch.device("meta"):
        model = LlamaGenVQ(config)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert len(shapes) == tensors
    there = from_published(state)
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(value.numel() for key, value in state.items() if key != USED) == count
    assert infer_config(state, 256) == config
    assert config.downsample == downsample
    assert config.grid == 256 // downsample


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "transformers":
            raise ModuleNotFoundError(name, name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"bozzetto\[llamagen\]"):
        LlamaGenVQ(SMALL)
