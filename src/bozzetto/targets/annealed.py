"""Fewer denoising steps the more tokens are known (DiSA, arXiv 2505.20297): later tokens have narrower laws, so that a
coarser chain draws them nearly as well. It is another sampler than the one with all steps everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from bozzetto.errors import require
from bozzetto.laws.schedules import DiffusionSchedule, FlowSchedule
from bozzetto.targets.heads import PackedDenoiser

S = TypeVar("S", FlowSchedule, DiffusionSchedule)


def annealed_steps(first: int, last: int, done: int, length: int) -> int:
    """Steps of the tokens that are drawn when `done` of `length` are known: evenly from `first` to `last`."""
    share = done / max(1, length - 1)
    return round(first + (last - first) * min(1.0, share))


def annealed(
    head: PackedDenoiser, schedule: Callable[[int], S], times: Callable[[S], Tensor], last: int, length: int
) -> list[tuple[S, PackedDenoiser]]:
    """Schedule and head for tokens drawn when so many of `length` are known. head: that of the first tokens; schedule:
    of a number of steps; times: what the head is told at the steps of a schedule; last: steps of the last token.

    Raises UsageError for a last number that is not from 1 to that of the first token.
    """
    first = head.steps
    require(1 <= last <= first, "last_steps", last, f"a whole number from 1 to steps = {first}")
    counts = [annealed_steps(first, last, done, length) for done in range(length)]
    made = {count: schedule(count) for count in set(counts)}
    heads = {count: (found, head.retimed(times(found))) for count, found in made.items()}
    return [heads[count] for count in counts]
