"""What samples are held against: two splits of photographs, at the model's size, classes in the model's order; their
features and a probe of their classes, complete and checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bozzetto.checkpoints.folders import load_tokenizer, read_config
from bozzetto.common.classes import class_named, distinct
from bozzetto.data import ImageSet, evaluation_view, read_captions, read_images
from bozzetto.errors import UsageError
from bozzetto.evaluate.features import FeatureExtractor, features_of
from bozzetto.evaluate.metrics import Interval, mean_interval
from bozzetto.evaluate.quality import class_probe
from bozzetto.pipeline.pipeline import Pipeline

SPLITS = ("test", "train")
LEAST = 8  # pictures that figures are made of
MOST = 100_000  # figures compare each with every other
FEW = 100  # below, a figure says more about their number than about the pictures
_NAMED = 5


def classed(images: ImageSet) -> bool:
    """Whether the classes of some photographs are known to the model."""
    return bool((images.labels >= 0).any())


def balanced(images: ImageSet, count: int) -> np.ndarray:
    """Rows of at most `count` photographs, all classes that have some in turn, as samples are drawn; stops when a class
    runs out. Without classes: any rows, always the same."""
    if not classed(images):
        return _shuffled(len(images))[:count]
    every = [np.flatnonzero(images.labels == label) for label in range(len(images.classes))]
    rows = [found for found in every if len(found)]
    turns = min(min(map(len, rows)), -(-count // len(rows)))
    return np.stack([r[:turns] for r in rows], 1).flatten()[:count]


def data_path(pipe: Pipeline, asked: str | Path | None) -> Path:
    """The data given, or those that the model's config.json says it was trained on."""
    if asked is None:
        recipe = read_config(pipe.folder).get("recipe", {}) if pipe.folder else {}
        asked = recipe.get("test", {}).get("path")
        if asked is None:
            raise UsageError(f"model {pipe.name!r} does not say which data it was trained on: give --data")
        if not Path(asked).exists():
            raise UsageError(f"the data that {pipe.name!r} was trained on are not at {asked}: give --data")
    path = Path(asked)
    if not path.exists():
        raise UsageError(f"data = {str(path)!r} not found (allowed: parquet or a folder, with splits train and test)")
    return path


def photographs(pipe: Pipeline, path: Path, split: str) -> ImageSet:
    """One split of a parquet file or of a folder, read straight at the model's size: samples are held against what the
    files show. Classes are the model's, -1 one that it does not know. Raises UsageError as `read_images` does."""
    found = read_images(path, split, pipe.size)
    known = [class_named(pipe.classes, name) for name in distinct(found.classes)]
    label = np.array([-1 if number is None else number for number in known], np.int64)
    return replace(found, labels=label[found.labels], classes=list(pipe.classes))


def prompts_for(pipe: Pipeline, path: Path) -> list[str]:
    """What a model that takes prompts is asked for, so that its samples can be held against the photographs: captions
    and styles of the test split, shuffled, always in the same order. Empty for models with classes."""
    if not pipe.takes_prompts:
        return []
    named = read_captions(path, "test")
    texts = [f"{caption}, {style}" if style else caption for caption, style in named]
    return [texts[i] for i in _shuffled(len(texts))]


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


@torch.no_grad()
def reconstructions(pipe: Pipeline, images: np.ndarray, batch: int = 32) -> np.ndarray:
    """What the tokenizer keeps of images uint8 [N, S, S, 3]: encoded to tokens and decoded again, same shape."""
    whole = pipe.tokenizer if pipe.folder is None else load_tokenizer(pipe.folder)  # with the half that encodes
    tokenizer, parts = whole.to(pipe.target.device), []
    for i in range(0, len(images), batch):
        x = evaluation_view(images[i : i + batch], images.shape[1]).to(pipe.target.device)
        pixels = (tokenizer.decode(tokenizer.encode(x)).clamp(0, 1) * 255).round().byte()
        parts.append(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return np.concatenate(parts)


class Reference:
    """Two splits of photographs for a model. features: by split, float64 [N, d]; probe: see `class_probe`, None where
    fewer than two classes have training photographs; accuracy: of the probe on test photographs (None: of classes that
    it does not know, or without one); notes: what is to be known about figures made from these.

    references: the splits that samples are to be compared with. Raises UsageError where one holds too few.
    """

    def __init__(
        self, pipe: Pipeline, path: Path, references: Sequence[str], extractor: FeatureExtractor, progress: bool = False
    ):
        self.pipe, self.extractor, self.progress = pipe, extractor, progress
        self.photographs = {split: photographs(pipe, path, split) for split in SPLITS}
        self.counts = {split: len(found) for split, found in self.photographs.items()}
        self.notes = [note for split in references if (note := few(self.counts[split], f"{split} photographs"))]
        for split in references:
            if self.counts[split] < LEAST:
                raise UsageError(
                    f"{path} holds {self.counts[split]} {split} photographs that can be read: at least {LEAST} are "
                    f"wanted, and {FEW} or more for figures that mean something"
                )
        self.features = {split: self.features_of(split, found.images) for split, found in self.photographs.items()}
        self.probe: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None
        self.accuracy: float | None = None
        if classed(self.photographs["train"]):
            self._learn_classes()
        elif not pipe.takes_prompts:
            self.notes.append(
                f"no class of the photographs is one of the model's ({', '.join(pipe.classes[:_NAMED])}, ...): "
                "there is no share of right classes, and what they show may be something else."
            )

    def features_of(self, name: str, images: np.ndarray) -> Tensor:
        """Features of uint8 images [n, H, W, 3]: float64 [n, d]. name: for the progress bar."""
        found = features_of(self.extractor, images, progress=self.progress, desc=f"features of {name}")
        return torch.from_numpy(np.asarray(found)).double()

    def _learn_classes(self) -> None:
        labels = {split: torch.from_numpy(found.labels) for split, found in self.photographs.items()}
        known, train = labels["train"] >= 0, labels["train"]
        missing = sorted(set(range(len(self.pipe.classes))) - set(train[known].tolist()))
        if missing:
            names = ", ".join(self.pipe.classes[k] for k in missing[:_NAMED])
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            self.notes.append(f"no training photographs of {names}{more}: the share of right classes leaves these out.")
        if len(train[known].unique()) < 2:
            return
        self.probe = class_probe(self.features["train"][known], train[known])
        found = self.consistency(self.features["test"], labels["test"], torch.zeros(0, len(labels["test"])).double())
        self.accuracy = None if found is None else found.value

    def consistency(self, features: Tensor, asked: Tensor, counts: Tensor) -> Interval | None:
        """Share of pictures in which the probe sees the class asked for, int64 [n], over those whose class it knows;
        counts: float64 [R, n] from `resamples`. None where there is nothing to see."""
        if self.probe is None:
            return None
        classes, shown = self.probe
        seen = torch.isin(asked, classes)
        if not bool(seen.any()):
            return None
        hits = (shown(features[seen]) == asked[seen]).double()
        return mean_interval(hits, counts[:, seen])

    def about(self) -> dict[str, Any]:
        """What a report says of the photographs."""
        found = self.photographs
        enlarged = {split: photos.enlarged for split, photos in found.items()}
        return {"size": found["test"].images.shape[2], "count": self.counts, "enlarged": enlarged}


def few(count: int, what: str) -> str:
    """A note on figures made of few pictures; empty for enough."""
    if count >= FEW:
        return ""
    return (
        f"{count} {what} are few: distances of fewer than {FEW} pictures tell mostly how few they are (compare rows of "
        "equal numbers only), and intervals are too narrow."
    )
