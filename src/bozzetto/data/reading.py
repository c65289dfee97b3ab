"""Pictures of a parquet file or of a folder, held in memory as uint8; captions in the same order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bozzetto.common.terminal import note
from bozzetto.data.folders import folder_source, visible_files
from bozzetto.data.pixels import formats, square, suffixes
from bozzetto.data.rows import Row, Source, classes_of, of_split, same_split
from bozzetto.data.shards import parquet_source
from bozzetto.errors import UsageError


@dataclass
class ImageSet:
    """Images of one size. images: uint8 [N, H, W, 3]; labels: int64 [N]; classes: names by label; enlarged: how
    many of the files held smaller squares."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    enlarged: int = 0

    def __len__(self) -> int:
        return len(self.images)


def _source(path: Path) -> Source:
    """What is found at a path. Raises UsageError where that is nothing, or two things."""
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"data file not found: {path}")
        return parquet_source(path, [path])
    files, hidden = visible_files(path)
    shards = [file for file in files if file.suffix == ".parquet"]
    pictures = next((file for file in files if file.suffix.lower() in suffixes()), None)
    if shards and pictures:
        raise UsageError(f"{path} holds both {shards[0].name} and {pictures.name} (allowed: parquet files or pictures)")
    if not shards and not pictures:
        raise UsageError(f"no images ({', '.join(formats())}) and no parquet files below {path}")
    return parquet_source(path, shards) if shards else folder_source(path, files, hidden)


def _rows(path: Path, split: str | None) -> tuple[Source, list[Row], Counter[str]]:
    """The rows of a split whose classes are known (all where none is), and counts of what is left out."""
    source = _source(path)
    rows = of_split(source, split)
    chosen = [row for row in rows if row.label is not None] or rows
    left_out = Counter(
        kind for part, kind in source.left_out if part is None or split is None or same_split(part, split)
    )
    left_out.update({"pictures without a class": len(rows) - len(chosen)})
    left_out.update({"rows without a split": split is not None and sum(row.split is None for row in source.rows)})
    return source, chosen, left_out


def read_images(path: str | Path, split: str | None, size: int | tuple[int, int] = 160) -> ImageSet:
    """Pictures of a parquet file, of a folder of parquet files or of a folder of pictures, as squares of `size` or in
    another shape (width, height); split: None reads all. What is left out is said in one line on stderr.

    Raises UsageError for data that are not there, cannot be read or lack the split; the file is named.
    """
    path = Path(path)
    source, rows, left_out = _rows(path, split)
    width, height = (size, size) if isinstance(size, int) else size
    images, notes = _room(path, len(rows), width, height), Counter[str]()
    smaller = f"smaller than {width} x {height}, enlarged"
    kept: list[Row] = []
    for row, raw in zip(rows, source.raw(rows), strict=True):
        if raw is None:
            left_out["rows without a picture"] += 1
            continue
        images[len(kept)], side, unusable = square(raw, size, row.where)
        kept.append(row)
        notes[smaller] += side < width
        notes["with a colour profile that cannot be used, read without it"] += unusable
    if not kept:
        raise UsageError(f"{path}: no pictures" + (f" of split {split!r}" if split else ""))
    labels, classes = classes_of(kept, source.names)
    _say(path, split, len(kept), left_out, notes)
    return ImageSet(images[: len(kept)], labels, classes, notes[smaller])


def _room(path: Path, count: int, width: int, height: int) -> np.ndarray:
    try:
        return np.empty((count, height, width, 3), np.uint8)
    except (MemoryError, ValueError) as error:
        raise UsageError(f"{path}: {count} pictures of {width} x {height} do not fit into memory") from error


def _say(path: Path, split: str | None, count: int, left_out: Counter[str], notes: Counter[str]) -> None:
    """One line on what was passed over and what was changed, if anything was."""
    parts = [f"{n} {kind}" for kind, n in notes.items() if n]
    if any(left_out.values()):
        parts.append("left out: " + ", ".join(f"{kind} ({n})" for kind, n in sorted(left_out.items()) if n))
    if parts:
        name = f"{path}, {split}" if split else str(path)
        note(f"{name}: {count} pictures; {'; '.join(parts)}")


def read_captions(path: str | Path, split: str | None) -> list[tuple[str, str]]:
    """(caption, style) of the pictures that `read_images` reads, in its order; without a style: "".

    Raises UsageError as `read_images` does, and for a picture without a caption.
    """
    path = Path(path)
    source, rows, _ = _rows(path, split)
    found = []
    for row, raw in zip(rows, source.raw(rows), strict=True):
        if raw is None:
            continue
        if row.caption is None:
            raise UsageError(
                f"{row.where} has no caption (allowed: a text in a column caption or text of a parquet file, or of a "
                "metadata.csv or metadata.jsonl with file_name; or a .txt file beside each picture)"
            )
        found.append((row.caption, row.style))
    return found
