"""The report's figures: what the traces of many images say together, SVG text to put into the page, and pictures as
data addresses.

Text in a figure stays text: the page sets its font and, in light and dark, its colour. Lines are of middle tones that
show on both. Equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image

from bozzetto.common.extras import needed
from bozzetto.decoding.images import PassTrace
from bozzetto.evaluate.metrics import Interval

# Offsets beyond this share the last colour of the maps.
MOST_OFFSETS = 12
_GREY = "#868b93"
# Okabe and Ito's colours, as far as they show on white and on black.
_FIXED = {"none": _GREY, "jacobi/exact": "#d55e00", "jacobi/seed-exact": "#1f83c4"}
_OTHERS = ("#009e73", "#b8639a", "#b58900", "#5f7fd6", "#8c564b", "#d55e00", "#1f83c4", _GREY)
_MARKERS = "osD^vP*X"
_QUALITY = 90
_LONG, _LEGEND_ROW = 26, 0.16  # letters of a method that needs a line of its own; inches of a line
_WIDTH = 4.4  # inches; small, so that the text is still read when a phone shrinks the figure

Point = tuple[str, Interval, Interval]  # one mark of a scatter: its label, x and y
Style = Mapping[str, Any]  # how a line looks, in matplotlib's words; a method's: color, #rrggbb, and marker


def styles_of(labels: Mapping[str, str]) -> dict[str, Style]:
    """A look for each label, given its method: the known methods have theirs on every page."""
    known: dict[str, str] = {}
    for label, method in labels.items():
        if method in _FIXED and _FIXED[method] not in known.values():
            known[label] = _FIXED[method]
    left = [c for c in _OTHERS if c not in known.values()]
    others = [label for label in labels if label not in known]
    known.update({label: left[i % len(left)] for i, label in enumerate(others)})
    return {label: {"color": known[label], "marker": _MARKERS[i % len(_MARKERS)]} for i, label in enumerate(labels)}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's defaults with ours on top, whatever the user's own settings are. Raises UsageError where matplotlib
    or jinja2 is not installed."""
    with needed("the report needs", "report"):
        import jinja2  # noqa: F401
        import matplotlib
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "bozzetto",
                "svg.fonttype": "none",
                "text.parse_math": False,  # a dollar in a name is a dollar
                "font.size": 8.5,
                "legend.fontsize": 8.5,
                "legend.frameon": False,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "grid.alpha": 0.3,
                "grid.linewidth": 0.6,
                "lines.linewidth": 1.8,
                **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _GREY),
                **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
            }
        )
        yield


def acceptance_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], styles: Mapping[str, Style], name: str
) -> str:
    """Share of the offered j-th drafts that were kept, a line per method. curves: offered and kept, int64 [L] each."""
    figure, axes = _figure(2.9)
    longest = 1
    for label, (offered, kept) in curves.items():
        j = np.flatnonzero(offered)
        longest = max(longest, *(j + 1)) if len(j) else longest
        axes.plot(j + 1, kept[j] / offered[j], ms=5, **styles[label])
    _percent(axes.yaxis)
    axes.set(xlim=(0.6, longest + 0.4), ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="offset j of the draft in its target pass", ylabel="kept, of those offered")
    alt = f"Line chart: share of offered drafts kept, by offset, for {', '.join(curves)}"
    return _svg(figure, name, alt, {label: styles[label] for label in curves})


def progress_figure(curves: Mapping[str, np.ndarray], styles: Mapping[str, Style], name: str) -> str:
    """Mean share of the image committed after each target pass, a line per method. curves: float64 [passes + 1]."""
    figure, axes = _figure(2.9)
    for label, curve in curves.items():
        _ended(axes, np.arange(len(curve)), curve, int(np.argmax(curve >= 1 - 1e-9)), styles[label])
    _percent(axes.yaxis)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.set(xlabel="target passes", ylabel="share of the image committed")
    alt = f"Line chart: share of the image committed against target passes, {', '.join(curves)}"
    return _svg(figure, name, alt, {label: styles[label] for label in curves})


def spend_figure(
    curves: Mapping[str, np.ndarray], budgets: Mapping[str, float], styles: Mapping[str, Style], name: str
) -> str:
    """Bias bound spent per image against the share of it that is committed, a line per method, its budget dotted.
    curves: float64 [points] over 0..1."""
    figure, axes = _figure(2.7)
    for label, curve in curves.items():
        _ended(axes, np.linspace(0, 1, len(curve)), curve, len(curve) - 1, styles[label])
        if label in budgets:
            axes.axhline(budgets[label], color=styles[label]["color"], lw=1, ls=":")
    _percent(axes.xaxis)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="share of the image committed", ylabel="total variation spent")
    alt = f"Line chart: bias spent against the share of the image committed, {', '.join(curves)}"
    return _svg(figure, name, alt, {label: styles[label] for label in curves})


