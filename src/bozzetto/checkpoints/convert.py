"""Published LlamaGen checkpoints into model folders: read safely, recognised by their tensors, written as a whole.

Sizes and conditions: Sun et al., arXiv 2406.06525, table 2 and section 2.3. Nothing but shapes is needed to tell them
apart; only the picture size is not in the weights, because the rotations have no parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bozzetto.autoencoders.llamagen_vq import USED, LlamaGenVQ, LlamaGenVQConfig, infer_config
from bozzetto.checkpoints.layout import weight_files
from bozzetto.checkpoints.llama_layout import MARKS, as_llamagen, grid_of
from bozzetto.checkpoints.own_sampling import SAMPLING
from bozzetto.checkpoints.published import published
from bozzetto.checkpoints.store import (
    CONFIG,
    OWN,
    PUBLISHED,
    WEIGHT,
    WEIGHTS,
    check_fit,
    name_of,
    save_state,
    stored_type,
    write_tokenizer,
)
from bozzetto.common.classes import note_on_doubles
from bozzetto.common.files import pointer_note, write_text
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import POSITIONS, SHAPES, LlamaGen, LlamaGenConfig, published_config

IMAGE_SIZES = (256, 384, 512)
GPT, VQ = "a LlamaGen transformer", "a LlamaGen VQ tokenizer"
LLAMA = "a language model in Llama's layout"
MAR, KL16 = "a MAR transformer", "a KL-16 autoencoder"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_REPEATED = 2**30  # bytes of a tensor that repeats a few numbers
WRAPPERS = ("model", "module", "state_dict")
# What a family is known by: its name, and keys that it alone has together.
_FAMILIES = (
    (GPT, ("tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight")),
    (VQ, ("quantize.embedding.weight", "post_quant_conv.weight", "decoder.conv_in.weight")),
    (MAR, ("z_proj.weight", "diffusion_pos_embed_learned", "diffloss.net.input_proj.weight")),
    (KL16, ("post_quant_conv.weight", "decoder.mid.attn_1.q.weight", "decoder.up.0.block.0.conv1.weight")),
    (LLAMA, MARKS),
    ("a drafter", ("fc.weight", "layers.0.self_attn.q_proj.weight")),
    ("a bozzetto tokenizer", ("codebook", "pre.0.weight", "post.0.weight")),
)
# What `convert` takes a family for, and as which option.
_OPTIONS = {
    GPT: ("llamagen", "--gpt"),
    VQ: ("llamagen", "--vq"),
    MAR: ("mar", "--checkpoint"),
    KL16: ("mar", "--vae"),
}


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
    LlamaForCausalLM (llama_layout.py). image_size: 256, 384 or 512; None: what the file or its name says, else 256.
    class_names: a text file with one name per line; None: "0", "1", ...; store: see `store.save_state`; text_encoder:
    what loading shall take for captions, "" for the published one. Returns a line about what was found. Raises
    UsageError for a file of another family, missing or misshapen or non-finite weights, parts that do not fit together,
    or an `out` that is not empty; then nothing is written.
    """
    check_out(out)
    if image_size is not None and image_size not in IMAGE_SIZES:
        raise UsageError(f"image_size = {image_size} is not allowed: {', '.join(map(str, IMAGE_SIZES))}")
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
    content = _content(size, config, text_encoder) | {"class_names": names}
    content["converted"] = {"size": size, "condition": condition, "gpt": gpt.name, "vq": vq.name}

    def write(folder: Path) -> None:
        save_state(folder / WEIGHTS, network, store=store)
        write_tokenizer(folder, PUBLISHED, tokenizer, pixels, {}, store)
        write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")

    write_folder(out, write)
    kind = f"{condition}, {config.classes} classes" if names else f"{condition}, {config.condition_tokens} text tokens"
    return (
        f"LlamaGen-{size} ({kind}) with VQ-{tokenizer.downsample}, {image_size} x {image_size} pixels ({how}), "
        f"{config.length} tokens, weights as {types_in({**network, **pixels}, store)}: {out}{note_on_doubles(names)}"
    )


def _content(size: str, config: LlamaGenConfig, text_encoder: str) -> dict[str, Any]:
    """config.json, but for what the files are called."""
    own = published("llamagen-t2i" if config.captioned else f"llamagen-c2i-{size}")
    content = {"family": "llamagen", "config": dataclasses.asdict(config), SAMPLING: own.recorded()}
    return content | ({"encoder": _place(text_encoder)} if text_encoder and config.captioned else {})


