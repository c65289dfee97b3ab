"""Fewer denoising steps the more tokens are known (DiSA, arXiv 2505.20297): later tokens have narrower laws, so that a
coarser chain draws them nearly as well. It is another sampler than the one with all steps everywhere.
"""

from __future__ import annotations

from typing import Any

from bozzetto.errors import require
from bozzetto.targets.heads import PackedDenoiser


def annealed_steps(first: int, last: int, done: int, length: int) -> int:
    """Steps of the tokens that are drawn when `done` of `length` are known: evenly from `first` to `last`."""
    share = done / max(1, length - 1)
    return round(first + (last - first) * min(1.0, share))


def annealed(head: PackedDenoiser, sampler: Any, scale: float, length: int) -> list[tuple[Any, PackedDenoiser]]:
    """Schedule and head for tokens drawn when so many of `length` are known (one of these for all, where steps do not
    grow fewer). head: that of the first tokens; scale: of the schedule's times, as the head is told them.

    Raises UsageError for `last_steps` that are not from 1 to those of the first token.
    """
    first, last = head.steps, sampler.last_steps
    if not last:
        return [(sampler.schedule, head)]
    require(1 <= last <= first, "last_steps", last, f"a whole number from 1 to steps = {first}")
    counts = [annealed_steps(first, last, done, length) for done in range(length)]
    made = {count: sampler.with_steps(count) for count in set(counts)}
    heads = {count: (found, head.retimed(found.time * scale)) for count, found in made.items()}
    return [heads[count] for count in counts]
