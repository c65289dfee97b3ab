"""How passes are run, and what a figure that is kept on disk belongs to.

On a processor passes are calls of our own kernels (runtime/engine.py), which know no shape; on a GPU the layers are
compiled by torch.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from bozzetto.errors import UsageError
from bozzetto.runtime.native import instructions

AUTO = "auto"  # our kernels where they compute, else torch
COMPILED = ("default", "max")
MODES = (AUTO, "off", *COMPILED)
Report = Callable[[str], None]


def check_mode(mode: str) -> str:
    """Raise UsageError for a mode that there is not."""
    if mode not in MODES:
        raise UsageError(f"compile = {mode!r} is not allowed: {', '.join(MODES)}")
    return mode


def _machine() -> tuple[object, ...]:
    """What the time of a pass belongs to."""
    libraries = (torch.__version__, platform.libc_ver())
    return (*libraries, torch.backends.cpu.get_cpu_capability(), instructions(), torch.get_num_threads())


def digest_of(*parts: object) -> str:
    """Of what is known by its representation, on this machine and with this code."""
    return hashlib.sha256(repr((_machine(), _source(), parts)).encode()).hexdigest()[:24]


@functools.cache
def _source() -> str:
    """A digest of the code that runs passes and what follows them."""
    total, root = hashlib.sha256(), Path(__file__).parent.parent
    for room in ("laws", "rules", "drafts", "drafters", "decoding", "runtime", "targets"):
        for path in sorted(p for p in (root / room).glob("*.[chp]*") if p.is_file()):
            total.update(path.read_bytes())
    return total.hexdigest()
