"""Speculative decoding inside transformers' own generate: `model.generate(..., custom_generate=generate_fn(...))`.

generate prepares the prompts, the guidance and the sampling options as ever; this runs the decode loop in place of its
own. For Emu3, Chameleon and GLM-Image (the autoregressive stage: its preview and its picture). Janus draws images in a
loop of its own that takes no other: use `bozzetto.load`.

What generate was asked is honoured, or refused by its name (`_refuse_rest`): nothing is passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bozzetto.adapters import chameleon, emu3, glm_image
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafts import CODES
from bozzetto.errors import UsageError, require
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import USUAL_RULES
from bozzetto.settings import GenerateSettings

_GUIDANCE, _PREFIX = "UnbatchedClassifierFreeGuidanceLogitsProcessor", "PrefixConstrainedLogitsProcessor"
# What shapes the law, in the order in which ours does it, and where each keeps its number.
_WARPERS = {"TemperatureLogitsWarper": "temperature", "TopKLogitsWarper": "top_k", "TopPLogitsWarper": "top_p"}
# Processors that change nothing among image tokens; LawSettings and the grid stand for the others.
_NEUTRAL = {
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
}
# Fields of a GenerationConfig that are followed, or that cannot change what is drawn.
_FOLLOWED = {
    *("do_sample", "temperature", "top_k", "top_p", "guidance_scale", "num_return_sequences"),
    *("return_dict_in_generate", "max_length", "max_new_tokens", "min_length", "min_new_tokens"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "transformers_version"),
    *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size"),
    *("remove_invalid_values", "renormalize_logits", "early_stopping", "length_penalty"),  # the last two: of beams
}
_CACHES = (None, "dynamic", "static", "offloaded", "offloaded_static")  # quantized ones change the picture
# Inputs of the model that generate prepares itself.
_PREPARED = {"attention_mask", "position_ids", "cache_position", "logits_to_keep", "use_cache", "tokenizer", "streamer"}
_CACHE_NAMES = ("cache", "past_key_values")
_GRIDS = ("image_grid_thw", "images_per_sample")  # GLM-Image's, from its processor


def generate_fn(
    height: int,
    width: int,
    *,
    drafter: str = "jacobi",
    rule: str = "seed-exact",
    window: int = 0,
    seed: int = 0,
    ending: Sequence[int] = (),
) -> Callable[..., Any]:
    """A callable for `custom_generate`. height, width: of the picture in tokens; drafter (jacobi, none), rule, window:
    as in GenerateSettings; seed: row i of the batch is image i of it; ending: token numbers to add after the picture
    (Emu3's end of frame, of image and of text).

    The callable returns the prompts with the picture's tokens behind them, int64 [B, T + n], as generate does (a
    GenerateDecoderOnlyOutput with return_dict_in_generate). A streamer is given token after token. Raises UsageError
    for a value out of range, and the callable for a model of another family, or anything asked of generate that it
    would have to ignore.
    """
    for name, value in (("height", height), ("width", width)):
        require(isinstance(value, int) and value >= 1, name, value, "a whole number >= 1, of tokens")
    require(isinstance(seed, int) and 0 <= seed < 2**63, "seed", seed, "a whole number from 0 to 2^63 - 1")
    settings = _settings(GenerateSettings(drafter, rule, window))

    def run(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        target = _target(model, height, width, kwargs)
        asked = {**_arguments_of_generate(model), **kwargs}
        length = target.length + len(ending)
        _refuse_rest(target, generation_config, asked, kwargs)
        _check_lengths(generation_config, asked, input_ids.shape[1], length)
        _check_stops(target, generation_config, stopping_criteria, input_ids.shape[1], length)
        law, without = _law(logits_processor, generation_config, input_ids)
        if law.guided and target.offsets is not None:
            _refuse("guidance_scale", law.guidance, "generate's guidance tells this model nothing of its grids")
        given = _rows(input_ids, kwargs.get("attention_mask"))
        _check_prefix(target, logits_processor, input_ids)
        prompts = [Prompt(words, other or words) for words, other in zip(given, without, strict=True)]
        labels = torch.tensor([target.add(prompt) for prompt in prompts])
        tail = torch.tensor([list(ending)] * len(labels), dtype=input_ids.dtype, device=input_ids.device)
        batch, streamer = _batch(target, settings, law, len(labels)), asked.get("streamer")
        drawn = _drawn(batch, labels.to(target.device), seed, partial(_words, target, input_ids), streamer)
        if streamer is not None:
            for column in tail.T:
                streamer.put(column.cpu())
            streamer.end()
        whole = torch.cat([input_ids, drawn, tail], 1)
        if not getattr(generation_config, "return_dict_in_generate", False):
            return whole
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=whole)

    return run


def _settings(settings: GenerateSettings) -> GenerateSettings:
    """With `auto` replaced. Raises UsageError for methods that need more than the model: they are a pipeline's."""
    settings = settings.with_method("jacobi", USUAL_RULES)
    drafter, rule = settings.drafter, settings.rule
    if rule.tokens != CODES:
        raise UsageError(f"{settings.method} is not allowed here: it is for continuous tokens")
    if drafter.trained or drafter.smaller:
        raise UsageError(
            f"drafter = {drafter.text!r} is not allowed here: jacobi, none (bozzetto.load has trained drafters)"
        )
    if settings.verifier.columns:
        raise UsageError(
            f"rule = {rule.text!r} is not allowed here: it reads a table of nearest codes (bozzetto.load has it)"
        )
    return settings


