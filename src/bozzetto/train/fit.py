"""What fitting a network has in common over all families: its arithmetic, the step, the averaged weights, the best
ones, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bozzetto.autoencoders.vq import VQTokenizer
from bozzetto.checkpoints.folders import read_config
from bozzetto.common.files import write_whole
from bozzetto.common.images import contact_sheet
from bozzetto.data import ImageSet, augment, read_captions
from bozzetto.errors import UsageError
from bozzetto.pipeline.loading import load
from bozzetto.pipeline.pipeline import model_folder
from bozzetto.runtime.native import multiplies_pairs
from bozzetto.targets.llamagen import LlamaGen
from bozzetto.train.folder import RunFolder, data_digest
from bozzetto.train.pictures import DataSource, by_name, note_overlap

M = TypeVar("M", bound=nn.Module)
_CHUNK = 64
_FLOOR = 0.05  # of the peak, where a learning rate ends


def compute_dtype() -> torch.dtype:
    """What training computes in: the faster of bfloat16 and float32 on this processor."""
    return torch.bfloat16 if multiplies_pairs() else torch.float32


def autocast() -> torch.autocast:
    """Matrix products in `compute_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() == torch.bfloat16)


def pass_over(*modules: nn.Module) -> None:
    """Draw what new modules of these kinds begin from, and drop it: recipes were made when reading a model did so, and
    what they train begins from the numbers after that."""
    for module in modules:
        kind: Any = type(module)
        if kind in (VQTokenizer, LlamaGen):
            kind(module.config)


class WeightAverage:
    """Exponential moving average of parameters, with the usual warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.live = list(parameters)
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights (call twice to restore)."""
        for p, s in zip(self.live, self.shadow, strict=True):
            kept = p.detach().clone()
            p.copy_(s)
            s.copy_(kept)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for s, saved in zip(self.shadow, state["shadow"], strict=True):
            s.copy_(saved)


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95); gains and biases do not decay."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a half cosine down to a twentieth of it at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def decayed_mean(losses: Iterable[Tensor], decay: float) -> Tensor:
    """Mean over the steps of a roll-out, step k weighs decay^k."""
    total, weights = torch.zeros(()), 0.0
    for k, loss in enumerate(losses):
        total, weights = total + decay**k * loss, weights + decay**k
    return total / weights


def channels_last(module: M) -> M:
    """Lay out convolution weights for the fast CPU kernels."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def encoded(images: np.ndarray, view: Callable[[np.ndarray], Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes or latents of one view of each of the images uint8 [N, S, S, 3]."""
    parts = []
    for i in range(0, len(images), _CHUNK):
        x = view(images[i : i + _CHUNK]).contiguous(memory_format=torch.channels_last)
        with autocast():
            parts.append(encode(x))
    return torch.cat(parts)


def mean_over(rows: int, parts: Sequence[Tensor], figure: Callable[..., Any]) -> Any:
    """Mean over pictures of a figure of `rows` of them at a time. parts: tensors with a row per picture."""
    total: Any = 0.0
    for some in zip(*(part.split(rows) for part in parts), strict=True):
        total = total + figure(*some) * len(some[0])
    return total / len(parts[0])


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
    family = "model"  # the folder inside the run's that is exported
    known: Sequence[str] | None = None  # classes of the target that this one is made for
    flips = True  # mirror every other picture
    labelled = True  # whether labels mean anything; if not, captions do
    shown = True  # whether samples can be looked at

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
        self.optimizer = adamw(self.model, recipe.lr, recipe.weight_decay)
        self.compiled = torch.compile(self.loss) if recipe.compile else self.loss
        self.average = WeightAverage(self.model.parameters(), recipe.ema)
        self.step, self.best, self.best_step = 0, math.inf, 0
        self._resume()

    @property
    def folder(self) -> Path:
        """What is exported."""
        return self.run.path / self.family

    @cached_property
    def target_folder(self) -> Path:
        """Of the trained model that this one is made for."""
        return model_folder(self.recipe.model)

    @property
    def target_name(self) -> str:
        """What that model is called."""
        return str(read_config(self.target_folder).get("name", self.target_folder.name))

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

    def augmented(self, images: np.ndarray) -> Tensor:
        """A new view of each of the images."""
        return augment(images, self.image_size, self.generator, self.recipe.jitter, self.flips)

    def scales(self, count: int, generator: torch.Generator) -> Tensor:
        """Guidance scales from the recipe's range, [count]."""
        low, high = self.recipe.guidance
        return low + (high - low) * torch.rand(count, generator=generator)

    def load_target(self) -> None:
        """Read the trained model that this one is made for, if it is made for one."""

    def load_data(self) -> None:
        """Make of self.data and self.held what the model is trained on, as far as it does not depend on the model."""
        raise NotImplementedError

    def make_model(self) -> nn.Module:
        """The network as training begins, with the weights that the recipe takes over."""
        raise NotImplementedError

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
        """Write the model's folder from the model as it is."""
        raise NotImplementedError

    def notes(self, **more: Any) -> dict[str, Any]:
        """What its config.json says beside the network."""
        return {**more, "steps": self.step, "recipe": asdict(self.recipe)}

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
            set_states(self, saved, "model", "optimizer", "average", "generator")
            torch.set_rng_state(saved["torch_rng"])
            self.step, self.best, self.best_step = saved["step"], saved["best"], saved["best_step"]

    def _save(self) -> None:
        progress = {"step": self.step, "best": self.best, "best_step": self.best_step}
        states = states_of(self, "model", "optimizer", "average", "generator")
        self.run.save({**self.kept(), **states, "torch_rng": torch.get_rng_state(), **progress})

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
                if self.shown:
                    with torch.random.fork_rng():  # a resumed run would not draw the numbers that this does
                        sample_sheet(self.folder, self.run.path / "samples.png")
                bar.set_postfix({"train": f"{running:.3f}", "held out": f"{held_out:.3f}"})
                over = self.over()
        bar.close()


def states_of(owner: object, *names: str) -> dict[str, Any]:
    """States of what an object holds by these names, as a checkpoint has them."""
    parts = {name: getattr(owner, name) for name in names}
    return {n: p.get_state() if isinstance(p, torch.Generator) else p.state_dict() for n, p in parts.items()}


def set_states(owner: object, saved: Mapping[str, Any], *names: str) -> None:
    """Bring what an object holds by these names to the states of a checkpoint."""
    for name in names:
        part = getattr(owner, name)
        put = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
        put(saved[name])


def check_finite(step: int, loss: float, what: str = "loss") -> None:
    """Raise UsageError for a loss that is no number: what follows would be of no use."""
    if not math.isfinite(loss):
        raise UsageError(f"the {what} is {loss} at step {step}: what was saved before is kept. Is lr too large?")


def sample_sheet(model: Path, out: Path, per_class: int = 4, guidance: float = 2.0, batch: int = 20) -> None:
    """Write a contact sheet of `per_class` samples of each class (one row a class) of a model folder, seed 0."""
    pipe = load(model, dtype="bfloat16", device="cpu")
    classes = [name for name in pipe.classes for _ in range(per_class)]
    result = pipe.generate(classes, seed=0, batch=batch, guidance=guidance)
    pixels = np.stack([np.asarray(i.image) for i in result.images])
    sheet = contact_sheet(pixels, columns=per_class, captions=[i.class_name for i in result.images])
    write_whole(out, sheet.save)
