"""`bozzetto evaluate --compare A B`: may two samplers be taken for one?

A and B are methods, or folders of samples. Their images are independent (different seeds), paired by index and class;
the tests are those of samelaw.py. Where both rules are seed-exact, the share of images that are the same under the same
seed is counted as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bozzetto.drafts import CODES
from bozzetto.errors import UsageError, check_number
from bozzetto.evaluate.bias import surprisal
from bozzetto.evaluate.columns import table
from bozzetto.evaluate.features import FeatureExtractor, features_of
from bozzetto.evaluate.output import write_report
from bozzetto.evaluate.photographs import LEAST, MOST
from bozzetto.evaluate.provenance import provenance
from bozzetto.evaluate.samelaw import (
    LEVEL,
    PERMUTATIONS,
    SwapTest,
    kernel_differences,
    rejected,
    surprisal_test,
    swap_test,
    token_tests,
    vector_tests,
)
from bozzetto.evaluate.sampling import PLAIN, SampleRun, as_begun, method_settings, sample, slug
from bozzetto.evaluate.shards import RUN, Samples, read_run, read_samples
from bozzetto.laws.categorical import LawSettings
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline

COMPARISON = "comparison.json"
_IDENTICAL = 64
_NEEDED: dict[str, Any] = {
    "seed": int,
    "classes": list,
    "top_k": int,
    **dict.fromkeys(("weights", "model", "method", "drafter", "rule"), str),
    **dict.fromkeys(("guidance", "temperature", "top_p"), int | float),
}


@dataclass(frozen=True)
class CompareSettings:
    """a, b: methods (none, or DRAFTER/RULE) or folders of samples; count: images of each; seed: of A's images, B's have
    the next one; base: law, batch and window where a method has to be sampled."""

    a: str
    b: str
    count: int = 500
    seed: int = 0
    base: GenerateSettings = GenerateSettings(batch=8)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        check_number("count", self.count, LEAST, MOST, whole=True)
        for spec in (self.a, self.b):
            if not is_folder(spec):
                method_settings(spec, self.base)


def is_folder(spec: str) -> bool:
    """Whether A or B names a folder of samples and not a method."""
    return (Path(spec) / RUN).is_file()


def compare(
    pipe: Pipeline, settings: CompareSettings, extractor: FeatureExtractor, out: Path, *, progress: bool = False
) -> dict[str, Any]:
    """Sample what is missing, test, write `comparison.json` into `out`; returns its content."""
    folders = sorted((out / "samples").glob("*"))
    settings = replace(settings, base=as_begun(pipe, settings.base, folders))
    seeds = _seeds(settings)
    for theirs in map(_settings_of, filter(is_folder, (settings.a, settings.b))):  # before anything is sampled
        if theirs["weights"] != pipe.fingerprint():
            raise UsageError(
                f"samples of {theirs['model']!r} with weights {theirs['weights']} cannot be compared here: "
                f"--model is {pipe.name!r} with weights {pipe.fingerprint()}"
            )
    drawn = [
        _samples(pipe, settings, spec, seed, out, progress)
        for spec, seed in zip((settings.a, settings.b), seeds, strict=True)
    ]
    if (drawn[0].label != drawn[1].label).any():
        raise UsageError("the two sets of samples are not of the same classes in the same order")
    surprise, tests = _tests(pipe, settings, drawn, progress)
    features = [torch.from_numpy(features_of(extractor, s.pixels, progress=progress)) for s in drawn]
    name = f"features, MMD ({extractor.name})"
    tests.append(swap_test(name, kernel_differences(features[0], features[1])))
    report = {
        "kind": "comparison",
        "settings": {
            **{k: v for k, v in asdict(settings).items() if k != "base"},
            "a_settings": drawn[0].settings,
            "b_settings": drawn[1].settings,
            "extractor": extractor.name,
            "permutations": PERMUTATIONS,
            "level": LEVEL,
            **provenance(),
        },
        "tests": tests,
        "mean_surprisal": [float(s[s.isfinite()].mean()) for s in surprise],
        "outside_support": [int((~s.isfinite()).sum()) for s in surprise],
        "identity": _identity(pipe, settings, drawn, out, progress),
        "rejected": rejected(tests),
    }
    write_report(out / COMPARISON, report, indent=1)
    return report


def _tests(
    pipe: Pipeline, settings: CompareSettings, drawn: list[Samples], progress: bool
) -> tuple[list[torch.Tensor], list[SwapTest]]:
    """Surprisals of A and B (codes only) and the tests on tokens."""
    a, b = (torch.from_numpy(s.tokens) for s in drawn)
    if pipe.target.tokens != CODES:
        return [], vector_tests(a, b)
    law = LawSettings(*(drawn[0].settings[k] for k in ("guidance", "temperature", "top_k", "top_p")))
    surprise = [surprisal(pipe, s, law, settings.base.batch, progress) for s in drawn]
    return surprise, [surprisal_test(surprise[0], surprise[1]), *token_tests(a.long(), b.long(), pipe.target.vocab)]


def _settings_of(folder: str) -> dict[str, Any]:
    """Settings of a folder of samples. Raises UsageError where one that is asked for here is missing, or is of another
    kind."""
    found: dict[str, Any] = read_run(folder)["settings"]
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(found.get(key), kind)]
    if wrong:
        raise UsageError(f"{Path(folder) / RUN}: settings lack {', '.join(wrong)}, or hold something else there")
    return found


def _seeds(settings: CompareSettings) -> list[int]:
    """The seed that each side is sampled with: those of the folders, other ones for methods."""
    given = [_settings_of(s)["seed"] if is_folder(s) else None for s in (settings.a, settings.b)]
    first = given[0] if given[0] is not None else settings.seed + (given[1] == settings.seed)
    second = given[1] if given[1] is not None else first + 1
    if first == second:
        raise UsageError(
            f"{settings.a} and {settings.b} were sampled with the same seed {first}: the test needs independent "
            "images, sample one of them with another seed"
        )
    return [first, second]


def _samples(pipe: Pipeline, settings: CompareSettings, spec: str, seed: int, out: Path, progress: bool) -> Samples:
    if is_folder(spec):
        return read_samples(spec, settings.count)
    folder = out / "samples" / f"{slug(spec)}-seed-{seed}"
    run = SampleRun(folder, pipe, method_settings(spec, settings.base), seed=seed, method=spec)
    sample(run, settings.count, progress=progress)
    return read_samples(folder, settings.count)


def _identity(
    pipe: Pipeline, settings: CompareSettings, drawn: list[Samples], out: Path, progress: bool
) -> dict[str, Any] | None:
    """Share of images that B's method draws like A's when it is given A's seed; None unless both are seed-exact."""
    a, b = ({**dict(PLAIN), **s.settings} for s in drawn)
    same = {k: a[k] for k in a if k not in ("method", "drafter", "rule", "window", "seed", "dtype")}
    if a["rule"] != "seed-exact" or b["rule"] != "seed-exact" or any(b.get(k) != v for k, v in same.items()):
        return None
    law = {k: b[k] for k in GenerateSettings.__dataclass_fields__ if k in b and k not in ("drafter", "rule")}
    count = min(_IDENTICAL, settings.count)
    run = SampleRun(
        out / "samples" / f"{slug(b['method'])}-seed-{a['seed']}-again",
        pipe,
        replace(method_settings(b["method"], settings.base), **law),
        seed=a["seed"],
        classes=a["classes"],
        method=b["method"],
    )
    sample(run, count, progress=progress)
    again = read_samples(run.folder, count)
    equal = (again.tokens == drawn[0].tokens[:count]).all(1)
    return {"share": float(equal.mean()), "count": count}


def comparison_table(report: dict[str, Any]) -> str:
    """The tests for people."""
    rows = [[t["name"], f"{t['statistic']:+.2f}", f"{t['p_value']:.4f}"] for t in report["tests"]]
    settings, limit = report["settings"], report["settings"]["level"] / len(report["tests"])
    lines = [table(("compared", "statistic", "p-value"), rows)]
    if any(report["outside_support"]):
        lines.append("tokens outside the law's support: {} in A, {} in B".format(*report["outside_support"]))
    if report["identity"] is not None:
        same = report["identity"]
        lines.append(f"same seed, same tokens: {100 * same['share']:.1f}% of {same['count']} images")
    verdict = "REJECTED: A and B do not draw from the same law" if report["rejected"] else "not rejected"
    lines.append(
        f"same law, {settings['count']} images each, {settings['permutations']} swaps: {verdict} "
        f"(some p-value < {limit:.4f} would reject, {100 * settings['level']:g}% over all tests)"
    )
    return "\n".join(lines)
