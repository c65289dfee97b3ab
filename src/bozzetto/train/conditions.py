"""What pictures are drawn from in training: classes or prompts, and what stands for neither.

A condition is a tuple of tensors with one row per picture: the arguments of `LlamaGen.features` beside the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.checkpoints.folders import read_config
from bozzetto.data import ImageSet, read_captions
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import CaptionEmbedding, LlamaGen, left_pad
from bozzetto.targets.sentence import SentenceEncoder
from bozzetto.train.fields import DataSource

_CHUNK = 64
_SHOWN = 20  # class names in a message
Condition = tuple[Tensor, ...]


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


class Conditions(Protocol):
    """Of all pictures of a set."""

    def of(self, rows: Tensor, generator: torch.Generator) -> Condition:
        """Of the pictures int64 [B]; where a picture has several, one is drawn."""
        ...

    def none(self, condition: Condition) -> Condition:
        """What stands for no condition, as many rows as given."""
        ...


class Classes:
    """labels: int64 [N]; nobody: the unconditional label."""

    def __init__(self, labels: Tensor, nobody: int):
        self.labels, self.nobody = labels, nobody

    def of(self, rows: Tensor, generator: torch.Generator) -> Condition:
        return (self.labels[rows],)

    def none(self, condition: Condition) -> Condition:
        return (torch.full_like(condition[0], self.nobody),)


class Prompts:
    """features: float16 [N, K, T, C] and mask: bool [N, K, T] of K prompts per picture; nothing: [T, C], the features
    of no prompt (under the mask of the one that they stand for)."""

    def __init__(self, features: Tensor, mask: Tensor, nothing: Tensor):
        self.features, self.mask, self.nothing = features, mask, nothing

    def of(self, rows: Tensor, generator: torch.Generator) -> Condition:
        which = torch.randint(self.features.shape[1], rows.shape, generator=generator)
        return self.features[rows, which].float(), self.mask[rows, which]

    def none(self, condition: Condition) -> Condition:
        return self.nothing.expand_as(condition[0]), condition[1]


def together(one: Condition, other: Condition) -> Condition:
    """The rows of both."""
    return tuple(torch.cat(pair) for pair in zip(one, other, strict=True))


def dropped(condition: Condition, none: Condition, rows: Tensor) -> Condition:
    """The condition, or none at rows bool [B]."""
    pairs = zip(condition, none, strict=True)
    return tuple(torch.where(rows.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs)


def prompt_features(encoder: SentenceEncoder, source: DataSource, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Left-padded features float16 [N, K, T, C] and their mask bool [N, K, T] of every picture's prompts."""
    named = read_captions(source.path, source.split)
    parts = []
    for prompt in prompts:
        texts = [prompt.format(caption=caption, style=style) for caption, style in named]
        chunks = tqdm(range(0, len(texts), _CHUNK), desc=f"encoding {prompt!r}")
        found = [left_pad(*encoder(texts[i : i + _CHUNK])) for i in chunks]
        parts.append((torch.cat([f.half() for f, _ in found]), torch.cat([m for _, m in found])))
    features, masks = zip(*parts, strict=True)
    return torch.stack(features, 1), torch.stack(masks, 1)


def conditions_of(target: LlamaGen, source: DataSource, labels: Tensor, prompts: Sequence[str]) -> Conditions:
    """Of a trained target's pictures. prompts: what a text-conditional one calls them. Raises UsageError where it does
    not say so."""
    embedding = target.cls_embedding
    if not isinstance(embedding, CaptionEmbedding):
        return Classes(labels, target.config.classes)
    if not prompts:
        raise UsageError("this target does not say what it calls pictures (recipe.prompts of its config.json)")
    encoder = SentenceEncoder(target.config.condition_tokens)
    return Prompts(*prompt_features(encoder, source, prompts), embedding.uncond_embedding.detach())
