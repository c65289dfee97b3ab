"""`bozzetto train target RECIPE.yaml`: fit a target to images, resumably. Here: LlamaGen's architecture, to codes, of
classes or of prompts.

Tokens of `views` augmented views per image are held in memory and one view is drawn anew every `refresh_every` steps,
so that augmentation keeps moving without encoding every batch. The averaged weights with the lowest held-out loss are
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bozzetto.checkpoints.folders import LLAMAGEN, load_target, load_tokenizer, save_llamagen
from bozzetto.data import evaluation_view, read_captions
from bozzetto.errors import UsageError
from bozzetto.pipeline.conditions import ENCODER
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.targets.sentence import SentenceEncoder
from bozzetto.train.fit import Fit, autocast, channels_last, encoded, mean_over, pass_over
from bozzetto.train.pictures import conditions_of, dropped, nothing, of_rows
from bozzetto.train.recipes import CaptionRecipe, TargetRecipe, check_sizes

_CHUNK = 64
_EXAMPLES = 12  # held-out prompts that are drawn where none is asked for


class TokenFit(Fit):
    """What targets and drafters of codes share: the tokens of augmented views, which live in the checkpoint."""

    tokenizer: Any

    @property
    def image_size(self) -> int:
        return self.tokenizer.config.image_size

    def read_tokenizer(self, folder: Path) -> None:
        """The tokenizer of a folder. Raises UsageError where its pictures would be enlarged ones."""
        self.tokenizer = channels_last(load_tokenizer(folder))
        try:
            check_sizes(self.image_size, self.recipe.train, self.recipe.test)
        except ValueError as error:
            raise UsageError(f"{error}, the tokenizer's") from error

    def view(self) -> Tensor:
        """Tokens of a new view of every picture, int16 [N, h*w]."""
        return self.tokens_of(self.data.images, self.augmented)

    def whole(self, images: np.ndarray) -> Tensor:
        """Tokens of whole pictures, as held-out ones are looked at."""
        return self.tokens_of(images, lambda x: evaluation_view(x, self.image_size))

    def tokens_of(self, images: np.ndarray, view: Callable[[np.ndarray], Tensor]) -> Tensor:
        """uint8 [N, S, S, 3] -> int16 tokens [N, h*w] of one view of each image."""
        return encoded(images, view, lambda x: self.tokenizer.encode(x).short())

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
    """Fits a LlamaGen-architecture target to codes: of classes, or of prompts, as LlamaGen's text-conditional ones."""

    recipe: TargetRecipe
    model: LlamaGen

    def load_target(self) -> None:
        self.prompts = self.recipe.prompts if isinstance(self.recipe, CaptionRecipe) else ()
        self.labelled, self.flips = not self.prompts, self.recipe.flips
        self.read_tokenizer(Path(self.recipe.tokenizer))
        pass_over(self.tokenizer)

    def load_data(self) -> None:
        r, held = self.recipe, torch.from_numpy(self.held.labels)
        self.test_tokens = self.whole(self.held.images).long()
        self.encoder = SentenceEncoder(r.condition_tokens) if isinstance(r, CaptionRecipe) else None
        self.given = conditions_of(self.encoder, r.train, torch.from_numpy(self.data.labels), self.prompts)
        test = conditions_of(self.encoder, r.test, held, self.prompts[:1])
        self.test_given = of_rows(test, torch.arange(len(held)), torch.Generator())

    def make_model(self) -> LlamaGen:
        r, tokens = self.recipe, self.tokenizer.config
        condition = {"classes": len(self.data.classes)}
        if self.encoder:
            condition = {"classes": 0, "condition_tokens": self.encoder.tokens, "caption_dim": self.encoder.dim}
        shape = {"vocab": tokens.codes, "grid": tokens.grid, **condition}
        model = LlamaGen(LlamaGenConfig(r.dim, r.layers, r.heads, **shape), r.dropout)
        if r.init:
            trained = load_target(Path(r.init), LLAMAGEN)
            pass_over(trained)
            if trained.config != model.config:
                raise UsageError(f"{r.init}: {trained.config} is not the recipe's {model.config}")
            model.load_state_dict(trained.state_dict())
        return model

    def first_views(self) -> list[Tensor]:
        """The last one may be of whole pictures."""
        return super().first_views() + ([self.whole(self.data.images)] if self.recipe.whole else [])

    def batch(self) -> tuple[Tensor, ...]:
        """Conditions of B pictures (some replaced by none) and tokens [B, N] of one view of each."""
        r, g = self.recipe, self.generator
        self.refresh()
        rows = torch.randint(len(self.tokens), (r.batch,), generator=g)
        views = torch.randint(r.views, rows.shape, generator=g)
        if r.whole:
            views = torch.where(torch.rand(rows.shape, generator=g) < r.whole, r.views, views)
        given = of_rows(self.given, rows, g)
        left_out = torch.rand(r.batch, generator=g) < r.class_dropout
        return *dropped(given, nothing(given, self.model), left_out), self.tokens[rows, views].long()

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean cross entropy in nats per token. batch: conditions and tokens."""
        condition, *more, tokens = batch
        with autocast():
            logits = self.model(condition, tokens[:, :-1], *more)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def held_out_loss(self) -> float:
        """Nats per token, true labels or the first prompt."""
        return float(mean_over(_CHUNK, (*self.test_given, self.test_tokens), lambda *part: self.loss(*part).item()))

    def export(self) -> None:
        r = self.recipe
        if self.prompts:
            held = read_captions(r.test.path, r.test.split)
            shown = held[:: max(1, len(held) // _EXAMPLES)][:_EXAMPLES]
            examples = [self.prompts[0].format(caption=caption, style=style) for caption, style in shown]
            drawn: dict[str, Any] = {"encoder": ENCODER, "prompts": examples}
        else:
            drawn = {"class_names": self.data.classes}
        notes = self.notes(name=r.name, **drawn, held_out_nats_per_token=self.best)
        save_llamagen(self.folder, self.model, self.tokenizer, notes, r.compact)
