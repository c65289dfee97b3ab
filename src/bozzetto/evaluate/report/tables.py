"""The report's tables, and numbers with as many digits as they can answer for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bozzetto.evaluate.columns import BENCH, MEMORISATION
from bozzetto.evaluate.metrics import Interval
from bozzetto.evaluate.quality import QUALITY
from bozzetto.evaluate.report.runs import Drawn, Run, figure_of

_SHARE = next(column for column in BENCH if column.key == "draft_share")
_SETTINGS = [column for column in BENCH[1:] if not column.words and column.digits is None and column.key != "range"]
_SPEED = [column for column in BENCH if column.words and column is not _SHARE]
_MOST_DIGITS = 3

Cell = dict[str, str]
Table = dict[str, Any]


def number(value: float, digits: int, sign: bool = False) -> str:
    """A number with that many decimals and a true minus sign."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    # What rounds to nothing has no sign.
    text = text.lstrip("+-") if float(text) == 0 else text
    return text.replace("-", "−")


def cell(figure: Interval | None, scale: float = 1, sign: bool = False) -> Cell:
    """Text of a figure and of its range. The range's half-width sets the digits: two of them are shown."""
    if figure is None:
        return {"text": "", "range": ""}
    value = figure.value * scale
    low, high = (None if part is None else part * scale for part in (figure.low, figure.high))
    half = (high - low) / 2 if low is not None and high is not None else 0.0
    size = half / 10 if half > 0 else abs(value) / 100
    digits = min(max(-math.floor(math.log10(size)), 0), _MOST_DIGITS) if size > 0 else 0
    around = (
        "" if not half or low is None or high is None else " to ".join(number(x, digits, sign) for x in (low, high))
    )
    return {"text": number(value, digits, sign), "range": around}


def plain(value: object) -> Cell:
    """A cell of text."""
    return {"text": "" if value is None else str(value), "range": ""}


def spend_table(spent: Mapping[str, Sequence[float]], tokens: Mapping[str, int], budgets: Mapping[str, float]) -> Table:
    """Bias spent by method: sums per image, tokens of an image, budget of an image where there is one."""
    rows = [
        [
            plain(method),
            plain(number(sum(sums) / len(sums), 1)),
            plain(number(max(sums), 1)),
            plain(number(sum(sums) / len(sums) / tokens[method], 3)),
            plain(f"{budgets[method]:g}" if method in budgets else "none"),
        ]
        for method, sums in spent.items()
    ]
    header = ["method", "mean per image", "most of an image", "mean per token", "budget per image"]
    return {"caption": "Bias bound spent, in total variation", "header": header, "rows": rows}


def distance_name(run: Run) -> str:
    """What the distance may be called: FID is the one with Inception features."""
    if str(run.settings.get("extractor", "")).startswith("Inception"):
        return "FID"
    return "Fréchet distance"


def quality_tables(run: Run, labels: Mapping[tuple[str, str], str]) -> list[Table]:
    """Every figure of quality with its interval: a table per reference."""
    tables = []
    for reference in dict.fromkeys(row.get("reference") for row in run.results):
        rows = [row for row in run.results if row.get("reference") == reference]
        header = ["method", *(column.words or distance_name(run) for column in QUALITY), "images"]
        cells = []
        for row in rows:
            name = labels.get((run.name, row["method"]), row["method"])
            found = [cell(figure_of(row, c.key), c.scale, c.sign) for c in QUALITY]
            cells.append([plain(name), *found, plain(row.get("count"))])
        against = f"{rows[0].get('reference_count', '')} {reference or ''} photographs".strip()
        words = f"{run.name}: against {against}. Features: {run.settings.get('extractor', 'unnamed')}."
        tables.append({"caption": words, "header": header, "rows": cells})
    return tables


def speed_row(label: str, row: Mapping[str, Any], drawn: Drawn | None, rate: Interval | None) -> list[Cell] | None:
    """A method's row of the table of speed, from an evaluation's row (empty: none) or from its samples alone; None
    where neither knows anything."""
    share = figure_of(row, _SHARE.key)
    if share is None and drawn is not None and drawn.draft_share is not None:
        share = Interval(drawn.draft_share)
    timed = [figure_of(row, column.key) for column in _SPEED[1:]]
    if not any((rate, share, *timed)):
        return None
    images = row.get("count") or (drawn.total if drawn else None)
    return [plain(label), plain(images), cell(rate), *(cell(f) for f in timed), _percent(share)]


def speed_table(rows: Sequence[list[Cell]]) -> Table | None:
    """Columns without a single figure are left out; None without rows."""
    header = ["method", "images", *(column.words for column in (*_SPEED, _SHARE))]
    kept = [i for i in range(len(header)) if any(row[i]["text"] for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    return {"caption": "Speed by method.", "header": [header[i] for i in kept], "rows": cells} if rows else None


def bench_table(run: Run) -> Table:
    """A benchmark, a row per method and setting."""
    rows = []
    for row in run.bench:
        settings = [
            plain(f"{row[c.key]:g}" if isinstance(row.get(c.key), int | float) else row.get(c.key)) for c in _SETTINGS
        ]
        found = [cell(figure_of(row, column.key)) for column in _SPEED]
        rows.append([plain(row["method"]), *settings, *found, _percent(figure_of(row, _SHARE.key))])
    header = ["method", *(c.heading for c in _SETTINGS), *(c.words for c in (*_SPEED, _SHARE))]
    device = str(run.settings.get("device", "unnamed device"))
    words = f"{run.name}: {run.settings.get('dtype', '')} on {device}".replace("  ", " ")
    return {"caption": f"{words}.", "header": header, "rows": rows}


def memorisation_table(run: Run, labels: Mapping[tuple[str, str], str]) -> Table:
    """Nearest training images: whatever figures the rows have."""
    keys = list(dict.fromkeys(k for row in run.memorisation for k in row if k != "method"))
    known = {column.key: column.words for column in MEMORISATION}
    rows = [
        [plain(labels.get((run.name, row["method"]), row["method"])), *(cell(figure_of(row, k)) for k in keys)]
        for row in run.memorisation
    ]
    header = ["method", *(known.get(k, k.replace("_", " ")) for k in keys)]
    return {"caption": f"{run.name}: nearest training images.", "header": header, "rows": rows}


def provenance_table(run: Run) -> Table:
    """Where a run comes from, in pairs of name and words."""
    fixed = {name: run.provenance.get(name) for name in ("command", "commit", "versions", "machine", "time")}
    more = {k: v for k, v in run.provenance.items() if k not in fixed}
    rows = [(name, _words(value) or "not recorded") for name, value in {**fixed, **more}.items()]
    return {"name": run.name, "kind": run.kind, "rows": [*rows, ("settings", _words(run.settings))]}


def _percent(figure: Interval | None) -> Cell:
    return plain("" if figure is None else f"{100 * figure.value:.1f}%")


def _words(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k.replace('_', ' ')}: {_words(v) or 'none'}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_words(v) for v in value)
    return "" if value is None else str(value)
