"""Published LlamaGen checkpoints into model folders: recognised by their tensors, written as a whole.

Sizes and conditions: Sun et al., arXiv 2406.06525, table 2 and section 2.3. Nothing but shapes is needed to tell them
apart; only the picture size is not in the weights, because the rotations have no parameters.

Some are published in the layout of LlamaForCausalLM: jadohu/LlamaGen-T2I and -2, the targets of LANTERN (arXiv
2410.03355). The names are Llama's, the rotations are LlamaGen's own (the code that goes with these files turns
interleaved pairs by row and column), so that no weight changes its order: queries, keys and values lie in one matrix
again, the rest is renamed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.autoencoders.decoder import renamed_whole
from bozzetto.autoencoders.llamagen_vq import USED, LlamaGenVQ, LlamaGenVQConfig, infer_config
from bozzetto.checkpoints.folders import CONFIG, LLAMAGEN, VQ_LLAMAGEN, write_model, write_tokenizer
from bozzetto.checkpoints.own_sampling import SAMPLING
from bozzetto.checkpoints.published import published
from bozzetto.checkpoints.states import (
    GPT,
    LLAMA,
    VQ,
    check_storable,
    family_of,
    family_state,
    open_state,
    published_size,
    telling_keys,
    types_in,
)
from bozzetto.checkpoints.weights import OWN, check_fit, on_meta, weight_files
from bozzetto.common.classes import note_on_doubles
from bozzetto.common.files import read_json
from bozzetto.common.staging import recover, staged_folder
from bozzetto.errors import UsageError, require
from bozzetto.targets.llamagen import POSITIONS, SHAPES, LlamaGen, LlamaGenConfig, published_config

IMAGE_SIZES = (256, 384, 512)
_NAMES = (
    (r"model\.embed_tokens\.(.+)", r"tok_embeddings.\1"),
    (r"model\.norm\.(.+)", r"norm.\1"),
    (r"lm_head\.(.+)", r"output.\1"),
    (r"model\.(layers\.\d+)\.self_attn\.o_proj\.(.+)", r"\1.attention.wo.\2"),
    (r"model\.(layers\.\d+)\.mlp\.gate_proj\.(.+)", r"\1.feed_forward.w1.\2"),
    (r"model\.(layers\.\d+)\.mlp\.up_proj\.(.+)", r"\1.feed_forward.w3.\2"),
    (r"model\.(layers\.\d+)\.mlp\.down_proj\.(.+)", r"\1.feed_forward.w2.\2"),
    (r"model\.(layers\.\d+)\.input_layernorm\.(.+)", r"\1.attention_norm.\2"),
    (r"model\.(layers\.\d+)\.post_attention_layernorm\.(.+)", r"\1.ffn_norm.\2"),
    (r"model\.(.+)", r"\1"),
)
_FUSED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


def convert_llamagen(
    gpt: Path,
    vq: Path,
    out: Path,
    image_size: int | None = None,
    class_names: Path | None = None,
    store: str = OWN,
    text_encoder: str = "",
) -> str:
    """Turn a published LlamaGen (class- or text-conditional, any size) and its tokenizer into the model folder `out`.

    gpt, vq: torch pickles (opened with weights_only=True) or safetensors files; gpt: or a folder in the layout of
    LlamaForCausalLM. image_size: 256, 384 or 512; None: what the file or its name says, else 256.
    class_names: a text file with one name per line; None: "0", "1", ...; store: see `save_state`; text_encoder:
    what loading shall take for captions, "" for the published one. Returns a line about what was found. Raises
    UsageError for a file of another family, missing or misshapen or non-finite weights, parts that do not fit together,
    or an `out` that is not empty; then nothing is written.
    """
    check_out(out)
    require(image_size in (None, *IMAGE_SIZES), "image_size", image_size, ", ".join(map(str, IMAGE_SIZES)))
    pixels, _ = family_state(vq, VQ)
    network = _transformer(gpt)
    tokenizer = _tokenizer_config(pixels, vq)
    image_size, how = choose_image_size(image_size, network, gpt, tokenizer.downsample)
    tokenizer = dataclasses.replace(tokenizer, image_size=image_size)
    size, config = recognise(network, gpt, tokenizer.grid)
    if config.vocab != tokenizer.codes:
        raise UsageError(f"{gpt} draws {config.vocab} tokens, but {vq} has {tokenizer.codes} codes")
    names = read_class_names(class_names, config.classes)
    network.pop(POSITIONS, None)
    pixels.pop(USED, None)
    for source, part in ((vq, pixels), (gpt, network)):
        check_storable(source, part, store)
    condition = "t2i" if config.captioned else "c2i"
    own = published("llamagen-t2i" if config.captioned else f"llamagen-c2i-{size}")
    notes: dict[str, Any] = {SAMPLING: own.recorded()}
    if text_encoder and config.captioned:  # a folder by its whole path, so that it is found from anywhere
        notes["encoder"] = str(Path(text_encoder).absolute()) if Path(text_encoder).is_dir() else text_encoder
    notes["class_names"] = names
    notes["converted"] = {"size": size, "condition": condition, "gpt": gpt.name, "vq": vq.name}
    with staged_folder(out) as folder:
        write_tokenizer(folder, VQ_LLAMAGEN, tokenizer, pixels, {}, store)
        write_model(folder, LLAMAGEN, config, network, notes, store=store)
    kind = f"{condition}, {config.classes} classes" if names else f"{condition}, {config.condition_tokens} text tokens"
    return (
        f"LlamaGen-{size} ({kind}) with VQ-{tokenizer.downsample}, {image_size} x {image_size} pixels ({how}), "
        f"{config.length} tokens, weights as {types_in({**network, **pixels}, store)}: {out}{note_on_doubles(names)}"
    )


def check_out(out: Path) -> None:
    """Raise UsageError where a new folder cannot be written: it exists and holds something, or is a file. What a killed
    process has left in it is finished, or swept."""
    recover(out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    require(not taken, "out", str(out), "it exists and is not an empty folder")


def _transformer(path: Path) -> dict[str, Tensor]:
    """The state of --gpt, a file or a folder, under LlamaGen's names."""
    files = weight_files(path) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= open_state(file)[0]
    if family_of(state) == LLAMA and any(key.startswith("model.cls_embedding.") for key in state):
        return _as_llamagen(state)
    return state if path.is_dir() and family_of(state) == GPT else family_state(files[0], GPT)[0]


