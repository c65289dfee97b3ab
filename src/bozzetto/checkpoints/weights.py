"""Files of weights: safetensors, strict about keys, shapes and finite numbers.

Weights are stored as float16, or in the types of the published file that they come from, and computed with as float32
or bfloat16. A compact file holds matrices as int8 with one scale per row, under the name of the matrix and `.scale`:
half the size, rounded to 1/254 of a row's largest weight.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bozzetto.common.files import pointer_note, read_json, write_whole
from bozzetto.errors import UsageError, brief
from bozzetto.targets.layers import Rotating

WEIGHTS = "model.safetensors"
_INDEX, _PICKLE = ".index.json", "pytorch_model.bin"
SCALE = ".scale"
WEIGHT = ".weight"  # how names end of what a network multiplies by, in its published files too
OWN = "own"  # how to store: every tensor in the type that it has
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMED = {"F16": "float16", "BF16": "bfloat16", "I8": "bfloat16"}
FLOATS, WHOLE = ("F16", "BF16", "F32", "F64"), ("I64", "I32", "I16", "I8", "U8", "BOOL")
M = TypeVar("M", bound=nn.Module)


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says of a tensor. type: as F16."""

    type: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read. Raises UsageError where there are none, for an index that is damaged or
    that names files elsewhere, and for shards that are missing."""
    for name in (WEIGHTS, _PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}{_INDEX}").is_file():
            return _shards(index)
    raise UsageError(f"{folder}: no weights ({WEIGHTS} or its shards with {WEIGHTS}{_INDEX})")


def is_name(name: object) -> bool:
    """Whether this is the name of a file or a folder, and not "", "..", or a path to somewhere else."""
    return isinstance(name, str) and Path(name).name == name and "\\" not in name


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"{index}: weight_map is {brief(shards)} (allowed: names of weights with their files)")
    for name in shards.values():
        if not is_name(name):
            raise UsageError(f"{index}: {brief(name)} is not allowed: the name of a file in this folder")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UsageError(f"{index.parent}: {', '.join(missing[:4])} missing ({len(missing)} of {len(files)} shards)")
    return files


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, open. Raises UsageError for one that is missing or damaged, also while it is read."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"weights not found: {path}")
    try:
        with safe_open(path, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a readable safetensors file: {pointer_note(path) or error}") from error


def header_of(content: Any) -> dict[str, TensorHeader]:
    """The tensors of an open safetensors file."""
    parts = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118  (not a dict)
    return {key: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}


def read_header(path: str | Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file, by its header, which says how long the file must be. Raises UsageError."""
    with open_tensors(path) as content:
        return header_of(content)


def usual_type(path: str | Path) -> str:
    """The type that most weights of a file have; int8 rows have no more digits than bfloat16. Raises UsageError."""
    counts: Counter[str] = Counter()
    for kind, shape in read_header(path).values():
        counts[_NAMED.get(kind, "float32")] += math.prod(shape)
    return max(counts, key=lambda name: counts[name], default="float32")


