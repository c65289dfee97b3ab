"""`bozzetto evaluate`: how good are the pictures of each method, and how quickly did they come, in one run.

The methods sample the same images round by round (a round is one batch of each method, the order rotates), so that
speeds are ratios within a round. Samples stay in the folder: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.common.files import write_whole
from bozzetto.common.images import contact_sheet
from bozzetto.errors import UsageError, check_number
from bozzetto.evaluate.bias import SURPRISAL, bias_figures
from bozzetto.evaluate.columns import (
    EVALUATION,
    MEMORISATION,
    METHOD,
    PHOTOGRAPHS,
    RECONSTRUCTIONS,
    SEQUENTIAL,
    Column,
    table_of,
)
from bozzetto.evaluate.features import FeatureExtractor
from bozzetto.evaluate.metrics import Comparison, Interval, interval, resamples
from bozzetto.evaluate.output import plain, write_report
from bozzetto.evaluate.photographs import (
    LEAST,
    MOST,
    SPLITS,
    Reference,
    balanced,
    data_path,
    few,
    prompts_for,
    reconstructions,
)
from bozzetto.evaluate.provenance import provenance
from bozzetto.evaluate.quality import QUALITY, memorisation, nearest
from bozzetto.evaluate.sampling import SampleRun, as_begun, batched, method_settings, slug
from bozzetto.evaluate.shards import Samples, read_samples
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline

NEAREST = "nearest.png"
_SHOWN = 16


@dataclass(frozen=True)
class EvaluateSettings:
    """methods: none, or DRAFTER/RULE (none always takes part); references: splits to compare with; count: images per
    method; bootstrap: resamples behind every interval; seed: of the images; base: law, batch and window of all methods;
    data: photographs (None: those named by the model); recitation: also look for training images in the samples."""

    methods: tuple[str, ...] = (SEQUENTIAL, "jacobi/exact", "jacobi/seed-exact")
    references: tuple[str, ...] = ("test",)
    count: int = 500
    bootstrap: int = 100
    seed: int = 0
    base: GenerateSettings = GenerateSettings(batch=8)  # noqa: RUF009  (frozen)
    data: Path | None = None
    recitation: bool = True

    def __post_init__(self) -> None:
        check_number("count", self.count, LEAST, MOST, whole=True)
        check_number("bootstrap", self.bootstrap, 2, 10_000, whole=True)
        for reference in self.references:
            if reference not in SPLITS:
                raise UsageError(f"unknown reference {reference!r} (allowed: {', '.join(SPLITS)})")
        if not self.references:
            raise UsageError(f"no reference given (allowed: {', '.join(SPLITS)})")
        for method in self.methods:
            method_settings(method, self.base)

    def all_methods(self) -> list[str]:
        """The methods, sequential decoding first, each once."""
        return list(dict.fromkeys([SEQUENTIAL, *self.methods]))


def sample_rounds(runs: Sequence[SampleRun], count: int, *, progress: bool = False) -> None:
    """Sample what is missing of images 0..count-1 of every run, a batch of each in turn."""
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(run.alone())
            run.claim()
        _draw_rounds(runs, count, progress)


def _draw_rounds(runs: Sequence[SampleRun], count: int, progress: bool) -> None:
    pending = [set(run.pending(count)) for run in runs]
    left, batch = sum(map(len, pending)), runs[0].settings.batch
    with tqdm(total=count * len(runs), initial=count * len(runs) - left, unit="image", disable=not progress) as bar:
        for run, wanted in zip(runs, pending, strict=True):
            if wanted:
                run.warm_up()
        for number, chunk in enumerate(batched(range(count), batch)):
            for i in range(len(runs)):
                at = (number + i) % len(runs)
                wanted_now = [index for index in chunk if index in pending[at]]
                if wanted_now:
                    bar.set_description(runs[at].method)
                    runs[at].draw(wanted_now)
                    bar.update(len(wanted_now))


def evaluate(
    pipe: Pipeline, settings: EvaluateSettings, extractor: FeatureExtractor, out: Path, *, progress: bool = False
) -> dict[str, Any]:
    """Sample, measure, write `evaluation.json` and `nearest.png` into `out`; returns the content of the former."""
    folders = [out / "samples" / slug(m) for m in settings.all_methods()]
    settings = replace(settings, base=as_begun(pipe, settings.base, folders))
    path = data_path(pipe, settings.data)
    run_of = partial(SampleRun, pipe=pipe, seed=settings.seed, classes=prompts_for(pipe, path)[: settings.count])
    runs = [
        run_of(out / "samples" / slug(m), settings=method_settings(m, settings.base), method=m)
        for m in settings.all_methods()
    ]
    reference = Reference(pipe, path, settings.references, extractor, progress)
    sample_rounds(runs, settings.count, progress=progress)
    samples = {run.method: read_samples(run.folder, settings.count) for run in runs}
    features = {method: reference.features_of(method, s.pixels) for method, s in samples.items()}
    reference.notes += filter(None, [few(settings.count, "samples")])
    speed = speeds(samples, settings.bootstrap)
    counts = resamples(settings.count, settings.bootstrap, seed=1)
    bias = bias_figures(pipe, samples, settings.base.law, SEQUENTIAL, counts, progress)
    rows = [row for split in settings.references for row in _results(reference, split, settings, samples, features)]
    recited = []
    if settings.recitation:
        recited = _recited(reference, settings.bootstrap, features, samples[SEQUENTIAL], out / NEAREST)
    report: dict[str, Any] = {
        "kind": "evaluation",
        "settings": {
            "model": pipe.name,
            "weights": pipe.fingerprint(),
            **{k: v for k, v in asdict(settings).items() if k not in ("base", "data")},
            **{k: v for k, v in asdict(settings.base).items() if k not in ("drafter", "rule")},
            "methods": settings.all_methods(),
            "dtype": pipe.dtype,
            "extractor": extractor.name,
            "data": path.name,
            "photographs": reference.about(),
            "class_probe_accuracy": reference.accuracy,
            **provenance(),
        },
        "results": [{**row, **speed.get(row["method"], {}), **bias.get(row["method"], {})} for row in rows],
        "memorisation": recited,
        "identity": identities(samples, max(pipe.rounding(run.settings) for run in runs)),
        "notes": reference.notes,
    }
    report = plain(report)
    write_report(out / EVALUATION, report, indent=1)
    return report


def _yardsticks(reference: Reference, split: str, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of photographs of a split, and of their reconstructions."""
    pipe, real = reference.pipe, reference.photographs[split]
    chosen = balanced(real, count)
    if len(chosen) < LEAST:
        reference.notes.append(f"{split} has {len(chosen)} photographs for the rows of photographs: they are left out.")
        return {}
    labels = torch.from_numpy(real.labels[chosen])
    found = {PHOTOGRAPHS: (reference.features[split][chosen], labels)}
    if pipe.tokenizer.encodes:
        again = reconstructions(pipe, real.images[chosen])
        found[RECONSTRUCTIONS] = (reference.features_of(RECONSTRUCTIONS, again), labels)
    return found


