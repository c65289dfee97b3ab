"""MAR against an explicit reference, and converting its published checkpoints: every layout and size; what does not
fit leaves nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bozzetto.autoencoders.kl16 import KL16Config
from bozzetto.checkpoints.convert import convert_llamagen
from bozzetto.checkpoints.convert_mar import convert_mar, recognise_mar
from bozzetto.checkpoints.folders import load_latents, load_target, read_config
from bozzetto.checkpoints.own_sampling import OwnSampling
from bozzetto.checkpoints.states import family_of
from bozzetto.errors import UsageError
from bozzetto.targets import mar
from bozzetto.targets.mar import MAR, MARConfig
from test_kl16 import SlowKL, published_state

TINY = MARConfig(dim=32, depth=2, heads=4, head_width=24, head_depth=2, token_dim=6, grid=3, classes=3, buffer=5)
PIXELS = KL16Config(image_size=12, token_dim=6, downsample=4, channels=32, multipliers=(1, 1, 2), blocks=1)


def notes_of(folder: Path) -> dict[str, Any]:
    """Everything in config.json besides family and config."""
    return {k: v for k, v in read_config(folder).items() if k not in ("family", "config")}


@pytest.fixture(autouse=True)
def size_t(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mar.SHAPES, "T", (TINY.dim, TINY.depth, TINY.heads, TINY.head_width, TINY.head_depth))


def network(config: MARConfig = TINY, seed: int = 0) -> MAR:
    """A random network with weights large enough for every part to matter (neither head nor modulation is zero)."""
    model, generator = MAR(config), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        norm = "norm" in name or "_ln." in name
        weight.data = 1 + 0.2 * noise if norm and name.endswith("weight") else 0.25 * noise
    return model.eval().requires_grad_(False)


# The slow reference: one image, float64, norms, attention and every place written out.


class SlowMAR:
    def __init__(self, model: MAR):
        self.w, self.c = {name: value.double() for name, value in model.state_dict().items()}, model.config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].t() + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"] if name else x

    def block(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x)).chunk(3, -1)
        size = self.c.dim // self.c.heads
        mixed = torch.zeros_like(v)
        for h in range(self.c.heads):
            part = slice(h * size, (h + 1) * size)
            for row in range(len(x)):
                weights = torch.softmax((k[:, part] * q[row, part]).sum(-1) / size**0.5, 0)
                mixed[row, part] = (weights[:, None] * v[:, part]).sum(0)
        x = x + self.linear(f"{name}.attn.proj", mixed)
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def features(self, label: int, tokens: Tensor, known: list[int]) -> Tensor:
        """label: `classes` for none; tokens [N, D]; known: places -> [N, dim]."""
        c, w = self.c, self.w
        of_class = w["fake_latent"][0] if label == c.classes else w["class_emb.weight"][label]
        seen = [*range(c.buffer), *(c.buffer + n for n in sorted(known))]
        rows = [of_class if at < c.buffer else self.linear("z_proj", tokens[at - c.buffer].double()) for at in seen]
        rows = [row + w["encoder_pos_embed_learned"][0, at] for row, at in zip(rows, seen, strict=True)]
        x = self.norm("z_proj_ln", torch.stack(rows))
        for n in range(c.depth):
            x = self.block(f"encoder_blocks.{n}", x)
        x = self.linear("decoder_embed", self.norm("encoder_norm", x))
        encoded = dict(zip(seen, x, strict=True))
        places = range(c.buffer + c.length)
        rows = [encoded.get(at, w["mask_token"][0, 0]) + w["decoder_pos_embed_learned"][0, at] for at in places]
        x = torch.stack(rows)
        for n in range(c.depth):
            x = self.block(f"decoder_blocks.{n}", x)
        return self.norm("decoder_norm", x)[c.buffer :] + w["diffusion_pos_embed_learned"][0]

    def predict(self, x: Tensor, time: float, z: Tensor) -> Tensor:
        """x [D], z [dim] -> [2 D]."""
        rates = [10000 ** (-n / 128) for n in range(128)]
        angles = torch.tensor([time * rate for rate in rates], dtype=torch.float64)
        y = self.linear("diffloss.net.time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        y = self.linear("diffloss.net.time_embed.mlp.2", y * y.sigmoid())
        y = y + self.linear("diffloss.net.cond_embed", z)
        y = y * y.sigmoid()  # every use of it begins so
        x = self.linear("diffloss.net.input_proj", x.double())
        for n in range(self.c.head_depth):
            name = f"diffloss.net.res_blocks.{n}"
            shift, scale, gate = self.linear(f"{name}.adaLN_modulation.1", y).chunk(3)
            h = self.linear(f"{name}.mlp.0", self.norm(f"{name}.in_ln", x) * (1 + scale) + shift)
            x = x + gate * self.linear(f"{name}.mlp.2", h * h.sigmoid())
        shift, scale = self.linear("diffloss.net.final_layer.adaLN_modulation.1", y).chunk(2)
        return self.linear("diffloss.net.final_layer.linear", self.norm("", x) * (1 + scale) + shift)


MODEL = network()
SLOW = SlowMAR(MODEL)
LABELS = torch.tensor([0, 2, TINY.classes])
TOKENS = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_features_equal_the_explicit_reference_for_known_tokens_in_any_order(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    known = torch.stack([torch.randperm(9, generator=generator)[:count] for _ in LABELS])
    fast = MODEL.features(LABELS, TOKENS, known)
    assert fast.shape == (3, 9, 32)
    for b, label in enumerate(LABELS.tolist()):
        slow = SLOW.features(label, TOKENS[b], known[b].tolist())
        assert torch.allclose(fast[b].double(), slow, atol=1e-5)
        assert float(slow.std()) > 0.2


def test_tokens_that_are_not_known_do_not_matter() -> None:
    known = torch.tensor([[4, 0], [1, 8], [2, 3]])
    others = torch.full_like(TOKENS, torch.nan).scatter(
        1, known[..., None].expand(-1, -1, 6), TOKENS.gather(1, known[..., None].expand(-1, -1, 6))
    )
    assert torch.equal(MODEL.features(LABELS, TOKENS, known), MODEL.features(LABELS, others, known))


def test_predictions_equal_the_explicit_reference() -> None:
    generator = torch.Generator().manual_seed(2)
    x, z = torch.randn(4, 6, generator=generator), torch.randn(4, 32, generator=generator)
    times = torch.tensor([0, 10, 20, 999])
    noise, mix = MODEL.predict(x, times, z)
    assert noise.shape == mix.shape == (4, 6)
    for r in range(4):
        slow = SLOW.predict(x[r], float(times[r]), z[r].double())
        # The published angles time * rate are float32: off by up to 3e-5 at the latest time, before all weights.
        error = float((torch.cat([noise[r], mix[r]]).double() - slow).abs().max())
        assert error < 1e-5 + 2e-7 * float(times[r])
        assert float(slow.std()) > 0.2


# Layouts.


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.save({"model": published_state(PIXELS)}, tmp_path / "kl16.ckpt")
    return tmp_path / "kl16.ckpt"


def saved(path: Path, content: dict) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def checkpoint(averaged: object, plain: dict[str, Tensor]) -> dict:
    """As the training script writes it."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    args = argparse.Namespace(model="mar_base", lr=1e-4, dist_url="env://", log_dir=None)
    rest = {"optimizer": optimizer.state_dict(), "epoch": 799, "scaler": {"scale": 2.0**16}, "args": args}
    return {"model": plain, "model_ema": averaged, **rest}


