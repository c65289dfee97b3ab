"""Compiled modules, kept on disk from one run to the next.

On a CPU a module is exported and compiled ahead of time into a package (AOTInductor): the weights are constants of it,
laid out for the matrix unit (freezing), and a call runs no Python. `max` also lets Inductor generate and time its own
matrix products, which have the narrow layers around them fused in. On a GPU it is torch.compile with CUDA graphs.

A package fits one machine, one number of threads and one set of weights: all of that is in its name. Where it is kept:
runtime/kept.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bozzetto.errors import UsageError
from bozzetto.runtime.kept import cache_folder, find, made, thin_out
from bozzetto.runtime.native import NO_COMPILER, instructions

MODES = ("off", "default", "max")
MOST_BYTES = 8 << 30  # of packages on disk; the ones not used for longest go first
_STALE = 24 * 3600  # seconds after which nobody still writes a file
Graph = Callable[[list[Tensor]], list[Tensor]]
Report = Callable[[str], None]
Dynamic = dict[int, dict[int, tuple[str, int]]]  # argument -> dimension -> (name, largest size)


def check_mode(mode: str) -> str:
    """Raise UsageError for a mode of compilation that there is not."""
    if mode not in MODES:
        raise UsageError(f"compile = {mode!r} is not allowed: {', '.join(MODES)}")
    return mode


class Compiler:
    """Makes graphs of modules. mode: `default` or `max`; report: told of every graph that is compiled."""

    def __init__(self, mode: str, report: Report | None = None, folder: Path | None = None):
        self.mode, self.report, self.folder = check_mode(mode), report, folder
        self.digests: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def graph(self, module: nn.Module, arguments: list[Tensor], what: str, dynamic: Dynamic | None = None) -> Graph:
        """The module as a function of a list of contiguous tensors of these shapes, to a list of tensors.

        module: takes the tensors one by one; arguments it changes in place are changed. what: named in the report.
        dynamic: by argument, a dimension whose size may change, and the largest; the smallest is 2. Dimensions of one
        name have one size.
        Raises UsageError where there is no C++ compiler to compile with, or no room to unpack a graph.
        """
        began, device = time.perf_counter(), arguments[0].device
        if device.type != "cpu":
            return self._live(module, dynamic)
        name, folder = f"{self._name(module, arguments, dynamic)}.pt2", self.folder or cache_folder()
        path = find(name, folder)
        if path is None:
            self._say(f"compiling {what} ...")
            path = made(name, lambda at: self._package(module, arguments, dynamic, at), folder)
            self._say(f"compiled in {time.perf_counter() - began:.0f} s, kept in {path.parent}")
        with contextlib.suppress(OSError):  # another process threw it away, or the folder is not ours
            os.utime(path)  # used just now
            _prune(path.parent, keep=path)
        try:
            return torch._inductor.aoti_load_package(str(path)).loader.run
        except (RuntimeError, OSError) as error:  # it is unpacked to the folder for temporary files
            raise UsageError(
                f"compile: the graph in {path} cannot be loaded: {error} (or use compile = 'off')"
            ) from error

    def _say(self, line: str) -> None:
        if self.report is not None:
            self.report(line)

    def _options(self) -> dict[str, bool]:
        return {"freezing": True, "max_autotune": self.mode == "max"}

    def _package(self, module: nn.Module, arguments: list[Tensor], dynamic: Dynamic | None, name: str) -> None:
        ranges = {size for sizes in (dynamic or {}).values() for size in sizes.values()}
        dims = {name_of: torch.export.Dim(name_of, min=2, max=most) for name_of, most in ranges}
        found = [{d: dims[n] for d, (n, _) in (dynamic or {}).get(i, {}).items()} for i in range(len(arguments))]
        with torch.no_grad():
            program = torch.export.export(_Listed(module), (arguments,), dynamic_shapes=(found,))
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=name, inductor_configs=self._options())
        except torch._inductor.exc.InvalidCxxCompiler as error:
            raise UsageError(NO_COMPILER) from error

    def _live(self, module: nn.Module, dynamic: Dynamic | None) -> Graph:
        options: Any = {"triton.cudagraphs": not dynamic, "max_autotune": self.mode == "max"}
        run = torch.compile(own_code(module), dynamic=bool(dynamic), options=options)
        return lambda arguments: list(run(*arguments))

    def _name(self, module: nn.Module, arguments: Sequence[Tensor], dynamic: Dynamic | None) -> str:
        total = hashlib.sha256()
        shapes = [(tuple(a.shape), str(a.dtype)) for a in arguments]
        for part in (_machine(), self.mode, shapes, sorted((dynamic or {}).items()), self._digest(module)):
            total.update(repr(part).encode())
        return total.hexdigest()[:24]

    def _digest(self, module: nn.Module) -> str:
        """Of the weights, the configuration and the code of a module."""
        if module not in self.digests:
            total = hashlib.sha256()
            total.update(f"{_source()} {module!r}".encode())
            for name, value in module.state_dict().items():
                total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self.digests[module] = total.hexdigest()
        return self.digests[module]


def _machine() -> tuple[object, ...]:
    """What a graph fits, and the time of a pass belongs to."""
    libraries = (torch.__version__, platform.libc_ver())
    return (*libraries, torch.backends.cpu.get_cpu_capability(), instructions(), torch.get_num_threads())


def digest_of(*parts: object) -> str:
    """Of what is known by its representation, on this machine and with this code."""
    return hashlib.sha256(repr((_machine(), _source(), parts)).encode()).hexdigest()[:24]


@functools.cache
def _source() -> str:
    """A digest of the code that graphs are made of."""
    total, root = hashlib.sha256(), Path(__file__).parent.parent
    for room in ("laws", "rules", "drafts", "drafters", "decoding", "runtime", "targets"):
        for path in sorted(p for p in (root / room).glob("*.[cp]*") if p.is_file()):
            total.update(path.read_bytes())
    return total.hexdigest()


class _Listed(nn.Module):
    """A module as a function of one list, so that a package takes the tensors as they are."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, arguments: list[Tensor]) -> Any:
        return self.module(*arguments)


def _prune(folder: Path, keep: Path) -> None:
    """Delete the packages not used for longest until the rest fit, and what killed processes left half copied."""
    for path in folder.glob(".*.pt2"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _STALE:
                path.unlink()
    thin_out(folder, "[!.]*.pt2", MOST_BYTES, keep)


def own_code(step: nn.Module) -> Callable[..., Any]:
    """The step as a function with a code object of its own: Dynamo keeps what it compiled, and counts it, per code."""

    def run(*arguments: Tensor) -> Any:
        return step(*arguments)

    return FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
