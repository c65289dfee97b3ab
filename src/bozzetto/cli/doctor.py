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
from bozzetto.common.extras import EXTRAS
from bozzetto.common.shipped import INSTALL, missing_models, shipped_folders
from bozzetto.runtime.kept import cache_folder, damaged
from bozzetto.runtime.native import built, compiler, has_matrix_unit, multiplies_pairs, usual_dtype

Verdict = Literal["ok", "note", "fail"]
_ROOM = 2**30  # bytes that features of captions and sample runs soon need


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do. verdict: ok, note (works, could be better) or fail."""

    what: str
    verdict: Verdict
    how: str
    fix: str = ""


def checked(what: str, good: object, how: str, fix: str, bad: Verdict = "fail") -> Finding:
    """What was looked at, fine or not; how it is; and what to do where it is not."""
    return Finding(what, "ok", how) if good else Finding(what, bad, how, fix)


def examine() -> list[Finding]:
    """Look at everything."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _torch,
        _matrix_unit,
        _threads,
        _device,
        _kernels,
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
    yield Finding("bozzetto", "ok", __version__)
    yield checked("Python", sys.version_info >= (3, 10), version, "use Python 3.10 or newer")


def _torch() -> Iterator[Finding]:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    ability = torch.backends.cpu.get_cpu_capability()
    how = f"{torch.__version__}, {'CUDA ' + str(torch.version.cuda) if torch.version.cuda else 'CPU build'}, {ability}"
    yield checked("PyTorch", (major, minor) >= (2, 6), how, "pip install 'torch>=2.6'")
    if not torch.backends.mkldnn.is_available():
        yield Finding("oneDNN", "note", "not in this build: bfloat16 is slow", "install a build of PyTorch with oneDNN")


def _matrix_unit() -> Iterator[Finding]:
    if torch.cuda.is_available():
        return
    how = "none: in bfloat16, passes of many places take longer than in float32"
    if good := has_matrix_unit() or multiplies_pairs():
        how = "AMX, for bfloat16" if has_matrix_unit() else "none, but products in bfloat16 are faster than in float32"
    fix = "use --dtype float32, or windows of 4 to 8 places in bfloat16"
    yield checked("matrix unit", good, how, fix, "note")


def _threads() -> Iterator[Finding]:
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    named = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    how = f"{used} of {able} processors" + (f" ({', '.join(named)})" if named else "")
    few = 2 * used < able and named
    fix = f"unset {' and '.join(n.partition('=')[0] for n in named)} to use all" if few else ""
    if used > able:
        fix = f"set OMP_NUM_THREADS={able}: more threads than processors are slow"
    yield checked("threads", not fix, how, fix, "note")


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


def _kernels() -> Iterator[Finding]:
    found, kept = compiler(), built()
    fix = "install g++ (Debian: apt install g++)"
    yield checked("C++ compiler", found, found or "none: kernels cannot be built", fix, "note")
    how = "not there: torch runs the passes, which takes several times longer"
    if good := kept or found:
        how = "built" if kept else "built when they are first asked for, once, in a few seconds"
        how += ", with pairs of bfloat16" if multiplies_pairs() else ", without pairs of bfloat16"
    yield checked("kernels", good, f"{how}; shipped models are drawn in {usual_dtype()} on a processor", fix, "note")


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
    yield checked("cache", left > _ROOM, how, "make room on this disk", "note")
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
    found = shipped_folders()
    if not found:
        yield Finding("models", "fail", "none shipped", "install bozzetto again: its assets are missing")
    for name, folder in sorted(found.items()):
        damaged = [path.name for path in sorted(folder.rglob("*.safetensors")) if not _readable(path)]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        how = f"damaged: {', '.join(damaged)}" if damaged else f"{size / 2**20:.0f} MiB"
        yield checked(f"model {name}", not damaged, how, "install bozzetto again")
    if missing := missing_models():
        yield Finding("other models", "note", f"not installed: {', '.join(missing)}", INSTALL)


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
        how, fix = f"without {', '.join(missing)}" if missing else "installed", f"pip install 'bozzetto[{extra}]'"
        yield checked(f"extra {extra}", not missing, how, f"{fix}, if you need it", "note")
