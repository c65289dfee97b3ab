"""What the traces of many images say together: acceptance by offset, bias spent, progress."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from bozzetto.decoding.images import PassTrace


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
