"""`bozzetto train target RECIPE.yaml`: fit a LlamaGen-architecture target to tokenised images, resumably.

Tokens of `views` augmented views per image are held in memory and one view is drawn anew every `refresh_every` steps,
so that augmentation keeps moving without encoding every batch. The averaged weights with the lowest held-out loss are
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bozzetto.autoencoders.vq import VQTokenizer
from bozzetto.data import augment, evaluation_view, read_images
from bozzetto.models.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.models.store import load_tokenizer, save_llamagen
from bozzetto.train.loop import RunFolder, WeightAverage, adamw, channels_last, cosine, set_lr
from bozzetto.train.recipes import TargetRecipe

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


class _Trainer:
    def __init__(self, recipe: TargetRecipe):
        self.recipe = recipe
        self.run = RunFolder(recipe.out)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.tokenizer = channels_last(load_tokenizer(recipe.tokenizer))
        size = self.tokenizer.config.image_size
        self.data = read_images(recipe.train.path, recipe.train.split)
        test = read_images(recipe.test.path, recipe.test.split)
        self.test_labels = torch.from_numpy(test.labels)
        self.test_tokens = tokenise(self.tokenizer, test.images, lambda x: evaluation_view(x, size)).long()
        config = LlamaGenConfig(
            recipe.dim,
            recipe.layers,
            recipe.heads,
            vocab=self.tokenizer.config.codes,
            grid=self.tokenizer.config.grid,
            classes=len(self.data.classes),
        )
        self.model = LlamaGen(config, recipe.dropout)
        self.optimizer = adamw(self.model, recipe.lr, recipe.weight_decay)
        self.loss = torch.compile(self._loss) if recipe.compile else self._loss
        self.average = WeightAverage(self.model.parameters(), recipe.ema)
        self.step, self.best, self.best_step = 0, math.inf, 0
        self._resume()

    def _view(self) -> Tensor:
        size, jitter = self.tokenizer.config.image_size, self.recipe.jitter
        return tokenise(self.tokenizer, self.data.images, lambda x: augment(x, size, self.generator, jitter))

    def _resume(self) -> None:
        saved = self.run.load()
        if saved is None:
            views = tqdm(range(self.recipe.views), desc="tokenising views")
            self.tokens = torch.stack([self._view() for _ in views], 1)  # int16 [N, views, h*w]
            return
        self.tokens = saved["tokens"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.load_state_dict(saved["average"])
        self.generator.set_state(saved["generator"])
        torch.set_rng_state(saved["torch_rng"])
        self.step, self.best, self.best_step = saved["step"], saved["best"], saved["best_step"]

    def _save(self) -> None:
        self.run.save(
            {
                "tokens": self.tokens,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(),
                "generator": self.generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
            }
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        """Labels [B] (some replaced by the unconditional one) and tokens [B, N]."""
        r, g = self.recipe, self.generator
        rows = torch.randint(len(self.tokens), (r.batch,), generator=g)
        views = torch.randint(r.views, (r.batch,), generator=g)
        labels = torch.from_numpy(self.data.labels)[rows]
        dropped = torch.rand(r.batch, generator=g) < r.class_dropout
        labels = torch.where(dropped, torch.tensor(self.model.config.classes), labels)
        return labels, self.tokens[rows, views].long()

    def _loss(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Mean cross entropy in nats per token."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(labels, tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def train_step(self) -> float:
        r = self.recipe
        if r.refresh_every and self.step and self.step % r.refresh_every == 0:
            self.tokens[:, (self.step // r.refresh_every) % r.views] = self._view()
        set_lr(self.optimizer, cosine(self.step, r.steps, r.lr, r.warmup))
        loss = self.loss(*self.batch())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def held_out(self) -> float:
        """Held-out loss of the averaged weights, nats per token, true labels, no dropout."""
        self.average.swap()
        self.model.eval()
        total = 0.0
        for labels, tokens in zip(self.test_labels.split(_CHUNK), self.test_tokens.split(_CHUNK), strict=True):
            total += self._loss(labels, tokens).item() * len(labels)
        self.model.train()
        self.average.swap()
        return total / len(self.test_labels)

    def checkpoint(self, train_loss: float) -> float:
        """Evaluate, keep the best averaged weights, save the resumable state."""
        held_out = self.held_out()
        if held_out < self.best:
            self.best, self.best_step = held_out, self.step
            self.average.swap()
            self.export()
            self.average.swap()
        self._save()
        self.run.log(step=self.step, train=train_loss, held_out=held_out, best=self.best)
        return held_out

    def export(self) -> None:
        notes = {
            "name": self.recipe.name,
            "class_names": self.data.classes,
            "held_out_nats_per_token": self.best,
            "steps": self.step,
            "recipe": asdict(self.recipe),
        }
        save_llamagen(Path(self.recipe.out) / "model", self.model, self.tokenizer, notes)

    def sheet(self) -> None:
        """A contact sheet of samples of the best weights so far."""
        from bozzetto.train.samples import sample_sheet

        with torch.random.fork_rng():  # building the sampler draws numbers that a resumed run would not draw
            sample_sheet(Path(self.recipe.out) / "model", self.run.path / "samples.png")

    def fit(self) -> None:
        r = self.recipe
        self.model.train()
        running = math.nan
        bar = tqdm(total=r.steps, initial=self.step, desc="target", smoothing=0.05)
        while self.step < r.steps:
            loss = self.train_step()
            running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
            bar.update()
            if self.step % r.evaluate_every == 0 or self.step == r.steps:
                held_out = self.checkpoint(running)
                self.sheet()
                bar.set_postfix({"train": f"{running:.3f}", "held out": f"{held_out:.3f}"})
                if self.step - self.best_step >= r.patience * r.evaluate_every:
                    break
        bar.close()


def train_target(recipe: TargetRecipe) -> Path:
    """Train (or resume) until `steps` or until the held-out loss stops falling. Returns the model folder."""
    _Trainer(recipe).fit()
    return Path(recipe.out) / "model"