def _target(model: Any, height: int, width: int, kwargs: dict[str, Any]) -> PromptedCodes:
    kind = type(model).__name__
    if kind not in _TARGETS:
        raise UsageError(f"{kind} is not allowed here: {', '.join(_TARGETS)} (others: bozzetto.load)")
    return _TARGETS[kind](model, height, width, kwargs)


def _chameleon(model: Any, height: int, width: int, kwargs: dict[str, Any]) -> PromptedCodes:
    if height != width:
        raise UsageError(f"height = {height}, width = {width} are not allowed: {type(model).__name__} draws squares")
    return chameleon.target(model, height, width)


def _glm_image(model: Any, height: int, width: int, kwargs: dict[str, Any]) -> PromptedCodes:
    preview = _preview(height, width, *(kwargs.pop(name, None) for name in _GRIDS))
    return glm_image.target(model, preview, (height, width))


def _preview(height: int, width: int, grids: Any, counts: Any) -> tuple[int, int]:
    """Rows and columns of GLM-Image's preview, from what its processor says of the grids of each row: the picture's,
    then the preview's."""
    if grids is None:
        _refuse("image_grid_thw", None, "give all that the processor returns")
    rows = torch.as_tensor(grids).view(-1, 2, 3) if len(grids) % 2 == 0 else torch.as_tensor(grids)[:, None]
    if rows.shape[1] == 1 or (counts is not None and set(torch.as_tensor(counts).tolist()) != {2}):
        _refuse("image_grid_thw", torch.as_tensor(grids).tolist(), "two grids for each prompt are: text to image only")
    found = {tuple(map(tuple, row)) for row in rows.tolist()}
    picture, preview = next(iter(found))
    if len(found) > 1 or picture != (1, height, width):
        _refuse("image_grid_thw", sorted(found), f"pictures of 1 x {height} x {width} are, of one size")
    return int(preview[1]), int(preview[2])


# By class of transformers: the target for a picture of this height and width in tokens and generate's other arguments.
_TARGETS: Mapping[str, Callable[[Any, int, int, dict[str, Any]], PromptedCodes]] = MappingProxyType(
    {
        "Emu3ForConditionalGeneration": lambda model, height, width, kwargs: emu3.target(model, height, width),
        "ChameleonForConditionalGeneration": _chameleon,
        "GlmImageForConditionalGeneration": _glm_image,
    }
)


