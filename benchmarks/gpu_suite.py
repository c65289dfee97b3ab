"""Passes and speculation on a GPU, most important things first, in one run that ends in time.

    python benchmarks/gpu_suite.py --device cuda --minutes 9 --json gpu.json

First the machine's two rates: copy bandwidth (bytes read plus bytes written) and bf16 matrix products. Then cells, in
the order of `plan`: LlamaGen-XL at 256 pixels, batch 1, then the shipped model `--model` with real tokens per pass and
its speed-up (`bozzetto bench` in short), then windows, the other sizes, MAR, batches 8, 32 and 4, and 384 pixels.

No cell is begun that would end after `--minutes`, judged by the longest of its kind so far, and one that runs over is
stopped, as is a row that is not compiled after `--way-minutes`. After every cell the JSON is written, whole. A cell or
a row that fails says so in one line and costs nothing else. `--only TEXT ...` keeps the cells whose name holds one of
the texts, so that several runs can share the work.

LlamaGen and MAR have random weights: what is measured is the cost of a pass, and no acceptance is claimed. Rows:

    eager    a static-cache loop, one token per image and pass; of MAR one pass of the backbone, one call of the head
    slots    our loop (decoding/fused.py) with a window of `width` places, compiled as asked, with its bookkeeping
    replay   the same pass with all of the cache, and what follows it, replayed from a CUDA graph: the device's own time
    compiled MAR's backbone or head under torch.compile

`share` is the part of a pass that the machine could not save: the weights, keys and values read once, over the copy
bandwidth, or the arithmetic over the matrix rate, whichever is longer, by the measured time. Ratios are taken within
rounds. `over_eager` is a speed-up, `over_width_1` the price T(W) / T(1) of a wider pass, per way.

`--device cpu --shapes tiny --compile off` runs everything small.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pass_loops import (
    TINY,
    EagerLoop,
    SlotLoop,
    Way,
    causal_config,
    causal_network,
    fill,
    measure_ways,
    middle,
    now,
    one_line,
    say,
    shown,
    spread,
    weights_read,
)

import bozzetto
from bozzetto.common.files import write_text
from bozzetto.evaluate.bench import BenchSettings, bench
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.provenance import provenance
from bozzetto.runtime.graphs import MODES
from bozzetto.targets.heads import DiffusionLaw
from bozzetto.targets.llamagen import LlamaGen
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from bozzetto.targets.mar import MAR, SHAPES, MARConfig
from bozzetto.targets.mar_target import MARSampler, MARTarget

CAUSAL = ("XL", "L", "B", "3B")  # in the order of importance
MASKED = ("MAR-B", "MAR-L", "MAR-H")
_GRIDS = {16: 256, 24: 384}  # tokens per side: pixels
_TINY_PIXELS = 64
_WARM_UP = 3
_CALLS = 20  # of a MAR backbone per round; heads get ten times as many
Row = dict[str, Any]


class OutOfTime(BaseException):
    """The deadline has come. (No Exception: nothing on the way may take it for a failure of its own.)"""


@dataclass(frozen=True)
class Rates:
    """bandwidth: bytes per second, read plus written; arithmetic: operations per second of a bf16 matrix product."""

    bandwidth: float
    arithmetic: float

    def floor_ms(self, read: float, operations: float) -> float:
        """Milliseconds that nothing on this machine can undercut."""
        return 1000 * max(read / self.bandwidth, operations / self.arithmetic)


@torch.no_grad()
def measure_rates(device: str, rounds: int = 10) -> Rates:
    """The machine's two rates: medians of some rounds, small on a CPU."""
    small = torch.device(device).type == "cpu"
    source = torch.empty(1 << (24 if small else 31), dtype=torch.uint8, device=device).random_()
    sink, side = torch.empty_like(source), 256 if small else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copies = timed(lambda: sink.copy_(source), device, rounds, 5)
    products = timed(lambda: a @ b, device, rounds, 5)
    figures = spread(copies)["median"], spread(products)["median"]
    return Rates(2 * len(source) / figures[0] * 1000, 2 * side**3 / figures[1] * 1000)


def timed(work: Callable[[], object], device: str, rounds: int, calls: int) -> list[float]:
    """Milliseconds per call of each round, after some that do not count."""
    for _ in range(_WARM_UP):
        work()
    return [_one_round(work, device, calls) for _ in range(rounds)]


