"""`bozzetto.load`: from the name or the folder of a model to a pipeline that draws its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bozzetto.checks import clipped, config_from, naming
from bozzetto.classes import distinct
from bozzetto.errors import UsageError
from bozzetto.models.captions import read_captions
from bozzetto.models.continuous_store import FLOW, MASKED, load_continuous, load_latents
from bozzetto.models.drift import DriftModel
from bozzetto.models.drift_store import DRIFT, load_drift
from bozzetto.models.flow_cache import FlowSampler
from bozzetto.models.llamagen import LlamaGenConfig
from bozzetto.models.llamagen_cache import LlamaGenTarget
from bozzetto.models.mar import MAR
from bozzetto.models.mar_target import MARSampler
from bozzetto.models.sentence import SentenceEncoder
from bozzetto.models.store import CONFIG, load_llamagen, load_tokenizer, read_config
from bozzetto.pipeline import DTYPES, Pipeline, is_hosted, model_folder
from bozzetto.pipelines import CodePipeline, DriftPipeline, FlowPipeline, MaskedPipeline
from bozzetto.prompts import ENCODER, CaptionPipeline

_LONGEST = 200  # characters of a name


def load(
    model: str | Path = "flowers",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    captions: str | Path | None = None,
    image_size: int = 0,
) -> Pipeline:
    """Load a shipped model by name, a model folder, or a checkpoint in the Hugging Face layout (a folder, or its name
    on the hub). dtype: float32 or bfloat16 (the target's passes only).

    captions: features file of a text-conditional model (models/captions.py); its captions then stand for the classes.
    image_size: pixels per side, where a model has a choice (0: its usual one).
    Raises UsageError for an unknown model, dtype or device and for files that do not fit together.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r} (allowed: {', '.join(DTYPES)})")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available here: {str(error).splitlines()[0]}") from error
    if is_hosted(model):
        if captions is not None:
            raise UsageError(f"{model} takes prompts: --captions is for LlamaGen models")
        return _load_hosted(model, dtype, device, image_size)
    folder = model_folder(model)
    config = read_config(folder)
    if image_size:
        raise UsageError(f"image_size = {image_size} is not allowed: {folder} draws pictures of one size")
    if config.get("family") in (FLOW, MASKED, DRIFT):
        if captions is not None:
            raise UsageError(f"{folder} draws classes: --captions is for text-conditional models")
        return _load_vectors(folder, config, dtype, device)
    return _load_codes(folder, config, dtype, device, captions)


def _load_hosted(model: str | Path, dtype: str, device: str, image_size: int) -> Pipeline:
    try:
        from bozzetto.hosted import load_prompted
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise UsageError(f"{model} needs transformers, which is not installed: pip install 'bozzetto[hf]'") from error
    return load_prompted(model, dtype, device, image_size)


def _load_codes(
    folder: Path, config: dict[str, Any], dtype: str, device: str, captions: str | Path | None
) -> CodePipeline:
    network = load_llamagen(folder).to(device)
    tokenizer = load_tokenizer(folder).to(device)
    names = config.get("class_names")
    target = LlamaGenTarget(network, DTYPES[dtype])
    if network.config.captioned:
        if captions is None and config.get("encoder") == ENCODER:
            prompts = config.get("prompts")
            if not _texts(prompts) or not prompts:
                raise UsageError(f"{folder / CONFIG}: prompts must list one text or more")
            if network.config.caption_dim != SentenceEncoder.dim:
                raise UsageError(f"{folder / CONFIG}: caption_dim is not {SentenceEncoder.dim}, as {ENCODER} gives it")
            _check_codes(folder, tokenizer.config, network.config)
            return CaptionPipeline(_name(folder, config), target, tokenizer, prompts, dtype, folder, network)
        if captions is None:
            raise UsageError(f"{folder} draws captions: give a file of their features with --captions")
        names, *given = read_captions(captions, network.config)
        target = target.with_captions(*given)
    elif captions is not None:
        raise UsageError(f"{folder} draws classes: --captions is for text-conditional models")
    else:
        names = _class_names(folder, config, network.config.classes)
    _check_codes(folder, tokenizer.config, network.config)
    classes = distinct([str(n) for n in names])
    pipe = CodePipeline(_name(folder, config), target, tokenizer, classes, dtype, folder, network)
    pipe.captions = None if captions is None else Path(captions)
    return pipe


def _check_codes(folder: Path, have: Any, want: LlamaGenConfig) -> None:
    if (have.codes, have.grid) != (want.vocab, want.grid):
        raise UsageError(
            f"{folder}: the tokenizer has {have.codes} codes on a {have.grid}x{have.grid} grid, the target expects "
            f"{want.vocab} on {want.grid}x{want.grid}"
        )


def _load_vectors(folder: Path, config: dict[str, Any], dtype: str, device: str) -> Pipeline:
    drift: DriftModel | None = None
    own, name = folder, _name(folder, config)
    if config.get("family") == DRIFT:
        folder = _base(own, config)
        config, drift = read_config(folder), load_drift(own, folder).to(device)
    network = load_continuous(folder).to(device) if drift is None else drift.flow
    tokenizer = load_latents(folder).to(device)
    classes = distinct([str(n) for n in _class_names(folder, config, network.config.classes)])
    have, want = tokenizer.config, network.config
    if (have.token_dim, have.grid) != (want.token_dim, want.grid):
        raise UsageError(
            f"{folder}: the decoder takes {have.token_dim} numbers on a {have.grid}x{have.grid} grid, the target draws "
            f"{want.token_dim} on {want.grid}x{want.grid}"
        )
    sampler, source = config.get("sampler", {}), folder / CONFIG
    with naming(source):
        if isinstance(network, MAR):
            masked = config_from(MARSampler, sampler, source)
            return MaskedPipeline(name, network, masked, tokenizer, classes, dtype, folder)
        if drift is not None:
            return DriftPipeline(name, drift, tokenizer, classes, dtype, own, folder)
        made = config_from(FlowSampler, sampler, source)
        return FlowPipeline(name, network, made, tokenizer, classes, dtype, folder)


def _base(folder: Path, config: dict[str, Any]) -> Path:
    with naming(folder / CONFIG):
        return model_folder(str(config.get("base")))


def _name(folder: Path, config: dict[str, Any]) -> str:
    name = config.get("name", folder.name)
    if not isinstance(name, str) or not name.isprintable() or not len(name) <= _LONGEST:
        raise UsageError(f"{folder / CONFIG}: name = {clipped(name)} is not allowed: a text of one line")
    return name


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _class_names(folder: Path, config: dict[str, Any], classes: int) -> list[Any]:
    names = config.get("class_names")
    if not isinstance(names, list) or not _texts(names) or len(names) != classes:
        raise UsageError(f"{folder / CONFIG}: class_names must list {classes} names")
    return names
