"""Files that are kept from one run to the next: kernels, tables of neighbours, features of captions.

A kept file has a digest of its bytes in its name, NAME.DIGEST.SUFFIX, and is used only while the two agree: one that
was cut or changed is thrown away and made again, and processes that make the same file at once do not meet. The folder
is `$BOZZETTO_CACHE`, or `bozzetto` in `$XDG_CACHE_HOME` (`~/.cache`). A folder that cannot be written to costs time
and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bozzetto.common.files import digest, write_digested
from bozzetto.errors import UsageError

KINDS = (".so", ".safetensors")  # suffixes of kept files
_DIGEST = "[0-9a-f]" * 16


def cache_folder() -> Path | None:
    """Where files are kept, whether or not it is there; None where nothing names a folder and there is no home."""
    if own := os.environ.get("BOZZETTO_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "bozzetto"
    try:
        return Path.home() / ".cache" / "bozzetto"
    except RuntimeError:  # no HOME, and the user has no entry in the system's list of users
        return None


def find(name: str, folder: Path | None) -> Path | None:
    """The kept file of this name (without its digest), None where there is none; damaged ones are thrown away."""
    stem, suffix = os.path.splitext(name)
    folders = [folder, _temporary()] if _temporary.cache_info().currsize else [folder]
    for path in (path for place in folders for path in _listed(place, f"{stem}.{_DIGEST}{suffix}")):
        with contextlib.suppress(OSError):  # it cannot be read, or another process threw it away
            if is_sound(path):
                return path
            path.unlink()
    return None


def is_sound(path: Path) -> bool:
    """Whether a kept file has the bytes that its name says. Raises OSError where it cannot be read."""
    return path.stem.rpartition(".")[2] == digest(path)


def damaged(folder: Path | None) -> list[Path]:
    """The kept files that would be thrown away."""
    found = []
    for path in (path for kind in KINDS for path in _listed(folder, f"[!.]*.{_DIGEST}{kind}")):
        with contextlib.suppress(OSError):
            if not is_sound(path):
                found.append(path)
    return found


def keep(name: str, make: Callable[[str], object], folder: Path | None) -> Path:
    """Call `make(temporary_name)` and keep the result under this name. Raises OSError where that is not possible."""
    if folder is None:
        raise FileNotFoundError("there is no home directory")
    return write_digested(folder / name, make)


def made(name: str, make: Callable[[str], object], folder: Path | None) -> Path:
    """The kept file of this name, made by `make(temporary_name)` where there is none.

    Where it cannot be kept it lies in a temporary folder, which goes with the process; that is logged once. Raises what
    `make` raises, and UsageError where there is no temporary folder either.
    """
    if found := find(name, folder):
        return found
    own = Path(tempfile.mkdtemp(dir=_temporary()))  # other threads see nothing of it that goes away again
    try:
        new = write_digested(own / name, make)
        try:
            return keep(name, lambda at: shutil.copyfile(new, at), folder)
        except OSError as error:
            _say_once(folder, error.strerror or str(error))
            return new.replace(_temporary() / new.name)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def thin_out(folder: Path, pattern: str, most: int, keep: Path) -> None:
    """Delete the files of this pattern that were not used for longest, until the rest has at most `most` bytes. `keep`
    stays."""
    found, total = [], 0
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > most and path != keep:
            path.unlink(missing_ok=True)


def leave_nothing() -> None:
    """Delete this process's temporary folder. It goes by itself where exit handlers run."""
    if _temporary.cache_info().currsize:
        shutil.rmtree(_temporary(), ignore_errors=True)


def _listed(folder: Path | None, pattern: str) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # a folder that cannot be looked into holds nothing
        if folder is not None and folder.is_dir():
            yield from sorted(folder.glob(pattern))


@functools.cache
def _temporary() -> Path:
    """A folder of this process."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="bozzetto-"))
    except OSError as error:
        raise UsageError(f"there is no folder for temporary files ({error}): set TMPDIR to one") from error
    atexit.register(leave_nothing)
    return folder


@functools.cache
def _say_once(folder: Path | None, why: str) -> None:
    where = "nothing can be kept" if folder is None else f"nothing can be kept in {folder}"
    logging.getLogger("bozzetto").warning(
        "%s (%s): what is made goes when this process ends; set BOZZETTO_CACHE to a folder that can be written to",
        where,
        why,
    )