def _ended(axes: Any, x: np.ndarray, y: np.ndarray, end: int, look: Style) -> None:
    """A line with a mark at its end."""
    axes.plot(x, y, markevery=[end], ms=6, clip_on=False, **look)


def strip_figure(traces: Mapping[str, PassTrace], styles: Mapping[str, Style], name: str) -> str:
    """Tokens committed in each target pass of one image, kept drafts below the target's own; a row per method."""
    figure = _empty(0.75 + 0.85 * len(traces))
    rows = figure.subplots(len(traces), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    tallest = max(max(t.committed) for t in traces.values())
    longest = max(len(t.committed) for t in traces.values())
    for axes, (label, trace) in zip(rows, traces.items(), strict=True):
        edges = np.arange(len(trace.committed) + 1) + 0.5
        axes.stairs(trace.accepted, edges, fill=True, color=styles[label]["color"])
        axes.stairs(trace.committed, edges, baseline=trace.accepted, fill=True, color=_GREY, alpha=0.45)
        axes.set_title(f"{label}: {len(trace.committed)} passes", loc="left", fontsize=8.5)
        axes.set_ylim(0, tallest + 0.3)
        axes.set_xlim(0.5, longest + 0.5)
        axes.yaxis.get_major_locator().set_params(integer=True)
    rows[-1].set_xlabel("target pass")
    figure.supylabel("tokens committed", fontsize=8.5)
    return _svg(figure, name, f"Bar strips: tokens committed in each target pass, {', '.join(traces)}")


def mean_map(share: np.ndarray, top: float, label: str, name: str) -> str:
    """Heat map of the share of images in which each token was a kept draft. share: float [rows, columns]; top: end
    of the scale."""
    figure = _empty(2.7, width=3.2)
    axes = figure.subplots()
    shown = axes.imshow(share, vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=axes, shrink=0.95, aspect=18)
    bar.outline.set_visible(False)
    _percent(bar.ax.yaxis)
    return _svg(figure, name, f"Heat map for {label}: share of images in which each token was a kept draft")


def quality_figure(
    points: Sequence[Point], lines: Mapping[str, Interval], axis: str, styles: Mapping[str, Style], name: str
) -> str:
    """Speed-up across, distance upwards, both with their intervals; `lines`: distances that have no speed."""
    figure, axes = _figure(3.1)
    _scatter(axes, points, styles)
    entries = {label: styles[label] for label, _, _ in points}
    for dash, (label, value) in zip(("--", ":", "-."), lines.items(), strict=False):
        entries[label] = {"color": _GREY, "ls": dash, "lw": 1.4}
        axes.axhline(value.value, **entries[label])
        if value.low is not None and value.high is not None:
            axes.axhspan(value.low, value.high, color=_GREY, alpha=0.12, lw=0)
    axes.margins(0.12, 0.12)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="speed-up over sequential decoding", ylabel=axis)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    alt = f"Scatter: {axis} against speed-up for {', '.join(label for label, _, _ in points)}"
    return _svg(figure, name, alt, entries)


def bench_figure(points: Sequence[Point], styles: Mapping[str, Style], name: str) -> str:
    """Speed-up (lowest to highest round) against tokens per target pass, a mark per row of the benchmark."""
    figure, axes = _figure(3.1)
    _scatter(axes, points, styles)
    top = max(max(x.value, y.value) for _, x, y in points) * 1.08
    axes.plot([0, top], [0, top], color=_GREY, ls=":", lw=1.2)
    axes.annotate("a pass costs the same", (top, top), ha="right", va="bottom", rotation_mode="anchor", fontsize=7.5)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens per target pass", ylabel="speed-up over sequential decoding")
    alt = "Scatter: speed-up against tokens per target pass"
    return _svg(figure, name, alt, {label: styles[label] for label, _, _ in points})


def _scatter(axes: Any, points: Sequence[Point], styles: Mapping[str, Style]) -> None:
    for label, x, y in points:
        bars = {"xerr": _whiskers(x), "yerr": _whiskers(y), "elinewidth": 1.3, "capsize": 2.5}
        axes.errorbar([x.value], [y.value], ls="none", ms=6.5, **styles[label], **bars)


def _whiskers(figure: Interval) -> np.ndarray | None:
    if figure.low is None or figure.high is None:
        return None
    # A median lies inside its range, an interval of moved replicates need not hold its figure: no negative lengths.
    return np.maximum([[figure.value - figure.low], [figure.high - figure.value]], 0)


