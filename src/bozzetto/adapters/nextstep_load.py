"""NextStep-1's published files: one set of shards for everything but the autoencoder, and that in a folder of its own.

The keys of the shards are those of a transformers decoder without a prefix (embed_tokens, layers, norm), an lm_head
that drawing does not need, and the parts of adapters/nextstep.py. Which decoder it is, config.json says: with biases in
queries, keys and values alone it is Qwen2's, with one in the output as well or none at all Llama's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from bozzetto.adapters.checkpoint import check_folder
from bozzetto.adapters.nextstep import NextStepParts, NextStepPictures, NextStepTarget, grid_positions
from bozzetto.adapters.prompted import Prompt
from bozzetto.adapters.source import Hosted, Source, check_multiple, fits_context
from bozzetto.autoencoders.kl16 import KL16Config, from_published, kl16_autoencoder
from bozzetto.checkpoints.folders import CONFIG, read_config
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.checkpoints.published import family_of
from bozzetto.checkpoints.states import read_state
from bozzetto.checkpoints.weights import Held, header_of, open_tensors, weight_files
from bozzetto.common.checks import clipped, config_from
from bozzetto.common.hub import fetched
from bozzetto.errors import UsageError
from bozzetto.targets.flow_cache import EulerSampler

VAE, VAE_WEIGHTS = "vae", "checkpoint.pt"
_UNUSED = ("lm_head.weight", "gen_pos_embed")  # of words; of a table that grid_positions computes
_HEAD, _AREA, _BLOCKS = "image_head.net.", "<|image_area|>", ("num_res_blocks", 2)


def load_nextstep(source: Source, wanted: LoadSettings) -> Hosted:
    """NextStep-1 as published. Raises UsageError for files that are missing or do not fit together."""
    source.refuse(wanted, "tokenizer", "vqgan")
    if wanted.device_map:
        raise UsageError(f"device_map = {wanted.device_map!r} is not allowed: NextStep-1 runs on one device here")
    shapes = _shapes(source)
    token_dim = shapes.get(f"{_HEAD}input_proj.weight", Held("", (0, 0))).shape[-1]
    if not token_dim:
        raise UsageError(f"{source.name}: {_HEAD}input_proj.weight is missing in its weights")
    vae = _Autoencoder(source, wanted)
    patch = _number(source, 2, "latent_patch_size", "patch_size")
    if patch * patch * vae.config.token_dim != token_dim:
        raise UsageError(
            f"{source.name}: a token has {token_dim} numbers, the autoencoder's {vae.config.token_dim} channels in "
            f"patches of {patch} x {patch} are {patch * patch * vae.config.token_dim}"
        )
    factor = vae.config.downsample
    if wanted.size:
        check_multiple(wanted.size, patch * factor)
    body, parts = _network(source, shapes, token_dim, wanted)
    tokenizer = source.read("tokenizer", AutoTokenizer.from_pretrained, config=body.config)
    # NextStep-1.1's config.json is of another make than its predecessors'.
    own = source.sampling(family_of(source.config))
    side = factor * _number(source, 64, "latent_size", "image_size")

    def sized(size: tuple[int, int]) -> Hosted:
        check_multiple(size, patch * factor)
        columns, rows = (pixels // (patch * factor) for pixels in size)
        places = _positions(source, rows, columns, body.config.hidden_size)
        target = NextStepTarget(body, parts, rows, columns, EulerSampler(), places)
        fits_context(source, target, size)
        pictures = NextStepPictures(target, vae.decoder, patch, factor, vae.scale, vae.shift)
        ask = Prompts(source, tokenizer, rows, columns)
        return Hosted(target, pictures, ask, own, tokenizer, ((side, side),), sized)

    return sized(wanted.size or (side, side))


def _number(source: Source, usual: int, *names: str) -> int:
    """A whole number above 0 of config.json, which calls it by one of these names."""
    value = next((source.config[name] for name in names if source.config.get(name) is not None), usual)
    if type(value) is not int or not 1 <= value <= 4096:
        raise UsageError(f"{source.folder / CONFIG}: {names[0]} = {clipped(value)} is not allowed: 1 to 4096")
    return value


def _positions(source: Source, rows: int, columns: int, dim: int) -> Tensor | None:
    if not source.config.get("use_gen_pos_embed", False):
        return None
    side = _number(source, 32, "base_image_grid_size")
    if max(rows, columns) > side:
        raise UsageError(f"image_size is not allowed: {rows} x {columns} tokens, there are places for {side} x {side}")
    return grid_positions(rows, columns, dim)


def _shapes(source: Source) -> dict[str, Held]:
    """What the headers of the weights say."""
    found: dict[str, Held] = {}
    for path in weight_files(source.folder):
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: not a safetensors file")
        with open_tensors(path) as content:
            found |= header_of(content)
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


def _network(source: Source, shapes: Mapping[str, Held], token_dim: int, wanted: LoadSettings) -> tuple[Any, Any]:
    """Decoder and parts with the published weights, each read once, into the dtype and onto the device that run."""
    depth = len({key.split(".")[3] for key in shapes if key.startswith(f"{_HEAD}res_blocks.")})

    def make() -> nn.ModuleList:
        body = _body(source)
        hidden, width = body.config.hidden_size, shapes[f"{_HEAD}input_proj.weight"].shape[0]
        return nn.ModuleList([body, NextStepParts(token_dim, hidden, width, depth)])

    check_folder(source.folder, make)
    with torch.device("meta"):
        body, parts = made = make()
    names = {key.partition(".")[2]: value.shape for key, value in made.named_parameters()}
    for what, found in (
        ("missing", [key for key in names if key not in shapes]),
        ("misshapen", [key for key, shape in names.items() if key in shapes and shapes[key].shape != tuple(shape)]),
        ("of an unknown network", [key for key in shapes if key not in names and key not in _UNUSED]),
    ):
        if found:
            raise UsageError(f"{source.name}: {what} in its weights: {', '.join(found[:4])} ({len(found)} in all)")
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


class _Autoencoder:
    """The decoder of a published autoencoder: config.json and a pickle of its state. config: its shape; scale, shift:
    tokens = (latents - shift) scale, 1 and 0 where config.json does not say."""

    def __init__(self, source: Source, wanted: LoadSettings):
        folder = autoencoder_folder(source.folder, wanted.vae)
        path = folder / VAE_WEIGHTS
        if not path.is_file():
            raise UsageError(
                f"{path} does not exist: NextStep-1's autoencoder (its folder {VAE}, or NextStep-1-f8ch16-Tokenizer) "
                f"belongs there; --vae FOLDER says where it is"
            )
        said = read_config(folder)
        self.scale, self.shift = (_real(said, folder, *one) for one in (("scaling_factor", 1.0), ("shift_factor", 0.0)))
        levels = said.get("ch_mult", [1, 2, 4, 4])
        downsample = 2 ** (len(levels) - 1) if isinstance(levels, list) and 0 < len(levels) <= 8 else 1
        shape = {"image_size": downsample, "downsample": downsample, "multipliers": levels}
        for ours, theirs, usual in (("token_dim", "z_channels", 16), ("channels", "ch", 128), ("blocks", *_BLOCKS)):
            shape[ours] = said.get(theirs, usual)
        self.config: KL16Config = config_from(KL16Config, shape, folder / CONFIG)
        self.decoder = self._decoder(path).to(wanted.device).eval().requires_grad_(False)

    def _decoder(self, path: Path) -> Any:
        with torch.device("meta"):
            decoder = kl16_autoencoder(self.config).decoder
        state = from_published(read_state(path), len(self.config.multipliers))
        part = {k.removeprefix("decoder."): v.float() for k, v in state.items() if k.startswith("decoder.")}
        wanted = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
        if odd := sorted(key for key in wanted if key not in part or tuple(part[key].shape) != wanted[key]):
            raise UsageError(f"{path}: missing or misshapen: decoder.{odd[0]} ({len(odd)} in all)")
        decoder.load_state_dict(part, strict=False, assign=True)
        return decoder


def _real(said: Mapping[str, Any], folder: Path, name: str, usual: float) -> float:
    value = said.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or (name == "scaling_factor" and value == 0):
        raise UsageError(f"{folder / CONFIG}: {name} = {clipped(value)} is not allowed: a number")
    return float(value)


class Prompts:
    """From words to tokens: begin of text, caption, the picture's size in tokens, begin of image. Every text starts
    with the tokenizer's begin of text where it has one, and the first token of the size is then left out, as the
    published pipeline does it."""

    def __init__(self, source: Source, tokenizer: Any, rows: int, columns: int):
        self.tokenizer = tokenizer
        begin = source.config.get("boi")
        if type(begin) is not int or not 0 <= begin < int(source.config.get("vocab_size", math.inf)):
            raise UsageError(f"{source.folder / CONFIG}: boi = {clipped(begin)} is not allowed: a token's number")
        size = self._numbers(f"{_AREA}{rows}*{columns}")
        self.ending = (*(size if tokenizer.bos_token is None else size[1:]), begin)

    def _numbers(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _tokens(self, text: str) -> tuple[int, ...]:
        return (*self._numbers((self.tokenizer.bos_token or "") + text), *self.ending)

    def __call__(self, text: str, negative: str) -> Prompt:
        return Prompt(self._tokens(text), self._tokens(negative))
