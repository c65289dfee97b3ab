"""Files that appear whole or not at all: write beside the target, flush, rename. JSON files that may hold anything."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bozzetto.errors import UsageError

_FULL = 2**16  # bytes: of a disk with less room than this, it is the room that a writer lacked
_MOST_JSON = 64 * 2**20  # bytes
_POINTER = b"version https://git-lfs"  # how a pointer file begins, by its specification
_DEEPEST = 64  # lists and mappings within each other


def read_json(path: str | Path, kind: type | tuple[type, ...] = dict) -> Any:
    """What a JSON file of ours holds, a mapping unless `kind` says otherwise (`object`: anything); see `parse_json`.

    Raises UsageError naming the file where it is missing, no file, larger than 64 MiB, or not what was asked for.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise UsageError(f"{path}: {'not a file' if path.exists() else 'does not exist'}")
        if (size := path.stat().st_size) > _MOST_JSON:
            raise UsageError(f"{path}: {size} bytes of JSON are too many (allowed: {_MOST_JSON})")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UsageError(f"{path}: cannot be read: {error}") from error
    return parse_json(data, path, kind)


def parse_json(text: str | bytes, source: str | Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Strict JSON of a file called `source`: UTF-8 with or without a byte-order mark, finite numbers, each key once,
    at most 64 levels deep, text that can be written as UTF-8. Raises UsageError naming `source`."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_refuse, parse_float=_finite)
        _check_plain(content)
    except RecursionError:
        raise UsageError(f"{source}: not valid JSON here: nested more than {_DEEPEST} deep") from None
    except ValueError as error:  # broken, not UTF-8, or a whole number of more digits than Python reads
        raise UsageError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(content, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join({"dict": "object", "list": "array"}.get(k.__name__, k.__name__) for k in kinds)
        raise UsageError(f"{source}: expected a JSON {wanted}, found {type(content).__name__}")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return content


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text[:40])


def _check_plain(content: Any) -> None:
    """Raise RecursionError for deep nesting and ValueError for text with half a surrogate pair."""
    level = [content]
    for _ in range(_DEEPEST + 1):
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8")
        parts = [[*v, *v.values()] if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        if not parts:
            return
        level = [value for part in parts for value in part]
    raise RecursionError


def write_whole(path: str | Path, write: Callable[[str], object]) -> None:
    """Call `write(temporary_name)` and rename the result to `path`; on any failure leave nothing behind.

    Raises whatever `write` raises (KeyboardInterrupt when cancelled), and OSError on a full disk.
    """
    _write(Path(path), write, lambda name: Path(path))


def write_digested(path: Path, write: Callable[[str], object]) -> Path:
    """`write_whole` to NAME.DIGEST.SUFFIX in place of NAME.SUFFIX; returns where that is."""
    return _write(path, write, lambda name: path.with_name(f"{path.stem}.{digest(name)}{path.suffix}"))


def _write(path: Path, write: Callable[[str], object], place: Callable[[str], Path]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = str(path.with_name(f".{path.name}.{secrets.token_hex(8)}{path.suffix}"))
    os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o666))
    try:
        write(name)
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        final = place(name)
        os.replace(name, final)
    except BaseException as error:
        full = isinstance(error, Exception) and shutil.disk_usage(path.parent).free < _FULL
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if full and not isinstance(error, OSError):  # torch 2.13 speaks of an "unexpected pos"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    return final


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def pointer_note(path: str | Path) -> str:
    """What to say of a file that is a Git LFS pointer in place of what it stands for; "" for any other file."""
    with open(path, "rb") as f:
        pointer = f.read(len(_POINTER)) == _POINTER
    return "a Git LFS pointer, not the file itself (`git lfs pull` fetches it)" if pointer else ""


def digest(*paths: str | Path) -> str:
    """sha256 of the files' bytes one after another, the first 16 hex digits."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()[:16]
