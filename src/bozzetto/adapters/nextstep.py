"""NextStep-1 (arXiv 2508.10711): a language model that draws continuous tokens with a flow-matching head.

The decoder is transformers' Llama or Qwen2; image tokens come in through a linear map, and a small denoiser that is
told the hidden state draws them. A token is a patch of an autoencoder's latents. Layouts, samplers and prompts are
those of the published repository (stepfun-ai/NextStep-1) and of the model pages; no code of a checkpoint is run.

Published is one set of shards for everything but the autoencoder, and that in a folder of its own. The keys of the
shards are those of a transformers decoder without a prefix (embed_tokens, layers, norm), an lm_head that drawing does
not need, and the parts below. Which decoder it is, config.json says: with biases in queries, keys and values alone it
is Qwen2's, with one in the output as well or none at all Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from bozzetto.adapters.pictures import HostedPictures, PictureConfig
from bozzetto.adapters.prompted import PromptedTarget, Shape
from bozzetto.adapters.source import (
    Ask,
    Hosted,
    Source,
    check_folder,
    check_multiple,
    check_word,
    fits_context,
    in_sizes,
    prompts_of,
    refuse_keys,
)
from bozzetto.autoencoders.decoder import numbered
from bozzetto.autoencoders.kl16 import KL16Config, from_published, kl16_autoencoder
from bozzetto.checkpoints.folders import CONFIG, read_config
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.states import read_state
from bozzetto.checkpoints.weights import TensorHeader, on_meta, open_tensors, read_header, weight_files
from bozzetto.common.checks import config_from
from bozzetto.common.hub import fetched
from bozzetto.errors import UsageError, require
from bozzetto.runtime.engine import LinearMap
from bozzetto.targets.base import Scores
from bozzetto.targets.denoiser import Denoiser, DenoiserConfig
from bozzetto.targets.flow_cache import EulerSampler, Sampled

_EPS = 1e-6  # of the norm of drawn tokens
VAE, VAE_WEIGHTS = "vae", "checkpoint.pt"
_UNUSED = ("lm_head.weight", "gen_pos_embed")  # of words; of a table that grid_positions computes
_HEAD, _AREA, _BLOCKS = "image_head.net.", "<|image_area|>", ("num_res_blocks", 2)


def next_step_parts(token_dim: int, hidden: int, width: int, depth: int) -> nn.ModuleDict:
    """All but the decoder, under the published names. token_dim: D; hidden: d; width, depth: of the head."""
    into, out = nn.Linear(token_dim, hidden), nn.Linear(hidden, hidden)
    head = nn.ModuleDict({"net": Denoiser(DenoiserConfig(token_dim, token_dim, hidden, width, depth))})
    return nn.ModuleDict({"image_in_projector": into, "image_out_projector": out, "image_head": head})


class NextStepTarget(Sampled, PromptedTarget):
    """body: a transformers decoder in evaluation mode; parts: in its dtype; rows, columns: of tokens; sampler: of the
    head (flow_cache.py); positions: [N, d], added to the hidden states that tokens are drawn from (None: nothing
    is).

    Tokens here are those that the chain ends in. Where the sampler has a norm, what is fed back and decoded is a
    function of them, `settled`: rules compare laws of the tokens before it, and what follows depends on these through
    the same function for draft and target, so that the law of whole pictures is the same.
    """

    time_scale = 1.0

    @torch.no_grad()
    def __init__(self, body: Any, parts: Any, rows: int, columns: int, sampler: Any, positions: Any = None):
        super().__init__(body, rows * columns)
        self.parts = parts
        self.image_in, self.image_out = parts["image_in_projector"], parts["image_out_projector"]
        self.token_dim = self.image_in.in_features
        self.config = Shape(0, self.length, body.config.hidden_size, columns)
        self.positions = None if positions is None else positions.to(self.device, self.dtype)
        self.use_head(self.denoiser(parts), sampler)

    def denoiser(self, model: Any) -> Any:
        return model["image_head"]["net"]

    def owned(self, network: Any = None) -> Any:
        other = super().owned(network)
        other.image_in, other.image_out = (LinearMap.of(part, self.dtype) for part in (self.image_in, self.image_out))
        other.use_head(self.denoiser(self.parts), self.sampler)
        return other

    def settled(self, tokens: Tensor) -> Tensor:
        """What is fed back and decoded of tokens [..., D]."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS) if self.sampler.norm else tokens

    def embed(self, tokens: Tensor) -> Tensor:
        return self.image_in(self.settled(tokens).to(self.dtype))

    def read_out(self, hidden: Tensor, number: Tensor) -> Scores:
        if self.positions is not None:
            hidden = hidden + self.positions[number.clamp_max(self.length - 1)]
        return Scores(None, self.image_out(hidden))


