"""`bozzetto train drafter RECIPE.yaml`: fit a drafter of codes to a trained target, one like EAGLE or one of several
tokens in a pass, resumably.

Pictures are tokenised as for the target; the target's features are computed anew for every batch, nothing is dumped.
Losses are taken on the guided law that drafting will use, over several steps of the drafter's own roll-out.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.checkpoints.folders import (
    EAGLE,
    LLAMAGEN,
    load_drafter,
    load_target,
    read_config,
    save_drafter,
    target_digest,
)
from bozzetto.checkpoints.weights import load_strict
from bozzetto.drafters.base import gather_rows
from bozzetto.drafters.trained import new_net
from bozzetto.errors import UsageError
from bozzetto.targets.sentence import SentenceEncoder
from bozzetto.train.fit import autocast, compute_dtype, decayed_mean, pass_over
from bozzetto.train.pictures import Condition, class_names, conditions_of, dropped, nothing, of_rows, together
from bozzetto.train.recipes import DrafterRecipe, ParallelRecipe
from bozzetto.train.target import TokenFit

_DEPTHS = 5  # of the roll-out in the held-out report
_ROWS = 16
_EVERY = 11  # pairs between held-out anchors of a drafter of several tokens


class DrafterFit(TokenFit):
    """Fits an EAGLE-style drafter; other kinds say what their network, their loss and their acceptance are."""

    family, title, shown = EAGLE, "drafter", False
    recipe: DrafterRecipe
    model: Any

    def load_target(self) -> None:
        self.target = load_target(self.target_folder, LLAMAGEN)
        self.labelled = not self.target.config.captioned
        if self.labelled:
            self.known = class_names(self.target_folder, self.target.config.classes)
        self.read_tokenizer(self.target_folder)
        pass_over(self.target, self.tokenizer)

    def load_data(self) -> None:
        recipe, test, config = self.recipe, self.held, self.target.config
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: recipe.test_images]
        prompts = read_config(self.target_folder).get("recipe", {}).get("prompts", ())
        encoder = SentenceEncoder(config.condition_tokens) if config.captioned else None
        self.given = conditions_of(encoder, recipe.train, torch.from_numpy(self.data.labels), prompts)
        held = conditions_of(encoder, recipe.test, torch.from_numpy(test.labels), prompts[:1])
        self.test_given = of_rows(held, chosen, self.generator)
        self.test_tokens = self.whole(test.images[chosen]).long()
        self.rows = self.target.tok_embeddings.weight.to(compute_dtype())
        self.head = self.target.output.weight.to(compute_dtype())

    def make_model(self) -> Any:
        """What a trained drafter of fewer layers has not begins as the identity."""
        r, net = self.recipe, new_net(self.family, self.target.config, asdict(self.recipe))
        if r.init:
            trained = load_drafter(r.init, self.family, self.target.config, target_digest(self.target_folder))
            layers = asdict(trained.config).get("layers", 0)
            if layers > r.layers:
                raise UsageError(f"{r.init}: {layers} layers, layers = {r.layers} is too few")
            load_strict(net, {**net.state_dict(), **trained.state_dict()}, r.init)
        return net

    def draws(self, batch: int) -> tuple[Tensor, ...]:
        """What else the loss of a batch of pictures needs."""
        return ()

    def batch(self) -> tuple[Tensor, ...]:
        self.refresh()
        given, tokens, scale = self.pictures()
        features = fed = self.features(given, tokens)
        if self.recipe.feature_noise:
            fed = features + self.recipe.feature_noise * (torch.rand(features.shape, generator=self.generator) - 0.5)
        return features, fed, tokens, scale, *self.draws(self.recipe.batch)

    def pictures(self) -> tuple[Condition, Tensor, Tensor]:
        """Conditions of R rows, tokens int64 [R, N] and a guidance scale float32 [B].

        With guidance R = 2B, [cond; uncond] rows of the same pictures; without, some conditions become none."""
        r, g = self.recipe, self.generator
        chosen = torch.randint(len(self.tokens), (r.batch,), generator=g)
        tokens = self.tokens[chosen, torch.randint(r.views, (r.batch,), generator=g)].long()
        given = of_rows(self.given, chosen, g)
        none = nothing(given, self.target)
        if r.guidance[1] > 1:
            return together(given, none), tokens.repeat(2, 1), self.scales(r.batch, g)
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

    def loss(self, features: Tensor, fed: Tensor, tokens: Tensor, scale: Tensor, *drawn: Tensor) -> Tensor:
        """Mean over roll-out steps (step k weighs decay^(k-1)) of the recipe's losses. features: the target's [R, N,
        d]; fed: what the drafter sees of them."""
        r = self.recipe
        with autocast():
            steps = self.model.roll_out(fed[:, :-1], self.rows[tokens[:, :-1]], r.rollout)
        wanted = features[:, 1:]
        log_p, losses = self.laws(wanted, scale), []
        for k, predicted in enumerate(steps):
            loss = self.apart(log_p[:, k:], self.laws(predicted, scale)[:, k:]).mean()
            if r.feature_weight:
                loss = loss + r.feature_weight * F.smooth_l1_loss(predicted[:, k:].float(), wanted[:, k:].float())
            losses.append(loss)
        return decayed_mean(losses, r.decay)

    def apart(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The recipe's losses of draft laws, [B, n]: log-laws [B, n, V] of the target and of the drafter."""
        r, p = self.recipe, log_p.exp()
        loss = torch.zeros(p.shape[:-1])
        if r.acceptance_weight:
            loss = loss + r.acceptance_weight * (1 - torch.minimum(p, log_q.exp()).sum(-1))
        if r.cross_entropy_weight:
            loss = loss + r.cross_entropy_weight * (p * (log_p - log_q)).sum(-1)
        return loss

    def held_out_loss(self) -> float:
        """Share of drafts that are not kept; `acceptance` keeps what is, by guidance and depth."""
        scales = dict.fromkeys([1.0, sum(self.recipe.guidance) / 2])
        self.acceptance = {f"guidance {g:g}": self.held_out_acceptance(g) for g in scales}
        return 1 - sum(map(sum, self.acceptance.values())) / sum(map(len, self.acceptance.values()))

    @torch.no_grad()
    def held_out_acceptance(self, guidance: float) -> list[float]:
        """Expected acceptance 1 - TV(p, q) by depth on held-out pictures."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for *given, tokens in zip(*(part.split(_ROWS) for part in (*self.test_given, self.test_tokens)), strict=True):
            condition, scale = tuple(given), torch.full((len(tokens),), guidance)
            if guidance > 1:
                condition, tokens = together(condition, nothing(condition, self.target)), tokens.repeat(2, 1)
            total = total + self.overlaps(self.features(condition, tokens), tokens, scale)
            count += len(scale)
        return (total / count).tolist()

    def overlaps(self, features: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
        """1 - TV(p, q) by depth, mean over places and summed over pictures: float64 [depths]."""
        with autocast():
            steps = self.model.roll_out(features[:, :-1], self.rows[tokens[:, :-1]], _DEPTHS)
        p = self.laws(features[:, 1:], scale).exp()
        kept = [torch.minimum(p, self.laws(h, scale).exp())[:, _DEPTHS:].sum(-1).mean(1).sum() for h in steps]
        return torch.stack(kept).double()

    def figures(self, held_out: float) -> dict[str, Any]:
        return {"acceptance": self.acceptance}

    def export(self) -> None:
        acceptance = {k: [round(x, 4) for x in v] for k, v in self.acceptance.items()}
        notes = self.notes(target_name=self.target_name, acceptance_by_depth=acceptance)
        save_drafter(self.folder, self.model, self.target_folder, notes, self.recipe.compact)


class ParallelFit(DrafterFit):
    """Fits a drafter of several tokens in one pass: families plane, block and glance.

    A step looks at the places after some anchors of each picture, held-out acceptance at those after evenly spaced
    ones. Laws of later places are taken given the true tokens before, as verification does while drafts are kept.
    """

    recipe: ParallelRecipe

    def load_target(self) -> None:
        self.family = self.recipe.family
        super().load_target()

    def draws(self, batch: int) -> tuple[Tensor, ...]:
        """Anchors int64 [B, A]."""
        pairs, r = self.target.config.length - 1, self.recipe
        return (torch.rand(batch, pairs, generator=self.generator).argsort(1)[:, : min(r.anchors, pairs)],)

    def loss(self, features: Tensor, fed: Tensor, tokens: Tensor, scale: Tensor, *drawn: Tensor) -> Tensor:
        r = self.recipe
        log_p, log_q, real, near = self.both(features, fed, tokens, scale, drawn[0])
        weight = real * r.decay ** torch.arange(r.places)
        loss = self.apart(log_p.flatten(1, 2), log_q.flatten(1, 2)).view_as(weight)
        if r.feature_weight:
            copies = len(near) // len(weight)
            loss = loss + r.feature_weight * near.view(copies, *weight.shape).mean(0)
        return (loss * weight).sum() / weight.sum()

    def both(
        self, features: Tensor, fed: Tensor, tokens: Tensor, scale: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-laws of target and drafter [B, A, K, V], which places are inside the picture, float [B, A, K], and the
        distance of the predicted features, [R, A, K]. anchors int64 [B, A]."""
        copies, (batch, count) = len(features) // len(scale), anchors.shape
        every = anchors.repeat(copies, 1)
        with autocast():
            guessed = self.model.after(fed[:, :-1], self.rows[tokens[:, :-1]], every)  # [R, A, K, d]
        place = every[..., None] + torch.arange(1, self.recipe.places + 1)
        inside = place.clamp_max(features.shape[1] - 1).flatten(1)  # [R, A K]
        wanted = gather_rows(features, inside)
        with autocast():
            more = self.model.bias(tokens.gather(1, inside - 1))
        log_p = self.laws(wanted, scale)
        log_q = self.laws(guessed.flatten(1, 2), scale, more)
        near = F.smooth_l1_loss(guessed.flatten(1, 2).float(), wanted.float(), reduction="none").mean(-1)
        real = (place[:batch] < features.shape[1]).float()
        shape = (count, self.recipe.places)
        return log_p.unflatten(1, shape), log_q.unflatten(1, shape), real, near.unflatten(1, shape)

    def overlaps(self, features: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
        last = self.target.config.length - 1 - self.recipe.places
        anchors = torch.arange(0, max(1, last), _EVERY).expand(len(scale), -1)
        log_p, log_q, *_ = self.both(features, features, tokens, scale, anchors)
        return torch.minimum(log_p.exp(), log_q.exp()).sum(-1).mean(1).sum(0).double()
