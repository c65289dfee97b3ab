"""Where a figure comes from: versions, the source's commit, the machine, the command. Everything that is written and
measured carries it."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bozzetto import __version__
from bozzetto.runtime.native import has_matrix_unit, processor


def versions() -> dict[str, str]:
    """What produced a file."""
    return {
        "bozzetto": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def machine() -> dict[str, object]:
    """The processor, its cores, the threads in use and whether it has a matrix unit."""
    return {
        "processor": processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matrix_unit": has_matrix_unit(),
    }


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """With so many CPU threads (0: as they are), which are put back."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def commit() -> str | None:
    """The git commit of the source tree, with `+` where files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, check=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # A package inside somebody else's repository (a virtual environment, say) must not report that one's commit.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        found, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return found + ("+" if changed else "")


def command() -> str:
    """The command line of this process; the program by name, without its folder."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    return shlex.join(["bozzetto" if name in ("__main__.py", "bozzetto") else name, *arguments])


def provenance() -> dict[str, object]:
    """All of the above and the time, ready for JSON."""
    return {
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