def _empty(height: float, width: float = _WIDTH) -> Any:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def _figure(height: float) -> tuple[Any, Any]:
    figure = _empty(height)
    return figure, figure.subplots()


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")


def _legend(figure: Any, entries: Mapping[str, Style]) -> None:
    """Above the plot, where it covers nothing."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], ms=5, **look) for look in entries.values()]
    columns = 3 if sum(map(len, entries)) < 40 else 2 if max(map(len, entries)) < _LONG else 1
    rows = -(-len(entries) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - 2))
    figure.legend(handles, list(entries), loc="outside upper left", ncols=columns, columnspacing=1.2)


def _svg(figure: Any, name: str, alt: str, entries: Mapping[str, Style] | None = None) -> str:
    """The figure as an <svg> element whose ids start with `name`, so that several share a page. entries: its legend."""
    if entries is not None:
        _legend(figure, entries)
    out = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'^<svg\b([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'^<svg\b([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def acceptance_by_offset(traces: Sequence[PassTrace]) -> tuple[np.ndarray, np.ndarray]:
    """How often the j-th draft of a pass was offered and how often kept, over all passes: int64 [L] each, j = 1..L."""
    longest = max((max(t.drafted, default=0) for t in traces), default=0)
    offered, kept = np.zeros(longest + 1, np.int64), np.zeros(longest + 1, np.int64)
    for trace in traces:
        np.add.at(offered, trace.drafted, 1)
        np.add.at(kept, trace.accepted, 1)
    # A pass that offers d drafts offers each of the first d.
    return offered[::-1].cumsum()[::-1][1:], kept[::-1].cumsum()[::-1][1:]


def mean_spend(traces: Sequence[PassTrace], points: int = 65) -> np.ndarray:
    """Mean bias spent per image when a share 0..1 of its tokens is committed, float64 [points]."""
    at = np.linspace(0, 1, points)
    curves = []
    for t in traces:
        done = np.cumsum([0, *t.committed]) / max(1, sum(t.committed))
        curves.append(np.interp(at, done, np.cumsum([0, *t.spent])))
    return np.mean(curves, 0)


def mean_progress(traces: Sequence[PassTrace]) -> np.ndarray:
    """Mean share of the image that is committed after 0, 1, 2, ... passes, float64 [passes + 1]; finished images
    stay at 1."""
    curves = [np.cumsum([0, *t.committed]) / max(1, sum(t.committed)) for t in traces]
    return np.array([np.mean(step) for step in zip_longest(*curves, fillvalue=1.0)])


def offset_colours(count: int) -> np.ndarray:
    """Colours of offsets 1..count, uint8 [count, 3], from dark to light."""
    import matplotlib

    # Most kept drafts have a small offset: the first steps of the scale are the widest.
    scale = 0.12 + 0.83 * np.sqrt(np.linspace(0, 1, count)) if count > 1 else np.array([0.5])
    return (matplotlib.colormaps["plasma"](scale)[:, :3] * 255).round().astype(np.uint8)


def cells(trace: PassTrace, grid: tuple[int, int]) -> np.ndarray:
    """`trace.offsets()` by place, int16 [rows, columns]; ends of lines, where the tokens hold some, are left out, and
    so are tokens before those of the picture."""
    rows, columns = grid
    offsets = trace.offsets()
    line = columns + 1 if len(offsets) == rows * (columns + 1) else columns
    return offsets[len(offsets) - rows * line :].reshape(rows, line)[:, :columns]


def overlay(trace: PassTrace, grid: tuple[int, int], colours: np.ndarray) -> np.ndarray:
    """Where each token came from, uint8 RGBA [rows, columns, 4]: the target's own draws are clear, a kept draft has the
    colour of its offset. colours: uint8 [n, 3]; later offsets share the last."""
    offset = np.minimum(cells(trace, grid), len(colours))
    pixels = np.zeros((*grid, 4), np.uint8)
    kept = offset > 0
    pixels[kept, :3], pixels[kept, 3] = colours[offset[kept] - 1], 255
    return pixels


def picture_uri(pixels: np.ndarray) -> str:
    """A photograph-like picture, uint8 [H, W, 3], as the address of a JPEG, a mask [rows, columns, 4] as a PNG's."""
    kind, out = "JPEG" if pixels.shape[-1] == 3 else "PNG", io.BytesIO()
    Image.fromarray(pixels).save(out, kind, optimize=kind == "PNG", quality=_QUALITY, subsampling=0)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
