"""Putting the page together: what of the runs goes where, and the words around it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bozzetto.common.files import write_text
from bozzetto.decoding.images import PassTrace
from bozzetto.errors import UsageError
from bozzetto.evaluate.columns import BARE, SEQUENTIAL, YARDSTICKS
from bozzetto.evaluate.metrics import Interval
from bozzetto.evaluate.output import check_writable
from bozzetto.evaluate.report import figures as draw
from bozzetto.evaluate.report.runs import BROKEN, Drawn, Run, figure_of, read_runs
from bozzetto.evaluate.report.tables import (
    Table,
    bench_table,
    cell,
    distance_name,
    memorisation_table,
    number,
    provenance_table,
    quality_tables,
    speed_row,
    speed_table,
    spend_table,
)

MOST_SHOWN, MOST_MAPS = 24, 8
_TEMPLATE = Path(__file__).with_name("page.html.j2")


def build_report(runs: Sequence[str | Path], out: str | Path, progress: bool = False) -> Path:
    """Write one self-contained HTML file about `runs` to `out`, whole or not at all; returns its path.

    A run is a folder written by generate, sample or evaluate, or a JSON file of evaluate or bench. Equal runs give
    equal bytes. progress: show a bar. Raises UsageError for anything that is not a run, for an `out` that cannot be
    written and where jinja2 or matplotlib is missing; OSError on a full disk.
    """
    out = Path(out)
    check_writable(out)
    with draw.drawing(), tqdm(total=len(runs) + 2, desc="report", unit="step", disable=not progress) as bar:
        found = read_runs(runs, bar.update)
        bar.update()
        try:
            text = _render(_Study.of(found).page())
        except BROKEN as error:
            if isinstance(error, UsageError):
                raise
            wanted = ", ".join(repr(str(run)) for run in runs)
            raise UsageError(f"{wanted}: the figures do not read as those of a run: {error}") from error
        write_text(out, text)
        bar.update()
    return out


def _render(content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(content)


@dataclass
class _Study:
    """The runs under the names that the page gives their methods. drawn, rows: by label; rows are those of evaluations
    without the yardsticks."""

    runs: list[Run]
    labels: dict[tuple[str, str], str]
    drawn: dict[str, Drawn]
    rows: dict[str, list[dict[str, Any]]]
    styles: dict[str, draw.Style]

    @classmethod
    def of(cls, runs: list[Run]) -> _Study:
        pairs = dict.fromkeys((r.name, m) for r in runs for m in _methods(r))
        often = Counter(method for _, method in pairs)
        labels = {(run, m): m if often[m] == 1 else f"{m} ({run})" for run, m in pairs}
        drawn = {labels[run.name, d.method]: d for run in runs for d in run.drawn}
        rows: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            for row in run.results:
                if row["method"] not in YARDSTICKS:
                    rows.setdefault(labels[run.name, row["method"]], []).append(row)
        methods = {label: method for (_, method), label in labels.items()}
        benched = {row["method"]: row["method"] for run in runs for row in run.bench}
        return cls(runs, labels, drawn, rows, draw.styles_of({**methods, **benched}))

    def page(self) -> dict[str, Any]:
        """What the template needs."""
        ids = (f"figure{i}" for i in count(1))
        traced = {label: d.traces for label, d in self.drawn.items() if d.traces}
        drafted = {label: t for label, t in traced.items() if any(sum(one.drafted) for one in t)}
        drafting = {label: t for label, t in drafted.items() if not self.drawn[label].scattered}
        scattered = [
            f"{label}: its tokens are drawn in an order of their own, so it has no acceptance maps and no offsets."
            for label in drafted
            if label not in drafting
        ]
        shown = self._shown()
        models = ", ".join(dict.fromkeys(run.model for run in self.runs))
        return {
            "models": models,
            "methods": list(dict.fromkeys([*self.labels.values(), *(self.styles if not self.labels else ())])),
            "lead": self._lead(),
            "tiles": self._tiles(),
            "notes": [note for run in self.runs for note in run.notes] + self._capped() + scattered,
            "rules": {label.partition("/")[2].split(" (")[0] for label in self.styles},
            "sheets": self._sheets(shown),
            "maps": self._maps(shown, drafting, ids),
            "without_drafts": [label for label in traced if label not in drafted],
            "acceptance": self._acceptance(drafting, next(ids)) if drafting else None,
            "passes": self._passes(shown, traced, ids) if traced else None,
            "spend": self._spend(traced, ids),
            "scatters": self._scatters(ids),
            "bench_plot": self._bench_plot(ids),
            "quality": [t for run in self.runs for t in quality_tables(run, self.labels)],
            "speed": self._speed(),
            "bench": [bench_table(run) for run in self.runs if run.bench],
            "memorisation": [memorisation_table(run, self.labels) for run in self.runs if run.memorisation],
            "provenance": [provenance_table(run) for run in self.runs],
            "styles": self.styles,
        }

    def _capped(self) -> list[str]:
        return [
            f"{label}: figures over the first {len(d.index)} of {d.total} images."
            for label, d in self.drawn.items()
            if len(d.index) < d.total
        ]

    def _tiles(self) -> list[dict[str, Any]]:
        """One per method: tokens per pass, speed-up, change of the distance."""
        tiles = []
        for label in dict.fromkeys(self.labels.values()):
            row = self._row(label)
            rate, change, distance = self._rate(label), figure_of(row, "frechet_change"), figure_of(row, "frechet")
            stats = [("tokens per target pass", cell(rate))] if rate else []
            speedup = figure_of(row, "speedup")
            if speedup:
                stats.append(("times as fast as sequential decoding", cell(speedup)))
            name = distance_name(self._run_of(label))
            if change:
                stats.append((f"change of the {name}, against {row.get('reference')}", cell(change, sign=True)))
            elif distance:
                stats.append((f"{name}, against {row.get('reference')}", cell(distance)))
            tiles.append({"label": label, "colour": self.styles[label]["color"], "stats": stats})
        return tiles or self._bench_tiles()

    def _bench_tiles(self) -> list[dict[str, Any]]:
        rows = [row for run in self.runs for row in run.bench if row["method"] != BARE]
        tiles = []
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            stats = []
            for key, words in (
                ("tokens_per_pass", "tokens per target pass"),
                ("speedup", "times as fast as sequential decoding"),
            ):
                values = [f.value for f in (figure_of(row, key) for row in mine) if f]
                if values:
                    ends = " to ".join(dict.fromkeys([number(min(values), 2), number(max(values), 2)]))
                    stats.append((f"{words}, over {len(mine)} settings", {"text": ends, "range": ""}))
            tiles.append({"label": method, "colour": self.styles[method]["color"], "stats": stats})
        return tiles

    def _speed(self) -> Table | None:
        rows = []
        for label in dict.fromkeys(self.labels.values()):
            row, drawn = self._row(label), self.drawn.get(label)
            rows.append(speed_row(label, row, drawn, self._rate(label)))
        return speed_table([row for row in rows if row])

    def _row(self, label: str) -> dict[str, Any]:
        """A method's first row of an evaluation; empty without one."""
        return next(iter(self.rows.get(label, [])), {})

    def _rate(self, label: str) -> Interval | None:
        """Tokens per target pass, as the evaluation says or else from the traces."""
        said = figure_of(self._row(label), "tokens_per_pass")
        mine = self.drawn[label].tokens_per_pass if label in self.drawn else None
        return said or (Interval(mine) if mine is not None else None)

    def _run_of(self, label: str) -> Run:
        name = next(run for (run, _), mine in self.labels.items() if mine == label)
        return next(run for run in self.runs if run.name == name)

    def _lead(self) -> str:
        """The page in one sentence."""
        timed = {label: figure_of(rows[0], "speedup") for label, rows in self.rows.items()}
        best = max((label for label, f in timed.items() if f), key=lambda m: timed[m] or Interval(0), default=None)
        if best is not None and cell(timed[best])["range"]:
            speed, rate, change = timed[best], self._rate(best), figure_of(self.rows[best][0], "frechet_change")
            words = f"{best} is {cell(speed)['text']} times as fast as sequential decoding ({cell(speed)['range']})"
            words += f", at {cell(rate)['text']} tokens per target pass" if rate else ""
            if change:
                by, name = cell(change, sign=True), distance_name(self._run_of(best))
                words += f"; its {name} differs from sequential decoding's by {by['text']} ({by['range']})"
            return words + "."
        rates = {label: self._rate(label) for label in self.drawn}
        parts = [f"{label} {cell(rate)['text']}" for label, rate in rates.items() if rate]
        return f"Tokens per target pass: {', '.join(parts)}." if parts else ""

    def _shown(self) -> dict[str, list[int]]:
        """Rows of the images on the page, by label: the first that all methods have, or else each method's first."""
        keys = {m: list(zip(d.index, d.class_names, strict=True)) for m, d in self.drawn.items()}
        common = set.intersection(*map(set, keys.values())) if keys else set()
        chosen = {m: [i for i, k in enumerate(own) if not common or k in common] for m, own in keys.items()}
        return {label: rows[:MOST_SHOWN] for label, rows in chosen.items()}

    def _sheets(self, shown: Mapping[str, list[int]]) -> list[dict[str, Any]]:
        pixels = {label: [self.drawn[label].load(i) for i in rows] for label, rows in shown.items()}
        base = next((label for label, d in self.drawn.items() if d.method == SEQUENTIAL), None)
        sheets = []
        for label, rows in shown.items():
            d = self.drawn[label]
            shots = [{"src": draw.picture_uri(p), **_name(d, i)} for p, i in zip(pixels[label], rows, strict=True)]
            same = None
            if (
                base is not None
                and base != label
                and [_name(d, i) for i in rows] == [_name(self.drawn[base], i) for i in shown[base]]
            ):
                same = sum(np.array_equal(a, b) for a, b in zip(pixels[label], pixels[base], strict=True))
            sheets.append({"label": label, "shots": shots, "total": d.total, "same": same, "base": base})
        return sheets

    def _maps(
        self, shown: Mapping[str, list[int]], drafting: Mapping[str, list[PassTrace]], ids: Any
    ) -> dict[str, Any] | None:
        """Overlays of a few images and the mean map of each method that drafts."""
        if not drafting:
            return None
        picked = {label: shown[label][:MOST_MAPS] for label in drafting}
        highest = max((int(drafting[m][i].offsets().max()) for m, rows in picked.items() for i in rows), default=1)
        colours = draw.offset_colours(min(max(highest, 1), draw.MOST_OFFSETS))
        groups = []
        for label, rows in picked.items():
            d, traces = self.drawn[label], drafting[label]
            items = []
            for i in rows:
                mask = draw.overlay(traces[i], d.grid, colours)
                kept, passes = float((mask[..., 3] > 0).mean()), len(traces[i].committed)
                sources = {"src": draw.picture_uri(d.load(i)), "mask": draw.picture_uri(mask)}
                items.append({**sources, **_name(d, i), "kept": f"{100 * kept:.0f}%", "passes": passes})
            groups.append({"label": label, "items": items, "grid": d.grid, "total": d.total})
        legend = [{"colour": f"#{bytes(c).hex()}", "offset": str(j)} for j, c in enumerate(colours, 1)]
        if highest > len(colours):
            legend[-1]["offset"] += " or more"
        return {"groups": groups, "legend": legend, "means": self._means(drafting, ids)}

    def _means(self, drafting: Mapping[str, list[PassTrace]], ids: Any) -> list[dict[str, Any]]:
        means = {}
        for label, traces in drafting.items():
            grid = self.drawn[label].grid
            means[label] = np.mean([draw.cells(t, grid) > 0 for t in traces], 0)
        top = max(0.1, math.ceil(10 * max(float(m.max()) for m in means.values())) / 10)
        return [
            {
                "label": label,
                "svg": draw.mean_map(mean, top, label, next(ids)),
                "images": len(drafting[label]),
                "mean": f"{100 * float(mean.mean()):.0f}%",
            }
            for label, mean in means.items()
        ]

    def _acceptance(self, drafting: Mapping[str, list[PassTrace]], name: str) -> dict[str, Any]:
        curves = {label: draw.acceptance_by_offset(traces) for label, traces in drafting.items()}
        offered = {label: int(o.sum()) for label, (o, _) in curves.items()}
        shares = {m: f"{100 * k.sum() / o.sum():.0f}%" for m, (o, k) in curves.items()}
        return {"svg": draw.acceptance_figure(curves, self.styles, name), "offered": offered, "shares": shares}

    def _passes(
        self, shown: Mapping[str, list[int]], traced: Mapping[str, list[PassTrace]], ids: Any
    ) -> dict[str, Any]:
        curves = {label: draw.mean_progress(traces) for label, traces in traced.items()}
        first = {label: shown[label][0] for label in traced}
        one = {label: traced[label][i] for label, i in first.items()}
        names = dict.fromkeys(
            f"image {n['index']} ({n['class']})" for n in (_name(self.drawn[m], first[m]) for m in one)
        )
        return {
            "svg": draw.progress_figure(curves, self.styles, next(ids)),
            "strip": draw.strip_figure(one, self.styles, next(ids)),
            "image": ", ".join(names),
            "average": {
                label: f"{np.mean([len(t.committed) for t in traces]):.1f}" for label, traces in traced.items()
            },
        }

    def _spend(self, traced: Mapping[str, list[PassTrace]], ids: Any) -> dict[str, Any] | None:
        """What relaxed rules spent; None where every rule is exact."""
        spent = {label: [sum(t.spent) for t in traces] for label, traces in traced.items()}
        relaxed = [label for label, sums in spent.items() if any(sums)]
        if not relaxed:
            return None
        budgets = {label: self.drawn[label].budget for label in relaxed}
        known = {label: budget for label, budget in budgets.items() if budget is not None}
        content = spend_table({m: spent[m] for m in relaxed}, {m: self.drawn[m].length for m in relaxed}, known)
        curves = {label: draw.mean_spend(traced[label]) for label in relaxed}
        return {"svg": draw.spend_figure(curves, known, self.styles, next(ids)), "table": content}

    def _scatters(self, ids: Any) -> list[dict[str, Any]]:
        """Speed against quality: a panel per evaluation and reference."""
        panels = []
        for run in self.runs:
            for reference in dict.fromkeys(row.get("reference") for row in run.results):
                rows = [row for row in run.results if row.get("reference") == reference]
                points, lines = [], {}
                for row in rows:
                    x, y = figure_of(row, "speedup"), figure_of(row, "frechet")
                    if row["method"] in YARDSTICKS and y:
                        lines[row["method"]] = y
                    elif x and y:
                        points.append((self.labels[run.name, row["method"]], x, y))
                if points:
                    axis = f"{distance_name(run)}\n({run.settings.get('extractor', 'unnamed features')})"
                    svg = draw.quality_figure(points, lines, axis, self.styles, next(ids))
                    described = {name: YARDSTICKS[name] for name in lines}
                    panels.append({"reference": reference, "run": run.name, "svg": svg, "lines": described})
        return panels

    def _bench_plot(self, ids: Any) -> str | None:
        points = []
        for row in (row for run in self.runs for row in run.bench if row["method"] != BARE):
            x, y = figure_of(row, "tokens_per_pass"), figure_of(row, "speedup")
            if x and y:
                points.append((row["method"], x, y))
        return draw.bench_figure(points, self.styles, next(ids)) if points else None


def _methods(run: Run) -> list[str]:
    """Methods of a run that has pictures or an evaluation's figures, in their order."""
    names = [d.method for d in run.drawn] + [row["method"] for row in run.results if row["method"] not in YARDSTICKS]
    return list(dict.fromkeys(names))


def _name(drawn: Drawn, i: int) -> dict[str, Any]:
    return {"index": drawn.index[i], "class": drawn.class_names[i]}
