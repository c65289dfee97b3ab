"""What a run is trained on: sets of pictures, their classes by name, and the classes or prompts that stand for them.

A condition is a tuple of tensors with one row per picture, the arguments of `LlamaGen.features` beside the tokens:
labels, or features of a prompt and their mask. Conditions of a set hold all its pictures, with several prompts each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor
from tqdm import tqdm

from bozzetto.checkpoints.folders import read_config
from bozzetto.common.terminal import note
from bozzetto.data import ImageSet, read_captions, read_images
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import CaptionEmbedding, LlamaGen, left_pad
from bozzetto.targets.sentence import SentenceEncoder

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # a path, or a model's name
Condition = tuple[Tensor, ...]
_CHUNK = 64
_SHOWN = 20  # class names in a message


@checked(frozen=True, config=STRICT)
class DataSource:
    """path: of parquet files or pictures (docs/data.md); split: which of them (None: all); size: pixels that squares
    are held at, from which random crops are taken (None: a quarter more than the model's, at least 160)."""

    path: Place
    split: str | None = None
    size: Annotated[int, Field(gt=0, le=4096)] | None = None

    def __str__(self) -> str:
        return self.path if self.split is None else f"{self.path} (split {self.split})"

    def read(self, image_size: int = 128) -> ImageSet:
        """The images, for a model of pictures of `image_size` pixels."""
        return read_images(self.path, self.split, self.size or max(160, image_size * 5 // 4))

    def overlaps(self, other: DataSource) -> bool:
        """Whether both name the same pictures, or one all and the other some of them."""
        return self.path == other.path and (None in (self.split, other.split) or self.split == other.split)


def note_overlap(train: Sequence[DataSource], test: DataSource) -> None:
    """Say it on stderr where pictures that are held out are trained on as well."""
    if any(source.overlaps(test) for source in train):
        note(f"note: {test}: trained on as well; held-out figures say nothing about new pictures")


def by_name(data: ImageSet, classes: Sequence[str], source: object) -> ImageSet:
    """The set with labels that count `classes`, found by name. source: what messages call it.

    Classes without pictures do not matter. Raises UsageError for labels out of range, for names that are not among
    `classes`, and for names given twice, unless both lists are the same.
    """
    labels, classes = np.unique(data.labels), list(classes)
    if odd := [int(label) for label in labels if not 0 <= label < len(data.classes)]:
        raise UsageError(f"{source}: label {odd[0]} is not allowed: 0 to {len(data.classes) - 1}")
    if data.classes == classes:
        return data
    used = [data.classes[label] for label in labels]
    if unknown := [name for name in used if name not in classes]:
        raise UsageError(f"{source}: {_listed(unknown)}: not among the classes that are trained: {_listed(classes)}")
    if double := [name for name in used if classes.count(name) > 1 or used.count(name) > 1]:
        raise UsageError(f"{source}: {_listed(double)}: more than one class is called so; give each a name of its own")
    number = np.zeros(len(data.classes), np.int64)
    number[labels] = [classes.index(name) for name in used]
    return replace(data, labels=number[data.labels], classes=classes)


def class_names(folder: Path, classes: int) -> list[str]:
    """Names by label of the model in a folder. Raises UsageError where they are not as many as its classes."""
    names = read_config(folder).get("class_names")
    if not isinstance(names, list) or len(names) != classes:
        raise UsageError(f"{folder}: class_names must list {classes} names")
    return [str(name) for name in names]


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def of_rows(conditions: Condition, rows: Tensor, generator: torch.Generator) -> Condition:
    """The condition of the pictures int64 [B]; where a picture has several prompts, one is drawn."""
    if len(conditions) == 1:
        return (conditions[0][rows],)
    features, mask = conditions
    which = torch.randint(features.shape[1], rows.shape, generator=generator)
    return features[rows, which].float(), mask[rows, which]


def nothing(condition: Condition, target: LlamaGen) -> Condition:
    """What stands for no condition, as many rows as given; no prompt goes under the mask of the one that it is for."""
    embedding = target.cls_embedding
    if isinstance(embedding, CaptionEmbedding):
        return embedding.uncond_embedding.expand_as(condition[0]), condition[1]
    return (torch.full_like(condition[0], target.config.classes),)


def together(one: Condition, other: Condition) -> Condition:
    """The rows of both."""
    return tuple(torch.cat(pair) for pair in zip(one, other, strict=True))


def dropped(condition: Condition, none: Condition, rows: Tensor) -> Condition:
    """The condition, or none at rows bool [B]."""
    pairs = zip(condition, none, strict=True)
    return tuple(torch.where(rows.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs)


def conditions_of(
    encoder: SentenceEncoder | None, source: DataSource, labels: Tensor, prompts: Sequence[str]
) -> Condition:
    """Of the pictures of a set: their labels, or, with an encoder, of what a text-conditional target calls each in its
    K prompts, left-padded features float16 [N, K, T, C] and their mask bool [N, K, T]. Raises UsageError where it does
    not say so."""
    if encoder is None:
        return (labels,)
    if not prompts:
        raise UsageError("this target does not say what it calls pictures (recipe.prompts of its config.json)")
    named = read_captions(source.path, source.split)
    parts = []
    for prompt in prompts:
        texts = [prompt.format(caption=caption, style=style) for caption, style in named]
        chunks = tqdm(range(0, len(texts), _CHUNK), desc=f"encoding {prompt!r}")
        found = [left_pad(*encoder(texts[i : i + _CHUNK])) for i in chunks]
        parts.append((torch.cat([f.half() for f, _ in found]), torch.cat([m for _, m in found])))
    features, masks = zip(*parts, strict=True)
    return torch.stack(features, 1), torch.stack(masks, 1)
