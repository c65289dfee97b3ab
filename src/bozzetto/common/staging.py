"""Folders that change all at once: written beside their place, and moved there when everything is done.

A missing folder appears by one rename. A folder that exists gets its files one by one; the rename before (`.done`) is
what decides: a process killed later has not lost anything, and the next one that writes there finishes its work.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bozzetto.errors import UsageError

LAST = "manifest.json"
_LAST = (LAST, "config.json")  # say what the other files are: they go first and come last
_NAME, _DONE = re.compile(r"\.bozzetto-[0-9a-f]{8}(\.done)?"), ".done"


@contextlib.contextmanager
def staged_folder(out: str | Path, ours: Callable[[Path], bool] = Path.is_file) -> Iterator[Path]:
    """Give a hidden folder to write into; when the block ends well its files move to `out`, otherwise it vanishes.

    An existing `out` keeps its other files; files of the same names are replaced where they are `ours`. Where one is
    not by then, the folder is kept beside `out` under a name of its own. At every moment manifest.json (of a model:
    config.json) in `out` is missing or says what is there. A missing `out` (and its missing parents) appears only on
    success. What killed processes have left is finished, or swept. Raises UsageError where `out` cannot be a folder.
    """
    out = Path(out).absolute()
    missing = [p for p in (out, *out.parents) if not p.exists()]
    blocker = next(p for p in (out, *out.parents) if p.exists())
    if not blocker.is_dir():
        raise UsageError(f"out = {str(out)!r} is not allowed: {blocker} is a file, a folder is wanted")
    place = out if out.is_dir() else out.parent
    for folder in {out, out.parent}:
        recover(folder)
    with _locked_folder(place) as staging:
        try:
            yield staging
            _publish(staging, out, ours)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for folder in missing[1:]:  # nearest first; a parent that someone else filled stays
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def recover(folder: Path) -> None:
    """Finish what killed processes had decided to move into a folder, and sweep what they had not."""
    try:
        found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    except OSError:  # there is no such folder, or it is not for us to look into
        return
    for path in found:
        with contextlib.suppress(OSError), locked(path) as free:
            if free and path.name.endswith(_DONE):
                _move_all(path, folder)
            elif free:
                shutil.rmtree(path, ignore_errors=True)


def _publish(staging: Path, out: Path, ours: Callable[[Path], bool]) -> None:
    if not out.exists():
        with contextlib.suppress(OSError):  # somebody was quicker
            os.rename(staging, out)
            return
    taken: list[Path] = []
    if out.is_dir():
        with locked(out, wait=True):  # while others move theirs, files are missing for a moment
            taken = [p for p in staging.iterdir() if os.path.lexists(out / p.name) and not ours(out / p.name)]
    if taken or not out.is_dir():
        kept = out.with_name(f"{out.name[:40]}-{secrets.token_hex(4)}")
        os.rename(staging, kept)
        why = f"{out / taken[0].name} was not written by this program" if taken else f"{out} is no folder"
        raise UsageError(f"{why}: everything is in {kept}")
    done = out / f"{staging.name}{_DONE}"
    os.rename(staging, done)  # from here on the files are those of this run, whatever happens
    try:
        _move_all(done, out)
    except KeyboardInterrupt:
        _move_all(done, out)
        raise KeyboardInterrupt(f"everything is written: {out}") from None
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: everything is in {done}, which the next run moves", out
        ) from error


def _move_all(done: Path, out: Path) -> None:
    """Move every file into its place; may be begun again by anybody."""
    with locked(out, wait=True):
        for name in _LAST:
            if (done / name).exists():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(out / name)
        for path in sorted(done.iterdir(), key=lambda p: (p.name in _LAST, p.name)):
            os.replace(path, out / path.name)
        done.rmdir()


@contextlib.contextmanager
def _locked_folder(place: Path) -> Iterator[Path]:
    """A new hidden folder that nobody else takes for a dead one's."""
    for _ in range(100):
        path = place / f".bozzetto-{secrets.token_hex(4)}"
        path.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(locked(path))
            except FileNotFoundError:  # swept between the two
                continue
            if held is not False and path.is_dir():
                yield path
                return
    raise OSError(f"no folder of its own could be made in {place}")


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False, shared: bool = False) -> Iterator[bool | None]:
    """Hold the lock of a folder, which ends with the process whatever ends that; False where another one holds it, None
    where there are no such locks. shared: others that want it shared may hold it too."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    held: bool | None = True
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:  # a file system without
            held = None
        yield held
    finally:
        os.close(handle)
