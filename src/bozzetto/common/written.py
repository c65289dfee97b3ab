"""What is written NAME:key=value:key=value: a name, and options that are the fields of a frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from bozzetto.errors import UsageError, brief

T = TypeVar("T")
NO_OPTION = {"option": ""}  # of a field: it is not written; another text: how the option is called


@dataclass(frozen=True)
class Written:
    """written: the text that it was read from ("": none was). Subclasses have a name; their fields are its options."""

    written: str = field(default="", kw_only=True, compare=False, repr=False, metadata=NO_OPTION)

    @property
    def text(self) -> str:
        """As it was written, or as it can be."""
        return self.written or spelled(self)


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """NAME:key=value:... -> name and options, all strings. Raises UsageError for an option without a value."""
    name, *parts = text.split(":")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{text!r}: {part!r} is not allowed: options are written key=value and joined by colons")
        options[key] = value
    return name, options


def _options(kind: Any) -> dict[str, Field[Any]]:
    """Fields of a dataclass that can be written, by how they are called."""
    called = {f.metadata.get("option", f.name): f for f in fields(kind) if f.init}
    return {name: f for name, f in called.items() if name}


def filled(usual: T, text: str, options: Mapping[str, str]) -> T:
    """An options dataclass with what was written (`split_spec`). Raises UsageError naming the option and what is
    allowed."""
    allowed = _options(usual)
    values: dict[str, Any] = {"written": text} if isinstance(usual, Written) else {}
    for key, value in options.items():
        if key not in allowed:
            raise UsageError(f"{text!r}: unknown option {key!r} (allowed: {', '.join(allowed) or 'none'})")
        wanted = {"int": int, "float": float}.get(str(allowed[key].type), str)
        try:
            values[allowed[key].name] = wanted(value)
        except ValueError as error:
            number = "a whole number" if wanted is int else "a number"
            raise UsageError(f"{brief(text)}: {key} = {brief(value)} is not allowed: {number}") from error
    for name, part in allowed.items():
        if part.metadata.get("needed") and part.name not in values:
            raise UsageError(f"{text!r}: option {name!r} is missing")
    return replace(usual, **values)  # type: ignore[type-var]


def spelled(made: Any) -> str:
    """In one spelling: numbers as they are read, and nothing that is left out anyway. (Whoever asks for fresh=2, 02,
    002, ... would else be given batches and files of times without end.)"""
    values = [(key, getattr(made, part.name), part.default) for key, part in _options(made).items()]
    return ":".join([made.name, *(f"{key}={value}" for key, value, usual in values if value != usual)])