STATE, OTHER = dict(MODEL.state_dict()), dict(network(seed=1).state_dict())
PARAMETERS = {name: nn.Parameter(value) for name, value in STATE.items()}
LAYOUTS: dict[str, tuple[str, Callable[[], dict], str]] = {
    "trained": ("checkpoint-last.pth", lambda: checkpoint(STATE, OTHER), "model_ema"),
    "trained, averaged parameters": ("checkpoint-last.pth", lambda: checkpoint(PARAMETERS, OTHER), "model_ema"),
    "trained, no average": ("checkpoint-last.pth", lambda: checkpoint(None, STATE), "model"),
    "average only": ("b.pth", lambda: {"model_ema": STATE}, "model_ema"),
    "model": ("b.pth", lambda: {"model": STATE}, "model"),
    "bare": ("b.pth", lambda: STATE, "bare"),
    "safetensors": ("b.safetensors", lambda: STATE, "bare"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_network(tmp_path: Path, vae: Path, layout: str) -> None:
    name, make, weights = LAYOUTS[layout]
    told = convert_mar(saved(tmp_path / name, make()), vae, tmp_path / "out")
    folder = tmp_path / "out"
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.safetensors"}
    assert {p.name for p in folder.iterdir()} == files
    averaged = {"model_ema": "averaged weights", "model": "weights without averaging", "bare": "weights as given"}
    assert f"MAR-T (3 classes, {averaged[weights]}) with KL-4, 12 x 12 pixels, 9 tokens" in told
    assert notes_of(folder) == {
        "class_names": ["0", "1", "2"],
        "converted": {"size": "T", "weights": weights, "checkpoint": name, "vae": "kl16.ckpt"},
        "sampler": {"steps": 100, "passes": 256, "guidance_schedule": "linear"},
        "sampling": OwnSampling().recorded(),  # no published size
    }
    after = load_target(folder, "flow", "mar")
    assert after.config == TINY
    assert not after.training
    for key, value in STATE.items():
        assert torch.equal(after.state_dict()[key], value), key


def test_the_decoder_takes_scaled_latents_and_leaves_the_encoder_behind(tmp_path: Path, vae: Path) -> None:
    convert_mar(saved(tmp_path / "b.pth", STATE), vae, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["kind"] == "latent-kl16"
    stored = load_file(tmp_path / "out" / "tokenizer.safetensors")
    assert not [key for key in stored if "encoder" in key]
    latents = load_latents(tmp_path / "out")
    assert latents.config == PIXELS
    images = latents.decode(TOKENS)
    for b in range(3):
        latent = TOKENS[b].t().unflatten(1, (3, 3)).double() / 0.2325
        slow = (SlowKL(published_state(PIXELS), PIXELS).decode(latent) + 1) / 2
        assert torch.allclose(images[b].double(), slow.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(("grid", "classes", "buffer", "head"), [(2, 7, 1, (16, 1)), (4, 1, 64, (40, 3))])
def test_any_grid_buffer_head_and_number_of_classes_converts(
    tmp_path: Path, vae: Path, grid: int, classes: int, buffer: int, head: tuple[int, int]
) -> None:
    config = MARConfig(32, 2, 4, *head, token_dim=6, grid=grid, classes=classes, buffer=buffer)
    (tmp_path / "names.txt").write_text("\n".join(f"class {n}" for n in range(classes)))
    made = saved(tmp_path / "b.pth", dict(network(config).state_dict()))
    convert_mar(made, vae, tmp_path / "out", tmp_path / "names.txt")
    assert load_target(tmp_path / "out", "flow", "mar").config == config
    assert load_latents(tmp_path / "out").config.grid == grid
    assert notes_of(tmp_path / "out")["class_names"][-1] == f"class {classes - 1}"


# What does not fit: named, and nothing is written.

KEY = "decoder_blocks.1.norm1.weight"


class Unsafe:
    """Something that a pickle of weights has no business to hold."""


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    return {key: value for key, value in {**STATE, **changes}.items() if value is not None}


def a_gain(value: float) -> Tensor:
    return torch.full((32,), value)


def resized(**changes: int) -> dict[str, Tensor]:
    shape = {"dim": 32, "depth": 2, "heads": 4, "head_width": 24, "head_depth": 2, "token_dim": 6, "grid": 3}
    return dict(MAR(MARConfig(**{**shape, "classes": 3, "buffer": 5, **changes})).state_dict())


def places(encoder: int, diffusion: int) -> dict[str, Tensor]:
    lengths = {"encoder": encoder, "decoder": encoder, "diffusion": diffusion}
    return changed(**{f"{part}_pos_embed_learned": torch.zeros(1, n, 32) for part, n in lengths.items()})


BROKEN_MAR: dict[str, tuple[Callable[[], dict], str]] = {
    "an autoencoder": (lambda: published_state(PIXELS), r"--checkpoint must be a MAR.*KL-16.*; give it as --vae"),
    "a LlamaGen": (
        lambda: {
            k: torch.zeros(1) for k in ("tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight")
        },
        "a LlamaGen transformer; `bozzetto convert llamagen` takes it as --gpt",
    ),
    "something else": (lambda: {"conv1.weight": torch.zeros(3)}, r"unknown network \(with 'conv1.weight'\)"),
    "nothing": (dict, "empty"),
    "an empty average": (lambda: checkpoint({}, STATE), "empty"),
    "an unsafe pickle": (
        lambda: {**checkpoint(STATE, OTHER), "args": Unsafe()},
        "not a checkpoint that can be read safely",
    ),
    "a missing key": (lambda: changed(**{KEY: None}), f"missing key '{KEY}'"),
    "a missing key that tells": (lambda: changed(**{"class_emb.weight": None}), "class_emb.weight"),
    "an unexpected key": (lambda: changed(**{"decoder_blocks.1.bias": torch.zeros(1)}), "unexpected key 'decoder_"),
    "a wrong shape": (lambda: changed(**{KEY: torch.ones(31)}), rf"'{KEY}' has shape \(31,\), expected \(32,\)"),
    "a NaN": (lambda: changed(**{KEY: a_gain(torch.nan)}), f"'{KEY}' has non-finite"),
    "an infinity": (lambda: changed(**{KEY: a_gain(-torch.inf)}), f"'{KEY}' has non-finite"),
    "whole numbers": (lambda: changed(**{KEY: a_gain(1).int()}), f"'{KEY}' is of type int32"),
    "no tensors": (lambda: {"z_proj.weight": 3}, "z_proj.weight.*int"),
    "an unknown size": (
        lambda: resized(depth=3),
        r"no published size has 32 dim.* x 3 blocks \(known: B 768 x 12, L 1024 x 16, H 1280 x 20",
    ),
    "another depth of the decoder": (
        lambda: {k: v for k, v in STATE.items() if not k.startswith("decoder_blocks.1")},
        "missing key 'decoder_blocks.1",
    ),
    "no square": (lambda: places(13, 8), "8 tokens in 13 places"),
    "no place for the class": (lambda: places(9, 9), "9 tokens in 9 places"),
    "tokens of several latents": (lambda: resized(token_dim=24), "tokens of 24 numbers.*6 latent channels"),
}


@pytest.mark.parametrize("kind", BROKEN_MAR)
def test_a_transformer_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path, vae: Path, kind: str) -> None:
    make, named = BROKEN_MAR[kind]
    with pytest.raises(UsageError, match=named) as caught:
        convert_mar(saved(tmp_path / "b.pth", make()), vae, tmp_path / "deep" / "out")
    assert "b.pth" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"b.pth", "kl16.ckpt"}


def pixels(without: str = "-", **changes: Tensor) -> dict[str, Tensor]:
    state = {**published_state(PIXELS), **changes}
    return {key: value for key, value in state.items() if not key.startswith(without)}


ATTENTION = "encoder.down.2.attn.0.q.weight"
BROKEN_VAE: dict[str, tuple[Callable[[], dict], str]] = {
    "a transformer": (lambda: STATE, r"--vae must be a KL-16.*a MAR transformer; give it as --checkpoint"),
    "a VQ tokenizer": (
        lambda: {f"{k}.weight": torch.zeros(1) for k in ("quantize.embedding", "post_quant_conv", "decoder.conv_in")},
        "VQ tokenizer; `bozzetto convert llamagen` takes it as --vq",
    ),
    "no encoder": (lambda: pixels("encoder."), "encoder.conv_in"),
    "no attention in the encoder": (lambda: pixels("encoder.down.2.attn.0.q"), f"missing key '{ATTENTION}'"),
    "a wrong shape": (
        lambda: pixels(**{ATTENTION: torch.zeros(64, 64, 3, 3)}),
        rf"'{ATTENTION}' has shape \(64, 64, 3, 3\), expected \(64, 64, 1, 1\)",
    ),
    "attention in the decoder": (
        lambda: pixels(**{"decoder.up.2.attn.0.q.bias": torch.zeros(64)}),
        "unexpected key 'decoder.up.2.attn.0.q.bias'",
    ),
    "an odd width": (
        lambda: pixels(**{"decoder.up.0.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}),
        "multiples of 32",
    ),
    "another width of the encoder": (
        lambda: pixels(**{"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}),
        r"'encoder.conv_in.weight' has shape \(48, 3, 3, 3\), expected \(32, 3, 3, 3\)",
    ),
    "a NaN": (lambda: pixels(**{"quant_conv.bias": torch.full((12,), torch.nan)}), "'quant_conv.bias' has non-finite"),
    "whole numbers": (
        lambda: pixels(**{"post_quant_conv.bias": torch.ones(6).long()}),
        "'post_quant_conv.bias' is of type int64",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_VAE)
def test_an_autoencoder_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    make, named = BROKEN_VAE[kind]
    made, vae = saved(tmp_path / "b.pth", STATE), saved(tmp_path / "kl16.ckpt", make())
    with pytest.raises(UsageError, match=named) as caught:
        convert_mar(made, vae, tmp_path / "out")
    assert "kl16.ckpt" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"b.pth", "kl16.ckpt"}


def test_a_mar_is_pointed_to_its_own_converter(tmp_path: Path, vae: Path) -> None:
    with pytest.raises(UsageError, match=r"--vq must be .* a KL-16 .*; `bozzetto convert mar` takes it as --vae"):
        convert_llamagen(saved(tmp_path / "b.pth", STATE), vae, tmp_path / "out")


def test_requests_that_cannot_be_met_are_refused(tmp_path: Path, vae: Path) -> None:
    made, out = saved(tmp_path / "b.pth", STATE), tmp_path / "out"
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"names\.txt: 2 class names.*3 classes"):
        convert_mar(made, vae, out, tmp_path / "names.txt")
    with pytest.raises(UsageError, match=r"none\.pth"):
        convert_mar(tmp_path / "none.pth", vae, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        convert_mar(made, vae, out)
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    made = saved(tmp_path / "b.pth", STATE)
    monkeypatch.setattr("bozzetto.checkpoints.convert_mar.write_model", full)
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with pytest.raises(OSError, match="No space"):
            convert_mar(made, vae, out)
    assert {p.name for p in tmp_path.iterdir()} == {"b.pth", "kl16.ckpt", "empty"}
    assert not list((tmp_path / "empty").iterdir())


# Published sizes.


@pytest.mark.parametrize(
    ("size", "tensors", "count"), [("B", 364, 207_924_768), ("L", 476, 478_326_304), ("H", 604, 942_403_104)]
)
def test_every_published_size_is_recognised_by_its_shapes(size: str, tensors: int, count: int) -> None:
    wanted = MARConfig(*mar.SHAPES[size])
    with torch.device("meta"):
        state = MAR(wanted).state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == count
    assert family_of(state) == "a MAR transformer"
    assert recognise_mar(state, Path("x.pth")) == (size, wanted)


def test_published_sizes_have_shapes_of_their_own() -> None:
    assert len({shape[:2] for shape in mar.SHAPES.values()}) == len(mar.SHAPES)