def _one_round(work: Callable[[], object], device: str, calls: int) -> float:
    began = now(device)
    for _ in range(calls):
        work()
    return 1000 * (now(device) - began) / calls


class Replay:
    """The device's part of a call, as a CUDA graph."""

    def __init__(self, work: Callable[[], object]):
        self.work = work  # holds what the graph reads
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = work()

    def __call__(self) -> None:
        self.graph.replay()


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs longer; inside another one, whichever ends first."""

    def stop(*_: object) -> None:
        raise OutOfTime

    began, outer = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)[0]
    seconds = min(seconds, outer) if outer else seconds
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        left = max(outer - (time.monotonic() - began), 1e-3) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


class Suite:
    """The cells of a run. Models are kept: a size that comes again finds its layers compiled."""

    def __init__(self, options: argparse.Namespace, rates: Rates, deadline: float):
        self.options, self.rates, self.deadline = options, rates, deadline
        self.device, self.dtype = options.device, getattr(torch, options.dtype)
        self.replays = torch.device(options.device).type == "cuda"
        self.causal = functools.cache(self._causal)
        self.masked = functools.cache(self._masked)

    def forget(self) -> None:
        """Let go of all models, when memory has run out."""
        self.causal.cache_clear()
        self.masked.cache_clear()

    def _causal(self, shape: str, grid: int) -> tuple[LlamaGen, LlamaGenTarget, LlamaGenTarget]:
        """A network, its eager target and the one that is compiled as asked."""
        network = causal_network(causal_config(shape, grid), self.dtype, self.device)
        eager = LlamaGenTarget(network, self.dtype)
        ours = eager if self.options.compile == "off" else eager.owned(network)
        return network, eager, ours

    def _masked(self, shape: str) -> tuple[MAR, MARTarget]:
        with torch.device("meta"):
            network = MAR(masked_config(shape))
        network = network.to_empty(device=self.device).eval().requires_grad_(False)
        fill(network)
        return network, MARTarget(network, MARSampler(passes=min(64, network.config.length)), self.dtype)

    def passes(self, shape: str, grid: int, batch: int, widths: Sequence[int]) -> Iterator[Row]:
        """Rows of a size of LlamaGen: eager, and windows of each of `widths` as loops and as replays."""
        o = self.options
        network, eager, ours = self.causal(shape, grid)
        tokens = min(o.tokens, network.config.length // 4)
        start = middle(network.config.length, tokens, max(widths))
        where = {"shape": shape, "pixels": pixels(shape, grid), "batch": batch, "part": "pass", "tokens": tokens}

        def row(way: str, width: int) -> Row:
            floor = self.rates.floor_ms(*work_of(network, batch, width, start + tokens // 2, o.guidance != 1))
            return {**where, "way": way, "width": width, "floor_ms": floor}

        def plain() -> Callable[[], float]:
            loop = EagerLoop(eager, batch, o.guidance)
            return lambda: 1000 * loop.run(start, tokens) / tokens

        made: dict[int, SlotLoop] = {}

        def slots(width: int) -> Callable[[], float]:
            loop = made[width] = SlotLoop(ours, batch, width, o.guidance)
            return lambda: 1000 * loop.run(start, tokens) / tokens

        def replay(width: int) -> Callable[[], float]:
            again = Replay(made[width].whole_pass())
            return lambda: _one_round(again, self.device, tokens)

        ways = [Way(row("eager", 1), plain)]
        for width in widths:
            ways.append(Way(row("slots", width), functools.partial(slots, width)))
            if self.replays:
                ways.append(Way(row("replay", width), functools.partial(replay, width)))
        yield from self._measure(ways)

    def backbone(self, shape: str, batch: int) -> Iterator[Row]:
        """Rows of a size of MAR in the middle of an image of 64 passes: a pass of the backbone, and one of the serial
        calls of the head that follow it, for the tokens of that pass."""
        o, c = self.options, masked_config(shape)
        network, target = self.masked(shape)
        known_count, width = c.length // 2, max(1, c.length // 64)
        labels = torch.arange(batch, device=self.device) % c.classes
        tokens = torch.randn(batch, c.length, c.token_dim, device=self.device)
        order = torch.arange(c.length, device=self.device).expand(batch, -1)
        known, places = order[:, :known_count], order[:, known_count : known_count + width]
        law = target.law(target.features(labels, tokens, known, places, True), (batch, width), o.guidance, 1.0)
        law.modulations()
        x = torch.randn(batch * width, c.token_dim, device=self.device)

        def features() -> object:
            return target.features(labels, tokens, known, places, True)

        def call(law: DiffusionLaw = law) -> object:
            return law.all_places(x, target.schedule.steps // 2)

        def fast_call() -> Callable[[], object]:
            fast = copy.copy(law)
            fast.head = copy.copy(target.head)
            fast.head.narrow = fast.head.few = self._compile(target.head.narrow)
            return functools.partial(call, fast)

        common = {"shape": shape, "pixels": pixels(shape, c.grid), "batch": batch, "width": width}
        parts = [("backbone", 1, features, lambda: self._compile(features), _CALLS)]
        parts.append(("head call", target.schedule.steps, call, fast_call, 10 * _CALLS))
        for part, per_pass, work, fast, calls in parts:
            floor = self.rates.floor_ms(*work_of_masked(network, batch, known_count, width, part, self.dtype))
            row = {**common, "part": part, "calls_per_pass": per_pass, "floor_ms": floor}
            yield from self._three_ways(row, work, fast, calls)

    def _compile(self, work: Callable[..., Any]) -> Callable[..., Any]:
        options: Any = {"max_autotune": self.options.compile == "max"}
        return torch.compile(work, dynamic=False, options=options)

    def _three_ways(
        self, row: Row, work: Callable[[], object], faster: Callable[[], Callable[[], object]], calls: int
    ) -> Iterator[Row]:
        """Eager; and where compiling is asked for, what `faster` makes, on a GPU also replayed."""
        made: list[Callable[[], object]] = []

        def prepare(way: str) -> Callable[[], float]:
            run = work
            if way != "eager":
                made.append(run := Replay(made[0]) if way == "replay" else faster())
            for _ in range(_WARM_UP):
                run()
            return lambda: _one_round(run, self.device, calls)

        names = ["eager"] if self.options.compile == "off" else ["eager", "compiled"]
        names += ["replay"] if len(names) > 1 and self.replays else []
        ways = [Way({**row, "way": name}, functools.partial(prepare, name)) for name in names]
        yield from self._measure(ways)

    def _measure(self, ways: Sequence[Way]) -> Iterator[Row]:
        """Rows with shares. What is not ready (compiled) in time fails alone."""
        ways = [Way(way.row, functools.partial(self._in_time, way.prepare)) for way in ways]
        for row in measure_ways(ways, self.options.rounds, tolerant=True):
            yield row if row["error"] else {**row, "share": row["floor_ms"] / row["ms_per_pass"]["median"]}

    def _in_time(self, prepare: Callable[[], Callable[[], float]]) -> Callable[[], float]:
        most = 60 * self.options.way_minutes
        try:
            with stopped_after(most):
                return prepare()
        except OutOfTime:
            if time.monotonic() >= self.deadline:
                raise
            raise TimeoutError(f"not ready after {most:g} s") from None

    def speculation(self, batch: int) -> Iterator[Row]:
        """Rows of `bozzetto bench` for a trained model: real tokens per pass, speed-ups over our sequential loop."""
        o = self.options
        pipe = bozzetto.load(o.model, dtype=o.dtype, device=self.device)
        methods = ["none", "jacobi/seed-exact"] + (["none@compile=off"] if o.compile != "off" else [])
        windows = tuple(w for w in o.widths if 1 < w <= pipe.target.length)
        settings = BenchSettings(
            methods=tuple(methods),
            batches=(batch,),
            guidances=(o.model_guidance,),
            windows=windows,
            count=o.rounds * batch,
            rounds=o.rounds,
            compile=o.compile,
        )
        for row in bench(pipe, settings)["results"]:
            yield {"shape": pipe.name, "part": "image", "way": row.pop("method"), **row, "error": None}


def masked_config(shape: str) -> MARConfig:
    """A published size of MAR, or a tiny one."""
    if shape == f"MAR-{TINY}":
        return MARConfig(32, 1, 2, 16, 1, grid=8, classes=10, buffer=4)
    return MARConfig(*SHAPES[shape.removeprefix("MAR-")])


def pixels(shape: str, grid: int) -> int:
    """Side of an image."""
    return _TINY_PIXELS if shape.endswith(TINY) else _GRIDS[grid]


def work_of(network: LlamaGen, batch: int, width: int, position: int, guided: bool) -> tuple[float, float]:
    """Bytes and operations of a pass at a position: every weight once, keys and values of what is there once."""
    c, weights = network.config, weights_read(network)
    rows, columns = batch * (2 if guided else 1), position + width
    size = network.output.weight.element_size()
    read = size * (weights + 2 * c.layers * c.dim * rows * columns)
    return read, 2 * rows * width * (weights + 2 * c.layers * c.dim * columns)


def work_of_masked(
    network: MAR, batch: int, known: int, width: int, part: str, dtype: torch.dtype
) -> tuple[float, float]:
    """Bytes and operations of a guided pass of the backbone, or of a call of the head for `width` tokens per image."""
    c, size, rows = network.config, torch.empty(0, dtype=dtype).element_size(), 2 * batch
    if part == "head call":
        blocks = network.diffloss.net.res_blocks
        weights = sum(block.mlp[i].weight.numel() for block in blocks for i in (0, 2))
        return size * weights, 2 * rows * width * weights
    encoder, decoder = (
        sum(weight.numel() for weight in blocks.parameters() if weight.ndim > 1)
        for blocks in (network.encoder_blocks, network.decoder_blocks)
    )
    seen, whole = c.buffer + known, c.buffer + c.length
    attention = 2 * c.depth * c.dim * (seen**2 + whole**2)
    return size * (encoder + decoder), 2 * rows * (encoder * seen + decoder * whole + attention)


@dataclass(frozen=True)
class Cell:
    """A part of the run. kind: cells of one kind take about the same time; rows: measures."""

    name: str
    kind: str
    rows: Callable[[], Iterator[Row]]


def plan(options: argparse.Namespace, suite: Suite) -> list[Cell]:
    """The cells of a run, the most important first."""
    causal = [s for s in (*CAUSAL, TINY) if s in options.shapes]
    masked = [s for s in MASKED if s in options.shapes] + ([f"MAR-{TINY}"] if TINY in options.shapes else [])
    first, others, one, more = causal[:1], causal[1:], options.batch[0], options.batch[1:]
    wide = [w for w in options.widths if w > 1]

    def passes(shapes: Sequence[str], grid: int, batches: Sequence[int], windows: bool) -> list[Cell]:
        return [
            Cell(
                f"LlamaGen-{s} {pixels(s, grid)} batch {b}" + (" windows" if windows else ""),
                "windows" if windows else "sequential",
                functools.partial(suite.passes, s, grid, b, [1, *wide] if windows else [1]),
            )
            for b in batches
            for s in shapes
        ]

    def model(batches: Sequence[int]) -> list[Cell]:
        return [Cell(f"{options.model} batch {b}", "model", functools.partial(suite.speculation, b)) for b in batches]

    cells = passes(first, 16, [one], False) + model([one]) + passes(first, 16, [one], True)
    cells += passes(others, 16, [one], False)
    cells += [Cell(f"{s} batch {one}", "MAR", functools.partial(suite.backbone, s, one)) for s in masked]
    cells += passes(first, 16, more, False) + model(more[:1]) + passes(others, 16, [one], True)
    cells += [Cell(f"{s} batch {b}", "MAR", functools.partial(suite.backbone, s, b)) for b in more for s in masked]
    cells += passes(others, 16, more, False) + passes(first, 16, more, True) + model(more[1:])
    large = [s for s in causal if s != TINY]
    cells += passes(large, 24, options.batch, False) + passes(large, 24, options.batch, True)
    cells += passes(others, 16, more, True)
    return [cell for cell in cells if not options.only or any(text in cell.name for text in options.only)]


def run_cells(
    cells: Sequence[Cell], deadline: float, report: Row, save: Callable[[], None], forget: Callable[[], None]
) -> None:
    """Run cells into report["cells"] until the deadline (of time.monotonic); the others are named in "not_run"."""
    longest: dict[str, float] = {}
    for cell in cells:
        began = time.monotonic()
        if began >= deadline or began + longest.get(cell.kind, 0.0) > deadline:
            report["not_run"].append(cell.name)
            continue
        rows: list[Row] = []
        found: Row = {"name": cell.name, "rows": rows, "error": None}
        try:
            with stopped_after(deadline - began):
                for row in cell.rows():
                    rows.append(row)
        except OutOfTime:
            found["error"] = "stopped at the deadline"
        except Exception as error:
            found["error"] = one_line(error)
        found["seconds"] = time.monotonic() - began
        if "OutOfMemory" in f"{found['error']} {[row.get('error') for row in rows]}":
            forget()
        elif found["error"] is None:
            longest[cell.kind] = max(longest.get(cell.kind, 0.0), found["seconds"])
        report["cells"].append(found)
        say(f"{cell.name}: {found['seconds']:.0f} s" + (f", {found['error']}" if found["error"] else ""))
        save()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    report["finished"] = not report["not_run"]
    save()


def shown_report(report: Row) -> str:
    """The rows for people."""
    passes, images, failed = [], [], []
    for cell in report["cells"]:
        failed += [f"{cell['name']}: {cell['error']}"] if cell["error"] else []
        for r in cell["rows"]:
            if r["error"]:
                failed.append(f"{cell['name']}, {r['way']} {r['width']}: {r['error']}")
            elif r["part"] == "image":
                line = [r["shape"], str(r["batch"]), r["way"], str(r["window"]), f"{r['tokens_per_pass']:.2f}"]
                speed = {name: r[f"speedup{end}"] for name, end in (("median", ""), ("low", "_low"), ("high", "_high"))}
                images.append([*line, f"{r['ms_per_pass']:.2f}", f"{r['images_per_second']:.2f}", shown(speed)])
            else:
                line = [r["shape"], str(r["pixels"]), str(r["batch"]), r["part"], r["way"], str(r["width"])]
                line += [shown(r["ms_per_pass"], 3), f"{r['floor_ms']:.3f}", f"{100 * r['share']:.0f}%"]
                passes.append([*line, shown(r["over_eager"]), shown(r["over_width_1"])])
    header = ["shape", "pixels", "batch", "part", "way", "width", "ms per pass", "floor ms", "share", "over eager"]
    text = [table([*header, "T(W)/T(1)"], passes)] if passes else []
    if images:
        header = ["model", "batch", "method", "window", "tokens/pass", "ms/pass", "images/s", "speed-up"]
        text.append(table(header, images))
    text += [f"failed: {line}" for line in failed]
    text += [f"not run: {', '.join(report['not_run'])}"] if report["not_run"] else []
    return "\n".join([*text, "Sizes of LlamaGen and MAR have random weights: no acceptance is claimed for them."])


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to end, counted from the start")
    parser.add_argument("--way-minutes", type=float, default=3.0, help="the longest that one row may take to compile")
    parser.add_argument("--shapes", nargs="+", default=[*CAUSAL, *MASKED], choices=[*CAUSAL, *MASKED, TINY])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 4], help="in the order of importance")
    parser.add_argument("--widths", nargs="+", type=int, default=[4, 8, 16], help="windows; 1 always takes part")
    parser.add_argument("--guidance", type=float, default=4.0, help="of random weights")
    parser.add_argument("--tokens", type=int, default=64, help="passes per timed loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", default="max", choices=MODES)
    parser.add_argument("--model", default="flowers", help="a trained model, shipped or a folder")
    parser.add_argument("--model-guidance", type=float, default=2.0)
    parser.add_argument("--only", nargs="+", default=[], help="cells whose name holds one of these")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    if min(*options.batch, *options.widths, options.rounds, options.tokens) < 1:
        parser.error("--batch, --widths, --rounds and --tokens are whole numbers >= 1")
    return options


def main(argv: list[str] | None = None) -> None:
    deadline = time.monotonic()
    options = _options(argv)
    deadline += 60 * options.minutes
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    gpu = torch.cuda.get_device_name(options.device) if torch.device(options.device).type == "cuda" else None
    report: Row = {"settings": settings, "gpu": gpu, "rates": None, "cells": [], "not_run": [], "finished": False}
    report |= provenance()

    def save() -> None:
        write_text(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n")

    rates = measure_rates(options.device)
    report["rates"] = asdict(rates)
    print(f"{gpu or 'CPU'}: copy {rates.bandwidth / 1e9:.0f} GB/s, products {rates.arithmetic / 1e12:.1f} TFLOP/s")
    save()
    suite = Suite(options, rates, deadline)
    run_cells(plan(options, suite), deadline, report, save, suite.forget)
    print(shown_report(report))


if __name__ == "__main__":
    main()
