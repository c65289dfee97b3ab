r"""The headline of docs/figures.md: its table and its plot, from the report of the suite of followers.

    bozzetto bench --suite followers --dtype bfloat16 --count 6 --images 48 --json suite-followers.json
    python benchmarks/headline.py suite-followers.json --readme docs/figures.md --full docs/benchmarks.md \
        --plot docs/followers.svg

A table stands between two comments of a file and is put in place of what is there. The first has, of each model, the
best methods and those of the papers, the other file's has all. The plot has a bar for each method: wall clock against
sequential decoding, and what a target pass keeps.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

from bozzetto.common.files import write_text
from bozzetto.errors import UsageError

PAPERS = ("sequential", "LANTERN", "CASCADE", "CSpD as released", "Drift-AR, one step")
BEGIN, END = "<!-- followers -->", "<!-- followers, end -->"
LEFT, BAR, RIGHT, ROW, HEAD = 345, 250, 200, 19, 42
EXACT, RELAXED = "#1b6ca8", "#c2571a"
Row = dict[str, Any]


def models(report: Row) -> dict[str, list[Row]]:
    """Rows of each model, the best in wall clock first."""
    found: dict[str, list[Row]] = {}
    for row in report["results"]:
        found.setdefault(row["model"], []).append(row)
    return {name: sorted(rows, key=lambda r: -r["speedup"]) for name, rows in found.items()}


def interval(figure: dict[str, float] | None, sign: str = "") -> str:
    """value (low to high), or nothing."""
    if figure is None:
        return ""
    return f"{figure['value']:{sign}.1f} ({figure['low']:{sign}.1f} to {figure['high']:{sign}.1f})"


def best(rows: list[Row]) -> list[Row]:
    """Of one model: the methods of papers, and the fastest ones and those that keep most, exact and not."""
    wanted = [row["method"] for row in rows if row["title"] in PAPERS]
    for exact in (True, False):
        some = [row for row in rows if row["exact"] == exact]
        for figure in ("speedup", "tokens_per_pass"):
            wanted += [max(some, key=lambda row: row[figure])["method"]] if some else []
    return [row for row in rows if row["method"] in wanted]


def markdown(report: Row, whole: bool = True) -> str:
    """The table, of all methods or of the best ones."""
    lines = [
        "| model | method | known as | exact | tokens/pass | speed-up | Fréchet | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in models(report).items():
        for row in rows if whole else best(rows):
            cells = [f"`{name}`", f"`{row['method']}`", row["title"], "yes" if row["exact"] else "no"]
            cells += [f"{row['tokens_per_pass']:.2f}"]
            speed, change = f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})", ""
            if "base" in row:
                speed += f"; {row['over_base']:.2f}x over sequential `{row['base']}`"
                change = f"; {interval(row['frechet_over_base'], '+')} over `{row['base']}`"
            cells += [speed, interval(row["frechet"]), (interval(row["frechet_change"], "+") + change).lstrip("; ")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put(text: str, table: str) -> str:
    """A file with the table between its comments. Raises UsageError where these are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"no place for the table: the lines {BEGIN} and {END} are wanted")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def plot(report: Row) -> str:
    """The whole SVG: a block of bars per model."""
    blocks, y, parts = models(report), 8, list[str]()
    longest = max(gain(row) for rows in blocks.values() for row in rows)
    for name, rows in blocks.items():
        title = name + (f", against sequential {rows[0]['base']}" if "base" in rows[0] else "")
        parts.append(f'<text x="8" y="{y + 20}" font-weight="bold">{escape(title)}</text>')
        one = LEFT + BAR / longest
        bottom = y + HEAD - 8 + ROW * len(rows)
        parts.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{y + HEAD - 12}" y2="{bottom}" stroke="#999"/>')
        for i, row in enumerate(rows):
            parts += bar(row, y + HEAD - 8 + ROW * i, longest)
        y = bottom + 12
    for x, colour, text in ((LEFT, EXACT, "exact"), (LEFT + 90, RELAXED, "another law, or relaxed")):
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{y + 10}">{text}</text>')
    size = f'width="{LEFT + BAR + RIGHT}" height="{y + 24}" viewBox="0 0 {LEFT + BAR + RIGHT} {y + 24}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'


def gain(row: Row) -> float:
    """Speed-up over sequential decoding: of a variant, over that of its base model."""
    return float(row.get("over_base", row["speedup"]))


def bar(row: Row, y: int, longest: float) -> list[str]:
    """One method."""
    width, colour = BAR * gain(row) / longest, EXACT if row["exact"] and "base" not in row else RELAXED
    note = f"{gain(row):.2f}x, {row['tokens_per_pass']:.2f} tokens per pass"
    return [
        f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(row["title"])}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>',
        f'<text x="{LEFT + width + 6:.1f}" y="{y + 11}">{note}</text>',
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--readme", type=Path, help="put the table of the best there; else the whole one is printed")
    parser.add_argument("--full", type=Path, help="put the whole table there")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    if report.get("kind") != "suite":
        raise SystemExit(f"{options.report} is not a report of `bozzetto bench --suite`")
    if options.readme is None:
        print(markdown(report))
    for path, whole in ((options.readme, False), (options.full, True)):
        if path is not None:
            write_text(path, put(path.read_text(encoding="utf-8"), markdown(report, whole)))
    if options.plot is not None:
        write_text(options.plot, plot(report))


if __name__ == "__main__":
    main()
