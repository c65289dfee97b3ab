"""Draw tokens per pass and speed-up against the window, from a report of `bozzetto bench --json`, as an SVG.

python benchmarks/plot_windows.py benchmarks/results/windows-bfloat16.json docs/windows.svg
"""

from __future__ import annotations

import json
import sys
from math import log2

from bozzetto.common.files import write_text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 340, 250, 44, 34, 42, 30
COLOURS = ("#1b6ca8", "#c2571a", "#3a7d44", "#7a4fa3")


def series(report: dict, figure: str) -> dict[str, list[tuple[int, float]]]:
    """Curves by name: (window, figure) of seed-exact decoding at batch 1."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in report["results"]:
        if row["method"] == "jacobi/seed-exact" and row["batch"] == 1:
            name = f"guidance {row['guidance']:g}" + (f", top-k {row['top_k']}" if row["top_k"] else "")
            curves.setdefault(name, [(1, 1.0)]).append((row["window"], row[figure]))
    return {name: sorted(points) for name, points in curves.items()}


def panel(curves: dict[str, list[tuple[int, float]]], title: str, x0: int) -> list[str]:
    """One chart: log2 of the window across, the figure upwards, grid lines and direct labels."""
    top = max(value for points in curves.values() for _, value in points) * 1.1
    widest = max(window for points in curves.values() for window, _ in points)
    inner_w, inner_h = WIDTH - LEFT - 10, HEIGHT - TOP - BOTTOM

    def at(window: int, value: float) -> tuple[float, float]:
        return x0 + LEFT + inner_w * log2(window) / log2(widest), TOP + inner_h * (1 - value / top)

    parts = [f'<text x="{x0 + LEFT}" y="20" font-weight="bold">{title}</text>']
    for tick in range(0, int(top) + 1, max(1, round(top / 6))):
        _, y = at(1, tick)
        parts.append(f'<line x1="{x0 + LEFT}" x2="{x0 + LEFT + inner_w}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 + LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for window in sorted({window for points in curves.values() for window, _ in points}):
        x, y = at(window, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{window}</text>')
    parts.append(f'<text x="{x0 + LEFT + inner_w / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">window</text>')
    for colour, points in zip(COLOURS, curves.values(), strict=False):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (at(*p) for p in points)]
    return parts


def plot(report: dict) -> str:
    """The whole SVG."""
    left, right = series(report, "tokens_per_pass"), series(report, "speedup")
    if not left:
        raise SystemExit("no rows of jacobi/seed-exact at batch 1 in this report")
    parts = panel(left, "tokens per target pass", 0) + panel(right, "speed-up, wall clock", WIDTH + GAP)
    for i, (colour, name) in enumerate(zip(COLOURS, left, strict=False)):
        x = LEFT + 160 * i
        parts.append(f'<rect x="{x}" y="{HEIGHT + 4}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{HEIGHT + 14}">{name}</text>')
    size = f'width="{2 * WIDTH + GAP}" height="{HEIGHT + 26}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        write_text(sys.argv[2], plot(json.load(file)))