def _as_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under LlamaGen's names. What has none there keeps its own, as the parts of a matrix that is not whole
    do, so that they are named as unexpected."""
    kept = (key for key in state if not key.endswith("rotary_emb.inv_freq"))
    found = {renamed_whole(key, _NAMES) or key: state[key] for key in kept}
    for name in [key.removesuffix(_FUSED[0]) for key in found if key.endswith(_FUSED[0])]:
        three = [found[name + part] for part in _FUSED if name + part in found]
        if len(three) == 3 and len({part.shape[1:] for part in three}) == 1:
            for part in _FUSED:
                del found[name + part]
            found[f"{name}attention.wqkv.weight"] = torch.cat(three)
    return found


def recognise(state: Mapping[str, Tensor], source: Path, grid: int) -> tuple[str, LlamaGenConfig]:
    """(published size, config) of a LlamaGen state at `grid`; every key and shape is checked, no number is read.

    Raises UsageError for a shape that no published size has, and for missing, unexpected or misshapen keys.
    """
    try:
        vocab, dim = state["tok_embeddings.weight"].shape
    except ValueError as error:
        raise UsageError(f"{source}: checkpoint does not fit: 'tok_embeddings.weight' is no matrix") from error
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    size = published_size(SHAPES, dim, layers, source, "layers")
    rows, captions = (state.get(f"cls_embedding.{n}") for n in ("embedding_table.weight", "uncond_embedding"))
    if rows is None and captions is None:
        raise UsageError(f"{source}: neither class-conditional nor text-conditional: no key 'cls_embedding...'")
    config = dataclasses.replace(published_config(size, grid, rows is None), vocab=vocab)
    if rows is not None and rows.ndim == 2 and len(rows) > 1:
        config = dataclasses.replace(config, classes=len(rows) - 1)
    elif captions is not None and captions.ndim == 2:
        config = dataclasses.replace(config, condition_tokens=captions.shape[0], caption_dim=captions.shape[1])
    wanted = on_meta(lambda: LlamaGen(config)).state_dict()
    check_fit(wanted, {key: value for key, value in state.items() if key != POSITIONS}, source)
    return size, config


def choose_image_size(asked: int | None, state: Mapping[str, Tensor], source: Path, downsample: int) -> tuple[int, str]:
    """(pixels a side, where that is known from): as asked; by a stored table of rotations or a folder's config.json; by
    the file's name; 256."""
    stored = _stored_grid(state) or (_grid_of(source) if source.is_dir() else None)
    if stored is not None:
        size = stored * downsample
        require(asked in (None, size), "image_size", asked, f"{source} was trained for {size} pixels")
        return size, "by the stored positions"
    if asked is not None:
        return asked, "as asked"
    named = re.search(rf"_({'|'.join(map(str, IMAGE_SIZES))})(?!\d)", source.stem)
    return (int(named[1]), "by the file's name") if named else (256, "assumed; --image-size changes it")


def _stored_grid(state: Mapping[str, Tensor]) -> int | None:
    """Tokens a side by the length of a stored table of rotations [T + grid^2, hd/2, 2], None where there is none."""
    table, captions = state.get(POSITIONS), state.get("cls_embedding.uncond_embedding")
    if table is None or not table.ndim or (captions is not None and not captions.ndim):
        return None
    return _side(len(table) - (1 if captions is None else len(captions)))


def _grid_of(folder: Path) -> int | None:
    """Tokens a side by `block_size` of the folder's config.json, None where it does not say."""
    if not (folder / CONFIG).is_file():
        return None
    tokens: Any = read_json(folder / CONFIG).get("block_size")
    return _side(tokens) if type(tokens) is int else None


def _side(tokens: int) -> int | None:
    """Tokens a side of a square grid of them; None where they are none."""
    side = math.isqrt(max(tokens, 0))
    return side if side and side * side == tokens else None


def read_class_names(path: Path | None, classes: int) -> list[str]:
    """One name per line of a text file; without a file the numbers; none for captions.

    Raises UsageError for another number of names than classes.
    """
    if path is None:
        return [str(n) for n in range(classes)]
    if not path.is_file():
        raise UsageError(f"class names not found: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin it with a byte-order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: class names are not UTF-8 text: {error}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != classes:
        raise UsageError(f"{path}: {len(names)} class names, but the model has {classes} classes")
    return names


def _tokenizer_config(state: Mapping[str, Tensor], source: Path) -> LlamaGenVQConfig:
    """The config of a published tokenizer, every key and shape checked."""
    with telling_keys(source):
        config = infer_config(state, 256)
    wanted = on_meta(lambda: LlamaGenVQ(config)).published_state()
    if USED in state:
        wanted[USED] = state[USED]
    check_fit(wanted, state, source)
    return config
