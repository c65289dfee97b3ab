"""The report's tables, and numbers with as many digits as they can answer for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bozzetto.evaluate.report.runs import Drawn, Figure, Run, figure_of

BARE = "bare"
# Rows of an evaluation that are no decoding methods: what they are, in words.
YARDSTICKS = {
    "photographs": "real photographs of the other split",
    "reconstructions": "the same photographs through the tokenizer and back",
}
_QUALITY = (
    ("frechet", "", 1),
    ("frechet_change", "change from none", 1),
    ("kernel", "kernel distance ×1000", 1000),
    ("precision", "precision", 1),
    ("recall", "recall", 1),
    ("consistency", "class recognised", 1),
    ("identical", "share identical to none", 1),
)
_MEMORISATION = {
    "distance": "median distance to the nearest training image",
    "distance_unseen": "the same for unseen photographs",
    "close": "share nearer than the nearest 5% of unseen photographs",
    "nearer": "probability of being nearer than an unseen photograph",
}
_BENCH = {
    "tokens_per_pass": "tokens per target pass",
    "ms_per_pass": "ms per target pass",
    "images_per_second": "images per second",
    "speedup": "times as fast as none",
}
_MOST_DIGITS = 3

Cell = dict[str, str]
Table = dict[str, Any]


def number(value: float, digits: int, sign: bool = False) -> str:
    """A number with that many decimals and a true minus sign."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    # What rounds to nothing has no sign.
    text = text.lstrip("+-") if float(text) == 0 else text
    return text.replace("-", "−")


def cell(figure: Figure | None, scale: float = 1, sign: bool = False) -> Cell:
    """Text of a figure and of its range. The range's half-width sets the digits: two of them are shown."""
    if figure is None:
        return {"text": "", "range": ""}
    value, low, high = (None if part is None else part * scale for part in figure)
    assert value is not None
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
        header = ["method", *(words or distance_name(run) for _, words, _ in _QUALITY), "images"]
        cells = []
        for row in rows:
            name = labels.get((run.name, row["method"]), row["method"])
            found = [cell(figure_of(row, k), scale, k == "frechet_change") for k, _, scale in _QUALITY]
            cells.append([plain(name), *found, plain(row.get("count"))])
        against = f"{rows[0].get('reference_count', '')} {reference or ''} photographs".strip()
        words = f"{run.name}: against {against}. Features: {run.settings.get('extractor', 'unnamed')}."
        tables.append({"caption": words, "header": header, "rows": cells})
    return tables


def speed_row(label: str, row: Mapping[str, Any], drawn: Drawn | None, rate: Figure | None) -> list[Cell] | None:
    """A method's row of the table of speed, from an evaluation's row (empty: none) or from its samples alone; None
    where neither knows anything."""
    share = figure_of(row, "draft_share")
    if share is None and drawn is not None and drawn.draft_share is not None:
        share = Figure(drawn.draft_share)
    timed = [figure_of(row, key) for key in ("ms_per_pass", "images_per_second", "speedup")]
    if not any((rate, share, *timed)):
        return None
    images = row.get("count") or (drawn.total if drawn else None)
    return [plain(label), plain(images), cell(rate), *(cell(f) for f in timed), _percent(share)]


def speed_table(rows: Sequence[list[Cell]]) -> Table | None:
    """Columns without a single figure are left out; None without rows."""
    header = ["method", "images", *_BENCH.values(), "time in drafting and verifying"]
    kept = [i for i in range(len(header)) if any(row[i]["text"] for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    return {"caption": "Speed by method.", "header": [header[i] for i in kept], "rows": cells} if rows else None


def bench_table(run: Run) -> Table:
    """A benchmark, a row per method and setting."""
    fixed = ["batch", "guidance", "window", "top_k"]
    rows = []
    for row in run.bench:
        settings = [plain(f"{row[k]:g}" if isinstance(row.get(k), int | float) else row.get(k)) for k in fixed]
        found = [cell(figure_of(row, k)) for k in _BENCH]
        rows.append([plain(row["method"]), *settings, *found, _percent(figure_of(row, "draft_share"))])
    header = ["method", "batch", "guidance", "window", "top-k", *_BENCH.values(), "time in drafting and verifying"]
    device = str(run.settings.get("device", "unnamed device"))
    words = f"{run.name}: {run.settings.get('dtype', '')} on {device}".replace("  ", " ")
    return {"caption": f"{words}.", "header": header, "rows": rows}


def memorisation_table(run: Run, labels: Mapping[tuple[str, str], str]) -> Table:
    """Nearest training images: whatever figures the rows have."""
    keys = list(dict.fromkeys(k for row in run.memorisation for k in row if k != "method"))
    rows = [
        [plain(labels.get((run.name, row["method"]), row["method"])), *(cell(figure_of(row, k)) for k in keys)]
        for row in run.memorisation
    ]
    header = ["method", *(_MEMORISATION.get(k, k.replace("_", " ")) for k in keys)]
    return {"caption": f"{run.name}: nearest training images.", "header": header, "rows": rows}


def provenance_table(run: Run) -> Table:
    """Where a run comes from, in pairs of name and words."""
    fixed = {name: run.provenance.get(name) for name in ("command", "commit", "versions", "machine", "time")}
    more = {k: v for k, v in run.provenance.items() if k not in fixed}
    rows = [(name, _words(value) or "not recorded") for name, value in {**fixed, **more}.items()]
    return {"name": run.name, "kind": run.kind, "rows": [*rows, ("settings", _words(run.settings))]}


def _percent(figure: Figure | None) -> Cell:
    return plain("" if figure is None else f"{100 * figure.value:.1f}%")


def _words(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k.replace('_', ' ')}: {_words(v) or 'none'}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_words(v) for v in value)
    return "" if value is None else str(value)
