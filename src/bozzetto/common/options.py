"""Options that the command line and the settings of Python share, each declared once: its docstring is the help text.

Nothing here imports torch, so that `bozzetto --help` is quick. The settings, which inherit the fields, check them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model."""

    dtype: str = "auto"
    """float32, bfloat16 or float16, for the target's passes; auto: on a processor float32, for shipped models bfloat16
    where our kernels multiply it fast; on a GPU as the weights are stored."""
    device: str = "auto"
    """Where the passes run: auto (a GPU where there is one, of several that of torchrun's LOCAL_RANK), cpu, cuda,
    cuda:1, ..."""
    captions: str | Path | None = None
    """For a text-conditional model: safetensors file with the captions' features, which then stand for prompts."""
    text_encoder: str | Path = ""
    """For a text-conditional LlamaGen: folder or hub name of its text encoder. Not given: google/flan-t5-xl."""
    image_size: int | str = 0
    """Pixels per side, or WIDTHxHEIGHT, for models that have a choice (Emu3, Lumina-mGPT, GLM-Image, NextStep-1). 0:
    the usual."""
    tokenizer: str = ""
    """For a Lumina-mGPT that comes without: a folder or a name on the hub with its tokenizer."""
    vqgan: str | Path | None = None
    """For models of Chameleon's family, and of adapters: the checkpoint of the decoder, if not in the folder."""
    offline: bool = False
    """Ask no network, as HF_HUB_OFFLINE=1 does: names on the hub are looked for in its cache only."""
    device_map: str = ""
    """Spread a model of transformers over several GPUs (with accelerate): auto, balanced or
    sequential. Not given: one device."""
    vae: str = ""
    """NextStep-1: folder of its autoencoder (config.json, checkpoint.pt), or its name on the hub. Not given: the
    model's own vae."""
    sampler: str = ""
    """NextStep-1: euler:steps=28:shift=1:last=0:norm=0 (as the model pages have it) or flow-sde:steps=30:level=0.8 (as
    NextStep-1.1's repository has it). Each is a law of its own. Not given: the first."""
    adapter: str | Path = ""
    """For a language model of transformers whose image tokens are words: YAML or JSON file that says which and how, or
    simplear, lumina-mgpt-2. Not given: bozzetto.yaml in the model's folder."""


@dataclass(frozen=True)
class MethodOptions:
    """How to draft and verify."""

    drafter: str = "auto"
    """auto: what suits the model, without bias; jacobi: guess several tokens ahead and check them in one pass; none:
    plain sequential decoding; eagle, glance, plane, block: a trained drafter (eagle:tree=chain-5), alone or beside
    windows (jacobi:fill=glance, jacobi:second=eagle); sketch: a trained drafter of continuous tokens (sketch:length=4);
    model: a smaller target (model:folder=DIR)."""
    rule: str = "auto"
    """auto: as the model and the drafter suggest. Codes: seed-exact, the very tokens that sequential decoding of the
    seed gives; exact, the same law, other tokens. For eagle and model also tree, traversal, block (exact) and lantern,
    lantern++, grouped, annealed, cascade (lossy): lantern:k=1000:delta=0.1. Continuous tokens: plain, reflection,
    coupled (without a drafter), chains, joint, block (exact) and pathwise, cspd (lossy): pathwise:epsilon=0.1."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How passes are run."""

    compile: str = "auto"
    """auto: passes on a processor are run by kernels of our own, which g++ or clang++ builds once, in a few seconds;
    where they cannot be, by torch. max (or default): so, or an error; on a GPU torch compiles the layers. off: by
    torch. Float32 results agree with `off` up to rounding."""
    deterministic: bool = False
    """Refuse passes by torch, for those of our kernels agree to the last bit at any width and batch, so that seed-exact
    images are the same bytes in bfloat16 too."""


@dataclass(frozen=True)
class LawOptions(EngineOptions):
    """The law that images are drawn from, and the engine that draws them."""

    window: int = 0
    """Positions scored in one pass of drafter jacobi. 0: chosen for the batch."""
    guidance: float | None = None
    """Classifier-free guidance, 1 or more. 1: off, which halves the work. Not given: the model's own."""
    temperature: float | None = None
    """Above 0; 0 always takes the likeliest token. Not given: the model's own."""
    top_k: int | None = None
    """Keep only the K likeliest tokens. 0: all. Not given: the model's own."""
    top_p: float | None = None
    """Keep the likeliest tokens that make up this probability, above 0 and up to 1. 1: all. Not given: the model's
    own."""
    batch: int = 1
    """Images decoded together."""
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


@dataclass(frozen=True, kw_only=True)
class BenchOptions(EngineOptions):
    """What all cells of a benchmark share."""

    count: int = 4
    """Images per method and setting, rounded up to whole batches."""
    rounds: int = 3
    """At least this many rounds, a batch each."""
    temperature: float | None = None
    """Shared by all methods. Not given: the model's own."""
    top_p: float | None = None
    """Shared by all methods. Not given: the model's own."""
    seed: int = 0
    """Seed of the images."""
    threads: int = 0
    """CPU threads. 0: as torch chooses."""
    waves: int = 1
    """Images per round for each place in the batch: with more than one, images enter as others finish."""


@dataclass(frozen=True)
class ProfileOptions(EngineOptions):
    """What is profiled, and how long."""

    method: str = "auto"
    """none, DRAFTER/RULE, or auto: the model's default. Sequential decoding always takes part."""
    window: int = 0
    """Positions scored in one pass of drafter jacobi. 0: chosen for the batch."""
    batch: int = 1
    """Images decoded together."""
    guidance: float | None = None
    """Classifier-free guidance, 1 or more. 1: off. Not given: the model's own."""
    seconds: float = 0.3
    """Spent on measuring each part, at least."""
    threads: int = 0
    """CPU threads. 0: as torch chooses."""
