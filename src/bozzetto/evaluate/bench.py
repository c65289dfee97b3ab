"""The benchmark: decoding methods against our own sequential engine, in one run.

A cell is one batch size, guidance and top-k. In a round every method of the cell decodes the same images, in an order
that rotates from round to round, so that a slow minute of the machine hits all of them. Ratios are taken within a round
and reported as median, lowest and highest. Pixels are not decoded: the tokenizer costs the same for every method.

`none` is the sequential engine, `bare` the same static-cache passes of width 1 without laws, noise or bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.checkpoints.own_sampling import OwnSampling
from bozzetto.common.options import BenchOptions
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.meter import Meter, now
from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafts import CODES, Draft
from bozzetto.errors import UsageError, check_number
from bozzetto.evaluate.columns import BARE, BENCH, SEQUENTIAL, table_of
from bozzetto.evaluate.provenance import on_threads, provenance
from bozzetto.evaluate.sampling import WARM_UP_PASSES, method_settings
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline

_MOST = 1_000_000
_LISTS = ("methods", "batches", "guidances", "windows", "top_ks")
_RANGES = {"count": (1, _MOST), "rounds": (1, _MOST), "threads": (0, 4096), "waves": (1, _MOST)}


@dataclass(frozen=True)
class BenchSettings(BenchOptions):
    """methods: none, or DRAFTER/RULE, each with settings of its own (see `method_settings`); batches, guidances (None:
    the model's own), windows (0: chosen for the batch), top_ks (None: the model's own): every combination is a cell of
    the table. Raises UsageError for a value out of range."""

    methods: tuple[str, ...] = (SEQUENTIAL, "jacobi/seed-exact", "jacobi/exact")
    batches: tuple[int, ...] = (1,)
    guidances: tuple[float | None, ...] = (None,)
    windows: tuple[int, ...] = (0,)
    top_ks: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            check_number(name, getattr(self, name), low, high, whole=True)
        check_number("seed", self.seed, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1", whole=True)
        for batch in self.batches:
            check_number("batch", batch, 1, _MOST, whole=True)
        for name in _LISTS:
            if not getattr(self, name):
                raise UsageError(f"{name} is empty: at least one value is wanted")
        for cell in self.cells():
            self.entries(cell)  # every combination validates its own numbers and names

    def with_own(self, own: OwnSampling) -> BenchSettings:
        """With the model's own values in place of what is not set."""
        return replace(
            self,
            guidances=tuple(own.guidance if value is None else value for value in self.guidances),
            top_ks=tuple(own.top_k if value is None else value for value in self.top_ks),
            temperature=own.temperature if self.temperature is None else self.temperature,
            top_p=own.top_p if self.top_p is None else self.top_p,
        )

    def cells(self) -> list[GenerateSettings]:
        """Sequential settings of every cell."""
        law = GenerateSettings(
            SEQUENTIAL,
            "seed-exact",
            temperature=self.temperature,
            top_p=self.top_p,
            compile=self.compile,
            deterministic=self.deterministic,
        )
        return [
            replace(law, guidance=guidance, top_k=top_k, batch=batch)
            for batch in self.batches
            for guidance in self.guidances
            for top_k in self.top_ks
        ]

    def entries(self, cell: GenerateSettings) -> list[tuple[str, GenerateSettings | None]]:
        """(method, settings) of every row of a cell; the bare loop has none. Sequential decoding always takes part."""
        rows: list[tuple[str, GenerateSettings | None]] = [(BARE, None), (SEQUENTIAL, cell)]
        for method in self.methods:
            if method == SEQUENTIAL:
                continue
            settings = [method_settings(method, replace(cell, window=w)) for w in self.windows]
            windowed = settings[0].drafter.window and "@window=" not in method
            rows += [(method, s) for s in (settings if windowed else settings[:1])]
        return rows


Timing = dict[str, Any]  # one decoded batch: see `_timed`


