"""From a transformers checkpoint (a folder, or a name on the hub) to a target, its prompts and its pictures.

Folders in the Hugging Face layout are read as they are. Names on the hub are fetched by huggingface_hub, which keeps to
HF_HUB_OFFLINE and its cache. Prompts go through the model's own processor.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bozzetto.adapters.chameleon import ChameleonTarget, LuminaPrompts, LuminaTarget
from bozzetto.adapters.checkpoint import check_folder
from bozzetto.adapters.emu3 import Emu3Target
from bozzetto.adapters.janus import JanusTarget, janus_prompt
from bozzetto.adapters.pictures import HostedPictures, emu3_pictures, janus_pictures
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.adapters.vqgan import chameleon_pictures
from bozzetto.errors import UsageError, brief
from bozzetto.files import digest
from bozzetto.load_settings import LoadSettings
from bozzetto.own_sampling import OwnSampling

Ask = Callable[[str, str], Prompt]  # (prompt, negative prompt; "": none)
_EMU3_FACTOR = 8  # pixels per token and side
_COUNTED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".model", ".txt", ".jinja", ".tiktoken")


@dataclass
class Hosted:
    """What was loaded. ask: from texts to tokens; own: how its authors sample it."""

    target: PromptedCodes
    pictures: HostedPictures
    ask: Ask
    own: OwnSampling = field(default_factory=OwnSampling)


def load_hosted(model: str | Path, wanted: LoadSettings) -> Hosted:
    """Load a checkpoint in the Hugging Face layout.

    Raises UsageError for a checkpoint that is not an image generator of a known family, that is incomplete, or that
    lacks its tokenizer.
    """
    kind = _model_type(model)
    if kind not in FAMILIES:
        raise UsageError(
            f"{model}: model type {kind!r} does not draw images by tokens here (allowed: {', '.join(FAMILIES)}; "
            "LlamaGen and MAR checkpoints: bozzetto convert)"
        )
    class_name, build = FAMILIES[kind]
    import transformers

    network_kind = getattr(transformers, class_name)
    if Path(model).is_dir():  # what comes from the hub was compared with its digests on the way
        check_folder(Path(model), lambda: network_kind(network_kind.config_class.from_pretrained(str(model))))
    processor = _processor(model)
    network, notes = _read(
        model, "weights", network_kind.from_pretrained, dtype=wanted.torch_dtype, output_loading_info=True
    )
    _check_whole(model, network, notes)
    hosted = build(network.to(wanted.device).eval().requires_grad_(False), processor, model, wanted)
    return replace(hosted, ask=_of_words(hosted.ask, processor.tokenizer, hosted.target))


def checkpoint_digest(model: str | Path) -> str:
    """What tells one checkpoint from another: a digest of the names and bytes of the files in its folder that loading
    may read (weights, configurations, tokenizer), or of those in the hub's cache. Sub-folders, code and notes do not
    count; files of the cache that are called by the sha256 of their bytes are taken at their word. "unknown" without
    files."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        known = huggingface_hub.try_to_load_from_cache(str(model), "config.json")
        if not isinstance(known, str):
            return "unknown"
        folder = Path(known).parent
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _COUNTED and not p.name.startswith(".")):
        blob = path.resolve().name  # in the cache, a link to its bytes
        named = path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob)
        total.update(f"{path.name} {blob if named else digest(path)}\n".encode())
    return total.hexdigest()[:16]


def _read(model: str | Path, what: str, read: Callable[..., Any], **options: Any) -> Any:
    """Call a from_pretrained. Its many kinds of error all mean that a file is missing or does not fit."""
    try:
        return read(str(model), **options)
    except Exception as error:  # tokenizers raises no class of its own, safetensors one that is none of Python's
        where = "" if Path(model).is_dir() else " from the hub (there is no such folder here)"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{model}: its {what} could not be read{where}: {reason}") from error


def _model_type(model: str | Path) -> str:
    from transformers import AutoConfig

    return str(getattr(_read(model, "config.json", AutoConfig.from_pretrained), "model_type", None))


def _processor(model: str | Path) -> Any:
    from transformers import AutoProcessor

    processor = _read(model, "processor", AutoProcessor.from_pretrained)
    if getattr(processor, "tokenizer", None) is None:
        raise UsageError(
            f"{model}: no tokenizer: put its files (tokenizer.json or the like, tokenizer_config.json, "
            "processor_config.json, preprocessor_config.json) beside the weights"
        )
    return processor


def _check_whole(model: str | Path, network: Any, notes: Mapping[str, Any]) -> None:
    """Weights are all there, of the right shape, and finite."""
    for name, what in (("missing_keys", "missing"), ("mismatched_keys", "misshapen")):
        if found := sorted(map(str, notes.get(name, ()))):
            raise UsageError(f"{model}: {what} in its weights: {', '.join(found[:4])} ({len(found)} in all)")
    for name, weight in network.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UsageError(f"{model}: {name} has non-finite values")


