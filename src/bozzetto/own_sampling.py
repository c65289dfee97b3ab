"""How a model is meant to be sampled: what its authors publish, taken where nothing else is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OwnSampling:
    """What unset settings mean for a model, in the terms of GenerateSettings. suffix: words that its authors append to
    every prompt; source: where this was published."""

    guidance: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int = 0
    passes: int = 0
    guidance_schedule: str = ""
    negative_prompt: str = ""
    suffix: str = ""
    source: str = "bozzetto"
