"""What each target pass offered and kept, image by image: the raw material of acceptance maps and timelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bozzetto.decoding.loop import PassEvent
from bozzetto.decoding.state import BatchResult


@dataclass
class PassTrace:
    """One image, one entry per target pass. committed: tokens appended; accepted: how many of them were drafts;
    drafted: positions drafted (inside the image); spent: bias bound of the pass (zeros under exact rules).
    committed - accepted is 1, or 0 in a last pass that kept all drafts."""

    committed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)

    def offsets(self) -> np.ndarray:
        """Where each token came from, int16 [N]: 0 is the target's own draw, j >= 1 the j-th draft of its pass."""
        parts = [np.zeros(0, np.int16)]
        for committed, accepted in zip(self.committed, self.accepted, strict=True):
            offset = np.arange(1, committed + 1, dtype=np.int16)
            parts.append(np.where(offset <= accepted, offset, 0).astype(np.int16))
        return np.concatenate(parts)


class TraceRecorder:
    """Collects the events of one batch; nothing is copied to the host before the end."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.spent: list[Tensor] = []

    def add(self, event: PassEvent) -> None:
        """Note one pass."""
        self.rows.append(torch.stack([event.count, event.accepted, event.drafted]))
        self.spent.append(event.spent)

    def traces(self) -> list[PassTrace]:
        """One trace per image of the batch, without the passes that it took no part in: those after it was finished,
        and those in which a masked model drew images that were behind."""
        total = torch.stack(self.rows, -1)  # [3, B, passes], running sums
        steps = torch.diff(total, prepend=torch.zeros_like(total[..., :1])).tolist()
        bias = torch.stack(self.spent, -1).double()  # [B, passes]
        costs = torch.diff(bias, prepend=torch.zeros_like(bias[..., :1])).tolist()
        traces = []
        for committed, accepted, drafted, spent in zip(*steps, costs, strict=True):
            passes = [i for i, count in enumerate(committed) if count > 0]
            traces.append(PassTrace(*([row[i] for i in passes] for row in (committed, accepted, drafted, spent))))
        return traces


def traced(
    decoder: Any, labels: Tensor, seed: int, index: Tensor, tick: Callable[[int], object]
) -> tuple[BatchResult, list[PassTrace]]:
    """Decode images to the end with any decoder; tick: told after every pass how many tokens are committed in all."""
    if hasattr(decoder, "traced"):
        found: tuple[BatchResult, list[PassTrace]] = decoder.traced(labels, seed, index, tick)
        return found
    recorder = TraceRecorder()
    for event in decoder.stream(labels, seed, index):
        recorder.add(event)
        tick(int(event.count.sum()))
    return decoder.result, recorder.traces()


def acceptance_by_offset(traces: Sequence[PassTrace]) -> tuple[np.ndarray, np.ndarray]:
    """How often the j-th draft of a pass was offered and how often kept, over all passes: int64 [L] each, j = 1..L."""
    longest = max((max(t.drafted, default=0) for t in traces), default=0)
    offered, kept = np.zeros(longest + 1, np.int64), np.zeros(longest + 1, np.int64)
    for trace in traces:
        np.add.at(offered, trace.drafted, 1)
        np.add.at(kept, trace.accepted, 1)
    # A pass that offers d drafts offers each of the first d.
    return offered[::-1].cumsum()[::-1][1:], kept[::-1].cumsum()[::-1][1:]


def mean_spend(traces: Sequence[PassTrace], points: int = 65) -> np.ndarray:
    """Mean bias spent per image when a share 0..1 of its tokens is committed, float64 [points]."""
    at = np.linspace(0, 1, points)
    curves = []
    for t in traces:
        done = np.cumsum([0, *t.committed]) / max(1, sum(t.committed))
        curves.append(np.interp(at, done, np.cumsum([0, *t.spent])))
    return np.mean(curves, 0)


def mean_progress(traces: Sequence[PassTrace]) -> np.ndarray:
    """Mean share of the image that is committed after 0, 1, 2, ... passes, float64 [passes + 1]; finished images
    stay at 1."""
    curves = [np.cumsum([0, *t.committed]) / max(1, sum(t.committed)) for t in traces]
    return np.array([np.mean(step) for step in zip_longest(*curves, fillvalue=1.0)])
