"""What a model folder looks like: config.json (family, config, notes), model.safetensors, and what makes pixels of its
tokens, tokenizer.json (kind, config, notes) and tokenizer.safetensors. MODEL_CARD.md is for people.

Folders of drafters and of drift variants have no tokenizer, and name the model that they are made for by a digest of
its weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bozzetto.autoencoders.kl16 import KL16Config, kl16_latents
from bozzetto.autoencoders.latents import KL16, TINY, LatentConfig, LatentDecoder, tiny_latents
from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig, from_published
from bozzetto.autoencoders.tiny import DOWNSAMPLE, LATENT_CHANNELS
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.weights import (
    WEIGHTS,
    fill,
    is_name,
    load_module,
    load_streamed,
    on_meta,
    read_weights,
    save_state,
)
from bozzetto.common.checks import config_from, naming
from bozzetto.common.files import digest, read_json, write_text
from bozzetto.drafters.gaussian import GaussianConfig, GaussianNet
from bozzetto.drafters.trained import TRAINED
from bozzetto.errors import UsageError, brief, require
from bozzetto.targets.drift import DriftConfig, DriftModel
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.targets.mar import MAR, MARConfig

CONFIG = "config.json"
PIPELINE, FIRST_STAGE = "model_index.json", "vision_language_encoder"  # of diffusers; its part that draws tokens
TOKENIZER_CONFIG, TOKENIZER_WEIGHTS = "tokenizer.json", "tokenizer.safetensors"
LLAMAGEN, FLOW, MASKED, DRIFT = "llamagen", "flow", "mar", "drift"
EAGLE, SKETCH = "eagle", "sketch"  # families, and folders inside a model's
VQ_TINY, VQ_LLAMAGEN = "vq-tiny", "vq-llamagen"


class Family(NamedTuple):
    """What a family in config.json, or a kind in tokenizer.json, stands for. network: of a config; layers: lists of its
    layers, which need not be in memory all at once; rest: the type of everything else (None: of the layers)."""

    config: type
    network: Callable[..., nn.Module]
    layers: tuple[str, ...] = ()
    rest: torch.dtype | None = None


TARGETS: Mapping[str, Family] = {
    LLAMAGEN: Family(LlamaGenConfig, LlamaGen, ("layers",)),
    FLOW: Family(FlowConfig, FlowModel, ("layers",), torch.float32),  # parts of the head are computed in float32
    MASKED: Family(MARConfig, MAR, ("encoder_blocks", "decoder_blocks"), torch.float32),
}
DRAFTERS: Mapping[str, Family] = {
    **{name: Family(kind.config, kind.net) for name, kind in TRAINED.items()},
    SKETCH: Family(GaussianConfig, GaussianNet),
}
TOKENIZERS: Mapping[str, Family] = {
    VQ_TINY: Family(VQConfig, VQTokenizer),
    VQ_LLAMAGEN: Family(LlamaGenVQConfig, LlamaGenVQ),
}
LATENTS: Mapping[str, Family] = {
    TINY: Family(LatentConfig, lambda config: tiny_latents(config.image_size)),
    KL16: Family(KL16Config, kl16_latents),
}
VARIANTS: Mapping[str, Family] = {DRIFT: Family(DriftConfig, DriftModel)}  # of a base model and a config
Tokenizer = VQTokenizer | LlamaGenVQ


def read_config(folder: str | Path, name: str = CONFIG) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UsageError when the file is missing or holds something else."""
    path = Path(folder) / name
    if not path.is_file():
        there = Path(folder).iterdir() if Path(folder).is_dir() else ()
        note = next(filter(None, map(convert_note, there)), " (bozzetto models lists those that are shipped)")
        raise UsageError(f"not a model folder: {path} does not exist{note}")
    return read_json(path)


def convert_note(path: str | Path) -> str:
    """What to do with a file that is called as authors call their checkpoints; "" for other names."""
    if Path(path).suffix not in (".pt", ".pth", ".ckpt") or Path(path).name == "checkpoint.pt":  # of our own training
        return ""
    return " (checkpoints of LlamaGen and MAR are converted first: bozzetto convert)"


def described(
    content: Mapping[str, Any], kinds: Mapping[str, Family], source: Path, key: str = "family"
) -> tuple[Family, Any]:
    """What the file `source` holds: the family or kind that it names among `kinds`, and its config. Raises UsageError
    for another one, and naming what is wrong in the config."""
    found = named(content, kinds, source, key)
    return kinds[found], config_from(kinds[found].config, content.get("config"), source)


