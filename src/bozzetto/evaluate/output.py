"""What the command line leaves behind: run folders, their manifests, tables."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from bozzetto.common.files import read_json, write_text
from bozzetto.common.images import ContactSheet
from bozzetto.common.staging import LAST
from bozzetto.errors import UsageError
from bozzetto.evaluate.provenance import provenance
from bozzetto.pipeline.results import GeneratedImage, GenerateResult

SHEET, MANIFEST, VECTORS = "sheet.png", LAST, "tokens.npz"
_SHEET_COLUMNS, _LONGEST_NAME, _LISTED = 8, 100, 20  # bytes of a class in a file name; near ties that are listed
_MARK_KEY, _MARK = "Software", "bozzetto"  # in what is written


def check_writable(path: str | Path) -> None:
    """Raise UsageError where a file cannot be written, before the work that would fill it is done."""
    path = Path(path).absolute()
    if path.is_dir():
        raise UsageError(f"{path} is a folder: a file name is wanted")
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {parent} is not a folder that can be written to")


def plain(content: Any) -> Any:
    """As JSON has it: dataclasses as mappings, tuples as lists, and null for numbers that are not finite."""
    if is_dataclass(content) and not isinstance(content, type):
        content = asdict(content)
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_report(path: str | Path, report: dict[str, Any], indent: int = 2) -> None:
    """Write results as JSON, whole or not at all. Raises OSError naming the file."""
    try:
        write_text(path, json.dumps(plain(report), indent=indent, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class RunWriter:
    """Writes a run into a folder image by image, so that none has to be kept: pictures, contact sheet, manifest.json,
    and continuous tokens as tokens.npz, one float32 array [N, D] by file name.

    count: images to come; size: of a picture; undecoded, codes: why there are tokens and no pictures, and from tokens
    int64 [1, N] to codes [1, rows, columns], which then lie in tokens.npz. As a context it closes its files. Raises
    OSError naming the file that does not fit."""

    def __init__(
        self,
        folder: Path,
        count: int,
        size: tuple[int, int],
        undecoded: str = "",
        codes: Callable[[Tensor], Tensor] | None = None,
    ):
        self.undecoded, self.codes = undecoded, codes
        self.folder, self.ties, self.near = folder, 0, list[int]()
        self.sheet = ContactSheet(count, size, _SHEET_COLUMNS, captions=True)
        self.files = contextlib.ExitStack()
        self.vectors: zipfile.ZipFile | None = None
        self.text = self.files.enter_context((folder / MANIFEST).open("w", encoding="utf-8"))
        self.text.write('{\n "images": [')

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with contextlib.suppress(*(() if kind is None else (OSError,))):  # what has gone wrong already is told
            self.files.close()

    def add(self, image: GeneratedImage) -> None:
        """Write one image, in order."""
        _write(self.folder / file_name(image.index, image.class_name), _png(image.image))
        if image.tokens.ndim > 1:
            self._add_array(image, image.tokens)
        elif self.undecoded and self.codes is not None:
            self._add_array(image, self.codes(image.tokens[None])[0])
        first = "" if self.sheet.count == 0 else ","
        self.sheet.add(image.image, f"{image.index} {image.class_name}")
        with _named(self.folder / MANIFEST):
            self.text.write(f"{first}\n  {{\n{_members(_entry(image), 3, 3)}\n  }}")
        if image.near_tie:
            self.ties += 1
            self.near += [image.index] if len(self.near) < _LISTED else []

    def _add_array(self, image: GeneratedImage, tokens: Tensor) -> None:
        if self.vectors is None:
            self.vectors = self.files.enter_context(zipfile.ZipFile(self.folder / VECTORS, "w"))
            self.vectors.comment = _MARK.encode()
        content = io.BytesIO()
        np.save(content, tokens.numpy())
        with _named(self.folder / VECTORS):
            self.vectors.writestr(f"{file_name(image.index, image.class_name)}.npy", content.getvalue())

    def finish(
        self, result: GenerateResult, settings: Mapping[str, object], sampling: Mapping[str, object] | None = None
    ) -> None:
        """Write what is known in the end. `settings` are added to those the result knows; sampling: see
        Pipeline.sampling."""
        own = {**result.settings.plain(), "window": result.windows[0], "windows": result.windows}
        figures = {name: getattr(result, name) for name in ("tokens_per_pass", "seconds", "head_calls", "head_rows")}
        used = {} if sampling is None else {"sampling": dict(sampling)}
        content = {**figures, "settings": {**own, **settings}, **used, **provenance()}
        _write(self.folder / SHEET, _png(self.sheet.picture))
        with _named(self.folder / MANIFEST):
            self.text.write(f"\n ],\n{_members(plain(content), 1, 2)}\n}}\n")
            self.text.flush()
            os.fsync(self.text.fileno())
            self.files.close()

    def summary(self, result: GenerateResult, out: Path) -> str:
        """What to tell about a run that has moved to `out`."""
        seconds, sheet = result.seconds["total"], self.sheet
        first = "" if sheet.shown >= result.count else f" (the first {sheet.shown})"
        text = f"{result.count} images, {result.tokens_per_pass:.2f} tokens per pass, {seconds:.1f} s\n"
        text += f"contact sheet: {out / SHEET}{first}"
        if self.undecoded:
            text += f"\nnote: these are maps of tokens and no pictures ({self.undecoded}); "
            text += f"their codes, [rows, columns] by file name: {out / VECTORS}"
        if self.ties:
            more = f" and {self.ties - len(self.near)} more" * (self.ties > len(self.near))
            text += f"\nnote: images {', '.join(map(str, self.near))}{more} hold a choice that another batch or window "
            text += "may turn: it was within float rounding of another one"
        return text


def _entry(image: GeneratedImage) -> dict[str, Any]:
    """What manifest.json says of an image. A margin is null where it was not measured (continuous tokens, greedy
    relaxed rules) or where no second candidate had any probability; so is any figure that is not finite."""
    tokens: dict[str, Any] = {"tokens": image.tokens.tolist()}
    if image.tokens.ndim > 1:  # continuous tokens lie in a file of their own
        tokens = {"distance_mean": image.moved, "distance_max": image.farthest, "tokens": VECTORS}
    content = {
        "file": file_name(image.index, image.class_name),
        "class": image.class_name,
        **({"prompt": image.prompt} if image.prompt not in ("", image.class_name) else {}),
        "seed": image.seed,
        "index": image.index,
        "sha256": image.sha256,
        "target_passes": image.target_passes,
        "accepted": image.accepted,
        "drafted": image.drafted,
        "margin": image.margin,
        "near_tie": image.near_tie,
        "tv_spent": image.spent,
        "trace": vars(image.trace),
        **tokens,
    }
    entry: dict[str, Any] = plain(content)
    return entry


def _members(content: Mapping[str, Any], depth: int, deepest: int) -> str:
    """A mapping's members as JSON, one on a line and lists on one, so that the file stays readable."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and value and depth < deepest:
            text = f"{{\n{_members(value, depth + 1, deepest)}\n{' ' * depth}}}"
        else:
            text = json.dumps(value, allow_nan=False)
        lines.append(f"{' ' * depth}{json.dumps(key)}: {text}")
    return ",\n".join(lines)