def _results(
    reference: Reference,
    split: str,
    settings: EvaluateSettings,
    samples: dict[str, Samples],
    features: dict[str, Tensor],
) -> list[dict[str, Any]]:
    """Photographs of the other split, their reconstructions, then every method, against one split."""
    other = next(name for name in SPLITS if name != split)
    sets = _yardsticks(reference, other, settings.count)
    sets |= {method: (features[method], torch.from_numpy(s.label)) for method, s in samples.items()}
    target, rows, sequential = reference.features[split], [], None
    v = resamples(len(target), settings.bootstrap, seed=2)
    for method, (mine, asked) in tqdm(sets.items(), desc=f"against {split}", disable=not reference.progress):
        # The same draws for every method.
        w, drawn = resamples(len(mine), settings.bootstrap, seed=1), samples.get(method)
        right = reference.consistency(mine, asked, w)
        identical = None if drawn is None else float(same_tokens(drawn, samples[SEQUENTIAL]).mean())
        found = Comparison(mine, target, w, v, right=right, identical=identical, base=sequential)
        sequential = found if method == SEQUENTIAL else sequential
        whole = {"method": method, "reference": split, "count": len(mine), "reference_count": len(target)}
        rows.append({**whole, **{column.key: column.measure(found) for column in QUALITY if column.measure}})
    return rows


def _recited(
    reference: Reference, bootstrap: int, features: dict[str, Tensor], sequential: Samples, picture: Path
) -> list[dict[str, Any]]:
    """Nearest training images of every method's samples; draws the closest pairs of sequential samples."""
    photographs = reference.photographs["train"].images
    # Training also saw mirror images.
    mirrored = reference.features_of("train, mirrored", photographs[:, :, ::-1])
    training = torch.cat([reference.features["train"], mirrored])
    unseen, _ = nearest(reference.features["test"], training)
    v = resamples(len(unseen), bootstrap, seed=2)
    rows = []
    for method, mine in features.items():
        apart, row = nearest(mine, training)
        rows.append({"method": method, **memorisation(apart, unseen, resamples(len(apart), bootstrap, seed=1), v)})
        if method == SEQUENTIAL:
            _draw_nearest(picture, sequential.pixels, photographs, apart, row % len(photographs))
    return rows


def _draw_nearest(picture: Path, pixels: np.ndarray, photographs: np.ndarray, apart: Tensor, row: Tensor) -> None:
    closest = apart.argsort()[:_SHOWN].tolist()
    images = [[pixels[i], photographs[int(row[i])]] for i in closest]
    captions = [[f"sample {i}", f"at {float(apart[i]):.1f}"] for i in closest]
    sheet = contact_sheet(np.concatenate(images), 8, [c for pair in captions for c in pair])
    write_whole(picture, lambda name: sheet.save(name, format="PNG"))


def same_tokens(a: Samples, b: Samples) -> np.ndarray:
    """Which images have the same tokens throughout: bool [n]."""
    return (a.tokens == b.tokens).reshape(len(a), -1).all(1)


