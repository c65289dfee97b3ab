"""Columns of figures, each declared once: how printed tables show a figure, what the report's page calls it, and for
picture quality how it is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BARE, SEQUENTIAL = "bare", "none"  # the loop of passes alone, and sequential decoding
PHOTOGRAPHS, RECONSTRUCTIONS = "photographs", "reconstructions"
# Rows of an evaluation that are no decoding methods: what they are, in words.
YARDSTICKS = {
    PHOTOGRAPHS: "real photographs of the other split",
    RECONSTRUCTIONS: "the same photographs through the tokenizer and back",
}
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Column:
    """A figure in rows of results. key: its name in a row and in JSON files; heading: of printed tables; words: of the
    report's tables ("": not there); digits: decimals in print (None: text, or a number as it is); sign: show + too;
    scale: factor of what is shown; unit: printed behind it, % makes hundredths of it; interval: whether print shows the
    range around it; measure: makes it of a `metrics.Comparison`; joined: whether suites show it beside speed."""

    key: str
    heading: str
    words: str = ""
    digits: int | None = 2
    sign: bool = False
    scale: float = 1
    unit: str = ""
    interval: bool = True
    measure: Callable[[Any], Any] | None = None
    joined: bool = True

    def shown(self, row: Mapping[str, Any]) -> str:
        """The figure of a row in print: a number, one with its range (value, low, high), or text; "" for none."""
        found = row.get(self.key)
        parts: list[Any] = [found[k] for k in ("value", "low", "high")] if isinstance(found, dict) else [found]
        if None in parts:
            return ""
        if self.digits is None:
            return f"{found:g}" if isinstance(found, float) else str(found)
        scale, sign = self.scale * (100 if self.unit == "%" else 1), "+" if self.sign else ""
        value, *ends = (f"{scale * part:{sign}.{self.digits}f}" for part in parts)
        return f"{value}{self.unit}" + (f" ({' to '.join(ends)})" if ends and self.interval else "")


def table_of(columns: Iterable[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of results for people."""
    columns = list(columns)
    return table([c.heading for c in columns], [[c.shown(row) for c in columns] for row in rows])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; cells that read as numbers stand to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [bool(rows) and all(re.match(r"[-+\d]", row[i]) for row in rows) for i in range(len(header))]
    texts = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in texts)


METHOD = Column("method", "method", digits=None)
BENCH = (
    METHOD,
    Column("batch", "batch", digits=None),
    Column("guidance", "guidance", digits=None),
    Column("window", "window", digits=None),
    Column("top_k", "top-k", digits=None),
    Column("tokens_per_pass", "tok/pass", "tokens per target pass"),
    Column("ms_per_pass", "ms/pass", "ms per target pass"),
    Column("images_per_second", "img/s", "images per second", digits=3),
    Column("speedup", "speedup", "times as fast as none", unit="x"),
    Column("range", "range", digits=None),
    Column("draft_share", "drafting", "time in drafting and verifying", digits=1, unit="%"),
    Column("ceiling", "1-TV"),
    Column("overhead_vs_bare", "vs bare", digits=1, sign=True, unit="%"),
    Column("head_calls", "head calls", digits=0),
    Column("head_rows", "head rows", digits=0),
)
MEMORISATION = (
    METHOD,
    Column("distance", "nearest training image", "median distance to the nearest training image"),
    Column("distance_unseen", "of unseen photographs", "the same for unseen photographs"),
    Column("close", "nearer than the nearest 5%", "share nearer than the nearest 5% of unseen photographs"),
    Column("nearer", "nearer", "probability of being nearer than an unseen photograph"),
)
