"""What would help most: explicit rules on the figures of a profile, each with an estimate of what it gains.

The estimate is Amdahl's: the time of a decoding pass over what is left of it when the part that a rule names is gone,
or as much faster as the figures say. It says what to try first; bozzetto bench says what it gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bozzetto.evaluate.roofline import Machine, Work

PRODUCTS, ATTENTION, NARROW = "matrix products", "attention", "norms, rotation, elementwise"
EMBEDDING, DISPATCH = "embedding, mask", "python and dispatch"
_WORTH = 1.05  # gains below this are not mentioned
_MUCH_DISPATCH, _LOW_ROOF, _MUCH_DRAFTING, _FEW_TOKENS = 0.15, 0.6, 0.25, 1.5
_MATRIX_UNIT = 2.0  # bfloat16 products over float32 ones from which there is a unit for them


@dataclass(frozen=True)
class PassFigures:
    """A pass alone. fastest, median, roofline: seconds; work: what it must do."""

    width: int
    fastest: float
    median: float
    roofline: float
    work: Work

    @property
    def share(self) -> float:
        """Of the roofline; above 1 where the weights stay in a cache."""
        return self.roofline / self.fastest


@dataclass(frozen=True)
class Part:
    """A part of an eager pass of `width` places, or of a compiled one. group: one of the names above, or that of a
    part of compiled passes; seconds: of one pass."""

    width: int
    group: str
    name: str
    seconds: float


@dataclass(frozen=True)
class Decoding:
    """Decoding of whole images. seconds: of one pass of the loop, all included; tokens_per_pass: per image; drafting:
    share spent drafting and verifying; head_calls: serial calls of a denoising head per pass; speedup: over sequential
    decoding of the same images; jacobi: whether --window says how wide a pass is; adaptive: whether the engine makes
    passes narrower where that is faster."""

    method: str
    window: int
    tokens_per_pass: float
    seconds: float
    drafting: float
    speedup: float
    head_calls: float = 0.0
    jacobi: bool = False
    adaptive: bool = False


@dataclass(frozen=True)
class Figures:
    """A profile. passes: of one place and of the window; decoding: sequential, then the method (which may be the same);
    compile: how passes ran."""

    machine: Machine
    passes: list[PassFigures]
    parts: list[Part]
    decoding: list[Decoding]
    compile: str

    def share(self, *groups: str) -> float:
        """Of groups of parts in the pass that the method makes."""
        mine = [p for p in self.parts if p.width == self.passes[-1].width]
        return sum(p.seconds for p in mine if p.group in groups) / max(1e-12, sum(p.seconds for p in mine))


@dataclass(frozen=True)
class Hint:
    """gain: how many times faster decoding may get; text: what to do, and the figure that says so."""

    gain: float
    text: str


def advise(figures: Figures) -> list[Hint]:
    """What the rules find, the largest gain first."""
    found = [hint for rule in (_passes, _window, _drafts, _drafting, _dtype) for hint in rule(figures)]
    return sorted((hint for hint in found if hint.gain >= _WORTH), key=lambda hint: -hint.gain)


def _without(figures: Figures, share: float) -> float:
    """Gain when this share of the pass is gone."""
    used = figures.decoding[-1]
    return 1 / max(1e-12, 1 - (1 - used.drafting) * min(share, 1.0))


def _passes(figures: Figures) -> Iterator[Hint]:
    """Compiling takes dispatch and small operations away and brings products of its own, so all that a pass takes above
    its roofline may go."""
    last, eager = figures.passes[-1], figures.compile == "off"
    dispatch, narrow = (figures.share(*groups) * eager for groups in ((DISPATCH,), (NARROW, EMBEDDING)))
    if last.share >= _LOW_ROOF and dispatch + narrow < _MUCH_DISPATCH:
        return
    what = "faster kernels" if figures.compile == "max" else "--compile max"
    runs = f"a pass of {last.width} place{'s' * (last.width > 1)} runs at {last.share:.0%} of its roofline"
    if figures.parts and eager:
        largest = max((PRODUCTS, ATTENTION), key=figures.share)
        runs += f"; python and dispatch are {dispatch:.0%}, small operations {narrow:.0%}"
        runs += f", {largest} {figures.share(largest):.0%}"
    yield Hint(_without(figures, max(1 - last.share, dispatch + narrow)), f"{what}: {runs}")


def _window(figures: Figures) -> Iterator[Hint]:
    """A narrower one, if tokens per pass grow as a power of the window (as they do from 4 to 32 places: docs/log.md)
    and the time of a pass evenly with its width."""
    used, one, last = figures.decoding[-1], figures.passes[0], figures.passes[-1]
    if not used.jacobi or used.adaptive or last.width == one.width:
        return
    power = math.log(used.tokens_per_pass) / math.log(last.width)
    slope = (1 - used.drafting) * (1 - one.median / last.median) / (last.width - one.width)  # of a decoding pass

    def rate(width: int) -> float:
        return width**power / max(1e-12, 1 - slope * (last.width - width))

    best = max((w for w in (2, 4, 8, 16, 32) if w < last.width), key=rate, default=last.width)
    yield Hint(
        rate(best) / rate(last.width),
        f"--window {best}: a pass of {last.width} places takes {last.median / one.median:.1f}x one of a single place "
        f"and keeps {used.tokens_per_pass:.2f} tokens",
    )


def _drafts(figures: Figures) -> Iterator[Hint]:
    used = figures.decoding[-1]
    if used.window == 1:
        return
    tokens = f"{used.tokens_per_pass:.2f} tokens per pass"
    if used.speedup < 1:
        yield Hint(1 / used.speedup, f"--method none: {used.method} is slower than sequential decoding, at {tokens}")
    if used.tokens_per_pass < _FEW_TOKENS:
        gain = 1 + 1 / used.tokens_per_pass
        yield Hint(gain, f"a better drafter: {tokens} of {used.window} places; this is what one more would gain")


def _drafting(figures: Figures) -> Iterator[Hint]:
    used = figures.decoding[-1]
    if used.drafting < _MUCH_DRAFTING:
        return
    what, why = "a cheaper drafter or rule, or a larger batch", "drafting and verifying"
    if used.head_calls:
        what = (
            "a cheaper head (" + "--compile max; " * (figures.compile != "max") + "fewer steps, which is another law)"
        )
        why = f"{used.head_calls:.1f} serial calls of the head per pass, drafting and verifying"
    yield Hint(1 / max(1e-12, 1 - used.drafting), f"{what}: {why} take {used.drafting:.0%} of decoding")


def _dtype(figures: Figures) -> Iterator[Hint]:
    machine, last = figures.machine, figures.passes[-1]
    ratio = machine.bfloat16 / machine.float32
    if machine.dtype != "float32" or ratio < _MATRIX_UNIT:
        return
    # Compiled passes are not taken apart: what the roofline explains is products.
    products = figures.share(PRODUCTS) if figures.compile == "off" else min(1.0, last.share)
    left = machine.roof(last.work, "bfloat16") / last.roofline
    yield Hint(
        _without(figures, products * (1 - left)),
        f"--dtype bfloat16: matrix products run {ratio:.1f}x faster, and half the bytes are read",
    )