def read_weights(
    path: str | Path,
    wanted: Mapping[str, Tensor] | None = None,
    chosen: Callable[[str], bool] = lambda key: True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The chosen tensors of a safetensors file, numbers with fractions and compact matrices (see above) in `dtype`.

    wanted: tensors, on the meta device perhaps, whose names and shapes those of the file must have. Nothing is read
    before the file's header has been looked at. Raises UsageError for a file that is broken or does not fit, types of
    numbers that no weights have here, and non-finite numbers.
    """
    with open_tensors(path) as content:
        held = header_of(content)
        compact = {key for key in held if key + SCALE in held}
        for key, (kind, _) in held.items():
            if key in compact and not _is_compact(held[key], held[key + SCALE]):
                raise UsageError(f"{path}: {key + SCALE!r} does not hold one scale for each row of an int8 matrix")
            if kind not in FLOATS and key not in compact and (wanted is not None or kind not in WHOLE):
                raise UsageError(f"{path}: weight {key!r} is of type {kind} (allowed: {', '.join(FLOATS)})")
        names = held.keys() - {key + SCALE for key in compact}
        if wanted is not None:
            check_fit(wanted, {key: held[key] for key in held if key in names}, path)
        return {key: _read(content, key, key in compact, path, dtype) for key in held if key in names and chosen(key)}


def _is_compact(matrix: TensorHeader, scale: TensorHeader) -> bool:
    """Whether they fit; otherwise a product could be much larger than the file."""
    rows = (*matrix.shape[:1], 1)
    return matrix.type == "I8" and len(matrix.shape) == 2 and scale.type in FLOATS and scale.shape == rows


def _read(content: Any, key: str, compact: bool, path: str | Path, dtype: torch.dtype) -> Tensor:
    """A tensor of its own: what safetensors gives is mapped, and a file may change."""
    value: Tensor = content.get_tensor(key)
    if compact:
        value = value * content.get_tensor(key + SCALE).float()
    value = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
    if not finite(value):
        raise UsageError(f"{path}: weight {key!r} has non-finite values in {name_of(dtype)}")
    return value


def finite(value: Tensor) -> bool:
    """Whether all numbers are; takes no memory, where isfinite takes as much as the tensor."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))


def check_fit(wanted: Mapping[str, Any], state: Mapping[str, Any], source: str | Path) -> None:
    """Raise UsageError that names missing, unexpected and misshapen keys, of tensors or whatever else has a shape."""
    problems = [f"missing key {k!r}" for k in wanted if k not in state]
    problems += [f"unexpected key {brief(k)}" for k in state if k not in wanted]
    problems += [
        f"{k!r} has shape {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and tuple(state[k].shape) != tuple(v.shape)
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UsageError(f"{source}: checkpoint does not fit: " + "; ".join(problems[:5]) + more)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """load_state_dict that explains itself (`check_fit`)."""
    check_fit(module.state_dict(), state, source)
    module.load_state_dict(state)


def load_module(make: Callable[[], M], path: Path) -> M:
    """The module that `make` makes with the weights of a file; float32, in evaluation mode. It takes memory only once
    the file's header has been found to fit. Raises UsageError as `read_weights`."""
    module = on_meta(make)
    return fill(module, read_weights(path, module.state_dict()))


class Streamed(nn.Module):
    """Layers that lie in a file: an iteration reads each when it comes to it, in `dtype` on `device`, and keeps none.

    layers: the same on the meta device; name: what their parameters' names begin with."""

    def __init__(self, layers: nn.ModuleList, path: Path, name: str, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.made, self.path, self.name = list(layers), path, name  # in a list: no parameters of a module
        self.dtype, self.device = dtype, device

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[nn.Module]:
        for number, blank in enumerate(self.made):
            before = f"{self.name}.{number}."
            keys = {before + key for key in blank.state_dict()}
            state = read_weights(self.path, None, keys.__contains__, self.dtype)
            layer = fill(copy.deepcopy(blank), {key.removeprefix(before): value for key, value in state.items()})
            yield layer.to(self.device)


def load_streamed(
    make: Callable[[], M],
    path: Path,
    lists: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str,
    others: torch.dtype | None = None,
) -> M:
    """As load_module, ready to be laid out in `dtype` on a device: the layers of these lists (Streamed) are in memory
    one at a time, while somebody goes through them. others: the type of everything else."""
    module = on_meta(make)
    outside = {key for key in module.state_dict() if key.partition(".")[0] not in lists}
    state = read_weights(path, module.state_dict(), outside.__contains__, others or dtype)
    for name in lists:
        layers = module.get_submodule(name)
        assert isinstance(layers, nn.ModuleList)
        setattr(module, name, Streamed(layers, path, name, dtype, device))
    return fill(module, state).to(device)


def on_meta(make: Callable[[], M]) -> M:
    """The module without its numbers: drawing millions at random only to overwrite them takes seconds."""
    with torch.device("meta"):
        return make()


def fill(module: M, state: Mapping[str, Tensor]) -> M:
    """Give a module that was made on the meta device its weights, which fit, and what is made from its config."""
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        if isinstance(part, Rotating):
            part.turn_by(part.turns)
    return module.eval().requires_grad_(False)


def save_state(path: str | Path, state: Mapping[str, Tensor], compact: bool = False, store: str = "float16") -> None:
    """Write tensors as safetensors, whole or not at all. store: a type of STORED, or OWN; compact: matrices as int8
    rows (see above).

    Raises UsageError when a weight is not finite in the type that it is stored in.
    """
    kept, places = {}, set()
    for key, value in state.items():
        if compact and value.ndim == 2 and bool(torch.isfinite(value).all()):
            scale = (value.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
            kept[key] = (value.float() / scale).round().to(torch.int8)
            kept[key + SCALE] = scale
            continue
        stored = value.to(stored_type(value.dtype, store))
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise UsageError(f"{path}: weight {key!r} has values that {name_of(stored.dtype)} cannot hold")
        if stored.data_ptr() in places:  # tied weights, which safetensors refuses
            stored = stored.clone()
        places.add(stored.data_ptr())
        kept[key] = stored.contiguous(memory_format=torch.contiguous_format)
    save_tensors(path, kept)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write tensors as they are, whole or not at all. Raises OSError where that is not possible."""

    def write(name: str) -> None:
        try:
            save_file(tensors, name, notes)
        except SafetensorError as error:  # safetensors 0.8 says so of a full disk too
            raise OSError(f"{path}: {error}") from error

    write_whole(path, write)


def stored_type(dtype: torch.dtype, store: str) -> torch.dtype:
    """What a tensor of this type is stored as. OWN: as it is, but float64, which nothing here computes in, as float32;
    numbers without a fraction are never changed."""
    if not dtype.is_floating_point:
        return dtype
    return STORED.get(store, torch.float32 if dtype == torch.float64 else dtype)


def name_of(dtype: torch.dtype) -> str:
    """float16 of torch.float16."""
    return str(dtype).removeprefix("torch.")
