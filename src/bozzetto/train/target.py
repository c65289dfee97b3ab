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
from bozzetto.data import augment, evaluation_view
from bozzetto.models.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.models.store import load_tokenizer, save_llamagen
from bozzetto.train.fit import Fit
from bozzetto.train.loop import channels_last
from bozzetto.train.recipes import FlowRecipe, MARRecipe, TargetRecipe

_CHUNK = 64


@torch.no_grad()
def tokenise(tokenizer: VQTokenizer, images: np.ndarray, view: Callable[[np.ndarray], Tensor]) -> Tensor:
    """uint8 [N, S, S, 3] -> int16 tokens [N, h*w] of one view of each image."""
    parts = []
    for i in range(0, len(images), _CHUNK):
        x = view(images[i : i + _CHUNK]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(tokenizer.encode(x).short())
    return torch.cat(parts)


class CodeFit(Fit):
    """Fits a LlamaGen-architecture target to codes."""

    recipe: TargetRecipe
    model: LlamaGen

    def load_data(self) -> None:
        recipe = self.recipe
        self.tokenizer = channels_last(load_tokenizer(recipe.tokenizer))
        size = self.tokenizer.config.image_size
        self.data = recipe.train.read()
        test = recipe.test.read()
        self.test_labels = torch.from_numpy(test.labels)
        self.test_tokens = tokenise(self.tokenizer, test.images, lambda x: evaluation_view(x, size)).long()

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

    def _view(self) -> Tensor:
        size, jitter = self.tokenizer.config.image_size, self.recipe.jitter
        return tokenise(self.tokenizer, self.data.images, lambda x: augment(x, size, self.generator, jitter))

    def views(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            bar = tqdm(range(self.recipe.views), desc="tokenising views")
            self.tokens = torch.stack([self._view() for _ in bar], 1)  # int16 [N, views, h*w]
        else:
            self.tokens = saved["tokens"]

    def kept(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def batch(self) -> tuple[Tensor, Tensor]:
        """Labels [B] (some replaced by the unconditional one) and tokens [B, N]."""
        r, g = self.recipe, self.generator
        if r.refresh_every and self.step and self.step % r.refresh_every == 0:
            self.tokens[:, (self.step // r.refresh_every) % r.views] = self._view()
        rows = torch.randint(len(self.tokens), (r.batch,), generator=g)
        views = torch.randint(r.views, (r.batch,), generator=g)
        labels = torch.from_numpy(self.data.labels)[rows]
        dropped = torch.rand(r.batch, generator=g) < r.class_dropout
        labels = torch.where(dropped, torch.tensor(self.model.config.classes), labels)
        return labels, self.tokens[rows, views].long()

    def loss(self, labels: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Mean cross entropy in nats per token."""
        with torch.autocast("cpu", torch.bfloat16):
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
        save_llamagen(Path(self.recipe.out) / "model", self.model, self.tokenizer, notes)


def train_target(recipe: TargetRecipe | FlowRecipe | MARRecipe) -> Path:
    """Train (or resume) until `steps` or until the held-out loss stops falling. Returns the model folder."""
    fit: Fit
    if isinstance(recipe, TargetRecipe):
        fit = CodeFit(recipe)
    else:
        from bozzetto.train.continuous import FlowFit, MARFit

        fit = FlowFit(recipe) if isinstance(recipe, FlowRecipe) else MARFit(recipe)
    fit.fit()
    return Path(recipe.out) / "model"
