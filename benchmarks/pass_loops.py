"""What `pass_cost.py` and `gpu_suite.py` share: networks with random weights, the loops they time, rounds and ratios.

Random weights cost what trained ones cost, pass by pass. They say nothing about how many drafts are kept, so a loop
here stands where it is told to stand: after every pass the images are put one position further, whatever the rule kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from bozzetto.decoding.advance import Advance
from bozzetto.decoding.fused import FusedBatch
from bozzetto.decoding.images import ImageRequest
from bozzetto.laws.categorical import LawSettings, law_of
from bozzetto.rules.seed_exact import SeedExact
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig, published_config
from bozzetto.targets.llamagen_cache import LlamaGenTarget

TINY = "tiny"  # of the tests
_BLOCK = 1_000_003  # random numbers that a network repeats; a prime, so that no two rows of a matrix are the same
_SHIFT = 997  # by which they are turned from matrix to matrix


def causal_config(shape: str, grid: int) -> LlamaGenConfig:
    """A published size of LlamaGen, class-conditional; `tiny` has 8 x 8 tokens whatever the grid."""
    if shape == TINY:
        return LlamaGenConfig(dim=64, layers=2, heads=2, vocab=64, grid=8, classes=10)
    return published_config(shape, grid)


@torch.no_grad()
def causal_network(config: LlamaGenConfig, dtype: torch.dtype, device: str = "cpu") -> LlamaGen:
    """With random weights, made in `dtype` at once (float32 first would be twice the memory)."""
    with torch.device("meta"):
        network = LlamaGen(config).to(dtype)
    network = network.to_empty(device=device)
    fill(network)
    network.rope = config.rope().to(device)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Matrices are copies of one block of normal noise of deviation 0.02, vectors are ones."""
    noise = 0.02 * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    for weight in network.parameters():
        if weight.ndim < 2:
            weight.fill_(1.0)
            continue
        noise = noise.roll(_SHIFT)
        block = noise.to(weight.device, weight.dtype)
        for part in weight.view(-1).split(_BLOCK):
            part.copy_(block[: len(part)])


def weights_read(network: LlamaGen) -> int:
    """Parameters that a pass reads: all but the embeddings."""
    parts: Sequence[nn.Module] = (network.layers, network.norm, network.output)
    return sum(weight.numel() for part in parts for weight in part.parameters())


def now(device: torch.device | str) -> float:
    """Seconds; on a GPU when it is done with what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fill_cache(session: Any) -> None:
    """As if images had been decoded: no zeros."""
    for part in session.cache.parts:
        part.uniform_(-1, 1)


class EagerLoop:
    """A plain static-cache loop of the eager target, batch after batch of one token per image: logits, guidance, a
    Gumbel sample with torch's own generator (cheaper than our numbered noise), and nothing to wait for in between."""

    def __init__(self, target: LlamaGenTarget, batch: int, guidance: float):
        self.target, self.batch, self.law = target, batch, LawSettings(guidance=guidance)
        labels = torch.arange(batch, device=target.device) % target.config.classes
        self.session = target.begin(labels, self.law.guided, 1)
        fill_cache(self.session)

    @torch.no_grad()
    def run(self, start: int, tokens: int) -> float:
        """Seconds for `tokens` passes from position `start` on."""
        began = now(self.target.device)
        token = torch.zeros(self.batch, 1, dtype=torch.int64, device=self.target.device)
        count, drawn = torch.full((self.batch,), start, device=self.target.device), []
        for position in range(start, start + tokens):
            logits = self.session.score(token, count, position).logits
            assert logits is not None
            log_p = law_of(logits, self.law)[:, 0]
            gumbel = torch.empty_like(log_p).exponential_().log_().neg_()
            token, count = (log_p + gumbel).argmax(-1, keepdim=True), count + 1
            drawn.append(token)
        torch.cat(drawn, 1)
        return now(self.target.device) - began


