"""Lines for whoever watches a command, beside what it prints."""

from __future__ import annotations

import sys


def note(line: str) -> None:
    """Write a line to stderr, at once."""
    print(line, file=sys.stderr, flush=True)
