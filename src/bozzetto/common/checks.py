"""Types and ranges of what configurations may say, and the way from a mapping in a JSON or YAML file to a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from bozzetto.errors import UsageError, brief

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
_MOST_BYTES, _MOST_KEYS = 2**20, 1000
_reader = functools.cache(TypeAdapter)  # to make one takes longer than to use it
_SHOWN = reprlib.Repr()  # aliases may make a short file's content endless
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 200, 200


def config_from(kind: type, values: object, source: str | Path) -> Any:
    """Build the config dataclass `kind` from a JSON mapping of the file `source`, every value checked for its type (no
    text for a number, no fraction for a count) and range.

    Raises UsageError naming the file, the key, the value and what is allowed.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{source}: `config` must be a mapping, found {type(values).__name__}")
    allowed = [f.name for f in dataclasses.fields(kind)]
    if unknown := sorted(set(values) - set(allowed)):
        raise UsageError(f"{source}: unknown config key {brief(unknown[0])} (allowed: {', '.join(allowed)})")
    try:
        return _reader(kind).validate_json(json.dumps(values), strict=True)  # JSON's arrays may be our tuples
    except ValidationError as error:
        raise UsageError(f"{source}: {_said(error.errors()[:4], kind, 'config key')}") from error


@contextlib.contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """What is wrong inside is said with the file that it comes from."""
    try:
        yield
    except UsageError as error:
        known = str(error).startswith(str(source))
        raise UsageError(str(error) if known else f"{source}: {error}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses keys given twice (PyYAML 6 takes the last one) and merges that grow without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if not hasattr(node, "flat"):  # an aliased one comes by more than once, with what was merged into it
            own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in own if own.count(key) > 1), None):
                raise yaml.YAMLError(f"key {twice!r} stands there twice")
        super().flatten_mapping(node)
        node.flat = True  # type: ignore[attr-defined]
        if len(node.value) > _MOST_KEYS:
            raise yaml.YAMLError(f"a mapping of more than {_MOST_KEYS} keys")


def read_mapping(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping that a YAML (or JSON) file holds. Raises UsageError naming the file, and `what` was wanted, for
    anything else."""
    if not path.is_file():
        raise UsageError(f"{what} not found: {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes are no {what} (allowed: {_MOST_BYTES})")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # a SafeLoader
    except RecursionError:
        raise UsageError(f"{path}: not valid YAML here: nested too deep") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # also dates that are none, and keys that are lists
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a {what} is a mapping of keys to values, not {type(content).__name__}")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise UsageError(f"{path}: key {odd[0]!r} is not allowed: keys are words")
    return content


def checked_as(kind: type, content: dict[str, Any], path: Path) -> Any:
    """The content as this dataclass. Raises UsageError naming the file, the key, its value and what is allowed."""
    try:
        return _reader(kind).validate_python(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {_said(error.errors(), kind, 'key')}") from error


def _said(problems: Iterable[Any], kind: type, what: str) -> str:
    """What pydantic finds wrong with a mapping, in one line. what: its keys are called."""
    allowed, lines = ", ".join(f.name for f in dataclasses.fields(kind)), []
    for item in problems:
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            lines.append(f"unknown {what} {where!r} (allowed: {allowed})")
        elif item["type"] in {"missing", "missing_argument"}:
            lines.append(f"missing {what} {where!r}")
        elif item["type"] == "value_error":  # a check of ours, which names what it is about
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{where or 'recipe'} = {_SHOWN.repr(item['input'])} is not allowed: {item['msg']}")
    return "; ".join(lines)
