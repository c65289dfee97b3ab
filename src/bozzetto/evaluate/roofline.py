"""What a pass must at least do, and how fast this machine could do it: the roofline (Williams et al., 2009)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bozzetto.decoding.meter import now
from bozzetto.runtime.native import processor
from bozzetto.targets.llamagen_cache import CausalTarget

LARGE = 1 << 30  # bytes that are read to measure memory: far beyond any cache
SIDE = 2048  # of the square matrices
_LEAST_CALLS = 3


@dataclass(frozen=True)
class Machine:
    """read, copy: bytes per second of main memory (a copied byte counts twice, read and written); float32, bfloat16:
    floating point operations per second of a square matrix product in that dtype; dtype: the one asked for, own: in it,
    if it is neither."""

    processor: str
    device: str
    threads: int
    dtype: str
    read: float
    copy: float
    float32: float
    bfloat16: float
    own: float = 0.0

    @property
    def bandwidth(self) -> float:
        """The faster of reading and copying, bytes per second."""
        return max(self.read, self.copy)

    def rate(self, dtype: str) -> float:
        """Operations per second in a dtype."""
        return float(getattr(self, dtype, self.own))

    def roof(self, work: Mapping[str, int], dtype: str = "") -> float:
        """Seconds in which work (see `pass_work`) of this machine's dtype cannot be outdone as long as it reads main
        memory; dtype: the same work in another one."""
        dtype = dtype or self.dtype
        size, own = (getattr(torch, name).itemsize for name in (dtype, self.dtype))
        return max(work["bytes"] * size / own / self.bandwidth, work["flops"] / self.rate(dtype))


def pass_work(target: CausalTarget, batch: int, copies: int, width: int, start: int) -> dict[str, int]:
    """What a pass of `width` places of `batch` images must do, `copies` rows each, after `start` tokens of an image:
    bytes that it reads, and flops, floating point operations (a multiplication and an addition are two).

    Read are the weights of all layers and of the read-out, one embedding per place, and the keys and values of the
    places before; what a pass writes is not counted, nor are narrow operations. A place attends to all before it and to
    itself. The head of continuous tokens is no part of a pass.
    """
    c = target.config
    vocab, token = getattr(target, "vocab", 0), getattr(target, "token_dim", 0)
    rows, past = batch * copies, c.condition_tokens - 1 + start
    maps = c.layers * (4 * c.dim**2 + 3 * c.dim * c.ffn) + vocab * c.dim
    narrow = c.layers * 2 * c.dim + c.dim + (token + 1) * c.dim * bool(token)
    read = maps + narrow + batch * width * c.dim + 2 * c.layers * rows * past * c.dim
    seen = width * past + width * (width + 1) // 2  # pairs of a place and what it attends to
    flops = 2 * rows * width * maps + 4 * c.layers * rows * seen * c.dim + 2 * batch * width * token * c.dim
    return {"bytes": read * target.dtype.itemsize, "flops": flops}


def measure_machine(dtype: str, device: torch.device, seconds: float) -> Machine:
    """Measure memory and matrix products in about five times `seconds`; the fastest call counts."""

    def fastest(call: Callable[[], Any]) -> float:
        return min(timed(call, seconds, device))

    memory, ones = torch.ones(LARGE // 4, device=device), torch.ones(1024, device=device)
    half = len(memory) // 2
    # Sums are bound by arithmetic on some machines, products with a vector by threading on others.
    read = min(fastest(memory.sum), fastest(partial(torch.mv, memory.view(-1, 1024), ones)))
    copy = fastest(partial(memory[:half].copy_, memory[half:]))
    rates = {}
    for name in {"float32", "bfloat16", dtype}:
        square = torch.randn(SIDE, SIDE, device=device).to(getattr(torch, name))
        rates[name] = 2 * SIDE**3 / fastest(partial(torch.mm, square, square))
    where = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Machine(
        where,
        str(device),
        torch.get_num_threads(),
        dtype,
        LARGE / read,
        LARGE / copy,
        own=rates.pop("float16", 0.0),
        **rates,
    )


def timed(call: Callable[[], Any], seconds: float, device: torch.device) -> list[float]:
    """Seconds of each of the calls that fit into `seconds`, at least three, after one that warms up."""
    call()
    found: list[float] = []
    while len(found) < _LEAST_CALLS or sum(found) < seconds:
        began = now(device)
        call()
        found.append(now(device) - began)
    return found
