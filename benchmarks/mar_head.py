"""What speculation inside the head saves, in milliseconds, at the size of a published MAR head.

    python benchmarks/mar_head.py --size B --steps 100 --json benchmarks/results/mar-head.json

The head has random weights, scaled so that its prediction is that of unit Gaussian tokens plus a random part: timing
does not ask for more. Rows: one token under guidance (two rows), drafted depths 2 to 12. `calls` are serial head calls
per token, `ms` is the fastest of the rounds; `call_ms` is one call of that many rows, so that the figures of a trained
model (its calls per token, printed by `bozzetto bench --model flowers-mar`) can be turned into time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bozzetto.evaluate.provenance import provenance
from bozzetto.laws.chain import sample_trajectory
from bozzetto.laws.schedules import diffusion_schedule
from bozzetto.rules.reflection import Coupled
from bozzetto.targets.denoiser import Denoiser
from bozzetto.targets.heads import DiffusionLaw, PackedDenoiser
from bozzetto.targets.mar import SHAPES, MARConfig

DEPTHS = (2, 4, 6, 8, 12)


def random_head(config: MARConfig, generator: torch.Generator) -> Denoiser:
    """A head of the config's size; its last layer is small."""
    head = Denoiser(config.denoiser).eval().requires_grad_(False)
    for name, weight in head.named_parameters():
        if weight.ndim > 1:
            scale = 0.02 if "final_layer.linear" in name else 0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return head


def fastest(work: Callable[[], object], rounds: int) -> float:
    """Milliseconds of the quickest of some rounds, after one that does not count."""
    work()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def measure(config: MARConfig, steps: int, dtype: torch.dtype, rounds: int) -> list[dict[str, float]]:
    """One row per depth; depth 0 is the sequential sampler."""
    generator = torch.Generator().manual_seed(0)
    schedule = diffusion_schedule(steps, 970)
    head = PackedDenoiser(random_head(config, generator), schedule.time, dtype)
    condition = torch.randn(2, config.dim, generator=generator)
    noise = torch.randn(1, steps + 1, config.token_dim, generator=generator)
    place, keys = torch.zeros(1, dtype=torch.int64), torch.tensor([7])
    law = DiffusionLaw(schedule, head, condition, (1, 1), 2.0, 1.0)
    rows = []
    for depth in (0, *DEPTHS):
        sampler = Coupled(depth) if depth else None

        def token(sampler: Coupled | None = sampler) -> Tensor:
            if sampler is None:
                return sample_trajectory(law, place, noise).token
            return sampler.sample(law, noise, keys)

        before = law.calls
        token()
        calls = law.calls - before
        several = place.repeat(depth + 1)
        x, step = noise[0, :1].repeat(depth + 1, 1), several
        call_ms = fastest(lambda x=x, step=step, several=several: law.kernel(x, step, several), 5 * rounds)
        rows.append({"depth": depth, "calls": calls, "call_ms": call_ms, "ms": fastest(token, rounds)})
    for row in rows:
        row["speedup"] = rows[0]["ms"] / row["ms"]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B", choices=[*SHAPES, "tiny"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    config = MARConfig(32, 1, 2, 16, 1) if options.size == "tiny" else MARConfig(*SHAPES[options.size])
    with torch.no_grad():
        rows = measure(config, options.steps, getattr(torch, options.dtype), options.rounds)
    print(f"MAR-{options.size} head, {options.steps} steps, {options.dtype}, one token, guidance 2")
    print("depth  calls  ms per call  ms per token  speed-up")
    for r in rows:
        print(f"{r['depth']:5d}  {r['calls']:5d}  {r['call_ms']:11.3f}  {r['ms']:12.2f}  {r['speedup']:7.2f}x")
    if options.json:
        settings = {k: str(v) for k, v in vars(options).items()}
        text = json.dumps({"settings": {**settings, **provenance()}, "results": rows}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
