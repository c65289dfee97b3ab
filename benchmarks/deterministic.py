"""What bfloat16 changes about seed-exact images, and that `--deterministic` costs nothing.

    python benchmarks/deterministic.py --count 20 --json benchmarks/results/deterministic-bfloat16.json

The same images are drawn sequentially one by one, sequentially in a batch, and speculatively one by one and in a batch;
`different` counts those whose tokens are not those of the first. Rounds of plain and deterministic decoding alternate;
`cost` is the median of the ratios of their times.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from bozzetto import load
from bozzetto.common.files import write_text
from bozzetto.evaluate.provenance import provenance
from bozzetto.pipeline.pipeline import GenerateResult, Pipeline

WAYS = {
    "none, batch 1": ("none", 1),
    "none, batch B": ("none", 0),
    "jacobi, 1": ("jacobi", 1),
    "jacobi, B": ("jacobi", 0),
}


def draw(pipe: Pipeline, way: str, deterministic: bool, options: argparse.Namespace) -> GenerateResult:
    """Images 0..count-1 in one way."""
    drafter, batch = WAYS[way]
    law = {"guidance": options.guidance, "compile": options.compile, "deterministic": deterministic}
    return pipe.generate(count=options.count, drafter=drafter, rule="seed-exact", batch=batch or options.batch, **law)


def measure(pipe: Pipeline, options: argparse.Namespace) -> list[dict[str, float | str]]:
    """A row for each way of decoding."""
    rows: list[dict[str, float | str]] = []
    first: dict[bool, list[torch.Tensor]] = {}
    for way in WAYS:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        row: dict[str, float | str] = {"way": way}
        for number in range(options.rounds + 1):
            for mode in (False, True):
                result = draw(pipe, way, mode, options)
                if number:  # the first warms up
                    seconds[mode].append(result.seconds["target"] + result.seconds["draft"])
        for mode in (False, True):
            tokens = [image.tokens for image in draw(pipe, way, mode, options).images]
            known = first.setdefault(mode, tokens)
            name = "different_deterministic" if mode else "different"
            row[name] = sum(not torch.equal(a, b) for a, b in zip(tokens, known, strict=True))
        row["seconds_per_image"] = median(seconds[False]) / options.count
        row["cost"] = median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--compile", default="max")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(load(options.model, dtype=options.dtype), options)
    if options.json is not None:
        report = {"settings": {**vars(options), "json": None, **provenance()}, "results": rows}
        write_text(options.json, json.dumps(report, indent=2) + "\n")
    print(f"{'way':<14} {'different':>10} {'deterministic':>14} {'s/image':>8} {'cost':>6}")
    for r in rows:
        print(
            f"{r['way']:<14} {r['different']:>10} {r['different_deterministic']:>14} "
            f"{r['seconds_per_image']:>8.3f} {r['cost']:>5.2f}x"
        )


if __name__ == "__main__":
    main()
