"""What a window rule for continuous tokens could gain at best: the overlap measured, at the price of its passes.

    python benchmarks/path_bound.py --methods jacobi/chains,jacobi/pathwise:epsilon=0.5 --json bound.json

Per method, interleaved with sequential decoding image by image (batch 1): tokens per pass, the speed-up that was
measured, and the bound: tokens per pass times the time of a sequential pass, over the time of the bare pass of that
width, which is the transformer on so many places and T head calls for them, without drafts, couplings and bookkeeping.
`none` against its own bare pass says what bookkeeping costs there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import bozzetto
from bozzetto.common.files import write_text
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.provenance import provenance
from bozzetto.evaluate.sampling import method_settings
from bozzetto.laws.chain import sample_trajectory
from bozzetto.pipeline.kinds import CausalVectors
from bozzetto.pipeline.pipeline import Pipeline


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after one that does not count."""
    work()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


@torch.inference_mode()
def bare_pass(pipe: Pipeline, width: int, guidance: float, rounds: int) -> float:
    """Seconds of one pass over `width` places in the middle of an image and of their T head calls."""
    target = pipe.target_in("auto")
    session = target.begin(torch.zeros(1, dtype=torch.int64), guidance != 1, width)
    tokens, start = torch.randn(1, width, target.token_dim), torch.tensor([target.length // 2])
    noise = torch.randn(width, target.schedule.steps + 1, target.token_dim)

    def work() -> None:
        features = session.score(tokens, start, int(start)).features
        sample_trajectory(target.law(features, guidance, 1.0), None, noise)

    return seconds(work, rounds)


def measure(
    pipe: Pipeline, methods: list[str], guidance: float, images: int, rounds: int
) -> list[dict[str, float | str]]:
    base = bozzetto.GenerateSettings(guidance=guidance, batch=1)
    timed: dict[str, list[tuple[float, float]]] = {method: [] for method in ["none", *methods]}
    batches = {method: pipe.make_batch(method_settings(method, base)) for method in timed}
    for number in range(-1, images):  # the first image warms up
        for method, batch in batches.items():
            label = torch.tensor([number % len(pipe.classes)])
            began = time.perf_counter()
            result = batch.run(label, 0, torch.tensor([max(number, 0)]))
            if number >= 0:
                timed[method].append((time.perf_counter() - began, float(result.passes[0])))
    rows: list[dict[str, float | str]] = []
    plain = [took for took, _ in timed["none"]]
    sequential = median(plain) / pipe.target.length
    for method, runs in timed.items():
        per_pass = pipe.target.length / median(passes for _, passes in runs)
        bare = bare_pass(pipe, batches[method].window, guidance, rounds)
        rows.append(
            {
                "method": method,
                "window": batches[method].window,
                "tokens_per_pass": per_pass,
                "speedup": median(a / b for a, (b, _) in zip(plain, runs, strict=True)),
                "bare_ms": 1000 * bare,
                "ms_per_pass": 1000 * median(took / passes for took, passes in runs),
                "bound": per_pass * sequential / bare,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowers-flow")
    parser.add_argument("--methods", default="jacobi/chains,jacobi/pathwise:epsilon=0.5")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    pipe = bozzetto.load(options.model, dtype=options.dtype)
    if not isinstance(pipe.kind, CausalVectors):
        parser.error(f"{options.model} is not a causal model of continuous tokens")
    rows = measure(pipe, options.methods.split(","), options.guidance, options.images, options.rounds)
    shown = [[str(r["method"]), *(f"{r[k]:.2f}" for k in list(r)[1:])] for r in rows]
    print(table(["method", "window", "tok/pass", "speed-up", "bare ms", "ms/pass", "bound"], shown))
    if options.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        write_text(options.json, json.dumps({"settings": settings, "results": rows, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
