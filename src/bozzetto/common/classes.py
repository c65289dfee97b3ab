"""Classes by name and by number. Several may have one name (ImageNet has two cranes): then only numbers tell them
apart, and stand in brackets behind the name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bozzetto.errors import UsageError

_LISTED = 20  # names of classes in an error
_DIGITS = 18  # of a number of a class, at most


def distinct(names: Sequence[str]) -> list[str]:
    """The names, those of several classes with the number behind: crane (134)."""
    often = Counter(names)
    return [f"{name} ({i})" if often[name] > 1 else name for i, name in enumerate(names)]


def class_named(names: Sequence[str], text: str) -> int | None:
    """The class called so; None where there is none. The name as it is written wins over other capitals. Raises
    UsageError where several are called so."""
    text = text.strip()
    bare = [name.removesuffix(f" ({i})") for i, name in enumerate(names)]
    full = [f"{name} ({i})" for i, name in enumerate(bare)]
    ways: list[tuple[str, Sequence[str]]] = [(text, names), (text, full), (text, bare)]
    ways += [(text.casefold(), [name.casefold() for name in have]) for have in (full, bare)]
    for wanted, have in ways:
        found = [i for i, name in enumerate(have) if name == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            numbers = " and ".join(map(str, found))
            better = " or ".join(repr(names[i] if names.count(names[i]) == 1 else full[i]) for i in found)
            raise UsageError(f"class {text!r} is {numbers}: give the number, or {better}")
    return None


def labels_of(names: Sequence[str], classes: Sequence[str | int]) -> list[int]:
    """Class names or numbers -> labels; none given: all in turn. A text is a name before it is a number. Raises
    UsageError naming the value and the classes."""
    return [_label(names, item) for item in classes] or list(range(len(names)))


def _label(names: Sequence[str], item: str | int) -> int:
    text = str(item).strip()
    named = class_named(names, item) if isinstance(item, str) else None
    if named is not None:
        return named
    if text.isdecimal() and len(text) <= _DIGITS and int(text) < len(names):
        return int(text)
    some = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    raise UsageError(f"unknown class {item!r} (allowed: {some} or 0-{len(names) - 1})")


def note_on_doubles(names: Sequence[str]) -> str:
    """What there is to say about names of several classes; empty where there are none."""
    often = Counter(names)
    lines = []
    for name in (name for name, count in often.items() if count > 1):
        numbers = [str(i) for i, other in enumerate(names) if other == name]
        lines.append(f"{name!r} is classes {' and '.join(numbers)}: ask for the number, or '{name} ({numbers[0]})'")
    return "".join(f"\nnote: {line}" for line in lines)
