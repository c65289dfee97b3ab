"""What fitting a network has in common over all families: the step, the averaged weights, the best ones, resuming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bozzetto.data import ImageSet, read_captions
from bozzetto.errors import UsageError
from bozzetto.train.conditions import by_name
from bozzetto.train.fields import DataSource, note_overlap
from bozzetto.train.folder import RunFolder, data_digest
from bozzetto.train.loop import WeightAverage, adamw, cosine, set_lr


class Fit:
    """A training run. Families say what the data and the model are and what a step's loss is.

    The averaged weights with the lowest held-out loss are exported; the run stops when that has not fallen for
    `patience` evaluations, where a recipe has such a limit. Everything random comes from one generator, whose state is
    saved. Pictures are matched with classes by name (`by_name`): held-out ones with those of training, and both with
    those of the target that a drafter or variant is for.

    recipe: any but a tokenizer's; restart: put an earlier run in its folder aside. Raises UsageError for what cannot be
    trained, and for a folder that holds a run of something else.
    """

    title = "target"  # of the progress bar
    known: Sequence[str] | None = None  # classes of the target that this one is made for
    labelled = True  # whether labels mean anything; if not, captions do

    def __init__(self, recipe: Any, restart: bool = False):
        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.load_target()
        note_overlap([recipe.train], recipe.test)
        self.data, train = self._pictures(recipe.train)
        self.held, test = self._pictures(recipe.test)
        self.run = RunFolder(recipe, {"train": train, "test": test}, restart)
        self.load_data()
        self.model = self.make_model()
        self.begin()
        self.optimizer = adamw(self.model, recipe.lr, recipe.weight_decay)
        self.compiled = torch.compile(self.loss) if recipe.compile else self.loss
        self.average = WeightAverage(self.model.parameters(), recipe.ema)
        self.step, self.best, self.best_step = 0, math.inf, 0
        self._resume()

    @property
    def image_size(self) -> int:
        """Pixels of the model's pictures."""
        return self.recipe.image_size

    def _pictures(self, source: DataSource) -> tuple[ImageSet, str]:
        """The set with labels as the run counts classes, and its digest."""
        pictures = source.read(self.image_size)
        if not self.labelled:
            return pictures, data_digest(pictures, captions=read_captions(source.path, source.split))
        self.known = self.known or pictures.classes
        pictures = by_name(pictures, self.known, source)
        return pictures, data_digest(pictures)

    def load_target(self) -> None:
        """Read the trained model that this one is made for, if it is made for one."""

    def load_data(self) -> None:
        """Make of self.data and self.held what the model is trained on, as far as it does not depend on the model."""
        raise NotImplementedError

    def make_model(self) -> nn.Module:
        raise NotImplementedError

    def begin(self) -> None:
        """Bring the new model to where training begins."""

    def loss(self, *batch: Any) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def batch(self) -> tuple[Any, ...]:
        """Arguments of `loss` for the next step."""
        raise NotImplementedError

    def held_out_loss(self) -> float:
        """Of the model as it is, in evaluation mode, without gradients."""
        raise NotImplementedError

    def export(self) -> None:
        """Write the model folder from the model as it is."""
        raise NotImplementedError

    def views(self, saved: dict[str, Any] | None) -> None:
        """Make or restore augmented views that live in the checkpoint. saved: the checkpoint, if there is one."""

    def kept(self) -> dict[str, Any]:
        """What `views` wants to find in the checkpoint."""
        return {}

    def _resume(self) -> None:
        saved = self.run.load()
        self.views(saved)
        if saved is None:
            return
        with self.run.reading():
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average.load_state_dict(saved["average"])
            self.generator.set_state(saved["generator"])
            torch.set_rng_state(saved["torch_rng"])
            self.step, self.best, self.best_step = saved["step"], saved["best"], saved["best_step"]

    def _save(self) -> None:
        self.run.save(
            {
                **self.kept(),
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

    def train_step(self) -> float:
        r = self.recipe
        set_lr(self.optimizer, cosine(self.step, r.steps, r.lr, r.warmup))
        loss = self.compiled(*self.batch())
        check_finite(self.step + 1, loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def held_out(self) -> float:
        """Held-out loss of the averaged weights, without dropout."""
        self.average.swap()
        self.model.eval()
        loss = self.held_out_loss()
        self.model.train()
        self.average.swap()
        return loss

    def checkpoint(self, train_loss: float) -> float:
        """Evaluate, keep the best averaged weights, save the resumable state."""
        held_out = self.held_out()
        check_finite(self.step, held_out, "held-out loss")
        if held_out < self.best:
            self.best, self.best_step = held_out, self.step
            self.average.swap()
            self.export()
            self.average.swap()
        self._save()
        self.run.log(step=self.step, train=train_loss, **self.figures(held_out))
        return held_out

    def figures(self, held_out: float) -> dict[str, Any]:
        """What an evaluation logs."""
        return {"held_out": held_out, "best": self.best}

    def sheet(self) -> None:
        """A contact sheet of samples of the best weights so far."""
        from bozzetto.train.samples import sample_sheet

        with torch.random.fork_rng():  # building the sampler draws numbers that a resumed run would not draw
            sample_sheet(self.run.path / "model", self.run.path / "samples.png")

    def over(self) -> bool:
        """Whether the last step is done, or nothing has improved for long enough."""
        r = self.recipe
        waited = self.step - self.best_step
        return self.step >= r.steps or waited >= getattr(r, "patience", math.inf) * r.evaluate_every

    def fit(self) -> None:
        """Train until it is over. Raises UsageError where the loss is no number any more."""
        r = self.recipe
        self.model.train()
        running, over = math.nan, self.over()
        bar = tqdm(total=r.steps, initial=self.step, desc=self.title, smoothing=0.05)
        while not over:
            loss = self.train_step()
            running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
            bar.update()
            if self.step % r.evaluate_every == 0 or self.step == r.steps:
                held_out = self.checkpoint(running)
                self.sheet()
                bar.set_postfix({"train": f"{running:.3f}", "held out": f"{held_out:.3f}"})
                over = self.over()
        bar.close()


def check_finite(step: int, loss: float, what: str = "loss") -> None:
    """Raise UsageError for a loss that is no number: what follows would be of no use."""
    if not math.isfinite(loss):
        raise UsageError(f"the {what} is {loss} at step {step}: what was saved before is kept. Is lr too large?")
