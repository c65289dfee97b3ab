"""One target pass alone, on a cache filled to the middle of the image: its time, the parts of it, and what it must at
least do on this machine, the roofline (Williams et al., 2009).

An eager pass is taken apart by operator. What the operators did not take of the time of an undisturbed pass is Python
and dispatch, so that the parts add up to a pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bozzetto.decoding.meter import now
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline
from bozzetto.runtime.native import processor
from bozzetto.targets.llamagen_cache import CausalSession, CausalTarget

PRODUCTS, ATTENTION, NARROW = "matrix products", "attention", "norms, rotation, elementwise"
EMBEDDING, DISPATCH = "embedding, mask", "python and dispatch"
KERNELS, AROUND = "layers by our kernels", "around them"
LARGE = 1 << 30  # bytes that are read to measure memory: far beyond any cache
SIDE = 2048  # of the square matrices
_LEAST_CALLS = 3
_ROUNDS = 8  # passes under the profiler, each after some without
_ATTENTION = "scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention scaled_dot_product_attention_math"
_OPERATORS = {
    ATTENTION: f"{_ATTENTION} bmm baddbmm softmax index_copy",
    NARROW: "rms_norm fused_rms_norm silu mul add addcmul sub div pow mean sum rsqrt copy",
    EMBEDDING: "index embedding where masked_fill bitwise_not bitwise_and bitwise_or and or le lt ge eq arange fill "
    "repeat cat clamp_max gather",
}
_GROUP_OF = {operator: group for group, known in _OPERATORS.items() for operator in known.split()}


# processor, device, threads; read, copy: bytes per second of main memory (a copied byte counts twice, read and
# written); float32, bfloat16: floating point operations per second of a square matrix product in that dtype; dtype: the
# one asked for, own: in it, if it is neither.
Machine = Mapping[str, Any]


def bandwidth(machine: Machine) -> float:
    """The faster of reading and copying, bytes per second."""
    return float(max(machine["read"], machine["copy"]))


def rate(machine: Machine, dtype: str = "") -> float:
    """Operations per second in a dtype ("": the one asked for)."""
    return float(machine.get(dtype or machine["dtype"], machine["own"]))


def roof(machine: Machine, work: Mapping[str, int], dtype: str = "") -> float:
    """Seconds in which work (see `pass_work`) of this machine's dtype cannot be outdone as long as it reads main
    memory; dtype: the same work in another one."""
    dtype = dtype or machine["dtype"]
    size, own = (getattr(torch, name).itemsize for name in (dtype, machine["dtype"]))
    return max(work["bytes"] * size / own / bandwidth(machine), work["flops"] / rate(machine, dtype))


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
    rates = {name: _rate(name, device, seconds) for name in {"float32", "bfloat16", dtype}}
    return {
        "processor": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "read": LARGE / read,
        "copy": LARGE / copy,
        "float32": rates["float32"],
        "bfloat16": rates["bfloat16"],
        "own": rates.get("float16", 0.0),
    }


def _rate(dtype: str, device: torch.device, seconds: float) -> float:
    """Operations per second of a matrix product: the largest of SIDE rows at most of which a few fit into `seconds`. (A
    processor that does not multiply bfloat16 takes minutes for one of SIDE.)"""
    for side in (SIDE // 8, SIDE // 4, SIDE // 2, SIDE):
        square = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        best = min(timed(partial(torch.mm, square, square), seconds / 8, device))
        if _LEAST_CALLS * 8 * best > seconds:  # the next takes eight times as long
            break
    return 2 * side**3 / best


def timed(call: Callable[[], Any], seconds: float, device: torch.device) -> list[float]:
    """Seconds of each of the calls that fit into `seconds`, at least three, after one that warms up."""
    call()
    found: list[float] = []
    while len(found) < _LEAST_CALLS or sum(found) < seconds:
        began = now(device)
        call()
        found.append(now(device) - began)
    return found


class BarePass:
    """A pass of `width` places for images of labels int64 [B], which have come to the middle."""

    def __init__(self, pipe: Pipeline, settings: GenerateSettings, labels: Tensor, width: int):
        self.target = pipe.target_in(settings.compile)
        self.width, self.start = width, self.target.length // 2
        self.session: CausalSession = self.target.begin(labels, settings.law.guided, width)
        for part in self.session.cache.parts:
            part.normal_()
        token = pipe.kind.blank_inputs(labels)
        self.inputs = token.expand(-1, width, *token.shape[2:]).contiguous()
        self.starts = torch.full_like(labels, self.start)

    def run(self) -> None:
        """Once."""
        self.session.score(self.inputs, self.starts, self.start)

    def figures(self, machine: Machine, seconds: float) -> dict[str, Any]:
        """Times of passes in `seconds`, and what a pass has to do; see `profile`."""
        found = timed(self.run, seconds, self.target.device)
        work = pass_work(self.target, len(self.starts), self.session.copies, self.width, self.start)
        fastest, roofline = min(found), roof(machine, work)
        times = {"fastest": fastest, "median": median(found), "roofline": roofline}
        return {"width": self.width, **times, "work": work, "share": roofline / fastest}

    def parts(self, seconds: float) -> list[dict[str, Any]]:
        """Of the time of a pass, the largest first; none of an eager pass on a GPU, whose operators return before they
        are done."""
        if self.target.own:
            return self._own(seconds)
        return self._eager(seconds) if self.target.device.type == "cpu" else []

    def _part(self, group: str, name: str, seconds: float) -> dict[str, Any]:
        return {"width": self.width, "group": group, "name": name, "seconds": seconds}

    def _own(self, seconds: float) -> list[dict[str, Any]]:
        """The layers' call and the read-out, and the session's Python around them."""
        cache, inside = self.session.cache, []
        call = cache.run

        def run(*arguments: Any) -> Any:
            began = now(self.target.device)
            found = call(*arguments)
            inside.append(now(self.target.device) - began)
            return found

        cache.run = run  # type: ignore[assignment]  # of this object, in front of the class's
        try:
            whole = timed(self.run, seconds, self.target.device)
        finally:
            del cache.run
        kernels = median(inside[1:])
        rest = max(0.0, median(whole) - kernels)
        return [self._part(KERNELS, KERNELS, kernels), self._part(AROUND, AROUND, rest)]

    def _eager(self, seconds: float) -> list[dict[str, Any]]:
        """By operator, each in its least disturbed round, against the fastest pass without the profiler."""
        whole, names = float("inf"), product_names(self.target)
        least: dict[tuple[str, str], float] = {}
        for _ in range(_ROUNDS):
            whole = min([whole, *timed(self.run, seconds / _ROUNDS, self.target.device)])
            with _no_notices(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                self.run()
            spent = by_part(seen.key_averages(group_by_input_shape=True), names)
            least = {key: min(found, least.get(key, found)) for key, found in spent.items()}
        scale = min(1.0, whole / sum(least.values()))  # the profiler itself takes time
        parts = [self._part(*key, found * scale) for key, found in least.items()]
        parts.append(self._part(DISPATCH, DISPATCH, max(0.0, whole - sum(part["seconds"] for part in parts))))
        return sorted(parts, key=lambda part: -part["seconds"])


def product_names(target: CausalTarget) -> dict[tuple[int, ...], str]:
    """What the weights of a matrix product [out, in] are called; maps of one shape share their names."""
    c, names = target.config, dict[tuple[int, ...], str]()
    shapes = {"wqkv": (3 * c.dim, c.dim), "wo": (c.dim, c.dim), "w1 w3": (2 * c.ffn, c.dim), "w2": (c.dim, c.ffn)}
    if vocab := getattr(target, "vocab", 0):
        shapes["head"] = (vocab, c.dim)
    if token := getattr(target, "token_dim", 0):
        shapes["tokens in"] = (c.dim, token)
    for name, shape in shapes.items():
        names[shape] = f"{names[shape]}, {name}" if shape in names else name
    return names


def by_part(events: Iterable[Any], names: Mapping[tuple[int, ...], str]) -> dict[tuple[str, str], float]:
    """(group, name) -> seconds, from the profiler's records by operator and shapes. Operators that only
    look at tensors in another way, or make room for them, count as dispatch and are left out."""
    spent: dict[tuple[str, str], float] = {}
    for event in events:
        operator, shapes = event.key.rpartition("::")[2].strip("_"), [tuple(s) for s in event.input_shapes]
        weight = {"mm": shapes[1:2], "addmm": shapes[2:3], "linear_pointwise": shapes[1:2]}.get(operator)
        if weight:
            shape = weight[0] if operator == "linear_pointwise" else weight[0][::-1]
            key = (PRODUCTS, names.get(shape, "others"))
        elif operator in _GROUP_OF:
            key = (_GROUP_OF[operator],) * 2
        else:
            continue
        spent[key] = spent.get(key, 0.0) + event.self_cpu_time_total / 1e6
    return spent


@contextlib.contextmanager
def _no_notices() -> Iterator[None]:
    """Without the lines that some builds of the profiler print on file descriptor 2 when it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
