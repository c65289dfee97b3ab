"""What images are drawn of: classes, or prompts, any text, which becomes a label when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bozzetto.common.classes import labels_of
from bozzetto.errors import UsageError
from bozzetto.pipeline.results import listed
from bozzetto.targets.llamagen import left_pad

if TYPE_CHECKING:
    from bozzetto.adapters.t5 import T5Encoder
    from bozzetto.targets.sentence import SentenceEncoder

ENCODER = "all-MiniLM-L6-v2"  # as models name it that take prompts through targets/sentence.py
EXAMPLES = ("a red tulip in a white vase", "a small house by a lake", "a portrait of an old sailor")


class Classes:
    """Classes by name. Labels are their numbers. takes_prompts: any text may be asked for; takes_negative: and what
    guidance leads away from."""

    takes_prompts = takes_negative = False

    def __init__(self, names: list[str]):
        self.names = names

    def labels(self, asked: str | int | Sequence[str | int], negative: str = "", suffix: str = "") -> list[int]:
        """See Pipeline.labels. negative, suffix: words around prompts."""
        return labels_of(self.names, listed(asked))

    def prompt_of(self, label: int) -> str:
        """What the model is asked for a label."""
        return self.names[label]

    def remember(self, most: int, busy: Callable[[], set[int]]) -> None:
        """See Pipeline.remember."""

    def fingerprint(self) -> str:
        """A digest of what makes conditions of words, besides the model's own files."""
        return ""


class PromptBook(Classes):
    """Prompts and their labels. names: what is listed as classes, grown here; add(text, negative, None): makes a label
    for a new prompt, which has to be the next number or that of an equal one; add(text, negative, label): puts it in
    the place of an old one. asked: what was added for each label, which ends in the suffix that it was given. most:
    prompts that are remembered (None: all); beyond, the one that was asked for longest ago gives way, unless `busy`
    says that it is still drawn."""

    takes_prompts = takes_negative = True

    def __init__(self, names: list[str], add: Callable[[str, str, int | None], int]):
        super().__init__(names)
        self.add = add
        self.most: int | None = None
        self.busy: Callable[[], set[int]] = set
        self.asked: list[str] = []
        self.known: dict[tuple[str, str], int] = {}
        self.used: dict[int, None] = {}  # labels, the one used last at the end

    def label(self, text: str, negative: str, suffix: str = "") -> int:
        """Raises UsageError for an empty prompt, or one that does not fit."""
        text, negative = " ".join(text.split()), " ".join(negative.split())
        if not text:
            raise UsageError("prompt '' is not allowed: say what to draw")
        whole = text + suffix
        if (whole, negative) not in self.known:
            old = self._oldest()
            label = self.add(whole, negative, old)
            if label == len(self.names):
                self.names.append(text)
                self.asked.append(whole)
            elif old is not None:
                self.known = {key: other for key, other in self.known.items() if other != label}
                self.names[label], self.asked[label] = text, whole
            self.known[whole, negative] = label
        label = self.known[whole, negative]
        self.used.pop(label, None)
        self.used[label] = None
        return label

    def _oldest(self) -> int | None:
        """The label that gives way, if one has to."""
        if self.most is None or len(self.names) < self.most:
            return None
        busy = self.busy()
        return next((label for label in self.used if label not in busy), None)

    def remember(self, most: int, busy: Callable[[], set[int]]) -> None:
        self.most, self.busy = most, busy

    def labels(self, asked: str | int | Sequence[str | int], negative: str = "", suffix: str = "") -> list[int]:
        """Labels of prompts, or of numbers of known ones; none given: all known ones in turn."""
        found = []
        for item in listed(asked):
            if isinstance(item, int):
                if not 0 <= item < len(self.names):
                    raise UsageError(f"prompt {item} is not allowed: a text, or a number up to {len(self.names) - 1}")
                item = self.names[item]
            found.append(self.label(item, negative, suffix))
        return found or [self.label(name, negative, suffix) for name in list(self.names)]

    def prompt_of(self, label: int) -> str:
        return self.asked[label]


class Captions(PromptBook):
    """Prompts of a text-conditional model whose text encoder is at hand (texts -> features float32 [K, T, C], padded
    on the right, and their mask [K, T]). prompts: those that stand for classes where none is asked; targets: the
    model's target and its twins. The encoder is let go of when prompts have become labels, unless a server
    will be asked for more (`remember`)."""

    takes_negative = False

    def __init__(self, encoder: SentenceEncoder | T5Encoder, prompts: Sequence[str], targets: Callable[[], Any]):
        super().__init__([], self._add)
        self.encoder, self.targets, self.serving = encoder, targets, False
        for text in prompts:
            self.label(text, "")

    def labels(self, asked: str | int | Sequence[str | int], negative: str = "", suffix: str = "") -> list[int]:
        try:
            return super().labels(asked)
        finally:
            if not self.serving:
                self.encoder.release()

    def remember(self, most: int, busy: Callable[[], set[int]]) -> None:
        self.serving, self.encoder.keeps = True, False  # words of other people
        super().remember(most, busy)

    def fingerprint(self) -> str:
        return self.encoder.fingerprint()

    def _add(self, text: str, negative: str, label: int | None) -> int:
        """Features of one more caption, or of another one for a label, in the target and in its twins."""
        new, had = left_pad(*self.encoder([text])), self.targets()[0].captions
        parts: tuple[Tensor, ...] = new
        if had is not None and label is None:
            parts = tuple(torch.cat([a, b.to(a)]) for a, b in zip(had, new, strict=True))
        elif had is not None:
            row = torch.tensor([label], device=had[0].device)
            parts = tuple(a.index_copy(0, row, b.to(a)) for a, b in zip(had, new, strict=True))
        grown = self.targets()[0].with_captions(*parts).captions
        for target in self.targets():
            target.captions = grown
        return len(parts[0]) - 1 if label is None else label
