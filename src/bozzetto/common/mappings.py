"""YAML files of settings: mappings read strictly, and what pydantic finds wrong with them in one line."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from bozzetto.errors import UsageError

R = TypeVar("R")
_MOST_BYTES, _MOST_KEYS = 2**20, 1000
_SHOWN = reprlib.Repr()  # aliases may make a short file's content endless
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 200, 200


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


def checked_as(kind: type[R], content: dict[str, Any], path: Path) -> Any:
    """The content as this dataclass. Raises UsageError naming the file, the key, its value and what is allowed."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error, kind)}") from error


def _explain(error: ValidationError, kind: type) -> str:
    allowed = ", ".join(f.name for f in fields(kind))
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            lines.append(f"unknown key {key!r} (allowed: {allowed})")
        elif item["type"] in {"missing", "missing_argument"}:
            lines.append(f"missing key {key!r}")
        elif item["type"] == "value_error":  # a check of ours, which names what it is about
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{key} = {_SHOWN.repr(item['input'])} is not allowed: {item['msg']}")
    return "; ".join(lines)
