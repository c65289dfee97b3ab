"""Which images may share slots, and the lanes that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bozzetto.decoding.slots import SlotLane
from bozzetto.decoding.widths import MeasuredWidth, PassTimes
from bozzetto.methods.registry import drafter_options, make_rule
from bozzetto.runtime.graphs import digest_of
from bozzetto.runtime.kept import cache_folder
from bozzetto.settings import GenerateSettings

_RULES = ("seed-exact", "exact")
_FILLERS = ("", "glance")


def in_slots(settings: GenerateSettings) -> bool:
    """Whether decoding/slots.py can do what resolved settings ask for."""
    return settings.tv_budget is None and (settings.drafter == "none" or _in_windows(settings))


def _in_windows(settings: GenerateSettings) -> bool:
    name, options = drafter_options(settings.drafter)
    return name == "jacobi" and settings.rule in _RULES and options.fill in _FILLERS and not options.second


def spelled(drafter: str) -> str:
    """A drafter in one spelling: numbers as they are read, and nothing that is left out anyway. (Whoever asks for
    fresh=2, 02, 002, ... would else be given lanes and files of times without end.)"""
    name, options = drafter_options(drafter)
    values = [(part.name, getattr(options, part.name), part.default) for part in fields(options)]
    return ":".join([name, *(f"{key}={value}" for key, value, usual in values if value != usual)])


@dataclass(frozen=True)
class LaneKind:
    """What images that share slots have in common. drafter: as `spelled`; window: places at most; measured: whether
    they are chosen from pass to pass; guided, filtered: see SlotLane."""

    compile: str
    deterministic: bool
    drafter: str
    rule: str
    window: int
    measured: bool
    guided: bool
    filtered: bool


class Lanes:
    """target_in: a pipeline's targets by (mode of compilation, whether deterministic); dtype: of their passes; filler:
    of a drafter as written, for such a target (None: it has none)."""

    def __init__(self, target_in: Callable[[str, bool], Any], dtype: str, filler: Callable[[str, Any], Any]):
        self.target_in, self.dtype, self.filler = target_in, dtype, filler
        self.made: dict[tuple[LaneKind, int], SlotLane] = {}

    def kind(self, settings: GenerateSettings) -> LaneKind:
        """Of resolved settings. Without a window of their own the tokens of a seed-exact image do not depend on it: it
        may follow the load, up to what suits one image."""
        law, rule = settings.law, "seed-exact" if settings.drafter == "none" else settings.rule
        filtered = bool(law.top_k) or law.top_p != 1 or not law.temperature
        measured = settings.drafter != "none" and settings.window == 0 and rule == "seed-exact"
        length = self.target_in("off", False).length
        window = settings.window_for(1 if measured else settings.batch, length, self.dtype)
        drafter = spelled(settings.drafter)
        return LaneKind(settings.compile, settings.deterministic, drafter, rule, window, measured, law.guided, filtered)

    def make(self, settings: GenerateSettings) -> SlotLane:
        """A lane of `settings.batch` slots."""
        kind = self.kind(settings)
        target = self.target_in(kind.compile, kind.deterministic)
        times = PassTimes(self._times_file(target, kind))
        pace = MeasuredWidth(times, kind.window, 2 if kind.guided else 1, settings.batch)
        width = pace if kind.measured else (lambda images: kind.window)
        rule = make_rule(kind.rule)
        filler = self.filler(kind.drafter, target)
        lane = SlotLane(target, rule, settings.batch, width, kind.window, kind.guided, kind.filtered, filler)
        times.measure = lane.time_pass
        return lane

    def shared(self, settings: GenerateSettings) -> SlotLane:
        """The same lane every time: what is decoded in it has to be finished, or cleared, before the next images."""
        key = (self.kind(settings), settings.batch)
        if key not in self.made:
            self.made[key] = self.make(settings)
        return self.made[key]

    def _times_file(self, target: Any, kind: LaneKind) -> Path | None:
        """Where the seconds of passes are kept, if anywhere; they depend on shapes, not on weights."""
        name = f"times-{digest_of(target.config, self.dtype, str(target.device), kind)}.json"
        folder = cache_folder()
        return None if folder is None else folder / name
