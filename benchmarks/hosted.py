"""Sequential decoding of a decoder of transformers: by transformers' own loops, and by ours with its kernels.

    python benchmarks/hosted.py --dtypes bfloat16,float32 --json hosted.json

A Llama of Janus' depth with random weights draws `--tokens` codes of two rows, [prompt; no prompt], without pictures:
the same steps in every loop, guidance and the choice of the next code included. Loops take turns; a row says the least
and the median milliseconds of a token, and how much faster than transformers' best loop each is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache

from bozzetto.adapters.layers import cache_argument
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.common.files import write_text
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.provenance import provenance

CODES, SCALE = 4096, 3.0
PROMPT = tuple(range(3, 19))


def make(options: argparse.Namespace, dtype: torch.dtype) -> PromptedCodes:
    """A target with one prompt."""
    torch.manual_seed(0)
    shape = {"hidden_size": options.dim, "intermediate_size": 8 * options.dim // 3, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": options.dim // 64, "num_key_value_heads": options.dim // 64}
    config = LlamaConfig(**shape, **heads, vocab_size=1024, max_position_embeddings=2048)
    body = LlamaModel(config).eval().to(dtype).requires_grad_(False)
    head, rows = (torch.randn(CODES, options.dim, dtype=dtype) / options.dim**0.5 for _ in range(2))
    target = PromptedCodes(body, rows, head, options.tokens)
    target.add(Prompt(PROMPT, (1,) * len(PROMPT)))
    return target


def next_codes(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest under guidance, [1, 1], of logits [2, V]."""
    given, without = logits
    return (without + SCALE * (given - without)).argmax().view(1, 1)


@torch.no_grad()
def theirs(target: PromptedCodes, cache: Callable[[Any], Any]) -> list[int]:
    """transformers' cached forward, token by token."""
    body, drawn = target.body, []
    kept = {cache_argument(body.forward): cache(body.config)}
    x = body.get_input_embeddings()(torch.tensor([PROMPT, (1,) * len(PROMPT)]))
    for _ in range(target.length):
        hidden = body(inputs_embeds=x, use_cache=True, **kept).last_hidden_state[:, -1]
        token = next_codes(torch.nn.functional.linear(hidden, target.head).float())
        x = target.embedding[token.expand(2, 1)]
        drawn.append(int(token))
    return drawn


@torch.no_grad()
def ours(target: PromptedCodes) -> list[int]:
    """The session that every method of ours decodes with."""
    session, token, drawn = target.begin(torch.zeros(1, dtype=torch.int64), True, 1), torch.zeros(1, 1).long(), []
    for at in range(target.length):
        logits = session.score(token, torch.tensor([at]), at).logits
        assert logits is not None
        token = next_codes(logits[:, 0])
        drawn.append(int(token))
    return drawn


def measure(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each loop."""
    target, twin = make(options, dtype), make(options, dtype)
    room, own = len(PROMPT) + options.tokens, twin.owned()
    loops: dict[str, Callable[[], list[int]]] = {
        "DynamicCache": lambda: theirs(target, lambda config: DynamicCache(config=config)),
        "StaticCache": lambda: theirs(target, lambda config: StaticCache(config=config, max_cache_len=room)),
        "session, off": lambda: ours(target),
        "session, max": lambda: ours(own),
    }
    drawn = {name: loop() for name, loop in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in tqdm(range(options.rounds), desc=str(dtype), file=sys.stderr):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - began)
    best = min(min(seconds["DynamicCache"]), min(seconds["StaticCache"]))
    rows = []
    for name, found in seconds.items():
        same = sum(a == b for a, b in zip(drawn[name], drawn["DynamicCache"], strict=True)) / options.tokens
        per = [1e3 * part / options.tokens for part in (min(found), statistics.median(found))]
        row = {"dtype": str(dtype).removeprefix("torch."), "loop": name, "ms": per[0], "median": per[1]}
        rows.append({**row, "faster": best / min(found), "same": same})
    return rows


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    rows = [row for name in options.dtypes.split(",") for row in measure(options, getattr(torch, name))]
    print(
        table(list(rows[0]), [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows])
    )
    if options.json:
        write_text(options.json, json.dumps({"about": provenance(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