def named(content: Mapping[str, Any], kinds: Iterable[str], source: Path, key: str = "family") -> str:
    """The family or kind that the file `source` names among `kinds`. Raises UsageError for another one."""
    found = content.get(key)
    if not isinstance(found, str) or found not in kinds:
        raise UsageError(f"{source}: {key} is {brief(found)} (allowed: {', '.join(map(repr, kinds))})")
    return found


def write_model(
    folder: str | Path,
    family: str,
    config: Any,
    state: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    compact: bool = False,
    store: str = "float16",
) -> None:
    """config.json and model.safetensors of a family. compact, store: see `save_state`."""
    save_state(Path(folder) / WEIGHTS, state, compact, store)
    _write_config(Path(folder) / CONFIG, {"family": family}, config, notes)


def write_tokenizer(
    folder: str | Path, kind: str, config: Any, state: Mapping[str, Tensor], notes: Mapping, store: str = "float16"
) -> None:
    """tokenizer.json and tokenizer.safetensors. state: under published names where the kind is `vq-llamagen`, of the
    LatentDecoder (scale, shift, decoder.*) where it is of latents; store: see `save_state`."""
    save_state(Path(folder) / TOKENIZER_WEIGHTS, state, store=store)
    _write_config(Path(folder) / TOKENIZER_CONFIG, {"kind": kind}, config, notes)


def _write_config(path: Path, first: Mapping[str, str], config: Any, notes: Mapping[str, Any]) -> None:
    """`first` (family or kind), the config dataclass (quiet fields where they are not as usual), the notes."""
    quiet = {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("quiet")}
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in quiet or getattr(config, k) != quiet[k]}
    write_text(path, json.dumps({**first, "config": kept, **notes}, indent=2) + "\n")


def target_digest(folder: str | Path) -> str:
    """What tells one target from another: a digest of its weights."""
    if not (path := Path(folder) / WEIGHTS).is_file():
        raise UsageError(f"weights not found: {path}")
    return digest(path)