def _place(source: str) -> str:
    """A folder by its whole path, so that it is found from anywhere; a hub name as it is."""
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def _transformer(path: Path) -> dict[str, Tensor]:
    """The state of --gpt, a file or a folder, under LlamaGen's names."""
    files = weight_files(path) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= open_state(file)[0]
    if family_of(state) == LLAMA and any(key.startswith("model.cls_embedding.") for key in state):
        return as_llamagen(state)
    return state if path.is_dir() and family_of(state) == GPT else family_state(files[0], GPT)[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, bare or under `model`, `module` or `state_dict`, in its own types.

    The file is mapped and not copied where its format allows. Raises UsageError for an unreadable or unsafe file,
    something else than tensors, or non-finite weights.
    """
    state, _ = open_state(path)
    check_finite(path, state)
    return state


def open_state(path: Path, wrappers: Sequence[str] = WRAPPERS) -> tuple[dict[str, Tensor], str]:
    """`read_state` without looking at the numbers, under the first of `wrappers` that there is; and which, "" for a
    bare state dict."""
    if not path.is_file():
        raise UsageError(f"checkpoint not found: {path}")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except Exception as error:  # torch raises several unrelated types for a broken or unsafe pickle
        why = pointer_note(path) or " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{path}: not a checkpoint that can be read safely: {why}") from error
    found = ""
    if isinstance(content, dict):
        found = next((wrapper for wrapper in wrappers if isinstance(content.get(wrapper), dict)), "")
        content = content[found] if found else content
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a state dict, found {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{path}: expected a state dict, but {key!r} is not a tensor but {type(value).__name__}")
        _check_plain(path, str(key), value)
    return {str(key): value.detach() for key, value in content.items()}, found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118


def _read_pickle(path: Path) -> object:
    packed = zipfile.is_zipfile(path)
    if packed:
        _check_sums(path)
    # Training scripts keep their command line, a Namespace, beside the weights: a bare record of options.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)


def _check_sums(path: Path) -> None:
    """Raise BadZipFile for an archive of torch with a part that does not have its checksum. torch 2.13 does not look,
    and gives whatever numbers are there; it can be told to save without checksums, which are 0 then."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            with archive.open(part) as content:
                while part.CRC and content.read(1 << 20):
                    pass


def _check_plain(path: Path, key: str, value: Tensor) -> None:
    """Raise UsageError for a tensor whose numbers are not in the file: sparse, of no device, repeated without end, or
    weights in a type that means nothing without scales."""
    if value.layout != torch.strided or value.device.type != "cpu":
        raise UsageError(f"{path}: {key!r} is no plain tensor ({value.layout}, {value.device})")
    if key.endswith(WEIGHT):
        check_types(path, {key: value})
    if value.numel() * value.element_size() > max(path.stat().st_size, _MOST_REPEATED):
        raise UsageError(f"{path}: {key!r} has shape {tuple(value.shape)}, which the file has no room for")


def check_finite(path: Path, state: Mapping[str, Tensor], store: str = OWN) -> None:
    """Raise UsageError that names the first weight that is not finite, or too large for what it is stored as."""
    for key, value in state.items():
        if not value.is_floating_point() or not value.numel():
            continue
        seen = value if value.dtype in _FLOATS else value.float()
        low, high = (float(end) for end in seen.aminmax())  # both are nan where one number is
        if not math.isfinite(low) or not math.isfinite(high):
            raise UsageError(f"{path}: weight {key!r} has non-finite values")
        kind = stored_type(value.dtype, store)
        if max(-low, high) > torch.finfo(kind).max:
            other = "" if store == OWN else " (without --store weights keep their own type)"
            raise UsageError(f"{path}: weight {key!r} has values that {name_of(kind)} cannot hold{other}")


def check_storable(path: Path, state: Mapping[str, Tensor], store: str) -> None:
    """`check_finite`, and raise UsageError that names the first weight of another type than weights have here.

    store: see `store.save_state`.
    """
    check_types(path, state)
    check_finite(path, state, store)


def check_types(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UsageError that names the first weight of another type than weights have here."""
    for key, value in state.items():
        if value.dtype not in _FLOATS:
            allowed = ", ".join(map(name_of, _FLOATS))
            raise UsageError(f"{path}: weight {key!r} is of type {name_of(value.dtype)} (allowed: {allowed})")


def types_in(state: Mapping[str, Tensor], store: str) -> str:
    """The types that a state is stored in, in words."""
    return " and ".join(sorted({name_of(stored_type(value.dtype, store)) for value in state.values()}))


def family_state(path: Path, wanted: str, wrappers: Sequence[str] = WRAPPERS) -> tuple[dict[str, Tensor], str]:
    """(state, key that it lay under) of a file that must hold `wanted`, under the first of `wrappers` that there is.

    Raises UsageError for an unreadable or unsafe file, and one that says what a file of another family holds.
    """
    state, wrapper = open_state(path, wrappers)
    found = family_of(state)
    if found == wanted:
        return state, wrapper
    verb, option = _OPTIONS[wanted]
    hint = ""
    if found in _OPTIONS:
        other, name = _OPTIONS[found]
        hint = f"; give it as {name}" if other == verb else f"; `bozzetto convert {other}` takes it as {name}"
    raise UsageError(f"{path}: {option} must be {wanted}, but this is {found}{hint}")


def family_of(state: Mapping[str, Tensor]) -> str:
    """What a state dict belongs to, in words."""
    for name, keys in _FAMILIES:
        if all(key in state for key in keys):
            return name
    some = ", ".join(repr(key) for key in sorted(state)[:3])
    return f"an unknown network (with {some})" if some else "an empty state dict"


def recognise(state: Mapping[str, Tensor], source: Path, grid: int) -> tuple[str, LlamaGenConfig]:
    """(published size, config) of a LlamaGen state at `grid`; every key and shape is checked, no number is read.

    Raises UsageError for a shape that no published size has, and for missing, unexpected or misshapen keys.
    """
    try:
        vocab, dim = state["tok_embeddings.weight"].shape
    except ValueError as error:
        raise UsageError(f"{source}: checkpoint does not fit: 'tok_embeddings.weight' is no matrix") from error
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    size = next((name for name, shape in SHAPES.items() if shape[:2] == (dim, layers)), None)
    if size is None:
        known = ", ".join(f"{name} {d} x {n}" for name, (d, n, _) in SHAPES.items())
        raise UsageError(f"{source}: no published size has {dim} dimensions x {layers} layers (known: {known})")
    rows, captions = (state.get(f"cls_embedding.{n}") for n in ("embedding_table.weight", "uncond_embedding"))
    if rows is None and captions is None:
        raise UsageError(f"{source}: neither class-conditional nor text-conditional: no key 'cls_embedding...'")
    config = dataclasses.replace(published_config(size, grid, rows is None), vocab=vocab)
    if rows is not None and rows.ndim == 2 and len(rows) > 1:
        config = dataclasses.replace(config, classes=len(rows) - 1)
    elif captions is not None and captions.ndim == 2:
        config = dataclasses.replace(config, condition_tokens=captions.shape[0], caption_dim=captions.shape[1])
    with torch.device("meta"):
        wanted = LlamaGen(config).state_dict()
    check_fit(wanted, {key: value for key, value in state.items() if key != POSITIONS}, source)
    return size, config


def choose_image_size(asked: int | None, state: Mapping[str, Tensor], source: Path, downsample: int) -> tuple[int, str]:
    """(pixels a side, where that is known from): as asked; by a stored table of rotations or a folder's config.json; by
    the file's name; 256."""
    stored = _stored_grid(state) or (grid_of(source) if source.is_dir() else None)
    if stored is not None:
        size = stored * downsample
        if asked not in (None, size):
            raise UsageError(f"image_size = {asked} is not allowed: {source} was trained for {size} pixels")
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
    tokens = len(table) - (1 if captions is None else len(captions))
    side = round(max(tokens, 0) ** 0.5)
    return side if side * side == tokens and side else None


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
    try:
        config = infer_config(state, 256)
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:  # a missing key, a tensor of another shape
        raise UsageError(f"{source}: checkpoint does not fit: missing or misshapen key {error}") from error
    with torch.device("meta"):
        wanted = LlamaGenVQ(config).published_state()
    if USED in state:
        wanted[USED] = state[USED]
    check_fit(wanted, state, source)
    return config


def check_out(out: Path) -> None:
    """Raise UsageError where a new folder cannot be written: it exists and holds something, or is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out = {str(out)!r} is not allowed: it exists and is not an empty folder")


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """`write` into a hidden folder and rename it, or its files if `out` exists; on any failure leave nothing behind."""
    out = out.absolute()
    mark = f".bozzetto-{secrets.token_hex(4)}"
    stage = out / mark if out.exists() else out.parent / mark
    stage.mkdir(parents=True)
    try:
        write(stage)
        if out.exists():
            for path in sorted(stage.iterdir(), key=lambda p: p.name == CONFIG):  # without CONFIG it is no model
                os.replace(path, out / path.name)
            stage.rmdir()
        else:
            os.replace(stage, out)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
