"""MAR-B as its training script leaves it (checkpoint-last.pth: weights, averaged ones, a Namespace) with kl16.ckpt."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from bozzetto.autoencoders.kl16 import KL16Config
from bozzetto.checkpoints.published import MAR_SAMPLER, published
from bozzetto.cli.main import main
from bozzetto.decoding.masked import place_order
from bozzetto.laws.noise import NormalField
from bozzetto.targets import mar
from bozzetto.targets.mar import MARConfig
from published import Published
from test_convert_mar import SlowMAR
from test_kl16 import published_state

SHAPE = MARConfig(dim=32, depth=2, heads=4, head_width=24, head_depth=2, token_dim=4, grid=3, classes=4, buffer=5)
PIXELS = KL16Config(image_size=48, token_dim=4, downsample=16, channels=32, multipliers=(1, 1, 1, 1, 1), blocks=1)
STEPS, PASSES, N, D = 6, 5, SHAPE.length, SHAPE.token_dim  # a tiny picture has fewer than 100 and 256 of them
NOISIEST = 600  # where chains begin, in place of 999: with random weights those leave all bounds


def transformer(seed: int) -> dict[str, Tensor]:
    """A published state dict, key by key."""
    c = SHAPE
    shapes: dict[str, tuple[int, ...]] = {"class_emb.weight": (c.classes, c.dim), "fake_latent": (1, c.dim)}
    shapes |= {"mask_token": (1, 1, c.dim), "diffusion_pos_embed_learned": (1, N, c.dim)}
    shapes |= {f"{side}_pos_embed_learned": (1, c.buffer + N, c.dim) for side in ("encoder", "decoder")}

    def linear(name: str, inner: int, outer: int) -> None:
        shapes.update({f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    linear("z_proj", D, c.dim)
    linear("decoder_embed", c.dim, c.dim)
    for name in ("z_proj_ln", "encoder_norm", "decoder_norm"):
        norm(name, c.dim)
    for block in (f"{side}_blocks.{n}" for side in ("encoder", "decoder") for n in range(c.depth)):
        norm(f"{block}.norm1", c.dim)
        linear(f"{block}.attn.qkv", c.dim, 3 * c.dim)
        linear(f"{block}.attn.proj", c.dim, c.dim)
        norm(f"{block}.norm2", c.dim)
        linear(f"{block}.mlp.fc1", c.dim, 4 * c.dim)
        linear(f"{block}.mlp.fc2", 4 * c.dim, c.dim)
    net, width = "diffloss.net", c.head_width
    linear(f"{net}.time_embed.mlp.0", 256, width)
    linear(f"{net}.time_embed.mlp.2", width, width)
    linear(f"{net}.cond_embed", c.dim, width)
    linear(f"{net}.input_proj", D, width)
    for block in (f"{net}.res_blocks.{n}" for n in range(c.head_depth)):
        norm(f"{block}.in_ln", width)
        linear(f"{block}.mlp.0", width, width)
        linear(f"{block}.mlp.2", width, width)
        linear(f"{block}.adaLN_modulation.1", width, 3 * width)
    linear(f"{net}.final_layer.adaLN_modulation.1", width, 2 * width)
    linear(f"{net}.final_layer.linear", width, 2 * D)
    made = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(shape, generator=made) for key, shape in shapes.items()}
    gains = ("norm1.weight", "norm2.weight", "norm.weight", "_ln.weight")
    return {key: 1 + 0.2 * value if key.endswith(gains) else 0.2 * value for key, value in state.items()}


def write(folder: Path) -> Path:
    """The published files, converted by the command line."""
    averaged = {key: nn.Parameter(value) for key, value in transformer(0).items()}
    args = argparse.Namespace(model="mar_base", diffloss_d=6, diffloss_w=1024, num_iter=64, lr=1e-4, output_dir="out")
    content = {"model": transformer(1), "model_ema": averaged, "epoch": 799, "args": args}
    torch.save(content, folder / "checkpoint-last.pth")
    torch.save({"model": published_state(PIXELS)}, folder / "kl16.ckpt")
    few = {"steps": STEPS, "passes": PASSES}
    with (
        mock.patch.dict(mar.SHAPES, {"B": (SHAPE.dim, SHAPE.depth, SHAPE.heads, SHAPE.head_width, SHAPE.head_depth)}),
        mock.patch("bozzetto.checkpoints.convert_mar.MAR_SAMPLER", {**MAR_SAMPLER, **few, "noisiest": NOISIEST}),
        mock.patch("bozzetto.checkpoints.convert_mar.published", lambda name: replace(published(name), **few)),
    ):
        files = ["--checkpoint", str(folder / "checkpoint-last.pth"), "--vae", str(folder / "kl16.ckpt")]
        assert main(["convert", "mar", *files, "--out", str(folder / "converted")]) == 0
    return folder / "converted"


def drawn(folder: Path, asked: str, guidance: float = 2.9) -> Tensor:
    """Tokens [N, D] of image 0 of seed 0 by the published loop: places in random order under a cosine, guidance that
    grows with them, the whole network in every pass, every denoising step of the head."""
    state = torch.load(folder.parent / "checkpoint-last.pth", weights_only=False)["model_ema"]
    slow = SlowMAR(SimpleNamespace(state_dict=lambda: {k: v.detach() for k, v in state.items()}, config=SHAPE))
    field = NormalField(0, torch.tensor([0]), N, STEPS, D)
    field.fill(N)
    noise = field.rows(torch.arange(N)[None])[0].double()  # [N, STEPS + 1, D]
    order = place_order(0, torch.tensor([0]), N)[0].tolist()
    tokens, masked = torch.zeros(N, D, dtype=torch.float64), N
    for turn in range(PASSES):
        left = max(1, min(masked - 1, math.floor(N * math.cos(math.pi / 2 * (turn + 1) / PASSES))))
        scale = 1 + (guidance - 1) * (N - left) / N  # of the last pass too as if one were left
        left = left if turn < PASSES - 1 else 0
        given, without = (slow.features(label, tokens, order[: N - masked]) for label in (int(asked), SHAPE.classes))
        fresh = {
            place: chain(slow, given[place], without[place], scale, noise[place])
            for place in order[N - masked : N - left]
        }
        for place, token in fresh.items():
            tokens[place] = token
        masked = left
    return tokens.float()


def chain(slow: SlowMAR, given: Tensor, without: Tensor, scale: float, noise: Tensor) -> Tensor:
    """The ancestral sampler of a cosine diffusion with learned variances, on STEPS of its 1,000 times."""
    level = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    products = torch.tensor([1 - min(0.999, 1 - b / a) for a, b in pairwise(level)], dtype=torch.float64).cumprod(0)
    times, x = [round(NOISIEST / (STEPS - 1) * i) for i in range(STEPS)], noise[0]
    for k, i in enumerate(reversed(range(STEPS))):
        p, before = products[times[i]], products[times[i - 1]] if i else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - p / before
        eps, share = slow.predict(x, times[i], given).chunk(2)
        other = slow.predict(x, times[i], without).chunk(2)[0]
        token = (x - (1 - p).sqrt() * (other + scale * (eps - other))) / p.sqrt()
        x = (beta * before.sqrt() * token + (1 - before) * (1 - beta).sqrt() * x) / (1 - p)
        if i:
            small, share = beta * (1 - before) / (1 - p), (share + 1) / 2
            x = x + (0.5 * (share * beta.log() + (1 - share) * small.log())).exp() * noise[k + 1]
    return x


OWN = {"guidance": 2.9, "guidance_schedule": "linear"}
FAMILIES = {
    "mar-b": Published(
        write,
        ("2", "0", "1"),
        drawn,
        OWN,
        "LTH14/mar: README.md (evaluation)",
        methods=("none", "none/plain"),
        temperature=1.0,
        rule="plain",
    )
}
