"""The kernels of our own: attention of a few queries per sequence over a ragged cache (attend.cpp), and linear maps of
a few rows for processors without a matrix unit (linear.cpp).

torch's attention for CPUs spends most of such a call on starting small matrix products, and its products in bfloat16
reach a third of what such a processor can do. Both are built by the machine's C++ compiler when compiled passes are
first asked for, and kept where compiled graphs are kept.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from bozzetto.errors import UsageError
from bozzetto.runtime.kept import cache_folder, made

SOURCES = tuple(Path(__file__).parent / name for name in ("attend.cpp", "linear.cpp"))
NO_COMPILER = "compile needs a C++ compiler (g++ or clang++): install one, or use compile = 'off'"
HEAD_UNIT = 32  # head dimensions are a multiple of this


def load_kernels(folder: Path | None = None) -> None:
    """Make `torch.ops.bozzetto.attend` known: (q [R, W, H, D], keys [R, H, S, D], values, seen bool [B, W, C], steady)
    -> [R, W, H, D], where row r attends to the columns c < C that seen[r % B] shows it; float32 or bfloat16.

    values: as keys in float32; [R, H, S/2, D, 2] in bfloat16, columns 2 i and 2 i + 1 side by side (`in_pairs`);
    `append_attend`(q, k, v, keys, values, slot int64 [B, W], seen, steady) first writes the pass's own keys and values,
    shaped as q, into columns `slot` of the caches; generated code writes such scattered columns number by number.

    `torch.ops.bozzetto.linear` is described at `runtime/linear.py`.

    steady: a query's result has the same bits in a call of any width (with the matrix unit it has anyway).

    folder: where they are kept, if not in the cache. They are loaded once in a process. Raises UsageError where they
    cannot be built or loaded.
    """
    if hasattr(torch.ops.bozzetto, "attend"):
        return
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UsageError(NO_COMPILER)
    code = b"".join(source.read_bytes() for source in SOURCES)
    name = hashlib.sha256(code + f"{torch.__version__} {platform.libc_ver()} {instructions()}".encode())
    path = made(f"kernels-{name.hexdigest()[:16]}.so", lambda at: _build(compiler, at), folder or cache_folder())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise UsageError(
            f"compile: the kernels in {path} cannot be loaded: {error} (or use compile = 'off')"
        ) from error

    @torch.library.register_fake("bozzetto::attend")
    def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, steady: bool) -> Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    @torch.library.register_fake("bozzetto::append_attend")
    def append_attend(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor, steady: bool
    ) -> Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    @torch.library.register_fake("bozzetto::linear")
    def linear(
        x: Tensor, weight: Tensor, columns: int, gated: bool, bias: Tensor | None, more: Tensor | None
    ) -> Tensor:
        return torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)


def in_pairs(values: Tensor) -> Tensor:
    """[R, H, S, D] -> [R, H, S/2, D, 2]."""
    return values.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()


def _build(compiler: str, path: str) -> None:
    command = [compiler, "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-fopenmp"]
    command += ["-shared", "-fPIC", "-std=c++20", *map(str, SOURCES), "-o", path]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " ".join(done.stderr.split())[-400:]
        raise UsageError(f"compile: {compiler} could not build the kernels: {tail} (or use compile = 'off')")


def instructions() -> str:
    """What code built here may run on: the processor's name, and its instructions, which a virtual machine may have
    fewer of than another of the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    known = " ".join(sorted(flags.partition(":")[2].split()))
    return f"{platform.machine()} {processor()} {hashlib.sha256(known.encode()).hexdigest()[:12]}"


def has_matrix_unit() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in a unit made for it (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@cache
def products_prefer_bfloat16() -> bool:
    """Whether torch's products of many rows are faster in bfloat16 than in float32 here, measured once (some tens of
    milliseconds): four times on one processor without a matrix unit, half as fast on another."""
    seconds = {torch.bfloat16: math.inf, torch.float32: math.inf}
    with torch.no_grad():
        for _ in range(4):  # the first one lays out, the best one counts
            for dtype in seconds:
                x = torch.ones(768, 768, dtype=dtype)
                begun = time.perf_counter()
                x @ x
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begun)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def cheap_rows() -> int:
    """Rows of a compiled pass in bfloat16 that cost little more than one on this machine: many on a GPU or with a
    matrix unit, some where pairs of bfloat16 are multiplied fast, few elsewhere."""
    if torch.cuda.is_available() or has_matrix_unit():
        return 32
    return 16 if products_prefer_bfloat16() else 8


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
