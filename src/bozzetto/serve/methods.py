"""Which drafters and rules a served model has."""

from __future__ import annotations

from typing import Any

from bozzetto.errors import UsageError
from bozzetto.methods.path_registry import PATH_DRAFTERS, PATH_RULES
from bozzetto.methods.registry import DRAFTERS, RULES
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.pipeline.pipelines import CodePipeline
from bozzetto.settings import GenerateSettings


def methods_of(pipe: Pipeline) -> dict[str, list[str]]:
    """Rules by drafter, without options: what a request can name and the model has."""
    codes = isinstance(pipe, CodePipeline)
    found: dict[str, list[str]] = {}
    for drafter in DRAFTERS if codes else PATH_DRAFTERS:
        if not _has(pipe, drafter):
            continue
        for rule in RULES if codes else PATH_RULES:
            # Without drafts every rule for codes is sequential decoding.
            sequential = codes and drafter == "none" and rule != "seed-exact"
            if not sequential and _goes(pipe, drafter, rule):
                found.setdefault(drafter, []).append(rule)
    return found


def own_sampling(pipe: Pipeline) -> dict[str, Any]:
    """How the model is sampled where a request says nothing, in the words of requests, and where that was published."""
    told = pipe.sampling()
    codes = () if isinstance(pipe, CodePipeline) else ("top_k", "top_p")
    unused = {"asked", "suffix", "negative_prompt", "quality_words", *codes}
    found = {"guidance_scale" if k == "guidance" else k: v for k, v in told.items() if k not in unused}
    words = {"quality_words": pipe.own.suffix, "negative_prompt": pipe.own.negative_prompt}
    return {**found, **{name: text for name, text in words.items() if text}}


def takes_negative(pipe: Pipeline) -> bool:
    """Whether a request may say what guidance leads away from."""
    try:
        pipe.refuse_negative(GenerateSettings(negative_prompt="-"))
    except UsageError:
        return False
    return True


def lossy(rules: dict[str, list[str]]) -> list[str]:
    """Names of rules that are not exact."""
    exact: dict[str, bool] = {name: rule.exact for name, rule in RULES.items()}
    exact |= {name: rule.exact for name, rule in PATH_RULES.items()}
    return sorted({name for names in rules.values() for name in names if not exact[name]})


def _has(pipe: Pipeline, drafter: str) -> bool:
    """Whether what a trained drafter needs lies beside the model."""
    try:
        pipe.drafter_weights(drafter)
    except (UsageError, OSError):
        return False
    return True


def _goes(pipe: Pipeline, drafter: str, rule: str) -> bool:
    """Whether the method can be asked for, and decoded."""
    try:
        pipe.make_batch(GenerateSettings(drafter, rule))
    except UsageError:
        return False
    return True