def file_name(index: int, class_name: str) -> str:
    """IIIIII-CLASS.png; whatever a file name should not hold becomes a dash, and a long name is cut, for file systems
    take 255 bytes at most (encrypted ones 143), of which a letter may need four."""
    safe = re.sub(r"[^\w]+", "-", class_name).encode()[:_LONGEST_NAME].decode(errors="ignore").strip("-")
    return f"{index:06d}-{safe}.png" if safe else f"{index:06d}.png"


def check_free(out: Path, count: int, class_names: Sequence[str], first: int = 0) -> None:
    """Raise UsageError where a folder holds something under a name that a run of images first..first + count - 1 needs
    and that no run has written: asked before anything is drawn. class_names: taken in turn, by index."""
    ours = written_before(out)
    for path in out.iterdir() if out.is_dir() else ():
        found = re.fullmatch(r"(\d{6,18})(-.*)?\.png", path.name)
        index = int(found[1]) - first if found else -1
        wanted = 0 <= index < count and path.name == file_name(index, class_names[index % len(class_names)])
        if (wanted or path.name in (SHEET, MANIFEST, VECTORS)) and not ours(path):
            raise UsageError(
                f"out = {str(out)!r} is not allowed: {path.name} in it was not written by generate and would be "
                "replaced (move it away, or choose another folder)"
            )


def written_before(out: Path) -> Callable[[Path], bool]:
    """Which files of a folder an earlier run wrote: they carry a mark, or its manifest.json lists them."""

    def listed() -> set[str]:
        try:
            images = read_json(out / MANIFEST)["images"]
            return {SHEET, VECTORS, *(str(image["file"]) for image in images)}
        except (UsageError, LookupError, TypeError):
            return set()

    names = functools.cache(listed)

    def ours(path: Path) -> bool:
        if path.is_symlink() or not path.is_file():
            return False
        if path.name == MANIFEST:
            with open(path, "rb") as f:
                return f.read(64).startswith(b'{\n "images": [')
        return _marked(path) or path.name in names()

    return ours


def _marked(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError):
        if path.suffix == ".png":
            with Image.open(path) as picture:
                return picture.info.get(_MARK_KEY) == _MARK
        with zipfile.ZipFile(path) as archive:
            return archive.comment == _MARK.encode()
    return False


def _png(image: Image.Image) -> bytes:
    # Encoded in memory, so that a full disk is reported as such and not as an encoder error.
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text(_MARK_KEY, _MARK)
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    with _named(path), open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error says which file it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path.name} ({error.strerror})", str(path.parent)) from error
