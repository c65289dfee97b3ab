"""Recipes: YAML files read into frozen dataclasses; unknown keys, wrong types and negative counts are errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as checked

from bozzetto.autoencoders.tiny import DOWNSAMPLE
from bozzetto.train.pictures import STRICT, DataSource, Place

Count = Annotated[int, Field(gt=0, le=10**9)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # of a layer, or how many of them
Times = Annotated[int, Field(ge=0, le=10**9)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Side = Annotated[int, Field(ge=2 * DOWNSAMPLE, le=4096, multiple_of=DOWNSAMPLE)]  # pixels; the tiny autoencoder's
Scale = Annotated[float, Field(ge=1)]


def _rising(guidance: tuple[float, float]) -> tuple[float, float]:
    if guidance[0] > guidance[1]:
        raise ValueError(f"guidance = {list(guidance)} is not allowed: [lowest, highest]")
    return guidance


Guidance = Annotated[tuple[Scale, Scale], AfterValidator(_rising)]


@checked(frozen=True, config=STRICT)
class TokenizerStage:
    """One stage of tokenizer training.

    kind: `latent` fits pre, codebook and post to the tiny autoencoder's latents (cheap); `pixel` adds the image losses
    and unfreezes the decoder; `decoder` keeps encoder and codebook as they are and polishes post and decoder.
    """

    kind: Literal["latent", "pixel", "decoder"]
    steps: Count
    lr: Rate
    batch: Width = 64
    warmup: Count = 50
    feature_weight: Weight = 0.0
    adversarial_weight: Weight = 0.0


@checked(frozen=True, config=STRICT)
class TokenizerRecipe:
    """How to train a VQ tokenizer. tiny: folder with the tiny autoencoder; views: augmented views held per image."""

    out: Place
    tiny: Place
    train: Annotated[list[DataSource], Field(min_length=1)]
    test: DataSource
    stages: Annotated[list[TokenizerStage], Field(min_length=1)]
    codes: Annotated[int, Field(gt=0, le=2**15)] = 4096  # training holds tokens as int16
    code_dim: Width = 8
    width: Annotated[int, Field(gt=0, le=2**16, multiple_of=8)] = 160
    pre_blocks: Width = 2
    post_blocks: Width = 4
    image_size: Side = 128
    views: Width = 2
    commitment: Weight = 0.25
    save_every: Count = 100
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_sizes(self.image_size, *self.train, self.test)


@checked(frozen=True, config=STRICT, kw_only=True)
class Recipe:
    """What all recipes but a tokenizer's share.

    views: augmented views held per image; jitter: largest relative change of brightness and contrast; ema: decay of the
    averaged weights; compile: use torch.compile (needs a C++ compiler).
    """

    out: Place
    train: DataSource
    test: DataSource
    views: Width = 4
    jitter: Share = 0.0
    steps: Count = 8000
    batch: Width = 32
    lr: Rate = 6e-4
    warmup: Count = 200
    weight_decay: Weight = 0.05
    ema: Share = 0.998
    evaluate_every: Count = 250
    compile: bool = False
    seed: Seed = 0


@checked(frozen=True, config=STRICT, kw_only=True)
class TargetRecipe(Recipe):
    """How to train a LlamaGen-architecture target on images tokenised on the fly.

    One of the views is drawn anew every `refresh_every` steps (0: never); flips: mirror every other picture; whole:
    share of a batch that is taken whole, as held-out pictures are, in place of a view; patience: evaluations without
    progress before stopping; compact: write matrices as int8 (weights.py); init: folder of a trained target of the same
    shape and tokenizer to begin from.
    """

    tokenizer: Place
    name: str
    compact: bool = False
    init: str = ""
    dim: Width = 512
    layers: Width = 6
    heads: Width = 8
    refresh_every: Times = 100
    flips: bool = True
    whole: Share = 0.0
    dropout: Dropout = 0.1
    class_dropout: Share = 0.1
    patience: Count = 6

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads, 4)  # rotations turn pairs of numbers by row and by column


@checked(frozen=True, config=STRICT, kw_only=True)
class CaptionRecipe(TargetRecipe):
    """How to train a text-conditional target (`family: caption`); columns `caption` and `style` make its prompts.

    prompts: what a picture is called, one drawn per picture and step; {caption} and {style} stand for its own, the
    first one is that of held-out pictures; condition_tokens: most features of a prompt.
    """

    family: Literal["caption"] = "caption"
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("{caption}, {style}",)
    condition_tokens: Width = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        for prompt in self.prompts:
            try:
                prompt.format(caption="", style="")
            except (LookupError, ValueError, AttributeError) as error:
                allowed = "only {caption} and {style} in braces"
                raise ValueError(f"prompts: {prompt!r} is not allowed: {allowed}") from error


@checked(frozen=True, config=STRICT, kw_only=True)
class DrafterRecipe(Recipe):
    """How to train an EAGLE-style drafter for a trained target.

    model: the target, a shipped name or a model folder. guidance: scales are drawn from this range for the laws in the
    loss ([1, 1]: no guidance; then `condition_dropout` of the labels become the unconditional one). Losses, each with
    its weight: acceptance (1 - sum of min(p, q)), cross entropy (KL of the draft law from the target's), feature
    (smooth L1, EAGLE-1). rollout: steps of the drafter's own roll-out in training (EAGLE-3; 1 is EAGLE-1); step k
    weighs decay^(k-1). feature_noise: width of the uniform noise on features. test_images: held-out pictures used.
    layers: of the drafter; init: folder of a trained drafter of no more layers to begin from; compact: write matrices
    as int8 (weights.py).
    """

    model: Place
    layers: Width = 1
    init: str = ""
    compact: bool = False
    guidance: Guidance = (1.0, 3.0)
    condition_dropout: Share = 0.1
    acceptance_weight: Weight = 1.0
    cross_entropy_weight: Weight = 0.1
    feature_weight: Weight = 0.0
    rollout: Annotated[int, Field(gt=0, le=8)] = 3
    decay: Rate = 0.8
    feature_noise: Weight = 0.0
    test_images: Count = 64
    refresh_every: Times = 0
    steps: Count = 2000
    batch: Width = 8
    warmup: Count = 100
    weight_decay: Weight = 0.02
    ema: Share = 0.995
    evaluate_every: Count = 200

    def __post_init__(self) -> None:
        check_weighted(
            acceptance_weight=self.acceptance_weight,
            cross_entropy_weight=self.cross_entropy_weight,
            feature_weight=self.feature_weight,
        )


@checked(frozen=True, config=STRICT, kw_only=True)
class ParallelRecipe(DrafterRecipe):
    """How to train a drafter that predicts several tokens in one pass: family plane, heads for the right neighbours and
    the one below; family block, marked places and a table of the token before (parallel.py); family glance, the
    row above and such a table (drafters/glance.py).

    places: tokens predicted, K; anchors: pairs per picture and step from which they are; rank: of the table; narrow:
    numbers that a glance keeps of a token. Place k weighs decay^(k-1); rollout means nothing here.
    """

    family: str
    places: Width = 12
    narrow: Width = 128
    anchors: Width = 48
    rank: Width = 128


@checked(frozen=True, config=STRICT, kw_only=True)
class LatentRecipe(Recipe):
    """What recipes on the tiny autoencoder's latents share.

    tiny: folder with the tiny autoencoder; patience: as for a target of codes.
    """

    tiny: Place
    image_size: Side = 128
    views: Width = 6
    class_dropout: Share = 0.1
    patience: Count = 6

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.train, self.test)


@checked(frozen=True, config=STRICT, kw_only=True)
class _VectorRecipe(LatentRecipe):
    """What targets of continuous tokens share. draws: noise draws for the head per token; compact: write matrices as
    int8 (weights.py)."""

    name: str
    draws: Width = 2
    compact: bool = False
    heads: Width = 6
    head_width: Width = 384
    head_depth: Width = 3
    dropout: Dropout = 0.1


@checked(frozen=True, config=STRICT, kw_only=True)
class FlowRecipe(_VectorRecipe):
    """How to train a causal flow model on the tiny autoencoder's latents.

    context_noise: largest deviation of the noise on the tokens that the transformer sees, drawn per image, so that
    small errors of earlier tokens do not add up.
    """

    family: Literal["flow"]
    dim: Width = 384
    layers: Width = 6
    context_noise: Weight = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.dim, self.heads, 4)


@checked(frozen=True, config=STRICT, kw_only=True)
class MARRecipe(_VectorRecipe):
    """How to train a masked model (MAR) on the tiny autoencoder's latents. depth: of the encoder and of the decoder;
    buffer: copies of the class; least_masked: smallest share of masked tokens."""

    family: Literal["mar"]
    dim: Width = 256
    depth: Width = 4
    buffer: Width = 16
    least_masked: Annotated[float, Field(gt=0, le=0.99)] = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.dim, self.heads)


@checked(frozen=True, config=STRICT, kw_only=True)
class SketchRecipe(LatentRecipe):
    """How to train a drafter of continuous tokens for a trained flow target.

    model: the target, a shipped name or a model folder; guidance: scales are drawn from this range; rollout: steps of
    the drafter's own roll-out in training, step k weighs decay^(k-1); divergence_weight, feature_weight: of the
    divergence of the trajectories and of the error of the predicted features (a drift variant drafts with these
    alone); init: a drafter to go on from; test_images: held-out pictures used.
    """

    family: Literal["sketch"]
    model: Place
    guidance: Guidance = (1.0, 3.0)
    rollout: Annotated[int, Field(gt=0, le=8)] = 2
    decay: Rate = 0.8
    divergence_weight: Weight = 1.0
    feature_weight: Weight = 0.0
    init: str = ""
    test_images: Count = 64
    steps: Count = 1200
    batch: Width = 8
    lr: Rate = 1e-3
    warmup: Count = 50
    weight_decay: Weight = 0.02
    class_dropout: Share = 0.0
    ema: Share = 0.99
    evaluate_every: Count = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weighted(divergence_weight=self.divergence_weight, feature_weight=self.feature_weight)


@checked(frozen=True, config=STRICT, kw_only=True)
class DriftRecipe(LatentRecipe):
    """How to train a drift variant of a trained flow model (train/drift.py).

    model: the flow model, a shipped name or a model folder; decoder_width, decoder_depth, largest, heat, tuned:
    targets/drift.py; guidance: scales are drawn from this range; context_noise: as for the target; places: per picture
    and step; positives, generated: samples of the teacher and of the decoder at each; alpha: weight of the first phase
    at the beginning; entropy_weight: of the entropy in it; frozen_from: share of the steps after which the body stands
    still; bandwidths: of the drifting; test_images: held-out pictures used.
    """

    model: Place
    name: str
    decoder_width: Width = 384
    decoder_depth: Width = 3
    largest: Rate = 0.5
    heat: Rate = 2.0
    tuned: Times = 0
    guidance: Guidance = (1.0, 3.0)
    context_noise: Weight = 0.2
    places: Width = 64
    positives: Annotated[int, Field(gt=1, le=2**16)] = 8
    generated: Annotated[int, Field(gt=1, le=2**16)] = 8
    alpha: Share = 0.95
    entropy_weight: Weight = 0.1
    frozen_from: Share = 0.8
    bandwidths: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.02, 0.05, 0.2)
    test_images: Count = 64
    steps: Count = 2000
    batch: Width = 8
    lr: Rate = 1e-3
    warmup: Count = 50
    weight_decay: Weight = 0.02
    class_dropout: Share = 0.0
    ema: Share = 0.995
    evaluate_every: Count = 100
    patience: Count = 20


def check_heads(dim: int, heads: int, turns: int = 1) -> None:
    """Raise ValueError where heads do not share dim evenly, or a head's share is no multiple of `turns`."""
    if dim % heads or dim // heads % turns:
        shares = f"multiples of {turns}" if turns > 1 else "equal"
        raise ValueError(f"dim = {dim} with heads = {heads} is not allowed: dim / heads must be whole, shares {shares}")


def check_weighted(**weights: float) -> None:
    """Raise ValueError where a loss weighs nothing."""
    if not any(weights.values()):
        raise ValueError(f"{' = '.join(weights)} = 0 is not allowed: one of them must be > 0, or nothing is learnt")


def check_sizes(image_size: int, *sources: DataSource) -> None:
    """Raise ValueError where pictures of `image_size` pixels would be enlarged ones."""
    for source in sources:
        if source.size is not None and source.size < image_size:
            raise ValueError(f"{source}: size = {source.size} is not allowed: at least image_size = {image_size}")
