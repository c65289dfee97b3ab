"""What would help most: explicit rules on the figures of a profile, each with an estimate of what it gains.

The estimate is Amdahl's: the time of a decoding pass over what is left of it when the part that a rule names is gone,
or as much faster as the figures say. It says what to try first; bozzetto bench says what it gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from bozzetto.evaluate.passes import ATTENTION, DISPATCH, EMBEDDING, NARROW, PRODUCTS, roof

_WORTH = 1.05  # gains below this are not mentioned
_MUCH_DISPATCH, _LOW_ROOF, _MUCH_DRAFTING, _FEW_TOKENS = 0.15, 0.6, 0.25, 1.5
_MATRIX_UNIT = 2.0  # bfloat16 products over float32 ones from which there is a unit for them

Figures = Mapping[str, Any]  # a profile, as its JSON file has it: see `profile`
Hint = tuple[float, str]  # how many times faster decoding may get; what to do, and the figure that says so


def _share(figures: Figures, *groups: str) -> float:
    """Of groups of parts in the pass that the method makes."""
    mine = [part for part in figures["parts"] if part["width"] == figures["passes"][-1]["width"]]
    taken = sum(part["seconds"] for part in mine if part["group"] in groups)
    return float(taken / max(1e-12, sum(part["seconds"] for part in mine)))


def advise(figures: Figures) -> list[dict[str, Any]]:
    """What the rules find, {gain, text}, the largest gain first. figures: a profile without advice."""
    found = [hint for rule in (_passes, _window, _drafts, _drafting, _dtype) for hint in rule(figures)]
    found.sort(key=lambda hint: -hint[0])
    return [{"gain": gain, "text": text} for gain, text in found if gain >= _WORTH]


def _without(figures: Figures, share: float) -> float:
    """Gain when this share of the pass is gone."""
    drafting: float = figures["decoding"][-1]["drafting"]
    return 1 / max(1e-12, 1 - (1 - drafting) * min(share, 1.0))


def _passes(figures: Figures) -> Iterator[Hint]:
    """Compiling takes dispatch and small operations away and brings products of its own, so all that a pass takes above
    its roofline may go."""
    last, eager = figures["passes"][-1], figures["settings"]["compile"] == "off"
    dispatch, narrow = (_share(figures, *groups) * eager for groups in ((DISPATCH,), (NARROW, EMBEDDING)))
    if last["share"] >= _LOW_ROOF and dispatch + narrow < _MUCH_DISPATCH:
        return
    what = "faster kernels" if figures["settings"]["compile"] == "max" else "--compile max"
    runs = f"a pass of {last['width']} place{'s' * (last['width'] > 1)} runs at {last['share']:.0%} of its roofline"
    if figures["parts"] and eager:
        largest = max((PRODUCTS, ATTENTION), key=partial(_share, figures))
        runs += f"; python and dispatch are {dispatch:.0%}, small operations {narrow:.0%}"
        runs += f", {largest} {_share(figures, largest):.0%}"
    yield (_without(figures, max(1 - last["share"], dispatch + narrow)), f"{what}: {runs}")


def _window(figures: Figures) -> Iterator[Hint]:
    """A narrower one, if tokens per pass grow as a power of the window (as they do from 4 to 32 places: docs/log.md)
    and the time of a pass evenly with its width."""
    used, one, last = figures["decoding"][-1], figures["passes"][0], figures["passes"][-1]
    if not used["jacobi"] or used["adaptive"] or last["width"] == one["width"]:
        return
    power = math.log(used["tokens_per_pass"]) / math.log(last["width"])
    wider = 1 - one["median"] / last["median"]  # of a pass, what its width takes
    slope = (1 - used["drafting"]) * wider / (last["width"] - one["width"])  # of a decoding pass

    def rate(width: int) -> float:
        return width**power / max(1e-12, 1 - slope * (last["width"] - width))

    best = max((w for w in (2, 4, 8, 16, 32) if w < last["width"]), key=rate, default=last["width"])
    times = last["median"] / one["median"]
    yield (
        rate(best) / rate(last["width"]),
        f"--window {best}: a pass of {last['width']} places takes {times:.1f}x one of a single place "
        f"and keeps {used['tokens_per_pass']:.2f} tokens",
    )


def _drafts(figures: Figures) -> Iterator[Hint]:
    used = figures["decoding"][-1]
    if used["window"] == 1:
        return
    tokens = f"{used['tokens_per_pass']:.2f} tokens per pass"
    if used["speedup"] < 1:
        yield (1 / used["speedup"], f"--method none: {used['method']} is slower than sequential decoding, at {tokens}")
    if used["tokens_per_pass"] < _FEW_TOKENS:
        gain = 1 + 1 / used["tokens_per_pass"]
        yield (gain, f"a better drafter: {tokens} of {used['window']} places; this is what one more would gain")


def _drafting(figures: Figures) -> Iterator[Hint]:
    used = figures["decoding"][-1]
    if used["drafting"] < _MUCH_DRAFTING:
        return
    what, why = "a cheaper drafter or rule, or a larger batch", "drafting and verifying"
    if used["head_calls"]:
        what = (
            "a cheaper head ("
            + "--compile max; " * (figures["settings"]["compile"] != "max")
            + "fewer steps, which is another law)"
        )
        why = f"{used['head_calls']:.1f} serial calls of the head per pass, drafting and verifying"
    yield (1 / max(1e-12, 1 - used["drafting"]), f"{what}: {why} take {used['drafting']:.0%} of decoding")


def _dtype(figures: Figures) -> Iterator[Hint]:
    machine, last = figures["machine"], figures["passes"][-1]
    ratio = machine["bfloat16"] / machine["float32"]
    if machine["dtype"] != "float32" or ratio < _MATRIX_UNIT:
        return
    # Compiled passes are not taken apart: what the roofline explains is products.
    products = _share(figures, PRODUCTS) if figures["settings"]["compile"] == "off" else min(1.0, last["share"])
    left = roof(machine, last["work"], "bfloat16") / last["roofline"]
    yield (
        _without(figures, products * (1 - left)),
        f"--dtype bfloat16: matrix products run {ratio:.1f}x faster, and half the bytes are read",
    )
