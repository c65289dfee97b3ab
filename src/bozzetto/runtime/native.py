"""The kernels of our own: cached decoders, attention over a ragged cache, linear maps of a few rows, denoising heads,
laws and noise (decoder.cpp and its headers).

They are plain C++ without torch, know no shape, and are built by the machine's compiler once, in a few seconds, when a
pass first asks for them; they are kept where other made files are kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.common.terminal import note
from bozzetto.errors import UsageError
from bozzetto.runtime.kept import cache_folder, find, made

_ENGINE = Path(__file__).parent / "decoder.cpp"


def instructions() -> str:
    """What code built here may run on: the processor's name, and its instructions, which a virtual machine may have
    fewer of than another of the same name."""
    known = " ".join(sorted(_told("flags", "features").split()))
    return f"{platform.machine()} {processor()} {hashlib.sha256(known.encode()).hexdigest()[:12]}"


def _told(*names: str) -> str:
    """What the system says of its first processor under one of these names, "" where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(names)), "")


def multiplies_pairs() -> bool:
    """Whether the processor has the instruction for pairs of bfloat16 that our kernels use, and torch's products: they
    are up to four times as fast with it as in float32, and half as fast without."""
    return "avx512_bf16" in _told("flags").split()


def has_matrix_unit() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in a unit made for it (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def cheap_rows() -> int:
    """Rows of a compiled pass in bfloat16 that cost little more than one on this machine: many on a GPU or with a
    matrix unit, some where pairs of bfloat16 are multiplied fast, few elsewhere."""
    if torch.cuda.is_available() or has_matrix_unit():
        return 32
    return 16 if multiplies_pairs() else 8


def processor() -> str:
    """What the processor calls itself."""
    return _told("model name") or platform.processor()


@cache
def library() -> ctypes.CDLL:
    """Our kernels. Raises UsageError where they cannot be built or loaded."""
    return load_kernels(cache_folder())


@cache
def lanes() -> int:
    """Numbers of 32 bits in a register of the kernels."""
    return int(library().bozzetto_lanes())


def load_kernels(folder: Path | None) -> ctypes.CDLL:
    """The kernels, from `folder`, or built and kept there; says so on stderr, for that takes seconds. Raises UsageError
    where there is no C++ compiler, or where what it built cannot be loaded."""
    path = made(_name(), _build, folder)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UsageError(
            f"compile: the kernels in {path} cannot be loaded: {error} (or use compile = 'off')"
        ) from error


def _name() -> str:
    code = b"".join(path.read_bytes() for path in [*sorted(_ENGINE.parent.glob("*.h")), _ENGINE])
    found = hashlib.sha256(code + f"{platform.libc_ver()} {instructions()}".encode()).hexdigest()[:16]
    return f"engine-{found}.so"


def built() -> Path | None:
    """Where the kernels of this machine are, None: not built yet."""
    return find(_name(), cache_folder())


def compiler() -> str | None:
    """What builds them, None: nothing here."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def usual_dtype() -> str:
    """In which type our kernels are fastest on this processor, as far as its instructions tell (a type must not change
    with what else the machine does); float32 where they cannot be."""
    return "bfloat16" if multiplies_pairs() and (built() or compiler()) else "float32"


def _build(path: str) -> None:
    if (found := compiler()) is None:
        raise UsageError("compile needs a C++ compiler (g++ or clang++): install one, or use compile = 'off'")
    note("building the kernels for this machine, once ...")
    command = [found, "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-fopenmp"]
    command += ["-shared", "-fPIC", "-std=c++20", str(_ENGINE), "-o", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " ".join(done.stderr.split())[-400:]
        raise UsageError(f"compile: {found} could not build the kernels: {tail} (or use compile = 'off')")


def address_of(part: Tensor | None) -> int | None:
    """Where a contiguous tensor lies, for a field of a structure."""
    return None if part is None else part.data_ptr()


NUMBER, FLOAT, ADDRESS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def structure(*fields: tuple[Any, str]) -> Any:
    """A structure of C. fields: (type, names), in order."""
    named = [(name, kind) for kind, names in fields for name in names.split()]
    return type("Structure", (ctypes.Structure,), {"_fields_": named})


def call(name: str, *arguments: Any) -> None:
    """Call a kernel with whole numbers, contiguous tensors (None: no address) and structures."""
    getattr(library(), name)(*map(_argument, arguments))


def _argument(part: Any) -> Any:
    if isinstance(part, int):
        return ctypes.c_int64(part)
    if part is None or isinstance(part, Tensor):
        return ctypes.c_void_p(address_of(part))
    return ctypes.byref(part)


def need_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Raise UsageError where our kernels do not compute."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        kind = "a processor" if device.type == "cpu" else device
        raise UsageError(f"compile is not allowed here: no kernels for {dtype} on {kind}")


@cache
def kernels_compute(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether they do; where they do not, a line on stderr says once why torch runs the passes."""
    try:
        need_kernels(dtype, device)
        library()
    except UsageError as error:
        note(f"passes are run by torch: {error}")
        return False
    return True


def loaded() -> bool:
    """Whether this process has our kernels."""
    return library.cache_info().currsize > 0
