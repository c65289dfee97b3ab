"""A model that is a variant of another: what it gains over the other's sequential sampler, and what it costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bozzetto.evaluate.columns import SEQUENTIAL
from bozzetto.evaluate.features import FeatureExtractor, features_of
from bozzetto.evaluate.metrics import Comparison, interval, replicate, resamples
from bozzetto.evaluate.photographs import data_path, photographs
from bozzetto.evaluate.sampling import slug
from bozzetto.evaluate.shards import Samples, read_samples
from bozzetto.pipeline.pipeline import Pipeline


def frechet_over(
    base: Samples, drawn: Samples, reference: torch.Tensor, extractor: FeatureExtractor, bootstrap: int
) -> dict[str, float]:
    """Fréchet distance of `drawn` less that of `base`, both from reference features [m, d], with a paired interval: the
    same indices (classes) and the same reference images in each resample."""
    w = resamples(len(drawn), bootstrap, seed=1)
    v = resamples(len(reference), bootstrap, seed=2)
    values, spread = [], []
    for samples in (base, drawn):
        features = torch.from_numpy(features_of(extractor, samples.pixels)).double()
        pair = Comparison(features, reference)
        values.append(pair.frechet())
        spread.append(replicate(pair.frechet, w, v))
    return asdict(interval(values[1] - values[0], spread[1] - spread[0]))


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
