"""Speculative decoding inside transformers' own generate: `model.generate(..., custom_generate=generate_fn(...))`.

generate prepares the prompts, the guidance and the sampling options as ever; this runs the decode loop in place of its
own. For Emu3 and Chameleon. Janus draws images in a loop of its own that takes no other: use `bozzetto.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bozzetto.adapters.chameleon import ChameleonTarget
from bozzetto.adapters.emu3 import Emu3Target
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.engine.loop import Decoder
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.registry import make_drafter, make_rule
from bozzetto.settings import GenerateSettings

_TARGETS = {"emu3": "Emu3ForConditionalGeneration", "chameleon": "ChameleonForConditionalGeneration"}
_GUIDANCE = "UnbatchedClassifierFreeGuidanceLogitsProcessor"
# Processors that the law or the grid already stands for.
_KNOWN = {
    _GUIDANCE,
    "PrefixConstrainedLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
}


def generate_fn(
    height: int,
    width: int,
    *,
    drafter: str = "jacobi",
    rule: str = "seed-exact",
    window: int = 0,
    seed: int = 0,
    ending: Sequence[int] = (),
) -> Callable[..., Tensor]:
    """A callable for `custom_generate`. height, width: of the picture in tokens; drafter, rule, window: as in
    GenerateSettings; seed: row i of the batch is image i of it; ending: token numbers to add after the picture (Emu3's
    end of frame, of image and of text).

    The callable returns the prompts with the picture's tokens behind them, int64 [B, T + n], as generate does. It
    raises UsageError for a model of another family, or a logits processor that it would have to ignore.
    """
    settings = GenerateSettings(drafter, rule, window)

    def run(
        model: Any, input_ids: Tensor, logits_processor: Any = (), generation_config: Any = None, **kwargs: Any
    ) -> Tensor:
        target = _target(model, height, width)
        guidance, without = _guidance(logits_processor, input_ids)
        mask = kwargs.get("attention_mask")
        prompts = zip(_rows(input_ids, mask), without, strict=True)
        labels = torch.tensor([target.add(Prompt(given, other or given)) for given, other in prompts])
        decoder = _decoder(target, settings, _law(generation_config, guidance), len(labels))
        drawn = decoder.run(labels.to(target.device), seed, torch.arange(len(labels), device=target.device)).tokens
        numbers = torch.tensor(target.numbers, device=input_ids.device)
        tail = torch.tensor([list(ending)] * len(labels), dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids, numbers[drawn].to(input_ids.dtype), tail], 1)

    return run


def _target(model: Any, height: int, width: int) -> Any:
    kind = type(model).__name__
    if kind == _TARGETS["emu3"]:
        return Emu3Target(model, height, width)
    if kind == _TARGETS["chameleon"]:
        if height != width:
            raise UsageError(f"height = {height}, width = {width} are not allowed: {kind} draws squares")
        return ChameleonTarget(model, height)
    raise UsageError(f"{kind} is not allowed here: {', '.join(_TARGETS.values())} (others: bozzetto.load)")


def _decoder(target: PromptedCodes, settings: GenerateSettings, law: LawSettings, batch: int) -> Decoder:
    dtype = str(target.dtype).removeprefix("torch.")
    places = settings.window or max(2, min(16, (128 if dtype == "bfloat16" else 64) // (2 * batch)))
    return Decoder(target, make_drafter(settings.drafter, places), make_rule(settings.rule), law)


def _rows(ids: Tensor, mask: Tensor | None) -> list[tuple[int, ...]]:
    """The prompts' tokens without padding."""
    real = torch.ones_like(ids) if mask is None else mask
    return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, real, strict=True)]


def _guidance(processors: Any, ids: Tensor) -> tuple[float, Sequence[tuple[int, ...] | None]]:
    """The scale, and what stands for no prompt in each row."""
    odd = [type(p).__name__ for p in processors if type(p).__name__ not in _KNOWN]
    if odd:
        raise UsageError(f"{odd[0]} is not allowed here: temperature, top_k, top_p and guidance are")
    found = [p for p in processors if type(p).__name__ == _GUIDANCE]
    if not found:
        return 1.0, [None] * len(ids)
    context = found[0].unconditional_context
    if context["input_ids"] is None:  # what generate does without a negative prompt: the prompt's last token
        return float(found[0].guidance_scale), [(int(row[-1]),) for row in ids]
    rows = _rows(context["input_ids"], context["attention_mask"])
    return float(found[0].guidance_scale), rows * (len(ids) if len(rows) == 1 else 1)


def _law(config: Any, guidance: float) -> LawSettings:
    if not getattr(config, "do_sample", False):
        return LawSettings(guidance, 0.0)
    found = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p")}
    return LawSettings(guidance, **{name: value for name, value in found.items() if value is not None})
