"""Suites: fixed sets of methods, measured in one run in speed (bench), picture quality and bias (evaluate)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bozzetto.checkpoints.folders import read_config
from bozzetto.errors import UsageError
from bozzetto.evaluate.bench import BenchSettings, bench, ranged
from bozzetto.evaluate.bias import SURPRISAL
from bozzetto.evaluate.columns import METHOD, SEQUENTIAL, Column, table_of
from bozzetto.evaluate.evaluation import EvaluateSettings, evaluate
from bozzetto.evaluate.features import FeatureExtractor, features_of
from bozzetto.evaluate.metrics import Comparison, resamples
from bozzetto.evaluate.photographs import data_path, photographs
from bozzetto.evaluate.quality import QUALITY
from bozzetto.evaluate.sampling import slug
from bozzetto.evaluate.shards import Samples, read_samples
from bozzetto.methods.table import read_method, split_method
from bozzetto.pipeline.pipeline import Pipeline, is_hosted, model_folder

Methods = Mapping[str, str]
_WHOLE = ("followers",)


@dataclass(frozen=True)
class Part:
    """What a suite does with one model. family: the models it can be run on; model: the shipped one ("": the one asked
    for); methods: by method, what the literature calls it; base: the model that it is a variant of, measured too."""

    family: str
    model: str
    methods: Methods
    base: str = ""


# Methods by what the literature calls them: the papers', what they compare with, and the better alternatives.
_LOSSY = {
    "eagle:tree=dynamic/lantern:k=1000:delta=0.1": "LANTERN",
    "eagle:tree=mc-sim-25/lantern++:k=10:lambda=2": "LANTERN++",
    "eagle:tree=mc-sim-25/grouped:group=8": "GSD",
    "eagle:tree=mc-sim-25/annealed": "COOL-SD",
    "eagle:tree=mc-sim-25/cascade": "CASCADE",
}
_TREES = {
    "eagle:tree=mc-sim-25/tree": "EAGLE static tree, exact",
    "eagle:tree=mc-sim-25/traversal": "traversal, exact",
}
_LANTERN = {
    "none": "sequential",
    "eagle:tree=dynamic/tree": "EAGLE-2, exact",
    **_TREES,
    "eagle:tree=chain-12/block": "block on a chain, exact",
    **_LOSSY,
    "jacobi/seed-exact": "coupled Jacobi, seed-exact",
}
_CODES = {
    "none": "sequential",
    "jacobi/seed-exact": "coupled Jacobi, seed-exact",
    "jacobi/exact": "coupled Jacobi, exact",
    "jacobi/exact@window=64": "coupled Jacobi, windows of 64, exact",
    "jacobi:fill=eagle/exact": "windows filled by a drafter, exact",
    "jacobi:second=eagle:places=12/exact@window=32": "windows of 32 with second guesses, exact",
    "jacobi:second=eagle:places=16:reach=4/exact@window=64": "windows of 64, second guesses of four tokens, exact",
    "eagle:tree=chain-12/block": "block on a chain, exact",
    "eagle:tree=chain-32/block": "block on a chain of 32, exact",
    "eagle:tree=chain-32:stop=0.1/block": "chain of 32, stopped by entropy, exact",
    **_TREES,
    **_LOSSY,
}
_FLOW = {
    "none": "sequential",
    "none/reflection": "head-level speculation, exact",
    "jacobi/chains": "coupled chains, exact",
    "sketch/joint": "joint, exact",
    "sketch/block": "block, exact",
    "sketch/chains": "coupled chains of a drafter, exact",
    "sketch/cspd:variant=paper": "CSpD as published",
    "sketch:length=4/cspd:variant=released": "CSpD as released",
    "jacobi/pathwise:epsilon=0.1": "pathwise, epsilon 0.1",
    "jacobi/pathwise:epsilon=0.5": "pathwise, epsilon 0.5",
}
_MASKED = {
    "none": "MAR, 256 passes",
    "none@passes=64": "MAR, 64 passes (another law)",
    "none/coupled": "head-level speculation, exact",
    "none/coupled@passes=64": "both",
    "model:length=8/cspd:variant=released": "CSpD as released",
}
_STEPS = {"none@steps=8": "half the steps of the head", "none@last_steps=4": "DiSA, annealed steps of the head"}
_DRIFT = {
    "none": "Drift-AR, one step",
    "jacobi/pathwise:epsilon=0.1": "Drift-AR, pathwise, epsilon 0.1",
    "jacobi/pathwise:epsilon=0.5": "Drift-AR, pathwise, epsilon 0.5",
    "sketch:length=6/pathwise:epsilon=0.5": "Drift-AR, its draft model",
    "sketch:length=12:stop=0.3/pathwise:epsilon=0.5": "Drift-AR, drafts stopped by entropy",
}
_GLANCE = {"jacobi:fill=glance:fresh=1/exact": "windows that a glance fills, exact"}

# `followers` has all of the project.
SUITES: Mapping[str, tuple[Part, ...]] = MappingProxyType(
    {
        "lantern": (Part("llamagen", "", _LANTERN),),
        "continuous": (
            Part("flow", "flowers-flow", {**_FLOW, "jacobi/pathwise:epsilon=0.3": "pathwise, epsilon 0.3"}),
            Part("mar", "flowers-mar", _MASKED),
        ),
        "followers": (
            Part("llamagen", "flowers", {**_CODES, **_GLANCE}),
            Part("llamagen", "emoji", _CODES),
            Part("flow", "flowers-flow", {**_FLOW, **_STEPS}),
            Part("drift", "flowers-drift", _DRIFT, base="flowers-flow"),
        ),
    }
)


def suite_models(name: str, asked: str) -> list[tuple[str, Part]]:
    """(model, part) of what is to be run: the part for the family of the model asked for, on that model; if the suite
    has none for it, every part on its own shipped model. `followers` is run whole for any shipped model. Raises
    UsageError for a model of transformers, which no part is for."""
    parts = SUITES[name]
    if is_hosted(asked):
        raise UsageError(f"suite {name!r} is not allowed with {asked}: its methods are for models of ours (--methods)")
    if name in _WHOLE and asked in {part.model for part in parts}:
        return [(part.model, part) for part in parts]
    family = read_config(model_folder(asked)).get("family")
    mine = {part.family: (asked, part) for part in reversed(parts) if part.family == family}
    return list(mine.values()) or [(part.model, part) for part in parts]


def run_suite(
    parts: Sequence[tuple[Pipeline, Methods]],
    name: str,
    speed: BenchSettings,
    quality: EvaluateSettings,
    extractor: FeatureExtractor,
    out: Path,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Bench first, with nothing else going on, then samples and their figures; returns {kind, suite, results, bench,
    evaluation}: results with the columns of both, the other two with one report per model. `speed` and `quality` give
    everything but the methods; samples lie in `out`, of several models in a folder each."""
    timed = [bench(pipe, replace(speed, methods=tuple(m)), progress=progress) for pipe, m in parts]
    report: dict[str, Any] = {"kind": "suite", "suite": name, "results": [], "bench": timed, "evaluation": []}
    for (pipe, methods), measured in zip(parts, timed, strict=True):
        folder = out if len(parts) == 1 else out / pipe.name
        judged = evaluate(pipe, replace(quality, methods=tuple(methods)), extractor, folder, progress=progress)
        report["evaluation"].append(judged)
        report["results"] += _joined(pipe, methods, measured, judged)
    for pipe, _ in parts:
        base = next((part.base for part in SUITES[name] if part.model == pipe.name), "")
        if base:
            compare_with_base(report, pipe, base, extractor, out, quality.bootstrap, quality.data)
    return report