class SlotLoop:
    """Our own loop with a window of `width` places, compiled where the target is."""

    def __init__(self, target: LlamaGenTarget, batch: int, width: int, guidance: float):
        self.target, self.width = target, width
        law = LawSettings(guidance=guidance)
        self.lane = FusedBatch(target, SeedExact(), batch, lambda images: width, width, law.guided, False)
        self.lane.admit([ImageRequest(i % target.config.classes, 0, i, law) for i in range(batch)])
        fill_cache(self.lane.session)

    @torch.no_grad()
    def stand_at(self, position: int) -> None:
        """Put all images there."""
        assert self.lane.state is not None
        self.lane.state.count.fill_(position)
        for image in self.lane.images:
            if image is not None:
                image.count = position

    def run(self, start: int, tokens: int) -> float:
        """Seconds for `tokens` passes, at `start` > 0 and one position further each. The first noise, of a window and
        more, is made before; then that of one position per pass."""
        for image in self.lane.images:
            if image is not None:
                image.noise_until = start - 1
        self.stand_at(start - 1)
        self.lane.step()
        taken = 0.0
        for position in range(start, start + tokens):
            self.stand_at(position)
            began = now(self.target.device)
            self.lane.step()
            taken += now(self.target.device) - began
        return taken

    def whole_pass(self) -> Callable[[], object]:
        """A call that runs a pass over the whole cache with what follows it, from where the images stand, and nothing
        on the host: what a CUDA graph can hold."""
        target, session, state, width = self.target, self.lane.session, self.lane.state, self.width
        assert state is not None
        held = state.tensors()  # the loop goes on with others
        advance = Advance(self.lane.rule, target.length, width, False)

        @torch.no_grad()
        def call() -> object:
            scores = session.score(held[0].contiguous(), held[1])
            return advance(scores.logits, scores.features, *held)

        return call


def middle(length: int, tokens: int, widest: int) -> int:
    """Where `tokens` passes begin that lie in the middle of an image. Raises ValueError where they do not fit."""
    start = (length - tokens) // 2
    if tokens < 1 or start < 1 or start + tokens + widest > length:
        raise ValueError(f"{tokens} passes of up to {widest} places do not fit into the middle of {length} tokens")
    return start


@dataclass
class Way:
    """Something to time. row: what it is, at least its part, way and width; prepare: makes a call that runs one round
    and gives the milliseconds of a pass."""

    row: dict[str, Any]
    prepare: Callable[[], Callable[[], float]]


def measure_ways(ways: Sequence[Way], rounds: int, tolerant: bool = False) -> Iterator[dict[str, Any]]:
    """Time ways in rounds whose order rotates, after a round that does not count. Yields a row per way: its rounds, and
    the spread of ratios within rounds, over the eager way of its part and over its own way at width 1 (None where there
    is none). tolerant: a way that cannot be made gives a row with its error, and the others go on."""
    ready: list[tuple[dict[str, Any], Callable[[], float], list[float]]] = []
    for way in ways:
        try:
            run = way.prepare()
            run()
        except Exception as error:
            if not tolerant:
                raise
            yield {**way.row, "error": one_line(error)}
        else:
            ready.append((way.row, run, []))
    for number in range(rounds):
        for i in range(len(ready)):
            _, run, taken = ready[(number + i) % len(ready)]
            taken.append(run())
    of = {(row["part"], row["way"], row["width"]): ms for row, _, ms in ready}
    for row, _, ms in ready:
        eager, one = of.get((row["part"], "eager", row["width"])), of.get((row["part"], row["way"], 1))
        yield {
            **row,
            "rounds_ms": ms,
            "ms_per_pass": spread(ms),
            "over_eager": None if eager is None else quotients(eager, ms),
            "over_width_1": None if one is None else quotients(ms, one),
            "error": None,
        }


def one_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def quotients(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios within rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def shown(figures: dict[str, float] | None, digits: int = 2) -> str:
    """`median (low to high)`."""
    if figures is None:
        return "-"
    middle_one, low, high = (f"{figures[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{middle_one} ({low} to {high})"


def say(line: str) -> None:
    """To the error stream, at once."""
    print(line, file=sys.stderr, flush=True)
