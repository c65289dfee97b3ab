"""Folders of pictures: splits and classes by sub-folder, captions by metadata files or a text beside each picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bozzetto.data.pixels import suffixes
from bozzetto.data.rows import UNCLASSED, Row, Source, split_named
from bozzetto.errors import UsageError

METADATA = ("metadata.csv", "metadata.jsonl")
_TEXTS = {".csv", ".json", ".jsonl", ".md", ".txt", ".yaml", ".yml"}  # nobody expects pictures there
_JUNK = "__MACOSX"  # what macOS adds to archives

Parts = tuple[str, ...]


def visible_files(root: Path) -> tuple[list[Path], list[tuple[Parts, str]]]:
    """Files below a folder, sorted, links followed; and what is hidden: the parts of its path and its kind."""
    files, hidden = [], []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        real = os.path.realpath(folder)
        for name in list(folders):
            link = os.path.realpath(here / name)
            if name.startswith(".") or name == _JUNK:
                hidden.append(((*here.relative_to(root).parts, name), "hidden folders"))
            elif real != link and not real.startswith(link + os.sep):  # not a way back up
                continue
            folders.remove(name)
        for name in names:
            if not name.startswith("."):
                files.append(here / name)
            elif Path(name).suffix.lower() in suffixes():
                hidden.append(((*here.relative_to(root).parts, name), "hidden files"))
    return sorted(files), hidden


def folder_source(root: Path, files: Sequence[Path], hidden: Sequence[tuple[Parts, str]]) -> Source:
    """The pictures among the visible files of a folder.

    Raises UsageError for a metadata file that cannot be read or names what is not there.
    """
    parts = {file: file.relative_to(root).parts for file in files}
    pictures = [file for file in files if file.suffix.lower() in suffixes()]
    level = _split_level([parts[file] for file in pictures])
    left_out = [(_split_of(p, level), kind) for p, kind in hidden]
    left_out += [(_split_of(parts[file], level), f"{file.suffix} files") for file in files if _strange(file)]
    classes, told = _folder_classes({file: parts[file] for file in pictures}, level), _told(files, set(pictures))
    classed = any(classes.values())
    rows = []
    for file in pictures:
        own, split = told[file], _split_of(parts[file], level)
        label = own.get("label") or classes[file]
        if level is not None and split is None:
            left_out.append((None, "pictures beside the folders of splits"))
        elif classed and not label and "caption" not in own:
            left_out.append((split, "pictures beside the folders of classes"))
        else:
            known = label or (UNCLASSED if classed else None)
            rows.append(Row(str(file), (file, 0), split, known, None, own.get("caption"), own.get("style", "")))
    return Source(root, rows, lambda wanted: (_bytes(row.at[0]) for row in wanted), None, left_out)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:  # a link to nothing, for one
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error


def _strange(file: Path) -> bool:
    """Whether somebody may take a file for a picture that is not read."""
    suffix = file.suffix.lower()
    return bool(suffix) and suffix not in suffixes() and suffix not in _TEXTS


def _split_level(pictures: Sequence[Parts]) -> int | None:
    """Which folder on the way to every picture is named after its split: the first (two different ones suffice, among
    others), or the second (`rose/train`)."""
    first = {p[0] for p in pictures if len(p) > 1}
    meant = {split_named(name) for name in first}
    if first and (None not in meant or len(meant) > 2):
        return 0
    second = {p[1] if len(p) > 2 else "" for p in pictures}
    return 1 if second and all(map(split_named, second)) else None


def _split_of(parts: Parts, level: int | None) -> str | None:
    return parts[level] if level is not None and len(parts) > level + 1 else None


def _folder_classes(pictures: dict[Path, Parts], level: int | None) -> dict[Path, str]:
    """Class by picture: its folders, without the split and without those that all pictures share ("": no folder)."""
    folders = {f: tuple(p for i, p in enumerate(parts[:-1]) if i != level) for f, parts in pictures.items()}
    deep = [f for f in folders.values() if f]
    least = min(map(len, deep), default=1) - 1
    shared = next((n for n in range(least) if len({f[n] for f in deep}) > 1), least)
    return {file: "/".join(f[shared:]) for file, f in folders.items()}


def _told(files: Sequence[Path], pictures: set[Path]) -> dict[Path, dict[str, str]]:
    """Caption, label and style by picture, as far as metadata files or texts of the picture's name say them."""
    there, told = set(files), {}
    for file in pictures:
        beside = file.with_suffix(".txt")
        told[file] = {"caption": _text(beside).strip()} if beside in there else {}
    for file in files:
        if file.name not in METADATA:
            continue
        for line, row in _table(file):
            named = row.get("file_name")
            if not isinstance(named, str) or (picture := Path(os.path.normpath(file.parent / named))) not in pictures:
                raise UsageError(f"{file}, row {line}: file_name = {named!r} is no picture there")
            row["caption"] = row.get("caption", row.get("text"))
            told[picture] |= {k: str(row[k]) for k in ("caption", "label", "style") if row.get(k) not in (None, "")}
    return told


def _table(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a metadata file."""
    text = _text(file)
    try:
        if file.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text)), 1)
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, dict(json.loads(line))
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise UsageError(f"{file}: not readable ({error})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not readable as UTF-8 ({error})") from error
