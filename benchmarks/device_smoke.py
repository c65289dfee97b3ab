"""Does everything run on a device, and how fast: whole images of published shapes with random weights.

    python benchmarks/device_smoke.py --device cuda --json device.json

LlamaGen-XL at 256 pixels and Janus-Pro-1B, bfloat16, guidance of their authors, batch 1 and 8, sequential and jacobi.
Random weights cost what trained ones cost, pass by pass; they say nothing about how many drafts are kept, so tokens per
second of jacobi are those of tokens that follow no law worth drafting. memory: the most that was held on the device, in
MiB (on a processor: of the process).

`--device cpu --shapes llamagen-tiny janus-tiny` runs everything small.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import janus_config, resident
from pass_loops import causal_config, causal_network, fill, now

from bozzetto.common.files import write_text
from bozzetto.decoding.loop import EagerBatch
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.provenance import provenance
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import read_method
from bozzetto.targets.llamagen_cache import LlamaGenTarget

METHODS = {"none": ("none", "seed-exact"), "jacobi": ("jacobi", "seed-exact"), "jacobi/exact": ("jacobi", "exact")}
_WORDS = 16  # of a prompt


def llamagen(shape: str, dtype: torch.dtype, device: str) -> Any:
    """XL, or tiny."""
    return LlamaGenTarget(causal_network(causal_config(shape, 16), dtype, device), dtype)


@torch.no_grad()
def janus(shape: str, dtype: torch.dtype, device: str) -> Any:
    """Pro-1B, or tiny; label 0 is a prompt."""
    from bozzetto.adapters.janus import JanusDrawing, janus_prompt
    from bozzetto.adapters.janus import target as janus_target

    config = janus_config(shape == "tiny")
    with torch.device("meta"):
        network = JanusDrawing(config).to(dtype)
    network = network.to_empty(device=device).eval().requires_grad_(False)
    fill(network)
    body = network.model.language_model
    body.rotary_emb = type(body.rotary_emb)(body.config).to(device)  # not a weight
    target = janus_target(network)
    words = [1, *([4] * min(_WORDS, config.text_config.vocab_size - 4)), 2]
    target.add(janus_prompt(words, 1, 2, 0))
    return target


SHAPES: dict[str, tuple[Callable[..., Any], str, float]] = {
    "llamagen-xl": (llamagen, "XL", 1.75),
    "janus-1b": (janus, "1B", 5.0),
    "llamagen-tiny": (llamagen, "tiny", 1.75),
    "janus-tiny": (janus, "tiny", 5.0),
}


def most_held(device: str) -> float:
    """MiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident()["all"]


def measured(target: Any, method: str, guidance: float, batch: int, window: int, device: str) -> dict[str, Any]:
    """One batch of whole images, after one that warms up."""
    drafter, rule = read_method(*METHODS[method])
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    index = torch.arange(batch, device=device)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def draw(seed: int) -> Any:
        made = EagerBatch(target, drafter.make(window, None, None, None), rule, LawSettings(guidance=guidance))
        return made.run(labels, seed, index)

    draw(0)
    began = now(device)
    found = draw(1)
    seconds = now(device) - began
    passes, tokens = int(found.passes.max()), found.tokens.numel()
    assert int(found.tokens.min()) >= 0 and int(found.tokens.max()) < target.vocab
    rates = {"tokens_per_second": tokens / seconds, "ms_per_pass": 1000 * seconds / passes}
    return {**rates, "tokens_per_pass": tokens / int(found.passes.sum()), "memory": most_held(device)}


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    header = ["shape", "batch", "method", "tokens/s", "ms/pass", "tokens/pass", "MiB"]
    lines = []
    for row in rows:
        figures = [f"{row[name]:.{places}f}" for name, places in (("tokens_per_second", 0), ("ms_per_pass", 2))]
        figures += [f"{row['tokens_per_pass']:.2f}", f"{row['memory']:.0f}"]
        lines.append([row["shape"], str(row["batch"]), row["method"], *figures])
    return table(header, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["llamagen-xl", "janus-1b"], choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--methods", nargs="+", default=["none", "jacobi"], choices=list(METHODS))
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--minutes", type=float, default=12.0, help="no row is begun after that")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    end, rows = time.monotonic() + 60 * options.minutes, list[dict[str, Any]]()
    cuda = torch.device(options.device).type == "cuda"
    report = {**provenance(), "device": torch.cuda.get_device_name(options.device) if cuda else "cpu", "rows": rows}
    for shape in options.shapes:
        make, size, guidance = SHAPES[shape]
        target = make(size, getattr(torch, options.dtype), options.device)
        for batch in options.batch:
            for method in options.methods:
                if time.monotonic() > end:
                    continue
                found = measured(target, method, guidance, batch, options.window, options.device)
                rows.append({"shape": shape, "dtype": options.dtype, "batch": batch, "method": method, **found})
                print(f"{shape}, batch {batch}, {method}: {found['tokens_per_second']:.0f} tokens/s", flush=True)
                write_text(options.json, json.dumps(report, indent=1) + "\n")
        del target
    print(shown(rows))


if __name__ == "__main__":
    main()
