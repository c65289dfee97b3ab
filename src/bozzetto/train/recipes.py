"""Recipes: YAML files read into frozen dataclasses; unknown keys, wrong types and negative counts are errors."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from bozzetto.data import ImageSet, read_images
from bozzetto.errors import UsageError

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@checked(frozen=True, config=_STRICT)
class DataSource:
    """path: a parquet file or a folder of images; split: which rows of a parquet file (None: all); size: pixels that
    the squares are held at, from which random crops are taken."""

    path: str
    split: str | None = None
    size: Count = 160

    def read(self) -> ImageSet:
        """The images."""
        return read_images(self.path, self.split, self.size)


@checked(frozen=True, config=_STRICT)
class TokenizerStage:
    """One stage of tokenizer training.

    kind: `latent` fits pre, codebook and post to the tiny autoencoder's latents (cheap); `pixel` adds the image losses
    and unfreezes the decoder; `decoder` keeps encoder and codebook as they are and polishes post and decoder.
    """

    kind: Literal["latent", "pixel", "decoder"]
    steps: Count
    lr: Rate
    batch: Count = 64
    warmup: Count = 50
    feature_weight: Annotated[float, Field(ge=0)] = 0.0
    adversarial_weight: Annotated[float, Field(ge=0)] = 0.0


@checked(frozen=True, config=_STRICT)
class TokenizerRecipe:
    """How to train a VQ tokenizer. tiny: folder with the tiny autoencoder; views: augmented views held per image."""

    out: str
    tiny: str
    train: list[DataSource]
    test: DataSource
    stages: list[TokenizerStage]
    codes: Count = 4096
    code_dim: Count = 8
    width: Count = 160
    pre_blocks: Count = 2
    post_blocks: Count = 4
    image_size: Count = 128
    views: Count = 2
    commitment: Annotated[float, Field(ge=0)] = 0.25
    save_every: Count = 100
    seed: Annotated[int, Field(ge=0)] = 0


@checked(frozen=True, config=_STRICT)
class TargetRecipe:
    """How to train a LlamaGen-architecture target on images tokenised on the fly.

    views: augmented token views held per image; one is drawn anew every `refresh_every` steps (0: never); jitter:
    largest relative change of brightness and contrast; flips: mirror every other picture; whole: share of a batch that
    is taken whole, as held-out pictures are, in place of a view; ema: decay of the averaged weights; patience:
    evaluations without progress before stopping; compile: use torch.compile (needs a C++ compiler); compact: write
    matrices as int8 (models/store.py); init: folder of a trained target of the same shape and tokenizer to begin from.
    """

    out: str
    tokenizer: str
    train: DataSource
    test: DataSource
    name: str
    compact: bool = False
    init: str = ""
    dim: Count = 512
    layers: Count = 6
    heads: Count = 8
    views: Count = 4
    refresh_every: Annotated[int, Field(ge=0)] = 100
    jitter: Share = 0.0
    flips: bool = True
    whole: Share = 0.0
    steps: Count = 8000
    batch: Count = 32
    lr: Rate = 6e-4
    warmup: Count = 200
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    dropout: Share = 0.1
    class_dropout: Share = 0.1
    ema: Share = 0.998
    evaluate_every: Count = 250
    patience: Count = 6
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


@checked(frozen=True, config=_STRICT)
class CaptionRecipe(TargetRecipe):
    """How to train a text-conditional target (`family: caption`); columns `caption` and `style` make its prompts.

    prompts: what a picture is called, one drawn per picture and step; {caption} and {style} stand for its own, the
    first one is that of held-out pictures; condition_tokens: most features of a prompt.
    """

    family: Literal["caption"] = "caption"
    prompts: tuple[str, ...] = ("{caption}, {style}",)
    condition_tokens: Count = 24


@checked(frozen=True, config=_STRICT)
class DrafterRecipe:
    """How to train an EAGLE-style drafter for a trained target.

    model: the target, a shipped name or a model folder. guidance: scales are drawn from this range for the laws in the
    loss ([1, 1]: no guidance; then `condition_dropout` of the labels become the unconditional one). Losses, each with
    its weight: acceptance (1 - sum of min(p, q)), cross entropy (KL of the draft law from the target's), feature
    (smooth L1, EAGLE-1). rollout: steps of the drafter's own roll-out in training (EAGLE-3; 1 is EAGLE-1); step k
    weighs decay^(k-1). feature_noise: width of the uniform noise on features. test_images: held-out pictures used.
    layers: of the drafter; init: folder of a trained drafter of no more layers to begin from; compact: write matrices
    as int8 (models/store.py).
    """

    out: str
    model: str
    train: DataSource
    test: DataSource
    layers: Count = 1
    init: str = ""
    compact: bool = False
    guidance: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (1.0, 3.0)
    condition_dropout: Share = 0.1
    acceptance_weight: Annotated[float, Field(ge=0)] = 1.0
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 0.1
    feature_weight: Annotated[float, Field(ge=0)] = 0.0
    rollout: Annotated[int, Field(gt=0, le=8)] = 3
    decay: Rate = 0.8
    feature_noise: Annotated[float, Field(ge=0)] = 0.0
    test_images: Count = 64
    views: Count = 4
    refresh_every: Annotated[int, Field(ge=0)] = 0
    jitter: Share = 0.0
    steps: Count = 2000
    batch: Count = 8
    lr: Rate = 6e-4
    warmup: Count = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    ema: Share = 0.995
    evaluate_every: Count = 200
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


@checked(frozen=True, config=_STRICT, kw_only=True)
class ParallelRecipe(DrafterRecipe):
    """How to train a drafter that predicts several tokens in one pass: family plane, heads for the right neighbours and
    the one below; family block, marked places and a table of the token before (models/parallel.py); family glance, the
    row above and such a table (models/glance.py).

    places: tokens predicted, K; anchors: pairs per picture and step from which they are; rank: of the table; narrow:
    numbers that a glance keeps of a token. Place k weighs decay^(k-1); rollout means nothing here.
    """

    family: Literal["plane", "block", "glance"]
    places: Count = 12
    narrow: Count = 128
    anchors: Count = 48
    rank: Count = 128


@checked(frozen=True, config=_STRICT)
class _ContinuousRecipe:
    """What the continuous families share.

    tiny: folder with the tiny autoencoder; views: augmented views held per image; draws: noise draws for the head per
    token; compact: write matrices as int8 (models/store.py); jitter, ema, patience: as for a discrete target.
    """

    out: str
    tiny: str
    train: DataSource
    test: DataSource
    name: str
    image_size: Count = 128
    views: Count = 6
    jitter: Share = 0.0
    draws: Count = 2
    compact: bool = False
    heads: Count = 6
    head_width: Count = 384
    head_depth: Count = 3
    steps: Count = 8000
    batch: Count = 32
    lr: Rate = 6e-4
    warmup: Count = 200
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    dropout: Share = 0.1
    class_dropout: Share = 0.1
    ema: Share = 0.998
    evaluate_every: Count = 250
    patience: Count = 6
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


@checked(frozen=True, config=_STRICT, kw_only=True)
class FlowRecipe(_ContinuousRecipe):
    """How to train a causal flow model on the tiny autoencoder's latents.

    context_noise: largest deviation of the noise on the tokens that the transformer sees, drawn per image, so that
    small errors of earlier tokens do not add up.
    """

    family: Literal["flow"]
    dim: Count = 384
    layers: Count = 6
    context_noise: Annotated[float, Field(ge=0)] = 0.2


@checked(frozen=True, config=_STRICT, kw_only=True)
class MARRecipe(_ContinuousRecipe):
    """How to train a masked model (MAR) on the tiny autoencoder's latents. depth: of the encoder and of the decoder;
    buffer: copies of the class; least_masked: smallest share of masked tokens."""

    family: Literal["mar"]
    dim: Count = 256
    depth: Count = 4
    buffer: Count = 16
    least_masked: Share = 0.7


@checked(frozen=True, config=_STRICT, kw_only=True)
class SketchRecipe:
    """How to train a drafter of continuous tokens for a trained flow target.

    model: the target, a shipped name or a model folder; tiny, train, test, views, jitter: as for the target; guidance:
    scales are drawn from this range; rollout: steps of the drafter's own roll-out in training, step k weighs
    decay^(k-1); divergence_weight, feature_weight: of the divergence of the paths and of the error of the predicted
    features (a drift variant drafts with these alone); init: a drafter to go on from; test_images: held-out pictures
    used.
    """

    family: Literal["sketch"]
    out: str
    model: str
    tiny: str
    train: DataSource
    test: DataSource
    image_size: Count = 128
    views: Count = 6
    jitter: Share = 0.0
    guidance: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (1.0, 3.0)
    rollout: Annotated[int, Field(gt=0, le=8)] = 2
    decay: Rate = 0.8
    divergence_weight: Annotated[float, Field(ge=0)] = 1.0
    feature_weight: Annotated[float, Field(ge=0)] = 0.0
    init: str = ""
    test_images: Count = 64
    steps: Count = 1200
    batch: Count = 8
    lr: Rate = 1e-3
    warmup: Count = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    class_dropout: Share = 0.0
    ema: Share = 0.99
    evaluate_every: Count = 100
    patience: Count = 6
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


@checked(frozen=True, config=_STRICT, kw_only=True)
class DriftRecipe:
    """How to train a drift variant of a trained flow model (train/drift.py).

    model: the flow model, a shipped name or a model folder; tiny, train, test, views, jitter: as for the target;
    decoder_width, decoder_depth, largest, heat, tuned: models/drift.py; guidance: scales are drawn from this range;
    context_noise: as for the target; places: per picture and step; positives, generated: samples of the teacher and of
    the decoder at each; alpha: weight of the first phase at the beginning; entropy_weight: of the entropy in it;
    frozen_from: share of the steps after which the body stands still; bandwidths: of the drifting; test_images:
    held-out pictures used.
    """

    out: str
    model: str
    tiny: str
    train: DataSource
    test: DataSource
    name: str
    image_size: Count = 128
    views: Count = 6
    jitter: Share = 0.0
    decoder_width: Count = 384
    decoder_depth: Count = 3
    largest: Rate = 0.5
    heat: Rate = 2.0
    tuned: Annotated[int, Field(ge=0)] = 0
    guidance: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (1.0, 3.0)
    context_noise: Annotated[float, Field(ge=0)] = 0.2
    places: Count = 64
    positives: Annotated[int, Field(gt=1)] = 8
    generated: Annotated[int, Field(gt=1)] = 8
    alpha: Share = 0.95
    entropy_weight: Annotated[float, Field(ge=0)] = 0.1
    frozen_from: Share = 0.8
    bandwidths: tuple[Rate, ...] = (0.02, 0.05, 0.2)
    test_images: Count = 64
    steps: Count = 2000
    batch: Count = 8
    lr: Rate = 1e-3
    warmup: Count = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    class_dropout: Share = 0.0
    ema: Share = 0.995
    evaluate_every: Count = 100
    patience: Count = 20
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


RECIPES = {"tokenizer": TokenizerRecipe, "target": TargetRecipe, "drafter": DrafterRecipe, "drift": DriftRecipe}
# Kinds that name their family, by what is trained; without a family it is for codes.
FAMILIES: dict[type, dict[str, type]] = {
    TargetRecipe: {"caption": CaptionRecipe, "flow": FlowRecipe, "mar": MARRecipe},
    DrafterRecipe: {"sketch": SketchRecipe, "plane": ParallelRecipe, "block": ParallelRecipe, "glance": ParallelRecipe},
}
R = TypeVar("R")


def read_recipe(path: str | Path, kind: type[R]) -> Any:
    """Read a YAML recipe of this kind, or of the kind that its `family` names. Raises UsageError naming the file, the
    key and what is allowed.

    Relative paths inside a recipe are relative to the working directory.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"recipe not found: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, not {type(content).__name__}")
    if kind in FAMILIES and "family" in content:
        family, known = content["family"], FAMILIES[kind]
        if family not in known:
            raise UsageError(f"{path}: family = {family!r} is not allowed: {', '.join(known)}, or no family for codes")
        kind = known[family]
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error, kind)}") from error


def _explain(error: ValidationError, kind: type) -> str:
    allowed = ", ".join(f.name for f in fields(kind))
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            lines.append(f"unknown key {key!r} (allowed: {allowed})")
        elif item["type"] in {"missing", "missing_argument"}:
            lines.append(f"missing key {key!r}")
        else:
            lines.append(f"{key} = {item['input']!r}: {item['msg']}")
    return "; ".join(lines)
