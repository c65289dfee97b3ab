"""Files that appear whole or not at all: write beside the target, flush, rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[str], object]) -> None:
    """Call `write(temporary_name)` and rename the result to `path`; on any failure leave nothing behind.

    Raises whatever `write` raises (OSError on a full disk, KeyboardInterrupt when cancelled).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(name)
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def digest(*paths: str | Path) -> str:
    """sha256 of the files' bytes one after another, the first 16 hex digits."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()[:16]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
