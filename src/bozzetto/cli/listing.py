"""`bozzetto models`: what lies in a folder of models, by their JSON files and the headers of their weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bozzetto.adapters.families import FAMILIES
from bozzetto.adapters.spec import find_spec_file, known_by, read_spec
from bozzetto.checkpoints.folders import (
    CONFIG,
    DRAFTERS,
    DRIFT,
    FIRST_STAGE,
    FLOW,
    LATENTS,
    LLAMAGEN,
    MASKED,
    PIPELINE,
    TARGETS,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    VARIANTS,
    VQ_TINY,
    described,
    read_config,
)
from bozzetto.checkpoints.own_sampling import brief_law, own_from
from bozzetto.checkpoints.published import family_of, sampling_of
from bozzetto.checkpoints.weights import SCALE, WEIGHTS, read_header
from bozzetto.common.shipped import INSTALL, missing_models, shipped_folders
from bozzetto.errors import UsageError, brief
from bozzetto.evaluate.columns import table
from bozzetto.pipeline.pipeline import is_hosted, model_folder

# What runs their passes on a processor, where the kernels can be (`bozzetto doctor`).
_PASSES = dict.fromkeys((LLAMAGEN, FLOW, DRIFT, MASKED), "our kernels")


def list_models(folder: str | Path | None) -> str:
    """A table of the models shipped (None), or of `folder` and the folders right below it."""
    header = ("name", "family", "parameters", "image", "tokens", "classes", "sampling", "passes by", "where")
    if folder is None:
        shown = table(header, [_row(path) for _, path in sorted(shipped_folders().items())])
        missing = ", ".join(missing_models())
        return f"{shown}\nnot installed: {missing} ({INSTALL})" if missing else shown
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"folder {str(folder)!r} not found (allowed: a model folder, or one that holds model folders)")
    inside = () if (root / PIPELINE).is_file() else root.iterdir()  # parts of a pipeline are no models
    folders = [root, *sorted(path for path in inside if path.is_dir())]
    found = [path for path in folders if (_described(path) / CONFIG).is_file()]
    if not found:
        return f"no models found in {root}"
    return table(header, [_row(path) for path in found])


def _described(folder: Path) -> Path:
    """Where its config.json is: of a diffusers pipeline, that of the part that draws tokens."""
    return folder / FIRST_STAGE if (folder / PIPELINE).is_file() else folder


def _row(folder: Path) -> tuple[str, ...]:
    """One row of the table; a folder that cannot be read says so in place of its figures."""
    try:
        place = _described(folder)
        content = read_config(place)
        return (
            str(content.get("name", folder.name)),
            *_figures(place, content),
            _sampling(place, content),
            "transformers" if is_hosted(place) else _PASSES.get(str(content.get("family")), "-"),
            str(folder),
        )
    except (UsageError, OSError) as error:
        return (folder.name, "unreadable", "-", "-", "-", "-", "-", "-", f"{folder} ({str(error).splitlines()[0]})")


def _sampling(folder: Path, content: dict[str, Any]) -> str:
    """How it is drawn where nothing is asked for."""
    if content.get("family") in DRAFTERS:
        return "-"
    own = own_from(content, folder / CONFIG)
    if is_hosted(folder):
        adapter = find_spec_file("", folder) or known_by(content)
        own = read_spec(adapter).sampling if adapter else sampling_of(family_of(content), folder)
    return brief_law(own)


def _figures(folder: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Family, parameters, pixels, tokens and classes."""
    if is_hosted(folder):
        kind = content["model_type"]
        if kind not in FAMILIES and not (find_spec_file("", folder) or known_by(content)):
            raise UsageError(f"model type {brief(kind)} draws no images by tokens here")
        return (f"{kind} (of transformers)", "-", "-", "-", "prompts")
    source, place = folder / CONFIG, folder / TOKENIZER_CONFIG
    _, config = described(content, {**TARGETS, **DRAFTERS, **VARIANTS}, source)
    family, own = content["family"], f"{_parameters(folder) / 1e6:.2f} M"
    if family in DRAFTERS:
        tokens = "-" if getattr(config, "before", "") == "words" else str(config.grid**2)  # of pictures of any size
        return (f"{family} (a drafter)", own, "-", tokens, "-")
    if family == DRIFT:  # it has its own head, and the rest from another model
        base = model_folder(str(content.get("base")))
        inner = read_config(base)
        if inner.get("family") == DRIFT:
            raise UsageError(f"{source}: base = {content['base']!r} is a variant itself")
        _, parameters, *rest = _figures(base, inner)
        return (f"drift (of {content['base']})", f"{own} and {parameters}", *rest)
    pixels = {"kind": VQ_TINY, **read_config(folder, TOKENIZER_CONFIG)}
    size = described(pixels, {**TOKENIZERS, **LATENTS}, place, "kind")[1].image_size
    labels = "captions" if getattr(config, "captioned", False) else str(config.classes)
    return (family, own, f"{size}x{size}", str(config.length), labels)


def _parameters(folder: Path) -> int:
    held = read_header(folder / WEIGHTS)
    scales = {key for key in held if key.endswith(SCALE) and key.removesuffix(SCALE) in held}
    return sum(math.prod(held[key].shape) for key in held.keys() - scales)
