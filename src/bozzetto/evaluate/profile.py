"""Where a target pass spends its time, against the roofline of the machine, and what decoding makes of it.

A pass is timed alone, as wide as sequential decoding makes it and as the method does; then both decode the same images,
in turn. Pixels are not decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.common.options import ProfileOptions
from bozzetto.decoding.batch import Batch
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.meter import Meter, now
from bozzetto.errors import UsageError, check_number
from bozzetto.evaluate.columns import SEQUENTIAL, table
from bozzetto.evaluate.passes import (
    ATTENTION,
    DISPATCH,
    EMBEDDING,
    NARROW,
    PRODUCTS,
    BarePass,
    Machine,
    bandwidth,
    measure_machine,
    rate,
    roof,
)
from bozzetto.evaluate.provenance import on_threads, provenance
from bozzetto.evaluate.sampling import WARM_UP_PASSES, method_settings
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline
from bozzetto.targets.llamagen_cache import CausalTarget

_BUSY = 1.3  # times the time of an undisturbed pass, from which another one is worth a note
_SHOW_AFTER = 2.0  # seconds until the progress bar appears
_WORTH = 1.05  # gains below this are not mentioned
_MUCH_DISPATCH, _LOW_ROOF, _MUCH_DRAFTING, _FEW_TOKENS = 0.15, 0.6, 0.25, 1.5
_MATRIX_UNIT = 2.0  # bfloat16 products over float32 ones from which there is a unit for them

Figures = Mapping[str, Any]  # a profile, as its JSON file has it: see `profile`
Hint = tuple[float, str]  # how many times faster decoding may get; what to do, and the figure that says so
_Round = tuple[float, list[ImageRequest], Batch, Meter]  # seconds, and what was decoded in them


@dataclass(frozen=True)
class ProfileSettings(ProfileOptions):
    """What is profiled; method: with settings of its own (see `method_settings`). Raises UsageError for a value out of
    range."""

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, 0, 86_400, "a number above 0, at most 86400 (a day)", above=True)
        check_number("threads", self.threads, 0, 4096, "a whole number >= 0, at most 4096", whole=True)
        self.generation  # noqa: B018  (validates its own numbers and names)

    @property
    def generation(self) -> GenerateSettings:
        """How the method decodes."""
        shared = {n: getattr(self, n) for n in ("window", "batch", "guidance", "compile", "deterministic")}
        return method_settings(self.method, GenerateSettings(SEQUENTIAL, "seed-exact", **shared))


def profile(pipe: Pipeline, settings: ProfileSettings, *, progress: bool = False) -> dict[str, Any]:
    """Measure the machine, the pass and the decoding of the images 0 to B - 1 of seed 0; returns {settings, machine,
    passes, parts, decoding, advice}, ready for JSON, times in seconds.

    machine: see `Machine`. passes: alone, of one place and of the window: width; fastest, median, roofline; work:
    {bytes, flops} that it must do; share: of the roofline, above 1 where the weights stay in a cache. parts: of an
    eager pass of `width` places, or of one by our kernels: group (of passes.py), name,
    seconds. decoding: of whole images, sequential, then by the method where it is another one: seconds: of one pass of
    the loop, all included; tokens_per_pass: per image; drafting: share spent drafting and verifying; speedup: over
    sequential decoding of the same images; head_calls: serial calls of a denoising head per pass; jacobi: whether
    --window says how wide a pass is; adaptive: whether the engine makes passes narrower where that is faster. advice:
    see `advise`.

    Raises UsageError for a masked model, whose passes are all different, and for one that transformers runs.
    """
    if not isinstance(pipe.target, CausalTarget):
        prompted = pipe.takes_prompts
        why = "its passes are those of transformers" if prompted else "it is masked, its passes are all different"
        raise UsageError(f"model = {pipe.name!r} is not allowed: {why} (causal models of ours; `bench` is for all)")
    method = pipe.resolve(settings.generation)
    with on_threads(settings.threads), tqdm(total=5, unit="part", disable=not progress, delay=_SHOW_AFTER) as bar:
        figures = _measured(pipe, method, settings.seconds, bar.update)
    known = {"model": pipe.name, **asdict(settings), **asdict(method.law)}
    known |= {"dtype": pipe.dtype, "compile": method.compile, **provenance()}
    return {"settings": known, **figures, "advice": advise({"settings": known, **figures})}


def _measured(pipe: Pipeline, method: GenerateSettings, seconds: float, tick: Callable[[], object]) -> dict[str, Any]:
    """Everything but the settings and the advice."""
    machine = measure_machine(pipe.dtype, pipe.target.device, seconds)
    tick()
    labels = torch.arange(method.batch, device=pipe.target.device) % len(pipe.classes)
    passes, parts = [], []
    for width in sorted({1, pipe.window(method)}):
        bare = BarePass(pipe, method, labels, width)
        passes.append(bare.figures(machine, seconds))
        parts += bare.parts(seconds)
        tick()
    methods = {SEQUENTIAL: pipe.resolve(replace(method, drafter=SEQUENTIAL, rule="auto"))}
    if not method.sequential:
        methods[method.method] = method
    decoding = _decoding(pipe, methods, labels, seconds, tick)
    return {"machine": machine, "passes": passes, "parts": parts, "decoding": decoding}


def _decoding(
    pipe: Pipeline,
    methods: dict[str, GenerateSettings],
    labels: Tensor,
    seconds: float,
    tick: Callable[[], object],
) -> list[dict[str, Any]]:
    """The methods in turn, the first one sequential, until the seconds are spent."""
    device, images = pipe.target.device, (labels.tolist(), 0, range(len(labels)))
    for method in methods.values():
        # With compile, passes of other widths are timed on the way, and on a GPU layers compiled.
        for _ in islice(pipe.passes(*images, method), WARM_UP_PASSES if method.compile == "off" else None):
            pass
        tick()
    rounds: dict[str, list[_Round]] = {name: [] for name in methods}
    began = now(device)
    while not rounds[SEQUENTIAL] or now(device) - began < seconds:
        for name, method in methods.items():
            start = now(device)
            drawn, batch = pipe.decoded(*images, method)
            rounds[name].append((now(device) - start, drawn, batch, batch.meter))
    return [_decoded(pipe, name, methods[name], found, rounds[SEQUENTIAL]) for name, found in rounds.items()]


def _decoded(
    pipe: Pipeline, name: str, method: GenerateSettings, found: list[_Round], sequential: list[_Round]
) -> dict[str, Any]:
    _, images, batch, meter = found[0]
    return {
        "method": name,
        "window": batch.window,
        "tokens_per_pass": method.batch * pipe.target.length / sum(image.passes for image in images),
        "seconds": median(seconds for seconds, *_ in found) / meter.passes,
        "drafting": median(m.parts["draft"] / max(1e-12, m.total) for *_, m in found),
        "speedup": median(slow / fast for (slow, *_), (fast, *_) in zip(sequential, found, strict=True)),
        "head_calls": meter.head_calls / meter.passes,
        "jacobi": method.drafter.window,
        "adaptive": batch.window > 1 and method.window == 0 and batch.prepared,
    }


def _share(figures: Figures, *groups: str) -> float:
    """Of groups of parts in the pass that the method makes."""
    mine = [part for part in figures["parts"] if part["width"] == figures["passes"][-1]["width"]]
    taken = sum(part["seconds"] for part in mine if part["group"] in groups)
    return float(taken / max(1e-12, sum(part["seconds"] for part in mine)))


def advise(figures: Figures) -> list[dict[str, Any]]:
    """What would help most: explicit rules on the figures, {gain, text}, the largest gain first. figures: a profile
    without advice.

    A gain is Amdahl's estimate: the time of a decoding pass over what is left of it when the part that a rule names is
    gone, or as much faster as the figures say. It says what to try first; bozzetto bench says what it gave."""
    found = [hint for rule in (_passes, _window, _drafts, _drafting, _dtype) for hint in rule(figures)]
    found.sort(key=lambda hint: -hint[0])
    return [{"gain": gain, "text": text} for gain, text in found if gain >= _WORTH]


def _without(figures: Figures, share: float) -> float:
    """Gain when this share of the pass is gone."""
    drafting: float = figures["decoding"][-1]["drafting"]
    return 1 / max(1e-12, 1 - (1 - drafting) * min(share, 1.0))


def _passes(figures: Figures) -> Iterator[Hint]:
    """Our kernels take dispatch and small operations away and bring products of their own, so all that a pass takes
    above its roofline may go."""
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
    # Passes by our kernels are not taken apart: what the roofline explains is products.
    products = _share(figures, PRODUCTS) if figures["settings"]["compile"] == "off" else min(1.0, last["share"])
    left = roof(machine, last["work"], "bfloat16") / last["roofline"]
    yield (
        _without(figures, products * (1 - left)),
        f"--dtype bfloat16: matrix products run {ratio:.1f}x faster, and half the bytes are read",
    )


def profile_table(report: dict[str, Any]) -> str:
    """The figures for people."""
    machine = report["machine"]
    sections = [_machine_text(machine), _pass_table(report, machine), _part_table(report), _decoding_table(report)]
    advice = [f"  {hint['gain']:.2f}x  {hint['text']}" for hint in report["advice"]]
    found = "What would help most, by estimate:" if advice else "No rule finds anything that would help."
    return "\n\n".join([*(s for s in sections if s), "\n".join([found, *advice])])


def _machine_text(m: Machine) -> str:
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    return (
        f"{m['processor']}, {m['device']}, {threads}, {m['dtype']}\n"
        f"memory: reads {m['read'] / 1e9:.1f} GB/s, copies {m['copy'] / 1e9:.1f} GB/s; "
        f"matrix products: {m['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16, {m['float32'] / 1e9:.0f} in float32"
    )


def _pass_table(report: dict[str, Any], machine: Machine) -> str:
    header = ["pass of", "ms", "median", "MB", "GFLOP", "roofline ms", "bound by", "GB/s", "GFLOP/s", "of the roofline"]
    rows = []
    for p in report["passes"]:
        read, flops = p["work"]["bytes"], p["work"]["flops"]
        bound = "memory" if read / bandwidth(machine) >= flops / rate(machine) else "products"
        times = [f"{p['width']}", f"{1e3 * p['fastest']:.3f}", f"{1e3 * p['median']:.3f}"]
        work = [f"{read / 1e6:.2f}", f"{flops / 1e9:.3f}", f"{1e3 * p['roofline']:.3f}", bound]
        rows.append([*times, *work, f"{read / p['fastest'] / 1e9:.1f}", f"{flops / p['fastest'] / 1e9:.0f}"])
        rows[-1].append(f"{p['share']:.0%}")
    notes = []
    if any(p["share"] > 1 for p in report["passes"]):
        notes.append("above 100%: the weights stay in the processor's cache, which is faster than the memory measured")
    if any(p["median"] > _BUSY * p["fastest"] for p in report["passes"]):
        notes.append("the median is far above the fastest pass: something else may keep this machine busy")
    return "\n".join([table(header, rows), *notes])


def _part_table(report: dict[str, Any]) -> str:
    """A row per part, a pair of columns per width."""
    parts = report["parts"]
    widths = sorted({p["width"] for p in parts}, reverse=True)
    times = {(p["group"], p["name"], p["width"]): p["seconds"] for p in parts}
    whole = {w: sum(p["seconds"] for p in parts if p["width"] == w) for w in widths}
    names = dict.fromkeys((p["group"], p["name"]) for p in sorted(parts, key=lambda p: (-p["width"], -p["seconds"])))
    header, rows = ["part", *(f"{what} of {w}" for w in widths for what in ("ms", "share"))], []
    for group, name in names:
        row = [name if name == group else f"{group}: {name}"]
        for width in widths:
            spent = times.get((group, name, width), 0.0)
            row += [f"{1e3 * spent:.3f}", f"{spent / max(1e-12, whole[width]):.0%}"]
        rows.append(row)
    return table(header, rows) if rows else ""


def _decoding_table(report: dict[str, Any]) -> str:
    alone = {p["width"]: p["median"] for p in report["passes"]}
    heads = any(d["head_calls"] for d in report["decoding"])
    header = ["method", "window", "tok/pass", "ms/pass", "the pass alone", "drafting", "ms/token", "speedup"]
    header += ["head calls/pass"] if heads else []
    rows = []
    for d in report["decoding"]:
        per_token = 1e3 * d["seconds"] / d["tokens_per_pass"]
        width = f"{d['window']} at most" if d["adaptive"] else str(d["window"])
        row = [d["method"], width, f"{d['tokens_per_pass']:.2f}", f"{1e3 * d['seconds']:.3f}"]
        row += [f"{1e3 * alone[d['window']]:.3f}", f"{d['drafting']:.0%}", f"{per_token:.3f}", f"{d['speedup']:.2f}x"]
        rows.append(row + ([f"{d['head_calls']:.1f}"] if heads else []))
    text = table(header, rows)
    slow = [d for d in report["decoding"] if d["seconds"] * (1 - d["drafting"]) > _BUSY * alone[d["window"]]]
    # What a head prepares counts as the pass's, and so does what follows it in a fused step.
    if slow and not heads and report["settings"]["compile"] == "off":
        text += "\npasses take far longer here than alone: something else may keep this machine busy"
    return text