def _batch(target: PromptedCodes, settings: GenerateSettings, law: LawSettings, images: int) -> EagerBatch:
    settings = replace(settings, **vars(law))
    window = settings.window_for(images, target.length, str(target.dtype).removeprefix("torch."))
    return EagerBatch(target, settings.drafter.make(window, None, None, target), settings.verifier, law)


def _drawn(batch: EagerBatch, labels: Tensor, seed: int, words: Callable[[Tensor], Tensor], streamer: Any) -> Tensor:
    """Words int64 [B, N] of the pictures. A streamer gets column after column, as generate's own loop gives it."""
    index, shown = torch.arange(len(labels), device=labels.device), 0
    if streamer is None:
        return words(batch.run(labels, seed, index).tokens)
    for state in batch.passes(labels, seed, index):
        common = int(state.count.min())
        for column in words(state.tokens[:, shown:common]).T:
            streamer.put(column.cpu())
        shown = common
    return words(state.tokens)


def _words(target: PromptedCodes, like: Tensor, tokens: Tensor) -> Tensor:
    """Numbers in the model's vocabulary."""
    return torch.tensor(target.numbers, device=like.device)[tokens.to(like.device)].to(like.dtype)


def _rows(ids: Tensor, mask: Tensor | None) -> list[tuple[int, ...]]:
    """The prompts' tokens without padding."""
    real = torch.ones_like(ids) if mask is None else mask
    return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, real, strict=True)]


# ---- what generate was asked -----------------------------------------------------------------------------------------


def _arguments_of_generate(model: Any) -> dict[str, Any]:
    """The variables of the call of generate that runs us. transformers (5.0 to 5.24 at least) drops `streamer`,
    `assistant_model` and `synced_gpus` before it calls a callable: there is no other way to see them."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            names = ("streamer", "assistant_model", "synced_gpus", "has_default_max_length")
            return {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        frame = frame.f_back
    return {}


def _refuse(name: str, value: object, why: str = "our loop would have to ignore it") -> None:
    raise UsageError(f"{name} = {str(value)[:60]} is not allowed here: {why}")


def _refuse_rest(target: PromptedCodes, config: Any, asked: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Raise UsageError for what is neither followed nor at its neutral value."""
    from transformers import GenerationConfig

    made: Callable[[], dict[str, Any]] = getattr(GenerationConfig, "_get_default_generation_params", dict)
    usual = made()
    for name, unset in vars(GenerationConfig()).items():
        value = getattr(config, name, None)
        if name == "cache_implementation" and value not in _CACHES:
            _refuse(name, value)
        if name.startswith("_") or name in _FOLLOWED or name == "cache_implementation":
            continue
        if not any(value is neutral or value == neutral for neutral in (None, False, unset, usual.get(name))):
            _refuse(name, value)
    for name in ("assistant_model", "synced_gpus"):
        if asked.get(name):
            _refuse(name, type(asked[name]).__name__ if name == "assistant_model" else True)
    for name, value in kwargs.items():
        if name in _CACHE_NAMES and value is not None:
            if held := value.get_seq_length():
                _refuse(name, f"a cache of {held} tokens")
        elif not (value is None or name in _PREPARED or (name == "mm_encoder_outputs" and not value)):
            _refuse(name, type(value).__name__)
    if (places := kwargs.get("position_ids")) is not None:
        for row in _rows(places, kwargs.get("attention_mask")):
            if list(row) != list(range(len(row))):
                _refuse("position_ids", list(row), "0, 1, 2, ... are")


def _check_lengths(config: Any, asked: dict[str, Any], prompt: int, length: int) -> None:
    """A picture is `length` tokens, no fewer and no more. prompt: tokens before it."""
    new, most, least = (getattr(config, name, None) for name in ("max_new_tokens", "max_length", "min_length"))
    wanted = f"the picture takes {length} tokens"
    # Where nothing is said generate fills in 20 tokens, which nobody meant.
    unsaid = new is None and asked.get("has_default_max_length", most is None or most == 20 + prompt)
    if new is not None and new < length:
        _refuse("max_new_tokens", new, wanted)
    if not unsaid and most is not None and most < prompt + length:
        _refuse("max_length", most, f"{wanted} beside {prompt} of the prompt")
    if least is not None and least > prompt + length:
        _refuse("min_length", least, f"{wanted} beside {prompt} of the prompt")