def load_target(
    folder: str | Path, *families: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """Read the network of a model folder of one of these families of TARGETS; float32, in evaluation mode. dtype: for a
    target in this type on the device, with layers that are Streamed.

    Raises UsageError for another family, and for missing, misshapen or non-finite weights.
    """
    folder = Path(folder)
    kinds = {name: TARGETS[name] for name in families}
    family, config = described(read_config(folder), kinds, folder / CONFIG)
    make, weights = lambda: family.network(config), folder / WEIGHTS
    if dtype is None:
        return load_module(make, weights)
    return load_streamed(make, weights, family.layers, dtype, device, family.rest)


def save_llamagen(
    folder: str | Path, model: LlamaGen, tokenizer: Tokenizer, notes: Mapping[str, Any], compact: bool = False
) -> None:
    """Write a complete model folder: config.json, model.safetensors and its tokenizer. compact: see `save_state`."""
    save_tokenizer(folder, tokenizer, {})
    write_model(folder, LLAMAGEN, model.config, model.state_dict(), notes, compact)


def save_tokenizer(folder: str | Path, model: Tokenizer, notes: Mapping[str, Any]) -> None:
    """Write tokenizer.safetensors and tokenizer.json (its kind, its config and `notes`)."""
    if isinstance(model, LlamaGenVQ):
        write_tokenizer(folder, VQ_LLAMAGEN, model.config, model.published_state(), notes)
    else:
        write_tokenizer(folder, VQ_TINY, model.config, model.state_dict(), notes)


def load_tokenizer(folder: str | Path, encoder: bool = True) -> Any:
    """Read what save_tokenizer wrote, a Tokenizer; float32, in evaluation mode. encoder: whether it has to encode
    pictures; the published tokenizers else leave out the half of their weights that does.

    Raises UsageError for missing, broken or unfitting files, an unknown kind, or a missing extra package.
    """
    source, weights = Path(folder) / TOKENIZER_CONFIG, Path(folder) / TOKENIZER_WEIGHTS
    content = {"kind": VQ_TINY, **read_config(folder, TOKENIZER_CONFIG)}  # folders of before there were kinds
    kind, config = described(content, TOKENIZERS, source, "kind")
    if kind.config is VQConfig:
        return load_module(lambda: kind.network(config), weights)
    model = on_meta(lambda: LlamaGenVQ(config))
    wanted = model.published_state()
    if not encoder:
        model.forget_encoder()
    return fill(model, from_published(read_weights(weights, wanted, model.published_state().__contains__)))


def load_latents(folder: Path) -> LatentDecoder:
    """Read the decoder of a folder of continuous tokens; float32, in evaluation mode. Where tokenizer.json says
    `same_as`, its weights are those of the folder of that name beside it. Raises UsageError as load_tokenizer does."""
    content, source = read_config(folder, TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG
    kind, config = described(content, LATENTS, source, "kind")
    if kind.config is LatentConfig and (config.token_dim, config.downsample) != (LATENT_CHANNELS, DOWNSAMPLE):
        raise UsageError(f"{source}: {TINY!r} has token_dim {LATENT_CHANNELS} and downsample {DOWNSAMPLE}")
    made: Any = load_module(lambda: kind.network(config), tokenizer_weights(folder, content))
    return made


def tokenizer_weights(folder: Path, content: Mapping[str, Any]) -> Path:
    """Where the weights of a tokenizer.json lie: beside it, or in the neighbouring folder that `same_as` names.

    Raises UsageError where that is no folder's name.
    """
    name = content.get("same_as", folder.name)
    require(is_name(name), f"{folder / TOKENIZER_CONFIG}: same_as", name, "a folder's name")
    return (folder.parent / name if "same_as" in content else folder) / TOKENIZER_WEIGHTS


def save_drafter(folder: str | Path, net: Any, target: Path, notes: Mapping[str, Any], compact: bool = False) -> None:
    """Write a drafter folder for the target in the model folder `target`. compact: see `save_state`."""
    family = next(name for name, kind in DRAFTERS.items() if type(net.config) is kind.config)
    made_for = {"target_weights": target_digest(target)}
    write_model(folder, family, net.config, net.state_dict(), {**made_for, **notes}, compact)


def load_drafter(folder: str | Path, family: str, target: Any, weights: str) -> Any:
    """Read a drafter of this family for a target with this config and this digest of its weights; float32, in
    evaluation mode.

    Raises UsageError for another family, another target, or a shape that is not the target's.
    """
    folder = Path(folder)
    content = read_config(folder)
    kind, config = described(content, {family: DRAFTERS[family]}, folder / CONFIG)
    before = getattr(config, "before", "nothing")
    allowed = ("nothing", "captions" if isinstance(target, LlamaGenConfig) else "words")
    if before not in allowed:
        raise UsageError(f"{folder}: a drafter of another target: before = {before!r} (allowed: {', '.join(allowed)})")
    if before == "words":  # it knows the whole vocabulary, and places in a line
        config = dataclasses.replace(config, vocab=target.vocab, grid=target.grid)
    _check_target(folder, content, config, target, weights)
    return load_module(lambda: kind.network(config), folder / WEIGHTS)


def _check_target(folder: Path, content: Mapping[str, Any], config: Any, target: Any, weights: str) -> None:
    """Raise UsageError unless a drafter with this config.json was trained for the target: for its shape by the names
    that both have, and for the weights of this digest (a converted drafter may say nothing of them)."""
    for name in ("dim", "vocab", "token_dim", "grid"):
        have, want = getattr(config, name, None), getattr(target, name, None)
        if have is not None and have != want:
            raise UsageError(f"{folder}: a drafter of another target: {name} = {have}, the target has {want}")
    if content.get("target_weights") not in (None, weights):
        name, found = content.get("target_name", "unknown"), content["target_weights"]
        raise UsageError(
            f"{folder}: a drafter of another target: it was trained for the weights of {brief(name)} "
            f"({brief(found)}), the target's are {weights}"
        )


def save_drift(folder: Path, model: DriftModel, base: str, base_folder: Path, notes: Mapping[str, Any]) -> None:
    """base: what the base model is loaded by, a shipped name or a path; base_folder: where it lies."""
    made_from = {"base": base, "base_weights": target_digest(base_folder)}
    write_model(folder, DRIFT, model.config, model.own_state(), {**made_from, **notes}, compact=True)


def load_base(folder: Path) -> FlowModel:
    """A flow model that a variant is made from. Raises UsageError for another family."""
    base = load_target(folder, FLOW, MASKED)
    if not isinstance(base, FlowModel):
        raise UsageError(f"{folder}: a drift variant is made from a flow model")
    return base


def load_drift(folder: Path, base_folder: Path) -> DriftModel:
    """Read a variant (classes, body and decoder of latents are the base model's); float32, in evaluation mode.

    Raises UsageError for another base than it was trained for, and for missing, misshapen or non-finite weights.
    """
    content, source = read_config(folder), folder / CONFIG
    _, config = described(content, VARIANTS, source)
    found = target_digest(base_folder)
    if content.get("base_weights") != found:
        raise UsageError(
            f"{folder}: made from other weights of {brief(content.get('base'))} "
            f"({brief(content.get('base_weights'))}) than those in {base_folder} ({found})"
        )
    base = load_base(base_folder)
    with naming(source):  # more tuned blocks than the base has
        model = on_meta(lambda: DriftModel(base, config))
    state = read_weights(folder / WEIGHTS, model.own_state())
    return fill(model, {**model.state_dict(), **state})
