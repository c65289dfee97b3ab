"""Packages that only some of the work needs: who lacks one is told which extra brings it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bozzetto.errors import UsageError


def lacking(need: str, package: str, extra: str) -> UsageError:
    """The error of a package that is not there. need: who needs it, "the report needs"; extra: of ours that has it."""
    return UsageError(f"{need} {package}, which is not installed: pip install 'bozzetto[{extra}]'")


@contextlib.contextmanager
def needed(need: str, extra: str, *packages: str) -> Iterator[None]:
    """One of these packages that cannot be imported within the block is an error as of `lacking`; others stay as they
    are."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        raise lacking(need, package, extra) from error
