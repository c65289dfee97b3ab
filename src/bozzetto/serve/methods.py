"""Which drafters and rules a served model has."""

from __future__ import annotations

from typing import Any

from bozzetto.drafts import VECTORS
from bozzetto.errors import UsageError
from bozzetto.methods.table import DRAFTERS, RULES, named, read_drafter
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.settings import GenerateSettings


def methods_of(pipe: Pipeline) -> dict[str, list[str]]:
    """Rules by drafter, without options: what a request can name and the model has."""
    tokens = pipe.target.tokens
    found: dict[str, list[str]] = {}
    for drafter in named(DRAFTERS, tokens):
        if not _has(pipe, drafter):
            continue
        for rule in named(RULES, tokens):
            if _goes(pipe, drafter, rule):
                found.setdefault(drafter, []).append(rule)
    return found


def own_sampling(pipe: Pipeline) -> dict[str, Any]:
    """How the model is sampled where a request says nothing, in the words of requests, and where that was published."""
    told = pipe.sampling()
    codes = ("top_k", "top_p") if pipe.target.tokens == VECTORS else ()
    unused = {"asked", "suffix", "negative_prompt", "quality_words", *codes}
    found = {"guidance_scale" if k == "guidance" else k: v for k, v in told.items() if k not in unused}
    words = {"quality_words": pipe.own.suffix, "negative_prompt": pipe.own.negative_prompt}
    return {**found, **{name: text for name, text in words.items() if text}}


def lossy(rules: dict[str, list[str]]) -> list[str]:
    """Names of rules that are not exact."""
    exact = {name: rule.exact for (_, name), rule in RULES.items()}
    return sorted({name for names in rules.values() for name in names if not exact[name]})


def said_of(pipe: Pipeline) -> dict[str, dict[str, str]]:
    """What each drafter and rule does, in a sentence, by its name."""
    tables: dict[str, Any] = {"drafters": DRAFTERS, "rules": RULES}
    return {
        what: {name: row.about for name, row in named(table, pipe.target.tokens).items() if row.about}
        for what, table in tables.items()
    }


def _has(pipe: Pipeline, drafter: str) -> bool:
    """Whether what a trained drafter needs lies beside the model."""
    try:
        pipe.drafter_weights(read_drafter(drafter, pipe.target.tokens))
    except (UsageError, OSError):
        return False
    return True


def _goes(pipe: Pipeline, drafter: str, rule: str) -> bool:
    """Whether the method can be asked for, and decoded, and is no other one by another name (without drafts every rule
    of codes is sequential decoding)."""
    try:
        settings = pipe.resolve(GenerateSettings(drafter, rule))
        pipe.make_batch(settings)
    except UsageError:
        return False
    return settings.verifier == settings.rule