def bench(pipe: Pipeline, settings: BenchSettings, *, progress: bool = False) -> dict[str, Any]:
    """Measure every method in every cell; returns {settings, results}, ready for JSON.

    A result is one method in one cell: batch, guidance, window, top_k; tokens_per_pass; passes; ms_per_pass,
    images_per_second, draft_share: medians over rounds (*_low, *_high: lowest and highest); speedup: sequential time
    over this method's time, same images, same round; rounds; overhead_vs_bare: extra time of sequential decoding over
    the bare loop (row `none`, else None); ceiling, ceiling_next: mean 1 - TV between a position's successive laws, over
    the whole window and at the position next to be committed (see `CeilingProbe`; None: no window); head_calls,
    head_rows: of a denoising head, per batch."""
    settings = replace(settings.with_own(pipe.own), compile=pipe.runner.mode(settings.compile))
    cells = [cell.with_own(pipe.own) for cell in settings.cells()]
    work = sum(len(settings.entries(cell)) * (1 + _rounds(settings, cell)) for cell in cells)
    with on_threads(settings.threads), tqdm(total=work, unit="batch", disable=not progress) as bar:
        rows = [row for cell in cells for row in measure_cell(pipe, settings, cell, bar.update)]
        return {"settings": _provenance(pipe, settings), "results": rows}