def _check_stops(target: PromptedCodes, config: Any, criteria: Any, prompt: int, length: int) -> None:
    """A picture ends when it is full. prompt, length: as `_check_lengths` has them."""
    for part in criteria:
        name = type(part).__name__
        if name == "MaxLengthCriteria":
            if part.max_length != getattr(config, "max_length", None) and part.max_length < prompt + length:
                _refuse("stopping_criteria", f"{name}({part.max_length})", f"the picture takes {length} tokens")
        elif name == "EosTokenCriteria":
            if found := set(torch.as_tensor(part.eos_token_id).flatten().tolist()) & set(target.numbers):
                _refuse("eos_token_id", min(found), "it is an image token")
        else:
            _refuse("stopping_criteria", name)


def _law(processors: Any, config: Any, ids: Tensor) -> tuple[LawSettings, Sequence[tuple[int, ...] | None]]:
    """The law, and what stands for no prompt in each row. The processors are read and not the configuration: they may
    have been given as such."""
    found: dict[str, Any] = {}
    for part in processors:
        name = type(part).__name__
        if name in _NEUTRAL or (name in _WARPERS and not getattr(config, "do_sample", False)):
            continue  # without sampling the likeliest token stays the likeliest
        if name not in (_GUIDANCE, _PREFIX, *_WARPERS):
            _refuse("logits_processor", name, "temperature, top_k, top_p and guidance are")
        order = [*_WARPERS]
        if name in found or (name in order and any(later in found for later in order[order.index(name) + 1 :])):
            _refuse("logits_processor", name, "each once, in the order temperature, top_k, top_p")
        if name == "TopPLogitsWarper" and part.min_tokens_to_keep != 1:
            _refuse("min_tokens_to_keep", part.min_tokens_to_keep, "1")
        found[name] = part
    options = {field: getattr(found[name], field) for name, field in _WARPERS.items() if name in found}
    if not getattr(config, "do_sample", False):
        options = {"temperature": 0.0}
    if _GUIDANCE not in found:
        return LawSettings(1.0, **options), [None] * len(ids)
    context, scale = found[_GUIDANCE].unconditional_context, float(found[_GUIDANCE].guidance_scale)
    if context["input_ids"] is None:  # what generate does without a negative prompt: the prompt's last token
        return LawSettings(scale, **options), [(int(row[-1]),) for row in ids]
    rows = _rows(context["input_ids"], context["attention_mask"])
    if len(ids) % len(rows):
        _refuse("negative_prompt_ids", f"{len(rows)} rows", f"1, or one for each of {len(ids)}")
    return LawSettings(scale, **options), [row for row in rows for _ in range(len(ids) // len(rows))]


def _check_prefix(target: PromptedCodes, processors: Any, ids: Tensor) -> None:
    """The grid decides which tokens may stand where. A function that says so too (Emu3's usual one) is followed by
    itself; asked at the first and the last token, and around the first end of a line, it has to say the same."""
    *codes, last = target.numbers
    width = target.line  # of pictures whose lines have an end
    for part in (p for p in processors if type(p).__name__ == _PREFIX):
        for row, words in enumerate(ids):
            for at in sorted({0, (width or 1) - 1, width, target.length - 1}):
                drawn = [last if width and i % (width + 1) == width else codes[0] for i in range(at)]
                ends = width > 0 and at % (width + 1) == width
                wanted = {last} if ends else set(codes if width else target.numbers)
                sent = torch.cat([words, words.new_tensor(drawn)])
                if {int(word) for word in part._prefix_allowed_tokens_fn(row // part._num_beams, sent)} != wanted:
                    why = f"of token {at} the grid allows {len(wanted)} words, and the function others"
                    _refuse("prefix_allowed_tokens_fn", getattr(part._prefix_allowed_tokens_fn, "__name__", "it"), why)
