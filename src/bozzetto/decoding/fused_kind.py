"""Which images may share a fused batch, and how one is made for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bozzetto.common.written import spelled
from bozzetto.decoding.fused import FusedBatch
from bozzetto.decoding.widths import MeasuredWidth, PassTimes
from bozzetto.rules.base import Rule
from bozzetto.runtime.graphs import digest_of
from bozzetto.runtime.kept import cache_folder
from bozzetto.settings import GenerateSettings


def fuses(settings: GenerateSettings) -> bool:
    """Whether decoding/fused.py can do what resolved settings ask for."""
    return settings.tv_budget is None and settings.drafter.fused and settings.verifier.fused


@dataclass(frozen=True)
class FusedKind:
    """What images that share a fused batch have in common. drafter: as `spelled`; window: places at most; measured:
    whether they are chosen from pass to pass; guided, filtered: see FusedBatch."""

    compile: str
    deterministic: bool
    drafter: str
    rule: Rule
    window: int
    measured: bool
    guided: bool
    filtered: bool


def fused_kind(settings: GenerateSettings, length: int, dtype: str) -> FusedKind:
    """Of resolved settings; length: tokens of an image. Without a window of their own the tokens of a seed-exact image
    do not depend on it: it may follow the load, up to what suits one image."""
    law, rule, measured = settings.law, settings.verifier, settings.any_window
    filtered = bool(law.top_k) or law.top_p != 1 or not law.temperature
    window = settings.window_for(1 if measured else settings.batch, length, dtype)
    drafter = spelled(settings.drafter)
    return FusedKind(settings.compile, settings.deterministic, drafter, rule, window, measured, law.guided, filtered)


def make_fused(kind: FusedKind, slots: int, target: Any, dtype: str, filler: Any) -> FusedBatch:
    """dtype: of the target's passes; filler: of the kind's drafter, for this target."""
    window = kind.window
    batch = FusedBatch(target, kind.rule, slots, lambda images: window, window, kind.guided, kind.filtered, filler)
    if kind.measured:
        # Where the seconds of passes are kept, if anywhere; they depend on shapes, not on weights.
        name, folder = f"times-{digest_of(target.config, dtype, str(target.device), kind)}.json", cache_folder()
        times = PassTimes(None if folder is None else folder / name, batch.time_pass)
        batch.width = MeasuredWidth(times, window, 2 if kind.guided else 1, slots)
    return batch
