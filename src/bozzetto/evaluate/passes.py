"""One target pass alone, on a cache filled to the middle of the image: its time, and the parts of it.

An eager pass is taken apart by operator. What the operators did not take of the time of an undisturbed pass is Python
and dispatch, so that the parts add up to a pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bozzetto.decoding.meter import now
from bozzetto.evaluate.advice import ATTENTION, DISPATCH, EMBEDDING, NARROW, PRODUCTS
from bozzetto.evaluate.roofline import Machine, pass_work, timed
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline
from bozzetto.targets.llamagen_cache import CausalSession, CausalTarget

GRAPH, AROUND = "compiled graph", "python around it"
_ROUNDS = 8  # passes under the profiler, each after some without
_ATTENTION = "scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention scaled_dot_product_attention_math"
_OPERATORS = {
    ATTENTION: f"{_ATTENTION} bmm baddbmm softmax index_copy",
    NARROW: "rms_norm fused_rms_norm silu mul add addcmul sub div pow mean sum rsqrt copy",
    EMBEDDING: "index embedding where masked_fill bitwise_not bitwise_and bitwise_or and or le lt ge eq arange fill "
    "repeat cat clamp_max gather",
}
_GROUP_OF = {operator: group for group, known in _OPERATORS.items() for operator in known.split()}


class BarePass:
    """A pass of `width` places for images of labels int64 [B], which have come to the middle."""

    def __init__(self, pipe: Pipeline, settings: GenerateSettings, labels: Tensor, width: int):
        self.target = pipe.target_in(settings.compile, settings.deterministic)
        self.width, self.start = width, self.target.length // 2
        self.session: CausalSession = self.target.begin(labels, settings.law.guided, width)
        for part in (part for both in self.session.cache for part in both):
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
        fastest, roofline = min(found), machine.roof(work)
        times = {"fastest": fastest, "median": median(found), "roofline": roofline}
        return {"width": self.width, **times, "work": work, "share": roofline / fastest}

    def parts(self, seconds: float) -> list[dict[str, Any]]:
        """Of the time of a pass, the largest first; none of an eager pass on a GPU, whose operators return before they
        are done."""
        if self.target.step is not None:
            return self._compiled(seconds)
        return self._eager(seconds) if self.target.device.type == "cpu" else []

    def _part(self, group: str, name: str, seconds: float) -> dict[str, Any]:
        return {"width": self.width, "group": group, "name": name, "seconds": seconds}

    def _compiled(self, seconds: float) -> list[dict[str, Any]]:
        """The graph's call, and the session's Python around it."""
        step, inside = self.target.step, []
        call = step.chain

        def chain(*arguments: Tensor) -> list[Tensor]:
            began = now(self.target.device)
            found = call(*arguments)
            inside.append(now(self.target.device) - began)
            return found

        step.chain = chain  # of this object, in front of the class's
        try:
            whole = timed(self.run, seconds, self.target.device)
        finally:
            del step.chain
        graph = median(inside[1:])
        rest = max(0.0, median(whole) - graph)
        return [self._part(GRAPH, GRAPH, graph), self._part(AROUND, AROUND, rest)]

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