def identities(samples: dict[str, Samples], tolerance: float) -> list[dict[str, Any]]:
    """For methods whose rule is seed-exact: how many images differ from sequential decoding, how many are flagged as
    near ties by either (margin below `tolerance`), and how many differ without a flag (none, if all is well)."""
    base, found = samples[SEQUENTIAL], []
    for method, drawn in samples.items():
        if method == SEQUENTIAL or drawn.settings["rule"] != "seed-exact":
            continue
        differ = ~same_tokens(drawn, base)
        flagged = np.fmin(drawn.margin, base.margin) < tolerance
        counts = {"differ": differ, "flagged": flagged, "unflagged": differ & ~flagged}
        found.append({"method": method, "count": len(drawn), **{k: int(v.sum()) for k, v in counts.items()}})
    return found


def speeds(samples: dict[str, Samples], bootstrap: int) -> dict[str, dict[str, Any]]:
    """Figures of speed by method, over the rounds that one process ran for all methods: seconds are those of drafting,
    verifying and target passes; pixels cost the same for every method and are left out. Intervals: over rounds."""
    rounds = _common_rounds(samples)
    found: dict[str, dict[str, Any]] = {}
    counts = resamples(len(rounds), bootstrap, seed=3) if rounds else torch.zeros(0, 0)
    base = _seconds(samples[SEQUENTIAL], rounds)
    for method, drawn in samples.items():
        passes = torch.tensor([len(t.committed) for t in drawn.traces], dtype=torch.float64)
        tokens = torch.full_like(passes, drawn.tokens.shape[1])
        row: dict[str, Any] = {"tokens_per_pass": _ratio(tokens, passes, resamples(len(passes), bootstrap, seed=1))}
        found[method] = row
        if not rounds:
            continue
        seconds, drafting = _seconds(drawn, rounds), _seconds(drawn, rounds, ("draft",))
        images = torch.tensor([len(r) for r in rounds], dtype=torch.float64)
        run = torch.stack([passes[list(r)].max() for r in rounds])  # a batch runs until its last image is finished
        row["images_per_second"] = _ratio(images, seconds, counts)
        row["speedup"] = _ratio(base, seconds, counts)
        row["ms_per_pass"] = _ratio(1000 * seconds, run, counts)
        row["draft_share"] = _ratio(drafting, seconds, counts)
    return found


def _common_rounds(samples: dict[str, Samples]) -> list[tuple[int, ...]]:
    """Index lists of the rounds that every method ran in the same process."""
    made = [{(tuple(b["index"]), b["process"]) for b in s.batches} for s in samples.values()]
    return sorted(index for index, _ in set.intersection(*made))


def _seconds(drawn: Samples, rounds: Sequence[tuple[int, ...]], parts: Sequence[str] = ("draft", "target")) -> Tensor:
    """Seconds of each round, of the parts named: float64 [rounds]."""
    shards = {tuple(b["index"]): b["seconds"] for b in drawn.batches}
    return torch.tensor([sum(shards[r][part] for part in parts) for r in rounds], dtype=torch.float64)


def _ratio(above: Tensor, below: Tensor, counts: Tensor) -> Interval:
    return interval(float(above.sum() / below.sum()), (counts @ above) / (counts @ below))


_SPEED = (Column("tokens_per_pass", "tok/pass", interval=False), Column("speedup", "speedup"))


def evaluation_table(report: dict[str, Any]) -> str:
    """The figures for people, one block per reference."""
    blocks = []
    for reference in report["settings"]["references"]:
        chosen = [r for r in report["results"] if r["reference"] == reference]
        n, m = chosen[-1]["count"], chosen[-1]["reference_count"]
        blocks.append(f"against {reference} ({m} photographs, {n} samples each), {report['settings']['extractor']}")
        blocks.append(table_of((METHOD, *QUALITY, SURPRISAL, *_SPEED), chosen) + "\n")
    recited = report["memorisation"]
    resampled, accuracy = report["settings"]["bootstrap"], report["settings"]["class_probe_accuracy"]
    right = "nothing, without classes" if accuracy is None else f"right on {100 * accuracy:.1f}% of test photographs"
    notes = [
        _read_at(report["settings"]["photographs"], report["settings"]["references"]),
        f"95% intervals from {resampled} resamples. class: share in which a probe on these features agrees",
        f"(it is {right}). same: share of images equal to those of none.",
        "bias: change of the tokens' surprisal under the target's law, nats per token (0 if exact, up to noise).",
    ]
    notes += [
        "{method}: {differ} of {count} images differ from none, {unflagged} of them without a near-tie flag "
        "({flagged} flagged).".format(**same)
        for same in report["identity"]
    ]
    notes += [f"note: {note}" for note in report.get("notes", [])]
    return "\n".join([*blocks, *([table_of(MEMORISATION, recited)] if recited else []), *notes])


def _read_at(photographs: dict[str, Any], references: Sequence[str]) -> str:
    """At which size the photographs were read, and whether some had to be enlarged."""
    size, enlarged = photographs["size"], photographs["enlarged"]
    smaller = [f"{enlarged[split]} of {split}" for split in references if enlarged[split]]
    note = f"; enlarged from smaller files: {', '.join(smaller)}" if smaller else ""
    return f"photographs are read at the model's size, {size} x {size}{note}."