_SPENT = (replace(SURPRISAL, heading="bias, nats/token"), Column("tv_spent", "bound/token", digits=3, interval=False))
_MOVED = (Column("moved", "mean distance", digits=4, interval=False), Column("farthest", "largest", digits=3))
_JOINED = [column for column in QUALITY if column.joined]


def _joined(pipe: Pipeline, methods: Methods, timed: dict[str, Any], judged: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a model with the columns of speed and of quality."""
    rows = []
    for row in timed["results"]:
        method = row["method"]
        if method not in methods:
            continue  # the bare loop
        found: dict[str, Any] = next((r for r in judged["results"] if r["method"] == method), {})
        quality = {column.key: found.get(column.key) for column in (*_JOINED, *_SPENT, *_MOVED)}
        title = {"model": pipe.name, "title": methods[method], "exact": _exact(method)}
        rows.append({**title, **row, **quality, "images": found.get("count")})
    return rows


def _exact(method: str) -> bool:
    """Whether a method draws from the law of the sequential sampler of the model as it is."""
    name, *own = method.split("@")
    _, rule = read_method(*split_method(name))
    return rule.exact and not any(part.startswith(_OTHER_LAW) for part in own)


_OTHER_LAW = ("steps=", "last_steps=", "passes=", "guidance_schedule=")


def frechet_over(
    base: Samples, drawn: Samples, reference: torch.Tensor, extractor: FeatureExtractor, bootstrap: int
) -> dict[str, float]:
    """Fréchet distance of `drawn` less that of `base`, both from reference features [m, d], with a paired interval: the
    same indices (classes) and the same reference images in each resample."""
    w, v = resamples(len(drawn), bootstrap, seed=1), resamples(len(reference), bootstrap, seed=2)
    before, after = (torch.from_numpy(features_of(extractor, samples.pixels)) for samples in (base, drawn))
    change = Comparison(after, reference, w, v, base=Comparison(before, reference, w, v)).change()
    assert change is not None
    return asdict(change)


def compare_with_base(
    report: dict[str, Any],
    pipe: Pipeline,
    base: str,
    extractor: FeatureExtractor,
    out: Path,
    bootstrap: int,
    data: Path | None = None,
) -> None:
    """Mark the rows of a suite's variant as not exact and add `over_base` (images per second over those of the base
    model's sequential sampler, both timed in this run) and `frechet_over_base`. out: the folder of the suite's
    samples; data: photographs (None: those named by the model)."""
    timed = {(r["model"], r["method"]): r["images_per_second"] for r in report["results"]}
    if (base, SEQUENTIAL) not in timed:
        return
    real = photographs(pipe, data_path(pipe, data), "test").images
    reference = torch.from_numpy(features_of(extractor, real)).double()
    begun = read_samples(out / base / "samples" / SEQUENTIAL)
    for row in report["results"]:
        if row["model"] == pipe.name:
            drawn = read_samples(out / pipe.name / "samples" / slug(row["method"]))
            row["base"], row["exact"] = base, False  # its law is another one than its base model's
            row["over_base"] = timed[pipe.name, row["method"]] / timed[base, SEQUENTIAL]
            row["frechet_over_base"] = frechet_over(begun, drawn, reference, extractor, bootstrap)


_OVER_BASE = Column("frechet_over_base", "", digits=1, sign=True)
_COLUMNS = (
    METHOD,
    Column("title", "as", digits=None),
    Column("exact", "exact", digits=None),
    Column("tokens_per_pass", "tok/pass"),
    Column("ms_per_pass", "ms/pass"),
    Column("draft_share", "drafting", digits=0, unit="%"),
    Column("speedup", "speed-up", unit="x"),
    Column("range", "range", digits=None),
    Column("head_calls", "head calls", digits=0),
    *(column for column in QUALITY if column.key.startswith("frechet")),
)


def suite_table(report: dict[str, Any]) -> str:
    """The figures of both for people, one block per model."""
    blocks = []
    for timed, judged in zip(report["bench"], report["evaluation"], strict=True):
        rows = [r for r in report["results"] if r["model"] == timed["settings"]["model"]]
        blocks.append(_model_table(rows, timed["settings"], judged["settings"]))
    return "\n\n".join(blocks)


def _model_table(results: list[dict[str, Any]], s: dict[str, Any], e: dict[str, Any]) -> str:
    vectors = any(r["head_calls"] for r in results)
    columns = [column for column in _COLUMNS if vectors or column.key != "head_calls"]
    shown = [{**r, "exact": "yes" if r["exact"] else "no"} for r in ranged(results)]
    notes = [
        f"{r['method']} against sequential {r['base']}: {r['over_base']:.2f}x as fast (same run, one after the other), "
        f"Fréchet {_OVER_BASE.shown(r)}."
        for r in results
        if "base" in r
    ]
    first = results[0]
    notes += [
        f"{s['model']}, speed: batch {first['batch']}, guidance {first['guidance']:g}, {s['dtype']}, {s['threads']} "
        f"threads, {first['rounds']} images per method in turn; speed-up over none of the same round (median, range).",
        f"quality: {e['count']} images per method, {e['extractor']}, 95% intervals; change: against none.",
        "head calls: serial, per batch. distance: from the target's own samples with the same noise, token units."
        if vectors
        else "bias: change of the tokens' surprisal under the target's law. bound: what the rule sums per token.",
    ]
    return "\n".join([table_of([*columns, *(_MOVED if vectors else _SPENT)], shown), *notes])
