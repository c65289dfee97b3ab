"""`bozzetto train target RECIPE.yaml`: fit a target to images, resumably. Here: LlamaGen's architecture, to codes.

Tokens of `views` augmented views per image are held in memory and one view is drawn anew every `refresh_every` steps,
so that augmentation keeps moving without encoding every batch. The averaged weights with the lowest held-out loss are
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bozzetto.autoencoders.vq import VQTokenizer
from bozzetto.checkpoints.folders import LLAMAGEN, load_target, load_tokenizer, save_llamagen
from bozzetto.data import augment, evaluation_view, read_captions
from bozzetto.errors import UsageError
from bozzetto.pipeline.prompts import ENCODER
from bozzetto.targets.llamagen import CaptionEmbedding, LlamaGen, LlamaGenConfig
from bozzetto.targets.sentence import SentenceEncoder
from bozzetto.train.conditions import prompt_features
from bozzetto.train.fields import check_sizes
from bozzetto.train.fit import Fit
from bozzetto.train.loop import autocast, channels_last, pass_over
from bozzetto.train.recipes import CaptionRecipe, DrafterRecipe, FlowRecipe, MARRecipe, TargetRecipe

_CHUNK = 64
_EXAMPLES = 12  # held-out prompts that are drawn where none is asked for


@torch.no_grad()
def tokenise(tokenizer: VQTokenizer, images: np.ndarray, view: Callable[[np.ndarray], Tensor]) -> Tensor:
    """uint8 [N, S, S, 3] -> int16 tokens [N, h*w] of one view of each image."""
    parts = []
    for i in range(0, len(images), _CHUNK):
        x = view(images[i : i + _CHUNK]).contiguous(memory_format=torch.channels_last)
        with autocast():
            parts.append(tokenizer.encode(x).short())
    return torch.cat(parts)


def check_image_size(image_size: int, recipe: TargetRecipe | DrafterRecipe) -> None:
    """Raise UsageError where the tokenizer's pictures would be enlarged ones."""
    try:
        check_sizes(image_size, recipe.train, recipe.test)
    except ValueError as error:
        raise UsageError(f"{error}, the tokenizer's") from error


