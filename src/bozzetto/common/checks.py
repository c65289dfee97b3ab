"""Types and ranges of what configurations may say, and the way from a mapping in a file to a config dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from bozzetto.errors import UsageError

# The largest values are well above any published model's: what is beyond them is a mistake and would cost memory.
Size = Annotated[int, Field(ge=1, le=2**24)]  # channels, codes, inputs
Count = Annotated[int, Field(ge=0, le=2**24)]  # what there may be none of
Layers = Annotated[int, Field(ge=1, le=1024)]
Grid = Annotated[int, Field(ge=1, le=128)]  # tokens a side
Pixels = Annotated[int, Field(ge=1, le=4096)]
Steps = Annotated[int, Field(ge=1, le=100_000)]
Base = Annotated[float, Field(ge=1, le=1e9)]  # of rotary positions
Epsilon = Annotated[float, Field(gt=0, le=1)]
Levels = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=8)]


def config_from(kind: type, values: object, source: str | Path) -> Any:
    """Build the config dataclass `kind` from a JSON mapping of the file `source`, every value checked for its type (no
    text for a number, no fraction for a count) and range.

    Raises UsageError naming the file, the key, the value and what is allowed.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{source}: `config` must be a mapping, found {type(values).__name__}")
    allowed = [f.name for f in dataclasses.fields(kind)]
    if unknown := sorted(set(values) - set(allowed)):
        raise UsageError(f"{source}: unknown config key {clipped(unknown[0])} (allowed: {', '.join(allowed)})")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)  # JSON's arrays may be our tuples
    except ValidationError as error:
        raise UsageError(f"{source}: " + "; ".join(_said(item) for item in error.errors()[:4])) from error


def _said(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"missing config key {where!r}"
    message = item["msg"].removeprefix("Value error, ")  # of a dataclass that looks at several values together
    return f"{where} = {clipped(item['input'])} is not allowed: {message}" if where else message


@contextlib.contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """What is wrong inside is said with the file that it comes from."""
    try:
        yield
    except UsageError as error:
        known = str(error).startswith(str(source))
        raise UsageError(str(error) if known else f"{source}: {error}") from error


def clipped(value: object, most: int = 80) -> str:
    """A value as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