def grid_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Sines and cosines of column and row in raster order, float32 [rows columns, dim]; the first half of the numbers
    tells the column."""
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1).float()  # [.., dim / 2]
    return torch.cat([one[:columns].repeat(rows, 1), one[:rows].repeat_interleave(columns, 0)], 1)


def next_step_pictures(
    target: NextStepTarget,
    decoder: Callable[[Tensor], Tensor],
    patch: int,
    factor: int,
    scale: float = 1.0,
    shift: float = 0.0,
) -> HostedPictures:
    """Of the tokens of a target. decoder: latents [B, C, h, w] -> [B, 3, H, W] in [-1, 1]; scale, shift: latents =
    tokens / scale + shift; factor: pixels per latent and side. A token holds the p x p latents of a patch, channel by
    channel."""

    def pixels(tokens: Tensor) -> Tensor:
        x = target.settled(tokens).unflatten(3, (-1, patch, patch))  # [B, row, column, C, p, p]
        latents = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return (decoder(latents / scale + shift) + 1) / 2

    columns = target.config.grid
    config = PictureConfig(target.length // columns, columns, patch * factor)
    return HostedPictures(config, torch.zeros(0, 0), pixels)


def load(source: Source, wanted: LoadSettings) -> Hosted:
    """NextStep-1 as published. Raises UsageError for files that are missing or do not fit together."""
    wanted.refuse(f"{source.name} has its own", "tokenizer", "vqgan")
    require(not wanted.device_map, "device_map", wanted.device_map, "NextStep-1 runs on one device here")
    shapes = _shapes(source)
    token_dim = shapes.get(f"{_HEAD}input_proj.weight", TensorHeader("", (0, 0))).shape[-1]
    if not token_dim:
        raise UsageError(f"{source.name}: {_HEAD}input_proj.weight is missing in its weights")
    vae, decoder, scale, shift = _autoencoder(source, wanted)
    patch = _number(source, 2, "latent_patch_size", "patch_size")
    if patch * patch * vae.token_dim != token_dim:
        raise UsageError(
            f"{source.name}: a token has {token_dim} numbers, the autoencoder's {vae.token_dim} channels in "
            f"patches of {patch} x {patch} are {patch * patch * vae.token_dim}"
        )
    factor, step = vae.downsample, patch * vae.downsample
    if wanted.size:
        check_multiple(wanted.size, step)
    body, parts = _network(source, shapes, token_dim, wanted)
    tokenizer = source.read("tokenizer", AutoTokenizer.from_pretrained, config=body.config)
    # NextStep-1.1's config.json is of another make than its predecessors'.
    own = source.sampling()
    side = factor * _number(source, 64, "latent_size", "image_size")

    def made(size: tuple[int, int]) -> Hosted:
        columns, rows = (pixels // step for pixels in size)
        places = _positions(source, rows, columns, body.config.hidden_size)
        target = NextStepTarget(body, parts, rows, columns, EulerSampler(), places)
        fits_context(source, target, size)
        pictures = next_step_pictures(target, decoder, patch, factor, scale, shift)
        return Hosted(target, pictures, _grammar(source, tokenizer, rows, columns), own, tokenizer)

    return in_sizes(wanted, ((side, side),), made, step)


def _number(source: Source, usual: int, *names: str) -> int:
    """A whole number above 0 of config.json, which calls it by one of these names."""
    value = next((source.config[name] for name in names if source.config.get(name) is not None), usual)
    fine = type(value) is int and 1 <= value <= 4096
    require(fine, f"{source.folder / CONFIG}: {names[0]}", value, "1 to 4096")
    return int(value)


def _positions(source: Source, rows: int, columns: int, dim: int) -> Tensor | None:
    if not source.config.get("use_gen_pos_embed", False):
        return None
    side = _number(source, 32, "base_image_grid_size")
    if max(rows, columns) > side:
        raise UsageError(f"image_size is not allowed: {rows} x {columns} tokens, there are places for {side} x {side}")
    return grid_positions(rows, columns, dim)


def _shapes(source: Source) -> dict[str, TensorHeader]:
    """What the headers of the weights say."""
    found: dict[str, TensorHeader] = {}
    for path in weight_files(source.folder):
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: not a safetensors file")
        found |= read_header(path)
    return found


def _body(source: Source) -> Any:
    """The decoder that config.json describes, without weights."""
    said = {key: value for key, value in source.config.items() if key not in ("auto_map", "model_type")}
    biased = bool(source.config.get("attention_bias", False))
    out = source.config.get("o_attention_bias")
    if biased and out is False:
        return Qwen2Model(Qwen2Config.from_dict(said))
    if bool(out if out is not None else biased) != biased:
        raise UsageError(f"{source.folder / CONFIG}: o_attention_bias without attention_bias is not known here")
    return LlamaModel(LlamaConfig.from_dict(said))


def _network(
    source: Source, shapes: Mapping[str, TensorHeader], token_dim: int, wanted: LoadSettings
) -> tuple[Any, Any]:
    """Decoder and parts with the published weights, each read once, into the dtype and onto the device that run."""
    depth = numbered(shapes, f"{_HEAD}res_blocks.")

    def make() -> nn.ModuleList:
        body = _body(source)
        hidden, width = body.config.hidden_size, shapes[f"{_HEAD}input_proj.weight"].shape[0]
        return nn.ModuleList([body, next_step_parts(token_dim, hidden, width, depth)])

    check_folder(source.folder, make)
    with torch.device("meta"):
        body, parts = made = make()
    names = {key.partition(".")[2]: value.shape for key, value in made.named_parameters()}
    odd = [key for key, shape in names.items() if key in shapes and shapes[key].shape != tuple(shape)]
    refuse_keys(source.name, "missing", [key for key in names if key not in shapes])
    refuse_keys(source.name, "misshapen", odd)
    refuse_keys(source.name, "of an unknown network", [k for k in shapes if k not in names and k not in _UNUSED])
    for path in weight_files(source.folder):
        with open_tensors(path) as content:
            for key in sorted(set(content.keys()) & set(names)):
                value = content.get_tensor(key).to(wanted.device, wanted.torch_dtype)
                if not bool(torch.isfinite(value).all()):
                    raise UsageError(f"{source.name}: {key} has non-finite values")
                owner = parts if key.startswith("image_") else body
                owner.load_state_dict({key: value}, strict=False, assign=True)
    body.rotary_emb = type(body.rotary_emb)(body.config).to(wanted.device)  # it is not stored
    return body.eval().requires_grad_(False), parts.eval().requires_grad_(False)


def autoencoder_folder(folder: Path, asked: str) -> Path:
    """Where the autoencoder of a checkpoint lies: in its sub-folder, or where one asks for (a folder, or a name on the
    hub)."""
    return fetched(asked) if asked else folder / VAE


def _autoencoder(source: Source, wanted: LoadSettings) -> tuple[KL16Config, Any, float, float]:
    """The published autoencoder, config.json and a pickle of its state: its shape; its decoder; scale and shift, tokens
    = (latents - shift) scale, 1 and 0 where config.json does not say."""
    folder = autoencoder_folder(source.folder, wanted.vae)
    path = folder / VAE_WEIGHTS
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist: NextStep-1's autoencoder (its folder {VAE}, or NextStep-1-f8ch16-Tokenizer) "
            f"belongs there; --vae FOLDER says where it is"
        )
    said = read_config(folder)
    scale, shift = (_real(said, folder, *one) for one in (("scaling_factor", 1.0), ("shift_factor", 0.0)))
    levels = said.get("ch_mult", [1, 2, 4, 4])
    downsample = 2 ** (len(levels) - 1) if isinstance(levels, list) and 0 < len(levels) <= 8 else 1
    shape = {"image_size": downsample, "downsample": downsample, "multipliers": levels}
    for ours, theirs, usual in (("token_dim", "z_channels", 16), ("channels", "ch", 128), ("blocks", *_BLOCKS)):
        shape[ours] = said.get(theirs, usual)
    config: KL16Config = config_from(KL16Config, shape, folder / CONFIG)
    return config, _decoder(config, path).to(wanted.device).eval().requires_grad_(False), scale, shift


def _decoder(config: KL16Config, path: Path) -> Any:
    decoder = on_meta(lambda: kl16_autoencoder(config).decoder)
    state = from_published(read_state(path), len(config.multipliers))
    part = {k.removeprefix("decoder."): v.float() for k, v in state.items() if k.startswith("decoder.")}
    wanted = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    if odd := sorted(key for key in wanted if key not in part or tuple(part[key].shape) != wanted[key]):
        raise UsageError(f"{path}: missing or misshapen: decoder.{odd[0]} ({len(odd)} in all)")
    decoder.load_state_dict(part, strict=False, assign=True)
    return decoder


def _real(said: Mapping[str, Any], folder: Path, name: str, usual: float) -> float:
    value = said.get(name, usual)
    fine = isinstance(value, int | float) and not isinstance(value, bool) and (name != "scaling_factor" or value)
    require(fine, f"{folder / CONFIG}: {name}", value, "a number")
    return float(value)


def _grammar(source: Source, tokenizer: Any, rows: int, columns: int) -> Ask:
    """From words to tokens: begin of text, caption, the picture's size in tokens, begin of image. Every text starts
    with the tokenizer's begin of text where it has one, and the first token of the size is then left out, as the
    published pipeline does it."""
    words = int(source.config.get("vocab_size", 2**31))
    begin = check_word(f"{source.folder / CONFIG}: boi", source.config.get("boi"), words)
    size = tokenizer(f"{_AREA}{rows}*{columns}")["input_ids"]
    ending = (*(size if tokenizer.bos_token is None else size[1:]), begin)
    return prompts_of(lambda text: (*tokenizer((tokenizer.bos_token or "") + text)["input_ids"], *ending))
