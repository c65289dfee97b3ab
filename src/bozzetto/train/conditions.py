"""What pictures are drawn from in training: classes or prompts, and what stands for neither.

A condition is a tuple of tensors with one row per picture: the arguments of `LlamaGen.features` beside the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.data import read_captions
from bozzetto.models.llamagen import CaptionEmbedding, LlamaGen, left_pad
from bozzetto.models.sentence import SentenceEncoder
from bozzetto.train.recipes import DataSource

_CHUNK = 64
Condition = tuple[Tensor, ...]


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
    """Of a trained target's pictures. prompts: what a text-conditional one calls them."""
    embedding = target.cls_embedding
    if not isinstance(embedding, CaptionEmbedding):
        return Classes(labels, target.config.classes)
    encoder = SentenceEncoder(target.config.condition_tokens)
    return Prompts(*prompt_features(encoder, source, prompts), embedding.uncond_embedding.detach())