def measure_cell(
    pipe: Pipeline, settings: BenchSettings, cell: GenerateSettings, tick: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Warm up, then time interleaved rounds of one cell; returns results as in `bench`."""
    entries = settings.entries(cell)
    ceilings = []
    for _, entry in entries:
        _warm_up(pipe, entry, cell, settings)
        ceilings.append(_ceiling(pipe, entry, cell, settings.seed))
        tick()
    timings: list[list[Timing]] = [[] for _ in entries]
    for number in range(_rounds(settings, cell)):
        first = number % len(entries)
        for i in [*range(first, len(entries)), *range(first)]:
            timings[i].append(_timed(pipe, entries[i][1], cell, settings, number))
            tick()
    bare, sequential = timings[0], timings[1]
    rows = []
    for (method, entry), found, (ceiling, following) in zip(entries, timings, ceilings, strict=True):
        window = 1 if entry is None else pipe.window(entry)
        law = {"batch": cell.batch, "guidance": cell.law.guidance, "window": window, "top_k": cell.law.top_k}
        over = median(_times(sequential, bare)) - 1 if found is sequential else None
        limits = {"overhead_vs_bare": over, "ceiling": ceiling, "ceiling_next": following}
        heads = {key: sum(t[key] for t in found) / len(found) for key in ("head_calls", "head_rows")}
        rows.append({"method": method, **law, **_figures(found, sequential, pipe.target.length), **limits, **heads})
    return rows


def _figures(timings: Sequence[Timing], sequential: Sequence[Timing], length: int) -> dict[str, Any]:
    """Figures of speed of a method's rounds; length: tokens of an image."""
    return {
        "tokens_per_pass": sum(t["tokens"] for t in timings) / sum(t["image_passes"] for t in timings),
        "passes": sum(t["passes"] for t in timings),
        **_spread("ms_per_pass", [1000 * t["seconds"] / t["passes"] for t in timings]),
        **_spread("images_per_second", [t["tokens"] / length / t["seconds"] for t in timings]),
        **_spread("speedup", _times(sequential, timings)),
        "draft_share": median(t["draft"] for t in timings),
        "rounds": len(timings),
    }


def _times(slow: Sequence[Timing], fast: Sequence[Timing]) -> list[float]:
    """How many times as fast, by round."""
    return [a["seconds"] / b["seconds"] for a, b in zip(slow, fast, strict=True)]


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def _rounds(settings: BenchSettings, cell: GenerateSettings) -> int:
    return max(settings.rounds, -(-settings.count // (cell.batch * settings.waves)))


def _images(pipe: Pipeline, batch: int, number: int) -> tuple[Tensor, range]:
    """Labels int64 [B] and indices of the images of a round: all classes in turn."""
    index = range(number * batch, (number + 1) * batch)
    return torch.tensor(index, device=pipe.target.device) % len(pipe.classes), index


def _warm_up(pipe: Pipeline, entry: GenerateSettings | None, cell: GenerateSettings, settings: BenchSettings) -> None:
    if (entry or cell).compile != "off" or cell.compile != "off":  # widths are timed, on a GPU layers compiled
        for number in range(2):
            _timed(pipe, entry, cell, settings, number)
        return
    labels, index = _images(pipe, cell.batch, 0)
    if entry is None:
        passes: Iterator[object] = pipe.bare_passes(labels, cell)
    else:
        passes = pipe.passes(labels.tolist(), 0, index, entry)
    for _ in islice(passes, WARM_UP_PASSES):
        pass


def _ceiling(
    pipe: Pipeline, entry: GenerateSettings | None, cell: GenerateSettings, seed: int
) -> tuple[float | None, float | None]:
    """Mean 1 - TV over the window and at its first position, from one untimed batch; None without a window."""
    window = 1 if entry is None else pipe.window(entry)
    plain = entry is not None and entry.drafter.window and not entry.drafter.trained
    if entry is None or not plain or window == 1 or pipe.target.tokens != CODES:
        return None, None
    probe = CeilingProbe(window, pipe.target.length)
    labels, index = _images(pipe, cell.batch, 0)
    EagerBatch(pipe.target, probe, entry.rule, entry.law).run(labels, seed, torch.tensor(index, device=labels.device))
    by_offset = probe.by_offset()
    return float(by_offset.mean()), float(by_offset[0])


class CeilingProbe(Jacobi):
    """A Jacobi drafter that records the ceiling of its window, 1 - TV between successive laws by offset; it changes no
    token. A position's draft was drawn from its law under the last pass's context; any rule that keeps it must pay for
    TV(new law, old law). 1 - TV is the largest probability of keeping it (the exact rule reaches it; seed-exact reaches
    at least (1 - TV) / (1 + TV), DISD, arXiv 2408.07978)."""

    def __init__(self, window: int, length: int):
        super().__init__(window)
        self.length = length
        self.total = torch.zeros(max(1, window - 1), dtype=torch.float64)
        self.count = torch.zeros(max(1, window - 1), dtype=torch.float64)

    def begin(self, start: Start) -> None:
        super().begin(replace(start, with_laws=True))

    def propose(self, batch: int, limit: int) -> Draft:
        self.proposed = super().propose(batch, limit)
        return self.proposed

    def observe(self, seen: Observation) -> None:
        law = self.proposed.log_q
        if law is not None and law.shape[1]:
            width = law.shape[1]
            overlap = torch.minimum(law.exp(), seen.laws[:, :width].exp()).sum(-1).double()  # [B, L]
            inside = seen.start[:, None] + torch.arange(width, device=overlap.device) < self.length
            self.total[:width] += (overlap * inside).sum(0).cpu()
            self.count[:width] += inside.sum(0).cpu()
        super().observe(seen)

    def by_offset(self) -> Tensor:
        """Mean 1 - TV at each offset in the window, float64 [L]; offset 0 is the position next to be committed."""
        return self.total / self.count.clamp_min(1)


def _timed(
    pipe: Pipeline, entry: GenerateSettings | None, cell: GenerateSettings, settings: BenchSettings, number: int
) -> Timing:
    """A round: `waves` batches of images, together where the engine refills its batch. Returns {seconds: wall time;
    passes: target passes of the batch; tokens, image_passes: summed over its images (their ratio is tokens per pass);
    draft: share of the time spent drafting and verifying; head_calls, head_rows: of a denoising head}."""
    labels, index = _images(pipe, cell.batch * settings.waves, number)
    tokens, began, device = len(index) * pipe.target.length, now(pipe.target.device), pipe.target.device
    meters, passes, image_passes, names = list[Meter](), 0, tokens, labels.tolist()
    if entry is None:
        passes = sum(1 for part in labels.split(cell.batch) for _ in pipe.bare_passes(part, cell))
    else:
        size, image_passes = len(index) if pipe.fuses(pipe.resolve(entry)) else cell.batch, 0
        for first in range(0, len(index), size):
            some = slice(first, first + size)
            images, batch = pipe.decoded(names[some], settings.seed, index[some], entry)
            meters.append(batch.meter)
            image_passes += sum(image.passes for image in images)
    return {
        "seconds": now(device) - began,
        "passes": passes + sum(m.passes for m in meters),
        "tokens": tokens,
        "image_passes": image_passes,
        "draft": sum(m.parts["draft"] for m in meters) / max(1e-12, sum(m.total for m in meters)),
        "head_calls": sum(m.head_calls for m in meters),
        "head_rows": sum(m.head_rows for m in meters),
    }


def _provenance(pipe: Pipeline, settings: BenchSettings) -> dict[str, Any]:
    known = asdict(settings)
    return {
        "model": pipe.name,
        **{name: known.pop(name) for name in _LISTS},
        **known,
        "dtype": pipe.dtype,
        "device": str(pipe.target.device),
        "threads": torch.get_num_threads(),
        **provenance(),
    }


def ranged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the range of their speedup as text."""
    return [{**row, "range": f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"} for row in rows]


def bench_table(report: dict[str, Any]) -> str:
    """The results for people; what is said of a denoising head only where there is one."""
    heads = any(row.get("head_calls") for row in report["results"])
    return table_of((c for c in BENCH if heads or not c.key.startswith("head")), ranged(report["results"]))
