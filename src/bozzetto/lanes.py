"""Which images may share slots, and the lanes that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bozzetto.engine.slots import SlotLane
from bozzetto.engine.widths import MeasuredWidth, PassTimes
from bozzetto.models.graphs import cache_folder, digest_of
from bozzetto.registry import make_rule
from bozzetto.settings import GenerateSettings

_METHODS = (("jacobi", "seed-exact"), ("jacobi", "exact"))


def in_slots(settings: GenerateSettings) -> bool:
    """Whether engine/slots.py can do what resolved settings ask for."""
    windows = settings.drafter == "none" or (settings.drafter, settings.rule) in _METHODS
    return windows and settings.tv_budget is None


@dataclass(frozen=True)
class LaneKind:
    """What images that share slots have in common. window: places at most; measured: whether they are chosen from pass
    to pass; guided, filtered: see SlotLane."""

    compile: str
    deterministic: bool
    rule: str
    window: int
    measured: bool
    guided: bool
    filtered: bool


class Lanes:
    """target_in: a pipeline's targets by (mode of compilation, whether deterministic); dtype: of their passes."""

    def __init__(self, target_in: Callable[[str, bool], Any], dtype: str):
        self.target_in, self.dtype = target_in, dtype
        self.made: dict[tuple[LaneKind, int], SlotLane] = {}

    def kind(self, settings: GenerateSettings) -> LaneKind:
        """Of resolved settings. Without a window of their own the tokens of a seed-exact image do not depend on it: it
        may follow the load, up to what suits one image."""
        law, rule = settings.law, "seed-exact" if settings.drafter == "none" else settings.rule
        filtered = bool(law.top_k) or law.top_p != 1 or not law.temperature
        measured = settings.drafter != "none" and settings.window == 0 and rule == "seed-exact"
        length = self.target_in("off", False).length
        window = settings.window_for(1 if measured else settings.batch, length, self.dtype)
        return LaneKind(settings.compile, settings.deterministic, rule, window, measured, law.guided, filtered)

    def make(self, settings: GenerateSettings) -> SlotLane:
        """A lane of `settings.batch` slots."""
        kind = self.kind(settings)
        target = self.target_in(kind.compile, kind.deterministic)
        times = PassTimes(self._times_file(target, kind))
        pace = MeasuredWidth(times, kind.window, 2 if kind.guided else 1, settings.batch)
        width = pace if kind.measured else (lambda images: kind.window)
        rule = make_rule(kind.rule)
        lane = SlotLane(target, rule, settings.batch, width, kind.window, kind.guided, kind.filtered)
        times.measure = lane.time_pass
        return lane

    def shared(self, settings: GenerateSettings) -> SlotLane:
        """The same lane every time: what is decoded in it has to be finished, or cleared, before the next images."""
        key = (self.kind(settings), settings.batch)
        if key not in self.made:
            self.made[key] = self.make(settings)
        return self.made[key]

    def _times_file(self, target: Any, kind: LaneKind) -> Path:
        """Where the seconds of passes are kept; they depend on shapes, not on weights."""
        return cache_folder() / f"times-{digest_of(target.config, self.dtype, str(target.device), kind)}.json"
