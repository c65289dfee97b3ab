"""`bozzetto.load`: from the name or the folder of a model to a pipeline that draws its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch

from bozzetto.adapters.families import way_out
from bozzetto.checkpoints.captions import read_captions
from bozzetto.checkpoints.folders import (
    CONFIG,
    DRIFT,
    FLOW,
    LLAMAGEN,
    MASKED,
    PIPELINE,
    TARGETS,
    VARIANTS,
    load_drift,
    load_latents,
    load_target,
    load_tokenizer,
    named,
    read_config,
)
from bozzetto.checkpoints.load_settings import LoadSettings, refuse_flow_options
from bozzetto.checkpoints.own_sampling import SAMPLING, own_from
from bozzetto.checkpoints.weights import WEIGHTS, usual_type
from bozzetto.common.checks import config_from, naming
from bozzetto.common.classes import distinct
from bozzetto.common.extras import needed
from bozzetto.common.hub import described, fetched, go_offline, model_name, on_hub
from bozzetto.common.shipped import shipped_folders
from bozzetto.errors import UsageError, brief, require
from bozzetto.methods.resources import MaskedResources, Resources, VectorResources
from bozzetto.pipeline.conditions import ENCODER, EXAMPLES, Captions, Classes
from bozzetto.pipeline.kinds import CausalVectors, Codes, MaskedVectors, TokenKind
from bozzetto.pipeline.pipeline import Pipeline, is_hosted, model_folder
from bozzetto.pipeline.results import settings_of
from bozzetto.pipeline.runner import Runner
from bozzetto.runtime.graphs import Report
from bozzetto.runtime.native import usual_dtype
from bozzetto.settings import GenerateSettings
from bozzetto.targets.drift import DriftModel, DriftTarget
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from bozzetto.targets.mar import MAR
from bozzetto.targets.mar_target import MARSampler, MARTarget, check_passes
from bozzetto.targets.sentence import SentenceEncoder

_LONGEST = 200  # characters of a name


def load(
    model: str | Path = "flowers", settings: LoadSettings | None = None, report: Report | None = None, **options: Any
) -> Pipeline:
    """Load a shipped model by name, a model folder, or a checkpoint in the Hugging Face layout (a folder, or its name
    on the hub). report: accepted, told nothing any more; options: fields of LoadSettings, in place of
    `settings`.

    Raises UsageError for an unknown model or option and for files that do not fit together.
    """
    wanted = settings_of(LoadSettings, settings, options)
    if wanted.offline:
        go_offline()
    place = _described(model) if on_hub(model) else model
    if not (Path(place) / CONFIG).is_file() and (why := way_out(str(model), {})):
        raise UsageError(f"{model}: {why}")
    if is_hosted(place):
        return _load_hosted(model, Path(place), wanted)
    folder = model_folder(fetched(model) if on_hub(model) else model)
    config = read_config(folder)
    family = named(config, (*TARGETS, *VARIANTS), folder / CONFIG)
    refuse_flow_options(wanted, str(folder))
    wanted.refuse(f"{folder} has its own", "tokenizer", "vqgan")
    own = own_from(config, folder / CONFIG)
    if wanted.size:
        raise UsageError(f"image_size = {wanted.image_size} is not allowed: {folder} draws pictures of one size")
    wanted.refuse(f"{folder} is no model of transformers", "device_map", "adapter")
    here = usual_dtype if folder in shipped_folders().values() else lambda: "float32"
    wanted = wanted.for_weights(lambda: usual_type(folder / WEIGHTS), here)
    read = _vectors if family in (FLOW, MASKED, DRIFT) else _codes
    kind, conditions = read(folder, config, wanted)
    pipe = Pipeline(kind, conditions, kind.runner, own)
    if SAMPLING in config:
        with naming(folder / CONFIG):  # what it says is allowed for this kind of model
            pipe.make_batch(GenerateSettings(drafter="none"))
    return pipe


def _described(model: str | Path) -> Path:
    """What is known of a name on the hub before its weights are fetched. Raises UsageError, with the way out where its
    name tells one."""
    try:
        found = described(model)
    except UsageError as error:
        why = way_out(str(model), {})
        raise UsageError(f"{error} (by its name: {why})" if why else str(error)) from error
    if not any((found / name).is_file() for name in (CONFIG, PIPELINE)):
        raise UsageError(f"{model}: {way_out(str(model), {}) or f'there is no {CONFIG}, which says what a model is'}")
    return found


def _load_hosted(model: str | Path, folder: Path, wanted: LoadSettings) -> Pipeline:
    _refuse_text(wanted, f"{model} takes prompts", "LlamaGen models")
    with needed(f"{model} needs", "hf"):
        from bozzetto.pipeline.hosted import load_prompted
    return load_prompted(model, wanted, folder)


def _codes(folder: Path, config: dict[str, Any], wanted: LoadSettings) -> tuple[TokenKind, Classes]:
    network = partial(load_target, folder, LLAMAGEN, dtype=wanted.torch_dtype, device=wanted.device)
    tokenizer = load_tokenizer(folder, encoder=False).to(wanted.device)
    target, captions = LlamaGenTarget(network(), wanted.torch_dtype, network), wanted.captions
    encoder: Any = None  # of texts
    names: Sequence[str]
    if not target.config.captioned:
        _refuse_text(wanted, f"{folder} draws classes")
        names = _class_names(folder, config, target.config.classes)
    elif captions is None:
        encoder, names = _encoder(folder, config, target, wanted)
    elif wanted.text_encoder:
        raise UsageError("give either --captions, the features of captions, or --text-encoder, which makes them")
    else:
        names, *given = read_captions(captions, target.config)
        target = target.with_captions(*given)
    have, want = tokenizer.config, target.config
    if (have.codes, have.grid) != (want.vocab, want.grid):
        raise UsageError(
            f"{folder}: the tokenizer has {have.codes} codes on a {have.grid}x{have.grid} grid, the target expects "
            f"{want.vocab} on {want.grid}x{want.grid}"
        )
    files = () if captions is None else (Path(captions),)
    runner = Runner(_name(folder, config), target, tokenizer, (folder,), files, network)
    kind = Codes(runner, Resources(target, tokenizer.codebook, folder))
    return kind, Classes(distinct(names)) if encoder is None else Captions(encoder, names, runner.targets)


def _refuse_text(wanted: LoadSettings, why: str, others: str = "text-conditional models") -> None:
    for name in ("captions", "text_encoder"):
        if getattr(wanted, name):
            raise UsageError(f"{why}: --{name.replace('_', '-')} is for {others}")


def _encoder(
    folder: Path, config: dict[str, Any], target: LlamaGenTarget, wanted: LoadSettings
) -> tuple[Any, Sequence[str]]:
    """The text encoder of a model that draws captions, and the prompts that stand for its classes."""
    shape = target.config
    own, source = config.get("encoder"), wanted.text_encoder
    if own == ENCODER:
        if source:
            raise UsageError(f"text_encoder = {str(source)!r} is not allowed: {folder} comes with its own, {ENCODER}")
        prompts = config.get("prompts")
        if not _texts(prompts) or not prompts:
            raise UsageError(f"{folder / CONFIG}: prompts must list one text or more")
        if shape.caption_dim != SentenceEncoder.dim:
            raise UsageError(f"{folder / CONFIG}: caption_dim is not {SentenceEncoder.dim}, as {ENCODER} gives it")
        return SentenceEncoder(shape.condition_tokens), prompts
    with needed("prompts need", "hf"):
        from bozzetto.adapters.t5 import DIM, PUBLISHED, T5Encoder
    require(isinstance(own, str | None), f"{folder / CONFIG}: encoder", own, "a folder, or a name on the hub")
    source = source or own or ""
    if not source and shape.caption_dim != DIM:
        raise UsageError(
            f"{folder} draws captions of {shape.caption_dim} numbers a token, which {PUBLISHED} does not give: "
            "name its text encoder with --text-encoder, or give a file of features with --captions"
        )
    dims = shape.condition_tokens, shape.caption_dim
    return T5Encoder(source or PUBLISHED, *dims, target.dtype, str(target.device)), EXAMPLES


def _vectors(folder: Path, config: dict[str, Any], wanted: LoadSettings) -> tuple[TokenKind, Classes]:
    _refuse_text(wanted, f"{folder} draws classes")
    own, name, base = folder, _name(folder, config), None
    drift: DriftModel | None = None
    if config.get("family") == DRIFT:
        folder = base = _base(own, config)
        config, drift = read_config(folder), load_drift(own, folder).to(wanted.device)
    again = partial(load_target, folder, FLOW, MASKED, dtype=wanted.torch_dtype, device=wanted.device)
    network = again() if drift is None else drift.flow
    tokenizer = load_latents(folder).to(wanted.device)
    classes = Classes(distinct(_class_names(folder, config, network.config.classes)))
    have, want = tokenizer.config, network.config
    if (have.token_dim, have.grid) != (want.token_dim, want.grid):
        raise UsageError(
            f"{folder}: the decoder takes {have.token_dim} numbers on a {have.grid}x{have.grid} grid, the target draws "
            f"{want.token_dim} on {want.grid}x{want.grid}"
        )
    folders = (own,) if base is None else (own, base)
    target: Any = _vector_target(network, drift, config.get("sampler", {}), folder / CONFIG, wanted.torch_dtype, again)
    runner = Runner(name, target, tokenizer, folders, (), again if drift is None else lambda: network)
    if isinstance(network, MAR):
        return MaskedVectors(runner, MaskedResources(target, name, own)), classes
    tuned = drift is not None and bool(drift.config.tuned)
    return CausalVectors(runner, VectorResources(target, name, own, base, tuned)), classes


def _vector_target(
    network: Any, drift: DriftModel | None, sampler: Any, source: Path, dtype: torch.dtype, again: Callable[[], Any]
) -> DriftTarget | MARTarget | FlowTarget:
    """sampler: as the file `source` says; again: reads the network again."""
    if drift is not None:
        return DriftTarget(drift, dtype)
    with naming(source):
        if not isinstance(network, MAR):
            return FlowTarget(network, config_from(FlowSampler, sampler, source), dtype, again)
        masked = config_from(MARSampler, sampler, source)
        check_passes(masked.passes, network.config.length)
    return MARTarget(network, masked, dtype)


def _base(folder: Path, config: dict[str, Any]) -> Path:
    with naming(folder / CONFIG):
        return model_folder(fetched(str(config.get("base"))))


def _name(folder: Path, config: dict[str, Any]) -> str:
    name = config.get("name", model_name(folder))
    if not isinstance(name, str) or not name.isprintable() or not len(name) <= _LONGEST:
        raise UsageError(f"{folder / CONFIG}: name = {brief(name)} is not allowed: a text of one line")
    return name


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _class_names(folder: Path, config: dict[str, Any], classes: int) -> list[str]:
    names = config.get("class_names")
    if not _texts(names) or len(names) != classes:
        raise UsageError(f"{folder / CONFIG}: class_names must list {classes} names")
    return names
