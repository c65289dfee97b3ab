"""`bozzetto train drafter RECIPE.yaml`: fit an EAGLE-style drafter to a trained target, resumably.

Pictures are tokenised as for the target; the target's features are computed anew for every batch, nothing is dumped.
Losses are taken on the guided law that drafting will use, over several steps of the drafter's own roll-out.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bozzetto.data import augment, evaluation_view
from bozzetto.errors import UsageError
from bozzetto.models.eagle import EagleNet, eagle_config
from bozzetto.models.eagle_store import FAMILY, load_drafter, save_drafter, target_digest
from bozzetto.models.store import load_llamagen, load_tokenizer, read_config
from bozzetto.pipeline import model_folder
from bozzetto.train.conditions import Condition, conditions_of, dropped, together
from bozzetto.train.loop import RunFolder, WeightAverage, adamw, autocast, channels_last, compute_dtype, cosine, set_lr
from bozzetto.train.recipes import DrafterRecipe, ParallelRecipe, SketchRecipe
from bozzetto.train.target import tokenise

_DEPTHS = 5  # of the roll-out in the held-out report
_ROWS = 16


class Trainer:
    """Fits an EAGLE-style drafter; other kinds say what their network, their loss and their acceptance are."""

    family = FAMILY

    def __init__(self, recipe: DrafterRecipe):
        self.recipe = recipe
        self.run = RunFolder(recipe.out)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.folder = model_folder(recipe.model)
        self.target = load_llamagen(self.folder)
        self.tokenizer = channels_last(load_tokenizer(self.folder))
        size = self.tokenizer.config.image_size
        self.data = recipe.train.read()
        test = recipe.test.read()
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: recipe.test_images]
        prompts = read_config(self.folder).get("recipe", {}).get("prompts", ())
        self.given = conditions_of(self.target, recipe.train, torch.from_numpy(self.data.labels), prompts)
        held = conditions_of(self.target, recipe.test, torch.from_numpy(test.labels), prompts[:1])
        self.test_given = held.of(chosen, self.generator)
        self.test_tokens = tokenise(self.tokenizer, test.images[chosen], lambda x: evaluation_view(x, size)).long()
        self.net = self.make_net()
        if recipe.init:
            self._begin_from(Path(recipe.init))
        self.rows = self.target.tok_embeddings.weight.to(compute_dtype())
        self.head = self.target.output.weight.to(compute_dtype())
        self.optimizer = adamw(self.net, recipe.lr, recipe.weight_decay)
        self.loss = torch.compile(self._loss) if recipe.compile else self._loss
        self.average = WeightAverage(self.net.parameters(), recipe.ema)
        self.step, self.best = 0, math.inf
        self._resume()

    def make_net(self) -> Any:
        return EagleNet(eagle_config(self.target.config, layers=self.recipe.layers))

    def draws(self, batch: int) -> tuple[Tensor, ...]:
        """What else the loss of a batch of pictures needs."""
        return ()

    def _begin_from(self, folder: Path) -> None:
        """Take over a trained drafter of no more layers; those that it has not begin as the identity."""
        trained = load_drafter(folder, self.family, self.target.config, target_digest(self.folder))
        if trained.config.layers > self.recipe.layers:
            raise UsageError(f"{folder}: {trained.config.layers} layers, layers = {self.recipe.layers} is too few")
        self.net.load_state_dict({**self.net.state_dict(), **trained.state_dict()})

    def _view(self) -> Tensor:
        size, jitter = self.tokenizer.config.image_size, self.recipe.jitter
        return tokenise(self.tokenizer, self.data.images, lambda x: augment(x, size, self.generator, jitter))

    def _resume(self) -> None:
        saved = self.run.load()
        if saved is None:
            views = tqdm(range(self.recipe.views), desc="tokenising views")
            self.tokens = torch.stack([self._view() for _ in views], 1)  # int16 [N, views, h*w]
            self._save()
            return
        self.tokens = saved["tokens"]
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.load_state_dict(saved["average"])
        self.generator.set_state(saved["generator"])
        self.step, self.best = saved["step"], saved["best"]

    def _save(self) -> None:
        self.run.save(
            {
                "tokens": self.tokens,
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "best": self.best,
            }
        )

    def batch(self) -> tuple[Condition, Tensor, Tensor]:
        """Conditions of R rows, tokens int64 [R, N] and a guidance scale float32 [B].

        With guidance R = 2B, [cond; uncond] rows of the same pictures; without, some conditions become none."""
        r, g = self.recipe, self.generator
        chosen = torch.randint(len(self.tokens), (r.batch,), generator=g)
        tokens = self.tokens[chosen, torch.randint(r.views, (r.batch,), generator=g)].long()
        given = self.given.of(chosen, g)
        none = self.given.none(given)
        low, high = r.guidance
        if high > 1:
            scale = low + (high - low) * torch.rand(r.batch, generator=g)
            return together(given, none), tokens.repeat(2, 1), scale
        left_out = torch.rand(r.batch, generator=g) < r.condition_dropout
        return dropped(given, none, left_out), tokens, torch.ones(r.batch)

    @torch.no_grad()
    def features(self, condition: Condition, tokens: Tensor) -> Tensor:
        """The target's hidden states after its final norm at inputs 0..N-1: [R, N, d]."""
        with autocast():
            return self.target.features(condition[0], tokens[:, :-1], *condition[1:])

    def laws(self, features: Tensor, scale: Tensor, more: Tensor | None = None) -> Tensor:
        """Guided log-laws [B, n, V] of hidden states [R, n, d]. more: logits [R, n, V] that are added."""
        logits = F.linear(features.to(self.head.dtype), self.head).float()
        if more is not None:
            logits = logits + more.float()
        if len(logits) > len(scale):
            cond, uncond = logits.chunk(2)
            logits = uncond + (cond - uncond) * scale[:, None, None]  # a scale per picture
        return logits.log_softmax(-1)

    def _loss(self, features: Tensor, fed: Tensor, tokens: Tensor, scale: Tensor, *drawn: Tensor) -> Tensor:
        """Mean over roll-out steps (step k weighs decay^(k-1)) of the recipe's losses. features: the target's [R, N,
        d]; fed: what the drafter sees of them."""
        r = self.recipe
        with autocast():
            steps = self.net.roll_out(fed[:, :-1], self.rows[tokens[:, :-1]], r.rollout)
        wanted = features[:, 1:]
        log_p = self.laws(wanted, scale)
        total, weights = torch.zeros(()), 0.0
        for k, predicted in enumerate(steps):
            apart = self.apart(log_p[:, k:], self.laws(predicted, scale)[:, k:])
            loss = apart.mean()
            if r.feature_weight:
                loss = loss + r.feature_weight * F.smooth_l1_loss(predicted[:, k:].float(), wanted[:, k:].float())
            total, weights = total + r.decay**k * loss, weights + r.decay**k
        return total / weights

    def apart(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The recipe's losses of draft laws, [B, n]: log-laws [B, n, V] of the target and of the drafter."""
        r, p = self.recipe, log_p.exp()
        loss = torch.zeros(p.shape[:-1])
        if r.acceptance_weight:
            loss = loss + r.acceptance_weight * (1 - torch.minimum(p, log_q.exp()).sum(-1))
        if r.cross_entropy_weight:
            loss = loss + r.cross_entropy_weight * (p * (log_p - log_q)).sum(-1)
        return loss

    def train_step(self) -> float:
        r = self.recipe
        if r.refresh_every and self.step and self.step % r.refresh_every == 0:
            self.tokens[:, (self.step // r.refresh_every) % r.views] = self._view()
        set_lr(self.optimizer, cosine(self.step, r.steps, r.lr, r.warmup))
        given, tokens, scale = self.batch()
        features = fed = self.features(given, tokens)
        if r.feature_noise:
            fed = features + r.feature_noise * (torch.rand(features.shape, generator=self.generator) - 0.5)
        loss = self.loss(features, fed, tokens, scale, *self.draws(r.batch))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def held_out(self, guidance: float) -> list[float]:
        """Expected acceptance 1 - TV(p, q) by depth on held-out pictures, averaged weights."""
        self.average.swap()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for *given, tokens in zip(*(part.split(_ROWS) for part in (*self.test_given, self.test_tokens)), strict=True):
            condition, scale = tuple(given), torch.full((len(tokens),), guidance)
            if guidance > 1:
                condition, tokens = together(condition, self.given.none(condition)), tokens.repeat(2, 1)
            total = total + self.overlaps(self.features(condition, tokens), tokens, scale)
            count += len(scale)
        self.average.swap()
        return (total / count).tolist()

    def overlaps(self, features: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
        """1 - TV(p, q) by depth, mean over places and summed over pictures: float64 [depths]."""
        with autocast():
            steps = self.net.roll_out(features[:, :-1], self.rows[tokens[:, :-1]], _DEPTHS)
        p = self.laws(features[:, 1:], scale).exp()
        kept = [torch.minimum(p, self.laws(h, scale).exp())[:, _DEPTHS:].sum(-1).mean(1).sum() for h in steps]
        return torch.stack(kept).double()

    def checkpoint(self, train_loss: float) -> dict[str, Any]:
        """Measure, keep the best averaged weights, save the resumable state."""
        figures = {f"guidance {g:g}": self.held_out(g) for g in dict.fromkeys([1.0, sum(self.recipe.guidance) / 2])}
        lost = 1 - sum(map(sum, figures.values())) / sum(map(len, figures.values()))
        if lost < self.best:
            self.best = lost
            self.average.swap()
            self.export(figures)
            self.average.swap()
        self._save()
        self.run.log(step=self.step, train=train_loss, acceptance=figures)
        return figures

    def export(self, figures: dict[str, Any]) -> None:
        notes = {
            "target_name": read_config(self.folder).get("name", self.folder.name),
            "acceptance_by_depth": {k: [round(x, 4) for x in v] for k, v in figures.items()},
            "steps": self.step,
            "recipe": asdict(self.recipe),
        }
        save_drafter(Path(self.recipe.out) / self.family, self.net, self.folder, notes, self.recipe.compact)

    def fit(self) -> None:
        r, running = self.recipe, math.nan
        bar = tqdm(total=r.steps, initial=self.step, desc="drafter", smoothing=0.05)
        while self.step < r.steps:
            loss = self.train_step()
            running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
            bar.update()
            if self.step % r.evaluate_every == 0 or self.step == r.steps:
                figures = self.checkpoint(running)
                last = list(figures.values())[-1]
                bar.set_postfix({"loss": f"{running:.3f}", "held out": " ".join(f"{a:.2f}" for a in last)})
        bar.close()


def train_drafter(recipe: DrafterRecipe | SketchRecipe) -> Path:
    """Train (or resume) to the recipe's last step. Returns the drafter folder."""
    if isinstance(recipe, SketchRecipe):
        from bozzetto.train.path_drafter import train_sketch

        return train_sketch(recipe)
    if isinstance(recipe, ParallelRecipe):
        from bozzetto.train.parallel import ParallelTrainer

        fit: Trainer = ParallelTrainer(recipe)
    else:
        fit = Trainer(recipe)
    fit.fit()
    return Path(recipe.out) / fit.family