class TokenFit(Fit):
    """What targets and drafters of codes share: the tokens of augmented views, which live in the checkpoint."""

    tokenizer: Any
    flips = True  # mirror every other picture

    @property
    def image_size(self) -> int:
        return self.tokenizer.config.image_size

    def view(self) -> Tensor:
        """Tokens of a new view of every picture, int16 [N, h*w]."""
        size, r = self.image_size, self.recipe
        return tokenise(
            self.tokenizer, self.data.images, lambda x: augment(x, size, self.generator, r.jitter, self.flips)
        )

    def whole(self, images: np.ndarray) -> Tensor:
        """Tokens of whole pictures, as held-out ones are looked at."""
        return tokenise(self.tokenizer, images, lambda x: evaluation_view(x, self.image_size))

    def first_views(self) -> list[Tensor]:
        return [self.view() for _ in tqdm(range(self.recipe.views), desc="tokenising views")]

    def views(self, saved: dict[str, Any] | None) -> None:
        # int16 [N, views, h*w]
        self.tokens: Tensor = torch.stack(self.first_views(), 1) if saved is None else saved["tokens"]

    def kept(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def refresh(self) -> None:
        """Draw one of the views anew, where it is time."""
        r = self.recipe
        if r.refresh_every and self.step and self.step % r.refresh_every == 0:
            self.tokens[:, (self.step // r.refresh_every) % r.views] = self.view()


class CodeFit(TokenFit):
    """Fits a LlamaGen-architecture target to codes."""

    recipe: TargetRecipe
    model: LlamaGen

    def begin(self) -> None:
        """Take over the weights of a trained target, if the recipe names one."""
        if not self.recipe.init:
            return
        trained = load_target(Path(self.recipe.init), LLAMAGEN)
        pass_over(trained)
        if trained.config != self.model.config:
            raise UsageError(f"{self.recipe.init}: {trained.config} is not the recipe's {self.model.config}")
        self.model.load_state_dict(trained.state_dict())

    def load_target(self) -> None:
        self.flips = self.recipe.flips
        self.tokenizer = channels_last(load_tokenizer(self.recipe.tokenizer))
        pass_over(self.tokenizer)
        check_image_size(self.tokenizer.config.image_size, self.recipe)

    def load_data(self) -> None:
        self.test_labels = torch.from_numpy(self.held.labels)
        self.test_tokens = self.whole(self.held.images).long()

    def make_model(self) -> LlamaGen:
        recipe = self.recipe
        config = LlamaGenConfig(
            recipe.dim,
            recipe.layers,
            recipe.heads,
            vocab=self.tokenizer.config.codes,
            grid=self.tokenizer.config.grid,
            classes=len(self.data.classes),
        )
        return LlamaGen(config, recipe.dropout)

    def first_views(self) -> list[Tensor]:
        """The last one may be of whole pictures."""
        return super().first_views() + ([self.whole(self.data.images)] if self.recipe.whole else [])

    def _views(self, rows: Tensor) -> Tensor:
        """One view of each of `rows` [B]: tokens [B, N]."""
        r, g = self.recipe, self.generator
        views = torch.randint(r.views, rows.shape, generator=g)
        if r.whole:
            views = torch.where(torch.rand(rows.shape, generator=g) < r.whole, r.views, views)
        return self.tokens[rows, views].long()

    def batch(self) -> tuple[Tensor, ...]:
        """Labels [B] (some replaced by the unconditional one) and tokens [B, N]."""
        r, g = self.recipe, self.generator
        self.refresh()
        rows = torch.randint(len(self.tokens), (r.batch,), generator=g)
        tokens = self._views(rows)
        labels = torch.from_numpy(self.data.labels)[rows]
        dropped = torch.rand(r.batch, generator=g) < r.class_dropout
        labels = torch.where(dropped, torch.tensor(self.model.config.classes), labels)
        return labels, tokens

    def loss(self, labels: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Mean cross entropy in nats per token."""
        with autocast():
            logits = self.model(labels, tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def held_out_loss(self) -> float:
        """Nats per token, true labels."""
        total = 0.0
        for labels, tokens in zip(self.test_labels.split(_CHUNK), self.test_tokens.split(_CHUNK), strict=True):
            total += self.loss(labels, tokens).item() * len(labels)
        return total / len(self.test_labels)

    def export(self) -> None:
        notes = {
            "name": self.recipe.name,
            "class_names": self.data.classes,
            "held_out_nats_per_token": self.best,
            "steps": self.step,
            "recipe": asdict(self.recipe),
        }
        save_llamagen(Path(self.recipe.out) / "model", self.model, self.tokenizer, notes, self.recipe.compact)


class CaptionFit(CodeFit):
    """Fits a text-conditional target to codes, conditioned as LlamaGen's are."""

    recipe: CaptionRecipe
    labelled = False

    def load_data(self) -> None:
        super().load_data()
        encoder = SentenceEncoder(self.recipe.condition_tokens)
        self.caption_dim = encoder.dim
        self.features, self.mask = prompt_features(encoder, self.recipe.train, self.recipe.prompts)
        self.test_features, self.test_mask = prompt_features(encoder, self.recipe.test, self.recipe.prompts[:1])
        held_out = read_captions(self.recipe.test.path, self.recipe.test.split)
        shown = held_out[:: max(1, len(held_out) // _EXAMPLES)][:_EXAMPLES]
        self.examples = [self.recipe.prompts[0].format(caption=caption, style=style) for caption, style in shown]

    def make_model(self) -> LlamaGen:
        recipe, tokens = self.recipe, self.tokenizer.config
        config = LlamaGenConfig(
            recipe.dim,
            recipe.layers,
            recipe.heads,
            vocab=tokens.codes,
            grid=tokens.grid,
            classes=0,
            condition_tokens=recipe.condition_tokens,
            caption_dim=self.caption_dim,
        )
        return LlamaGen(config, recipe.dropout)

    def batch(self) -> tuple[Tensor, ...]:
        """Features [B, T, C] (some replaced by those of no caption), mask [B, T] and tokens [B, N]."""
        r, g = self.recipe, self.generator
        self.refresh()
        rows = torch.randint(len(self.tokens), (r.batch,), generator=g)
        tokens = self._views(rows)
        prompts = torch.randint(self.features.shape[1], (r.batch,), generator=g)
        features, mask = self.features[rows, prompts].float(), self.mask[rows, prompts]
        dropped = torch.rand(r.batch, generator=g) < r.class_dropout
        features = torch.where(dropped[:, None, None], self._nothing(), features)
        return features, mask, tokens

    def _nothing(self) -> Tensor:
        """Features of no caption, [T, C]."""
        embedding = self.model.cls_embedding
        assert isinstance(embedding, CaptionEmbedding)
        return embedding.uncond_embedding

    def loss(self, features: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Mean cross entropy in nats per token."""
        with autocast():
            logits = self.model(features, tokens[:, :-1], mask)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def held_out_loss(self) -> float:
        """Nats per token, under the first prompt."""
        total = 0.0
        parts = (self.test_features[:, 0].float(), self.test_mask[:, 0], self.test_tokens)
        for features, mask, tokens in zip(*(part.split(_CHUNK) for part in parts), strict=True):
            total += self.loss(features, mask, tokens).item() * len(tokens)
        return total / len(self.test_tokens)

    def export(self) -> None:
        notes = {
            "name": self.recipe.name,
            "encoder": ENCODER,
            "prompts": list(self.examples),
            "held_out_nats_per_token": self.best,
            "steps": self.step,
            "recipe": asdict(self.recipe),
        }
        save_llamagen(Path(self.recipe.out) / "model", self.model, self.tokenizer, notes, self.recipe.compact)


def train_target(recipe: TargetRecipe | FlowRecipe | MARRecipe, restart: bool = False) -> Path:
    """Train (or resume) until `steps` or until the held-out loss stops falling. Returns the model folder.

    restart: put an earlier run in the recipe's `out` aside and begin anew.
    """
    kind: type[Fit]
    if isinstance(recipe, TargetRecipe):
        kind = CaptionFit if isinstance(recipe, CaptionRecipe) else CodeFit
    else:
        from bozzetto.train.continuous import FlowFit, MARFit

        kind = FlowFit if isinstance(recipe, FlowRecipe) else MARFit
    kind(recipe, restart).fit()
    return Path(recipe.out) / "model"
