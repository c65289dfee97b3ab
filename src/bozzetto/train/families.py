"""`bozzetto train WHAT RECIPE.yaml`: what can be trained, by the word `family` of a recipe, and by which fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bozzetto.common.checks import checked_as, read_mapping
from bozzetto.errors import UsageError
from bozzetto.train import recipes
from bozzetto.train.continuous import LatentFit
from bozzetto.train.drafter import DrafterFit, ParallelFit
from bozzetto.train.drift import DriftFit
from bozzetto.train.gaussian import GaussianFit
from bozzetto.train.target import CodeFit
from bozzetto.train.tokenizer import TokenizerFit

_PARALLEL = (recipes.ParallelRecipe, ParallelFit)
# By what is trained and the family, "" where a recipe names none: the recipe and what fits it.
TRAINABLE: Mapping[str, Mapping[str, tuple[type, type]]] = {
    "tokenizer": {"": (recipes.TokenizerRecipe, TokenizerFit)},
    "target": {
        "": (recipes.TargetRecipe, CodeFit),
        "caption": (recipes.CaptionRecipe, CodeFit),
        "flow": (recipes.FlowRecipe, LatentFit),
        "mar": (recipes.MARRecipe, LatentFit),
    },
    "drafter": {
        "": (recipes.DrafterRecipe, DrafterFit),
        "sketch": (recipes.SketchRecipe, GaussianFit),
        "plane": _PARALLEL,
        "block": _PARALLEL,
        "glance": _PARALLEL,
    },
    "drift": {"": (recipes.DriftRecipe, DriftFit)},
}


def read_recipe(path: str | Path, what: str) -> Any:
    """Read a YAML recipe of what is trained (a key of TRAINABLE). Raises UsageError naming the file, the key and
    what is allowed.

    Relative paths inside a recipe are relative to the working directory.
    """
    path, known = Path(path), TRAINABLE[what]
    content = read_mapping(path)
    family = content.get("family", "")
    if len(known) > 1 and "family" in content and (not isinstance(family, str) or not family or family not in known):
        named = ", ".join(name for name in known if name)
        raise UsageError(f"{path}: family = {family!r} is not allowed: {named}, or no family for codes")
    return checked_as(known[family if len(known) > 1 else ""][0], content, path)


def train(recipe: Any, restart: bool = False) -> Path:
    """Train (or resume) until the last step, or until the held-out loss stops falling. Returns the folder of what was
    trained. restart: put an earlier run in the recipe's `out` aside and begin anew."""
    rows = [row for known in TRAINABLE.values() for row in known.values()]
    fit: Any = next(fit for kind, fit in rows if kind is type(recipe))(recipe, restart)
    fit.fit()
    return Path(fit.folder)
