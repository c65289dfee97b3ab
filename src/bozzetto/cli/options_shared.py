"""What several verbs can be told: how to load a model, and how to draw with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from bozzetto.checkpoints.load_settings import AUTO, LoadSettings
from bozzetto.errors import UsageError

STRICT = ConfigDict(extra="forbid")
OWN = "own"  # in a list: the model's own value


@checked(frozen=True, config=STRICT)
class Loading:
    """What every verb that loads a model can be told about it: the fields of LoadSettings."""

    dtype: str = "auto"
    """float32, bfloat16 or float16, for the target's passes; auto: float32 on a processor, on a GPU as the weights are
    stored. The byte-for-byte promise holds in float32."""
    device: str = "auto"
    """Where the passes run: auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""
    device_map: str = ""
    """Spread a model of transformers over several GPUs (with accelerate): auto, balanced or
    sequential. Not given: one device."""
    captions: Path | None = None
    """For a text-conditional model: safetensors file with the captions' features, which then stand for prompts."""
    text_encoder: str = ""
    """For a text-conditional LlamaGen: folder or hub name of its text encoder. Not given: google/flan-t5-xl."""
    image_size: int | str = 0
    """Pixels per side, or WIDTHxHEIGHT, for models that have a choice (Emu3, Lumina-mGPT, GLM-Image, NextStep-1). 0:
    the usual."""
    vae: str = ""
    """NextStep-1: folder of its autoencoder (config.json, checkpoint.pt), or its name on the hub. Not given: the
    model's own vae."""
    sampler: str = ""
    """NextStep-1: euler:steps=28:shift=1:last=0:norm=0 (as the model pages have it) or flow-sde:steps=30:level=0.8 (as
    NextStep-1.1's repository has it). Each is a law of its own. Not given: the first."""
    adapter: str = ""
    """For a language model of transformers whose image tokens are words: YAML or JSON file that says which and how, or
    simplear, lumina-mgpt-2. Not given: bozzetto.yaml in the model's folder."""
    tokenizer: str = ""
    """For a Lumina-mGPT that comes without: a folder or a name on the hub with its tokenizer."""
    vqgan: Path | None = None
    """For models of Chameleon's family, and of adapters: the checkpoint of the decoder, if not in the folder."""
    offline: bool = False
    """Ask no network: names on the hub are looked for in its cache only."""


@checked(frozen=True, config=STRICT)
class Law(Loading):
    """What every verb that draws images can be told about the law and the engine."""

    seed: int = 0
    """Image i of a seed is the same picture in any batch and with any number of images or processes around it."""
    window: int = 0
    """Positions scored in one pass. 0: chosen for the batch."""
    guidance: float | None = None
    """Classifier-free guidance, 1 or more. 1: off, which halves the work. Not given: the model's own."""
    temperature: float | None = None
    """Above 0; 0 always takes the likeliest token. Not given: the model's own."""
    top_k: int | None = None
    """Keep only the K likeliest tokens. 0: all. Not given: the model's own."""
    top_p: float | None = None
    """Keep the likeliest tokens that make up this probability, above 0 and up to 1. 1: all. Not given: the model's
    own."""
    tv_budget: float | None = None
    """Most bias (total variation, summed over an image's tokens) that a relaxed rule may spend before it decides
    exactly. Not given: no limit."""
    steps: int = 0
    """Continuous tokens: denoising steps per token. 0: as the model says."""
    last_steps: int = 0
    """Continuous tokens without drafts: denoising steps of the last token, to which they fall evenly from --steps. It
    is another sampler. 0: as of the first."""
    passes: int = 0
    """Masked models: autoregressive steps, up to one per token. 0: as the model says."""
    guidance_schedule: str = ""
    """Masked models: linear (guidance grows as the image fills) or constant. Not given: as the model says."""
    negative_prompt: str | None = None
    """Models in the Hugging Face layout: what guidance leads away from. Not given: what the model has for no prompt, or
    with --quality-words what its authors publish."""
    quality_words: bool = False
    """Append to every prompt what the model's authors append to theirs (Emu3, NextStep-1), and take their negative
    prompt where none is given."""
    compile: str = "off"
    """off, default or max: compile the passes of a causal model. The first pass of each shape then takes seconds (max:
    half a minute), the others less than before; they are kept on disk. Float32 results agree with `off` up to
    rounding."""
    deterministic: bool = False
    """With --compile: passes of any width and batch agree to the last bit, so that seed-exact images are the same bytes
    in bfloat16 too, whatever the batch."""
    batch: int = 8
    """Images decoded together."""
    progress: bool = False
    """Show progress bars even where no terminal is attached."""


def loading_of(options: Any) -> Any:
    """LoadSettings of a verb's options; a GPU that nobody named is said in one line."""
    found = settings_from(options, LoadSettings)
    if options.device == AUTO and found.device != "cpu":
        print(f"device: {found.device} (--device cpu for the processor)", file=sys.stderr, flush=True)
    return found


def settings_from(options: Any, kind: Any, **own: Any) -> Any:
    """A dataclass of settings, with every option of its name, and `own` where they are not typed under that name."""
    names = [name for name in kind.__dataclass_fields__ if hasattr(options, name) and name not in own]
    return kind(**{name: getattr(options, name) for name in names}, **own)


def listed(name: str, text: str, kind: Callable[[str], Any], own: bool = False) -> tuple[Any, ...]:
    """Values separated by commas. own: `own`, or nothing, is None, for the model's own. Raises UsageError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if own and not text.strip():
        parts = [OWN]
    try:
        return tuple(None if own and part == OWN else kind(part) for part in parts)
    except ValueError as error:
        wanted = ("whole numbers" if kind is int else "numbers") + f" or {OWN}" * own
        raise UsageError(f"{name} = {text!r} is not allowed: {wanted} separated by commas") from error
