"""Prompts as conditions: any text may be asked for, and becomes a label when it first is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ
from bozzetto.autoencoders.vq import VQTokenizer
from bozzetto.errors import UsageError
from bozzetto.models.llamagen import LlamaGen, left_pad
from bozzetto.models.llamagen_cache import LlamaGenTarget
from bozzetto.models.sentence import SentenceEncoder
from bozzetto.pipelines import CodePipeline
from bozzetto.settings import GenerateSettings

ENCODER = "all-MiniLM-L6-v2"  # as models name it that take prompts through models/sentence.py


class PromptBook:
    """Prompts and their labels. names: what is listed as classes, grown here; add: makes a label for a new prompt,
    which has to be the next number or that of an equal one."""

    def __init__(self, names: list[str], add: Callable[[str, str], int]):
        self.names, self.add = names, add
        self.known: dict[tuple[str, str], int] = {}

    def label(self, text: str, negative: str) -> int:
        """Raises UsageError for an empty prompt, or one that does not fit."""
        text, negative = " ".join(text.split()), " ".join(negative.split())
        if not text:
            raise UsageError("prompt '' is not allowed: say what to draw")
        if (text, negative) not in self.known:
            label = self.add(text, negative)
            if label == len(self.names):
                self.names.append(text)
            self.known[text, negative] = label
        return self.known[text, negative]

    def labels(self, asked: Sequence[str | int], negative: str) -> list[int]:
        """Labels of prompts, or of numbers of known ones; none given: all known ones in turn."""
        found = []
        for item in asked:
            if isinstance(item, int):
                if not 0 <= item < len(self.names):
                    raise UsageError(f"prompt {item} is not allowed: a text, or a number up to {len(self.names) - 1}")
                item = self.names[item]
            found.append(self.label(item, negative))
        return found or [self.label(name, negative) for name in list(self.names)]


class CaptionPipeline(CodePipeline):
    """A text-conditional model whose text encoder is at hand, so that any prompt can be asked for. prompts: those that
    stand for the classes where none is asked for."""

    def __init__(
        self,
        name: str,
        target: LlamaGenTarget,
        tokenizer: VQTokenizer | LlamaGenVQ,
        prompts: Sequence[str],
        dtype: str,
        folder: Path,
        network: LlamaGen,
    ):
        super().__init__(name, target, tokenizer, [], dtype, folder, network)
        self.encoder = SentenceEncoder(network.config.condition_tokens)
        self.book = PromptBook(self.classes, self._add)
        self.book.labels(prompts, "")

    def labels(self, asked: Sequence[str | int], settings: GenerateSettings | None = None) -> list[int]:
        return self.book.labels(asked, "")

    def _add(self, text: str, negative: str) -> int:
        """Features of one more caption, in the target and in its compiled twins."""
        new = left_pad(*self.encoder([text]))
        had = self.target.captions
        parts = new if had is None else tuple(torch.cat([a, b.to(a)]) for a, b in zip(had, new, strict=True))
        grown = self.target.with_captions(*parts).captions
        for target in (self.target, *self.compiled.values()):
            target.captions = grown
        return len(parts[0]) - 1
