"""The one kernel of our own: attention of a few queries per sequence over a ragged cache (attend.cpp).

torch's attention for CPUs spends most of such a call on starting small matrix products. It is built by the machine's
C++ compiler when compiled passes are first asked for, and kept where compiled graphs are kept.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from bozzetto.errors import UsageError
from bozzetto.files import write_whole

SOURCE = Path(__file__).parent / "attend.cpp"
NO_COMPILER = "compile needs a C++ compiler (g++ or clang++): install one, or use compile = 'off'"
HEAD_UNIT = 32  # head dimensions are a multiple of this


def load_attend(folder: Path) -> None:
    """Make `torch.ops.bozzetto.attend` known: (q [R, W, H, D], keys [R, H, S, D], values, seen bool [B, W, C], steady)
    -> [R, W, H, D], where row r attends to the columns c < C that seen[r % B] shows it; float32 or bfloat16.

    values: as keys in float32; [R, H, S/2, D, 2] in bfloat16, columns 2 i and 2 i + 1 side by side (`in_pairs`);
    `append_attend`(q, k, v, keys, values, slot int64 [B, W], seen, steady) first writes the pass's own keys and values,
    shaped as q, into columns `slot` of the caches; generated code writes such scattered columns number by number.

    steady: a query's result has the same bits in a call of any width (with the matrix unit it has anyway).

    It is loaded once in a process. Raises UsageError where it cannot be built.
    """
    if hasattr(torch.ops.bozzetto, "attend"):
        return
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UsageError(NO_COMPILER)
    name = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {platform.machine()} {processor()}".encode())
    path = folder / f"attend-{name.hexdigest()[:16]}.so"
    if not path.exists():
        write_whole(path, lambda name: _build(compiler, name))
    torch.ops.load_library(str(path))

    @torch.library.register_fake("bozzetto::attend")
    def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, steady: bool) -> Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    @torch.library.register_fake("bozzetto::append_attend")
    def append_attend(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor, steady: bool
    ) -> Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def in_pairs(values: Tensor) -> Tensor:
    """[R, H, S, D] -> [R, H, S/2, D, 2]."""
    return values.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()


def _build(compiler: str, path: str) -> None:
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", path]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " ".join(done.stderr.split())[-400:]
        raise UsageError(f"compile: {compiler} could not build {SOURCE.name}: {tail} (or use compile = 'off')")


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