def _of_words(ask: Ask, tokenizer: Any, target: PromptedCodes) -> Ask:
    """`ask` for prompts that are words: to the model its special tokens (<image>, an end of text, padding, an image
    token) are no words, whoever wrote them."""
    special = {*tokenizer.all_special_ids, *getattr(target, "numbers", ())}
    special |= {number for number, word in tokenizer.added_tokens_decoder.items() if word.special}
    special -= {tokenizer.unk_token_id}

    def checked(text: str, negative: str) -> Prompt:
        for said in (text, negative):
            odd = next((i for i in tokenizer.encode(said, add_special_tokens=False) if i in special), None)
            if odd is not None:
                word = tokenizer.convert_ids_to_tokens(odd)
                raise UsageError(f"prompt {brief(said)} is not allowed: {word!r} in it is a special token of the model")
        try:
            return ask(text, negative)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"prompt {brief(text)} is not allowed: {brief(' '.join(str(error).split()))}") from error

    return checked


def _fixed_size(model: str | Path, asked: int, own: int) -> None:
    if asked not in (0, own):
        raise UsageError(f"image_size = {asked} is not allowed: {model} draws {own} pixels per side")


def _numbers(tokens: Any) -> list[int]:
    """The one row of a processor's result."""
    return torch.as_tensor(tokens["input_ids"]).view(-1).tolist()


def _build_janus(network: Any, processor: Any, model: str | Path, wanted: LoadSettings) -> Hosted:
    target, known = JanusTarget(network), network.generation_config
    pictures = janus_pictures(network, math.isqrt(target.length))
    _fixed_size(model, wanted.image_size, pictures.config.image_size)
    begin = processor.tokenizer.convert_tokens_to_ids(processor.image_start_token)

    def tokens(text: str) -> list[int]:
        if processor.chat_template:
            said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            text = processor.apply_chat_template(said, add_generation_prompt=True)
        return _numbers(processor(text=text, generation_mode="image", return_tensors="pt"))

    def ask(text: str, negative: str) -> Prompt:
        given = tokens(text)
        if negative:
            return Prompt(tuple(given), tuple(tokens(negative)))
        return janus_prompt(given, known.bos_token_id, begin, known.pad_token_id)

    return Hosted(target, pictures, ask)


def _build_emu3(network: Any, processor: Any, model: str | Path, wanted: LoadSettings) -> Hosted:
    image_size = wanted.image_size
    area = (image_size or math.isqrt(processor.image_area)) ** 2
    height, width = processor.calculate_generate_size("1:1", area, _EMU3_FACTOR)
    if height != width or height < 1 or (image_size and height * _EMU3_FACTOR != image_size):
        raise UsageError(f"image_size = {image_size} is not allowed: a multiple of {_EMU3_FACTOR}")
    target, own = Emu3Target(network, height, width), processor.image_processor
    if target.length >= target.context:
        raise UsageError(
            f"image_size = {height * _EMU3_FACTOR} is not allowed: {target.length} image tokens, "
            f"the model's context is {target.context}"
        )
    pictures = emu3_pictures(network, width, list(own.image_mean), list(own.image_std))

    def tokens(text: str) -> tuple[int, ...]:
        asked = {"return_for_image_generation": True, "ratio": "1:1", "image_area": area}
        return tuple(_numbers(processor(text=[text], return_tensors="pt", **asked)))

    return Hosted(target, pictures, lambda text, negative: Prompt(tokens(text), tokens(negative)))


def _build_lumina(network: Any, processor: Any, model: str | Path, wanted: LoadSettings) -> Hosted:
    ask = LuminaPrompts(processor.tokenizer, str(model), wanted.image_size)
    target = LuminaTarget(network, ask.end, ask.grid)
    if target.length >= target.context:
        raise UsageError(
            f"image_size = {ask.pixels} is not allowed: {target.length} image tokens, "
            f"the model's context is {target.context}"
        )
    pictures = chameleon_pictures(model, network, ask.grid, lined=True)
    return Hosted(target, pictures, ask)


def _build_chameleon(network: Any, processor: Any, model: str | Path, wanted: LoadSettings) -> Hosted:
    if any("XLLMX" in name for name in network.config.architectures or ()):  # what Lumina-mGPT's checkpoints say
        return _build_lumina(network, processor, model, wanted)
    grid = math.isqrt(processor.image_seq_length)
    target, pictures = ChameleonTarget(network, grid), chameleon_pictures(model, network, grid)
    _fixed_size(model, wanted.image_size, pictures.config.image_size)
    begin, first = processor.image_start_token_id, processor.tokenizer.bos_token_id

    def tokens(text: str) -> tuple[int, ...]:
        return (*_numbers(processor(text=text, return_tensors="pt")), begin)

    def ask(text: str, negative: str) -> Prompt:
        return Prompt(tokens(text), tokens(negative) if negative else (first, begin))

    return Hosted(target, pictures, ask)


FAMILIES: Mapping[str, tuple[str, Callable[..., Hosted]]] = MappingProxyType(
    {
        "janus": ("JanusForConditionalGeneration", _build_janus),
        "emu3": ("Emu3ForConditionalGeneration", _build_emu3),
        "chameleon": ("ChameleonForConditionalGeneration", _build_chameleon),
    }
)
