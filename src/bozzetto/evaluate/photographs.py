"""The real images that samples are held against: two splits, at the model's size, classes in the model's order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bozzetto.checkpoints.folders import load_tokenizer, read_config
from bozzetto.common.classes import class_named, distinct
from bozzetto.data import ImageSet, evaluation_view, read_captions, read_images
from bozzetto.errors import UsageError
from bozzetto.pipeline.pipeline import Pipeline

SPLITS = ("test", "train")


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
