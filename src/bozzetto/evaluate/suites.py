"""Suites: fixed sets of methods, measured in one run in speed (bench), picture quality and bias (evaluate)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bozzetto.evaluate.bench import BenchSettings, bench
from bozzetto.evaluate.evaluation import EvaluateSettings, evaluate
from bozzetto.evaluate.features import FeatureExtractor
from bozzetto.output import table
from bozzetto.pipeline import Pipeline
from bozzetto.registry import make_rule, split_method

# The paper's methods, what it compares with, and the better alternatives. Titles are what the literature calls them.
SUITES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "lantern": MappingProxyType(
            {
                "none": "sequential",
                "eagle:tree=dynamic/tree": "EAGLE-2, exact",
                "eagle:tree=mc-sim-25/tree": "EAGLE static tree, exact",
                "eagle:tree=mc-sim-25/traversal": "traversal, exact",
                "eagle:tree=chain-12/block": "block on a chain, exact",
                "eagle:tree=dynamic/lantern:k=1000:delta=0.1": "LANTERN",
                "eagle:tree=mc-sim-25/lantern++:k=10:lambda=2": "LANTERN++",
                "eagle:tree=mc-sim-25/grouped:group=8": "GSD",
                "eagle:tree=mc-sim-25/annealed": "COOL-SD",
                "eagle:tree=mc-sim-25/cascade": "CASCADE",
                "jacobi/seed-exact": "coupled Jacobi, seed-exact",
            }
        )
    }
)


def run_suite(
    pipe: Pipeline,
    name: str,
    speed: BenchSettings,
    quality: EvaluateSettings,
    extractor: FeatureExtractor,
    out: Path,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Bench first, with nothing else going on, then samples and their figures; returns {kind, suite, bench, evaluation,
    results}, results with the columns of both. `speed` and `quality` give everything but the methods."""
    methods = tuple(SUITES[name])
    timed = bench(pipe, replace(speed, methods=methods), progress=progress)
    judged = evaluate(pipe, replace(quality, methods=methods), extractor, out, progress=progress)
    results = []
    for row in timed["results"]:
        if row["method"] not in SUITES[name]:
            continue  # the bare loop
        method = row["method"]
        found: dict[str, Any] = next((r for r in judged["results"] if r["method"] == method), {})
        taken = ("frechet", "frechet_change", "kernel", "precision", "recall", "surprisal_change", "tv_spent")
        rule = make_rule(split_method(method)[1])
        title = {"title": SUITES[name][method], "exact": rule.exact}
        results.append({**title, **row, **{k: found.get(k) for k in taken}, "images": found.get("count")})
    return {"kind": "suite", "suite": name, "results": results, "bench": timed, "evaluation": judged}


def suite_table(report: dict[str, Any]) -> str:
    """The figures of both for people."""
    header = ["method", "as", "exact", "tok/pass", "ms/pass", "drafting", "speed-up", "range"]
    header += ["Fréchet", "change", "bias, nats/token", "bound/token"]
    rows = []
    for r in report["results"]:
        speed = [f"{r['tokens_per_pass']:.2f}", f"{r['ms_per_pass']:.2f}", f"{100 * r['draft_share']:.0f}%"]
        speed += [f"{r['speedup']:.2f}x", f"{r['speedup_low']:.2f}-{r['speedup_high']:.2f}"]
        quality = [_shown(r[k], d, s) for k, d, s in (("frechet", 1, ""), ("frechet_change", 1, "+"))]
        bias = [_shown(r["surprisal_change"], 3, "+"), f"{r['tv_spent']['value']:.3f}" if r["tv_spent"] else ""]
        rows.append([r["method"], r["title"], "yes" if r["exact"] else "no", *speed, *quality, *bias])
    first = report["results"][0]
    s, e = report["bench"]["settings"], report["evaluation"]["settings"]
    notes = [
        f"speed: batch {first['batch']}, guidance {first['guidance']:g}, {s['dtype']}, {s['threads']} threads, "
        f"{first['rounds']} images per method in turn; speed-up over none of the same round (median, range).",
        f"quality: {e['count']} images per method, {e['extractor']}, 95% intervals; change: against none. bias:",
        "change of the tokens' surprisal under the target's law. bound: what the rule itself sums per token.",
    ]
    return "\n".join([table(header, rows), *notes])


def _shown(i: dict[str, float] | None, digits: int, sign: str) -> str:
    if i is None:
        return ""
    return f"{i['value']:{sign}.{digits}f} ({i['low']:{sign}.{digits}f} to {i['high']:{sign}.{digits}f})"
