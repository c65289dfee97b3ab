"""State dicts of published checkpoints: read safely, recognised by their tensors, checked before they are stored."""

from __future__ import annotations

import argparse
import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bozzetto.checkpoints.weights import OWN, WEIGHT, name_of, stored_type
from bozzetto.common.files import pointer_note
from bozzetto.errors import UsageError, one_line

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
    (LLAMA, ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight")),
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
        why = pointer_note(path) or one_line(error)
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


@contextlib.contextmanager
def telling_keys(source: Path) -> Iterator[None]:
    """A key that is missing inside, or a tensor with another number of dimensions, is an error that names both."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{source}: checkpoint does not fit: missing or misshapen key {error}") from error


def published_size(shapes: Mapping[str, tuple[int, ...]], dim: int, depth: int, source: Path, parts: str) -> str:
    """The published size with these dimensions and so many layers or blocks (`parts`), the first two of its shape.
    Raises UsageError where none has them."""
    size = next((name for name, shape in shapes.items() if shape[:2] == (dim, depth)), None)
    if size is None:
        known = ", ".join(f"{name} {d} x {n}" for name, (d, n, *_) in shapes.items())
        raise UsageError(f"{source}: no published size has {dim} dimensions x {depth} {parts} (known: {known})")
    return size


def family_of(state: Mapping[str, Tensor]) -> str:
    """What a state dict belongs to, in words."""
    for name, keys in _FAMILIES:
        if all(key in state for key in keys):
            return name
    some = ", ".join(repr(key) for key in sorted(state)[:3])
    return f"an unknown network (with {some})" if some else "an empty state dict"
