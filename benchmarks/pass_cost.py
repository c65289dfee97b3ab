"""What a pass costs on this machine at published sizes of LlamaGen: an eager loop, our compiled loop, wider passes.

    python benchmarks/pass_cost.py --shapes B L --batch 1 8 --guidance 4 --widths 1 4 8 16 --dtype bfloat16 \
        --compile max --rounds 5 --json benchmarks/results/pass-cost.json

Networks have random weights, and every loop makes `--tokens` passes in the middle of its images. Rows, per size and
batch, interleaved in rounds whose order rotates; ratios are taken within a round, and the median (lowest to highest) is
shown:

    eager       a static-cache loop over the same model: logits, guidance, a Gumbel sample with torch's generator
    slots 1     our sequential loop (decoding/fused.py, seed-exact), run as asked; `over eager` is its speed-up
    slots 4 ... our loop with a window of so many places: ms per pass, and T(W) / T(1)

T(W) / T(1) is also the break-even: speculation with this window is faster than our sequential loop where it keeps more
tokens per pass than that, and `at most` is its speed-up if every draft were kept. Random weights have no meaningful
acceptance: none is claimed, and none is measured.

Kernels are built once and kept in `--cache`, or where `$BOZZETTO_CACHE` says. The loops of all widths share one copy of
the weights in the kernels' layout, beside the eager model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterator
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
    measure_ways,
    middle,
    say,
    shown,
    weights_read,
)

from bozzetto.common.files import write_text
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.provenance import provenance
from bozzetto.runtime.graphs import MODES
from bozzetto.targets.llamagen import SHAPES, LlamaGen
from bozzetto.targets.llamagen_cache import LlamaGenTarget

_GRIDS = {16: 256, 24: 384}  # tokens per side: pixels
Row = dict[str, Any]


def measure(network: LlamaGen, target: LlamaGenTarget, batch: int, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one size and batch. target: the eager one of the network."""
    guidance, tokens = options.guidance, options.tokens
    start = middle(target.length, tokens, max(options.widths))
    ours = target if options.compile == "off" else target.owned(network)

    def way(name: str, width: int) -> Way:
        def prepare() -> Callable[[], float]:
            slots = name == "slots"
            loop = SlotLoop(ours, batch, width, guidance) if slots else EagerLoop(target, batch, guidance)
            return lambda: 1000 * loop.run(start, tokens) / tokens

        return Way({"batch": batch, "part": "pass", "way": name, "width": width}, prepare)

    for row in measure_ways([way("eager", 1), *(way("slots", w) for w in options.widths)], options.rounds):
        price = row["over_width_1"]["median"] if row["way"] == "slots" else None
        most = None if price is None else row["width"] / price
        yield {**row, "break_even_tokens_per_pass": price, "speedup_at_most": most}


def measure_shape(shape: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one size."""
    dtype = getattr(torch, options.dtype)
    config = causal_config(shape, options.grid)
    network = causal_network(config, dtype)
    target, parameters = LlamaGenTarget(network, dtype), weights_read(network)
    rows = []
    for batch in options.batch:
        say(f"LlamaGen-{shape}, {parameters / 1e6:.0f} M parameters per pass, batch {batch}")
        for row in measure(network, target, batch, options):
            rows.append({"shape": shape, "parameters_read": parameters, "length": config.length, **row})
        gc.collect()  # loops hold their caches
    return rows


def shown_table(rows: list[Row]) -> str:
    """The rows for people."""
    header = ["shape", "batch", "loop", "width", "ms per pass", "over eager", "T(W)/T(1)", "break-even tokens/pass"]
    lines = []
    for r in rows:
        even, most = r["break_even_tokens_per_pass"], r["speedup_at_most"]
        line = [r["shape"], str(r["batch"]), r["way"], str(r["width"]), shown(r["ms_per_pass"])]
        line += [shown(r["over_eager"]), "-" if even is None else shown(r["over_width_1"])]
        lines.append([*line, *("-" if x is None else f"{x:.2f}{unit}" for x, unit in ((even, ""), (most, "x")))])
    return table([*header, "at most"], lines)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["B"], choices=[*SHAPES, TINY])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 4, 8, 16], help="1 always takes part")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--grid", type=int, default=16, choices=[*_GRIDS], help="tokens per side: 256 or 384 pixels")
    parser.add_argument("--tokens", type=int, default=64, help="passes per timed loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", default="max", choices=MODES)
    parser.add_argument("--cache", type=Path, help="folder where kernels are kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    options.widths = sorted({1, *options.widths})
    if min(*options.batch, options.widths[0], options.rounds) < 1:
        parser.error("--batch, --widths and --rounds are whole numbers >= 1")
    for shape in options.shapes:
        try:
            middle(causal_config(shape, options.grid).length, options.tokens, options.widths[-1])
        except ValueError as error:
            parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    if options.cache:
        os.environ["BOZZETTO_CACHE"] = str(options.cache)
    rows = [row for shape in options.shapes for row in measure_shape(shape, options)]
    print(
        f"guidance {options.guidance:g}, {options.dtype}, compile {options.compile}, {torch.get_num_threads()} threads"
    )
    print(shown_table(rows))
    print(
        "Random weights: no acceptance is claimed. A window pays where it keeps more tokens per pass than break-even."
    )
    if options.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        report = {"settings": settings, "results": rows, **provenance()}
        write_text(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
