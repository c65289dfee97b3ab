"""Errors that a user can act on."""

from numbers import Real
from typing import Any

_LONGEST = 60  # characters of a value in a message


class UsageError(ValueError):
    """Bad input: the message names the value and what is allowed. The command line exits with code 2."""


def brief(value: object, most: int = _LONGEST) -> str:
    """A value as a message shows it: what is longer than `most` is cut. (Python refuses to write whole numbers of more
    than 4,300 digits out.)"""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def one_line(error: Exception, most: int = 300) -> str:
    """What an exception of another library says, in one line that is cut; its name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def require(fine: object, name: str, value: object, allowed: str) -> None:
    """Raise UsageError `NAME = VALUE is not allowed: ALLOWED` unless it is fine."""
    if not fine:
        raise UsageError(f"{name} = {brief(value)} is not allowed: {allowed}")


def check_number(
    name: str, value: object, low: float, high: float, allowed: str = "", whole: bool = False, above: bool = False
) -> None:
    """Raise UsageError for anything but a number, finite or not, from low (above: not low itself) to high. whole: and a
    whole one; allowed: what is said of that, if not its two ends."""
    number: Any = value if isinstance(value, Real) else float("nan")
    fine = (low < number if above else low <= number) and number <= high and not (whole and number % 1)
    require(fine, name, value, allowed or f"a {'whole ' if whole else ''}number from {low} to {high}")


def check_text(name: str, value: object) -> None:
    """Raise UsageError for anything but a text that can be written as UTF-8."""
    try:
        fine = isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        fine = False
    require(fine, name, value, "a text (UTF-8)")
