"""What the command line leaves behind: run folders that appear whole or not at all, manifests, tables."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from bozzetto.errors import UsageError
from bozzetto.images import contact_sheet
from bozzetto.models.store import CONFIG, WEIGHTS, read_config
from bozzetto.pipeline import ASSETS, GeneratedImage, GenerateResult
from bozzetto.provenance import provenance

SHEET, MANIFEST, VECTORS = "sheet.png", "manifest.json", "tokens.npz"
_SHEET_COLUMNS = 8


@contextlib.contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """Give a hidden folder to write into; when the block ends well its files move to `out`, otherwise it vanishes.

    An existing `out` keeps its other files, files of the same names are replaced, all or none of them. A missing `out`
    (and its missing parents) appears only on success. Raises UsageError where `out` cannot be a folder.
    """
    out = Path(out).absolute()
    missing = [p for p in (out, *out.parents) if not p.exists()]
    blocker = next(p for p in (out, *out.parents) if p.exists())
    if not blocker.is_dir():
        raise UsageError(f"out = {str(out)!r} is not allowed: {blocker} is a file, a folder is wanted")
    mark = secrets.token_hex(4)
    staging = out / f".bozzetto-{mark}" if out.is_dir() else out.parent / f".{out.name}-{mark}"
    try:
        staging.mkdir(parents=True)
        yield staging
        if out.is_dir():
            _move_all(staging, out)
            shutil.rmtree(staging, ignore_errors=True)  # the replaced files
        else:
            os.rename(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in missing[1:]:  # nearest first; a parent that someone else filled stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _move_all(staging: Path, out: Path) -> None:
    """Move every file of `staging` into `out`, keeping what is replaced until all have moved; undo on failure."""
    names = sorted(p.name for p in staging.iterdir())
    old, undo = staging / "replaced", []
    old.mkdir()
    try:
        for name in names:
            if (out / name).exists():
                undo.append((old / name, out / name))
                os.replace(out / name, old / name)
            undo.append((out / name, staging / name))
            os.replace(staging / name, out / name)
    except BaseException:
        for source, target in reversed(undo):
            with contextlib.suppress(FileNotFoundError):
                os.replace(source, target)
        raise


def check_writable(path: str | Path) -> None:
    """Raise UsageError where a file cannot be written, before the work that would fill it is done."""
    path = Path(path).absolute()
    if path.is_dir():
        raise UsageError(f"{path} is a folder: a file name is wanted")
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {parent} is not a folder that can be written to")


def write_run(folder: Path, result: GenerateResult, settings: Mapping[str, object]) -> None:
    """Write the images, their contact sheet and manifest.json, and continuous tokens as tokens.npz, one float32 array
    [N, D] by file name. Raises OSError naming the file that does not fit."""
    for image in result.images:
        _write(folder / file_name(image), _png(image.image))
    pixels = np.stack([np.asarray(i.image) for i in result.images])
    captions = [f"{i.index} {i.class_name}" for i in result.images]
    _write(folder / SHEET, _png(contact_sheet(pixels, _SHEET_COLUMNS, captions)))
    if result.images[0].tokens.ndim > 1:
        buffer = io.BytesIO()
        np.savez(buffer, **{file_name(i): i.tokens.numpy() for i in result.images})  # type: ignore[arg-type]
        _write(folder / VECTORS, buffer.getvalue())
    text = json.dumps(manifest(result, settings), indent=1, allow_nan=False)
    # Lists of tokens on one line each: the file stays readable.
    text = re.sub(r"\[[-+\s\d.,e]+\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    _write(folder / MANIFEST, text.encode() + b"\n")


def manifest(result: GenerateResult, settings: Mapping[str, object]) -> dict[str, Any]:
    """The content of manifest.json. `settings` are added to those the result knows.

    A margin is null where it was not measured (rule exact) or where no second candidate had any probability.
    """
    return {
        "images": [_entry(image) for image in result.images],
        "tokens_per_pass": result.tokens_per_pass,
        "seconds": result.seconds,
        "head_calls": result.head_calls,
        "head_rows": result.head_rows,
        "settings": {
            **vars(result.settings),
            "window": result.windows[0],
            "windows": result.windows,
            **settings,
        },
        **provenance(),
    }


def _entry(image: GeneratedImage) -> dict[str, Any]:
    finite = image.margin is not None and math.isfinite(image.margin)
    return {
        "file": file_name(image),
        "class": image.class_name,
        "seed": image.seed,
        "index": image.index,
        "sha256": image.sha256,
        "target_passes": image.target_passes,
        "accepted": image.accepted,
        "drafted": image.drafted,
        "margin": image.margin if finite else None,
        "near_tie": bool(image.near_tie),
        "tv_spent": image.spent,
        "trace": vars(image.trace),
        **({"tokens": image.tokens.tolist()} if image.tokens.ndim == 1 else _vectors(image)),
    }


def _vectors(image: GeneratedImage) -> dict[str, Any]:
    """Continuous tokens lie in a file of their own."""
    return {"distance_mean": image.moved, "distance_max": image.farthest, "tokens": VECTORS}


def file_name(image: GeneratedImage) -> str:
    """IIIIII-CLASS.png; whatever a file name should not hold becomes a dash."""
    safe = re.sub(r"[^\w]+", "-", image.class_name).strip("-") or str(image.label)
    return f"{image.index:06d}-{safe}.png"


def _png(image: Image.Image) -> bytes:
    # Encoded in memory, so that a full disk is reported as such and not as an encoder error.
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        with open(path, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path.name} ({error.strerror})", str(path.parent)) from error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; cells that read as numbers stand to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [bool(rows) and all(re.match(r"[-+\d]", row[i]) for row in rows) for i in range(len(header))]
    texts = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in texts)


def list_models(folder: str | Path | None) -> str:
    """A table of the models shipped (None), or of `folder` and the folders right below it."""
    root = ASSETS if folder is None else Path(folder)
    if folder is not None and not root.is_dir():
        raise UsageError(f"folder {str(folder)!r} not found (allowed: a model folder, or one that holds model folders)")
    found = [p.parent for p in [root / CONFIG, *sorted(root.glob(f"*/{CONFIG}"))] if p.is_file()]
    if not found:
        return f"no models found in {root}"
    header = ("name", "family", "parameters", "image", "tokens", "classes", "where")
    return table(header, [_describe(path) for path in found])


def _describe(folder: Path) -> tuple[str, ...]:
    """One row of the table; a folder that cannot be read says so in place of its figures."""
    try:
        content = read_config(folder)
        config, family = content.get("config", {}), str(content.get("family", "?"))
        with safe_open(folder / WEIGHTS, framework="pt") as f:
            names = [key for key in f.keys() if not key.endswith(".scale")]  # noqa: SIM118  (not a dict)
            parameters = sum(math.prod(f.get_slice(key).get_shape()) for key in names)
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        size, tokens = tokenizer["config"]["image_size"], config["grid"] ** 2
        figures = (f"{parameters / 1e6:.2f} M", f"{size}x{size}", str(tokens), str(config["classes"]))
        return (str(content.get("name", folder.name)), family, *figures, str(folder))
    except (UsageError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return (folder.name, "unreadable", "-", "-", "-", "-", f"{folder} ({error})")
