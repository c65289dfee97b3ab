"""What data sets of every layout have in common: rows, one per picture, their splits and their classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bozzetto.errors import UsageError

UNCLASSED = "images"  # the one class of pictures without classes

# As the Hugging Face hub reads names of files and folders.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class Row:
    """A picture that is not read yet. where: names it in errors; at: its file, and its place there; split: as the data
    call it; label: its class as the data have it (None: unknown); name: what they call a numbered class."""

    where: str
    at: tuple[Path, int]
    split: str | None = None
    label: int | str | None = None
    name: str | None = None
    caption: str | None = None
    style: str = ""


@dataclass(frozen=True)
class Source:
    """Data found at `path`. raw: the bytes of rows, in order (None: a row without a picture); names: of numbered
    classes, where the data declare them; left_out: split and kind of what is passed over."""

    path: Path
    rows: list[Row]
    raw: Callable[[Sequence[Row]], Iterator[bytes | None]]
    names: list[str] | None = None
    left_out: list[tuple[str | None, str]] = field(default_factory=list)


def split_named(word: str) -> str | None:
    """train, validation or test, if the word stands for one."""
    return _SPLITS.get(word.lower())


def of_split(source: Source, split: str | None) -> list[Row]:
    """Rows of a split (None: all), by its name in the data or another one of the same meaning.

    Raises UsageError if there are none, naming the splits that exist.
    """
    if split is None:
        return source.rows
    found = {row.split for row in source.rows} - {None}
    if not found:
        raise UsageError(
            f"{source.path} has no splits, split = {split!r} was asked for (allowed: none, for all pictures; or data "
            "with a column `split`, or files or folders named after splits)"
        )
    chosen = [row for row in source.rows if same_split(row.split, split, split in found)]
    if not chosen:
        raise UsageError(f"{source.path}: unknown split {split!r}; found {sorted(map(str, found))}")
    return chosen


def same_split(name: str | None, asked: str, exact: bool = False) -> bool:
    """Whether a row of split `name` is asked for; `val` also gives `validation`, unless it shall be exact."""
    if exact or name is None:
        return name == asked
    return name == asked or (split_named(asked) is not None and split_named(name) == split_named(asked))


def classes_of(rows: Sequence[Row], names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Classes int64 [N] of rows and names by class: the declared ones; else those that occur, in order. Where numbers
    are missing among these, names of several have theirs behind: crane (134).

    Raises UsageError for a label beyond the declared names, and for one with two names.
    """
    if all(row.label is None for row in rows):
        return np.zeros(len(rows), np.int64), [UNCLASSED]
    if names is not None:
        for row in rows:
            if not (isinstance(row.label, int) and row.label < len(names)):
                raise UsageError(f"{row.where}: label {row.label!r} has no name (allowed: 0 to {len(names) - 1})")
        return np.array([row.label for row in rows], np.int64), names
    called: dict[int | str, str] = {}
    for row in rows:
        assert row.label is not None
        name = str(row.label) if row.name is None else row.name
        if called.setdefault(row.label, name) != name:
            raise UsageError(f"{row.where}: label {row.label!r} is called {called[row.label]!r} and {name!r}")
    if len({type(label) for label in called}) > 1:
        raise UsageError(f"{rows[0].where} and others: some labels are numbers, some are words")
    order = {label: i for i, label in enumerate(sorted(called))}  # type: ignore[type-var]
    found = [called[label] for label in order]
    if list(order) != list(range(len(order))):
        often = Counter(found)
        found = [f"{name} ({label})" if often[name] > 1 else name for name, label in zip(found, order, strict=True)]
    return np.array([order[row.label] for row in rows], np.int64), found  # type: ignore[index]
