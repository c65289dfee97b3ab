"""Which drafters and rules a served model has."""

from __future__ import annotations

from bozzetto.errors import UsageError
from bozzetto.path_registry import PATH_DRAFTERS, PATH_RULES, check_path_method
from bozzetto.pipeline import Pipeline
from bozzetto.registry import DRAFTERS, RULES, check_method
from bozzetto.settings import GenerateSettings


def methods_of(pipe: Pipeline) -> dict[str, list[str]]:
    """Rules by drafter, without options: what a request can name and the model has."""
    found: dict[str, list[str]] = {}
    for drafter in dict.fromkeys((*DRAFTERS, *PATH_DRAFTERS)):
        if not _has(pipe, drafter):
            continue
        path = drafter in PATH_DRAFTERS and _goes(pipe, GenerateSettings(drafter, "auto"), continuous=True)
        rules, check = (PATH_RULES, check_path_method) if path else (RULES, check_method)
        for rule in rules:
            try:
                check(drafter, rule)
                settings = GenerateSettings(drafter, rule)
            except UsageError:
                continue
            if _goes(pipe, settings) and not (drafter == "none" and not path and rule != "seed-exact"):
                found.setdefault(drafter, []).append(rule)
    return found


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


def _goes(pipe: Pipeline, settings: GenerateSettings, continuous: bool = False) -> bool:
    try:
        resolved = pipe.resolve(settings)
        pipe.decoder_for(resolved, 1)
    except UsageError:
        return False
    return not continuous or resolved.rule in PATH_RULES
