"""Pipelines of models of other libraries, conditioned by prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.adapters.load import checkpoint_digest, load_hosted
from bozzetto.adapters.prompted import PromptedCodes
from bozzetto.adapters.sketch import PromptedEagle
from bozzetto.adapters.source import Hosted
from bozzetto.drafters.grow import Sketcher
from bozzetto.errors import UsageError
from bozzetto.hub import model_name
from bozzetto.load_settings import LoadSettings
from bozzetto.models.eagle_store import load_eagle
from bozzetto.models.store import name_of
from bozzetto.pipelines import CodePipeline
from bozzetto.prompts import PromptBook
from bozzetto.settings import GenerateSettings
from bozzetto.workshop import TargetWorkshop

EXAMPLES = ("a red tulip in a white vase", "a small house by a lake", "a portrait of an old sailor")


class HostedWorkshop(TargetWorkshop):
    """Drafters and neighbours for a target of another library."""

    target: Any

    def __init__(self, target: PromptedCodes, codebook: Tensor):
        whole: Any = target
        super().__init__(whole, codebook, None)

    def _load_trained(self, name: str, folder: str) -> Any:
        if name != "eagle":
            raise UsageError(f"drafter {name!r} is not allowed here: it is for LlamaGen models (none, jacobi, eagle)")
        net = load_eagle(folder, self.target.config, "").to(self.target.device)
        return PromptedEagle(net, self.target)

    def smaller(self, folder: str) -> Sketcher:
        raise UsageError("drafter 'model' is not allowed here: it is for LlamaGen models (none, jacobi, eagle)")

    def _all_neighbours(self, most: int) -> Tensor:
        """A token that is no code (an end of line) has no neighbour but itself, and is nobody's."""
        near = super()._all_neighbours(most)
        others = torch.arange(len(near), self.target.vocab, device=near.device, dtype=near.dtype)
        return torch.cat([near, others[:, None].expand(-1, most)])


class HostedPipeline(CodePipeline):
    """A model of another library, drawing what prompts say. source: where it was loaded from."""

    takes_prompts = True

    target: PromptedCodes

    def __init__(self, name: str, hosted: Hosted, dtype: str, source: str | Path):
        target, self.source, self.hosted = hosted.target, source, hosted
        super().__init__(name, target, hosted.pictures, [], dtype)  # type: ignore[arg-type]
        self.workshop = HostedWorkshop(target, hosted.pictures.codebook)
        self.own = hosted.own

        def add(text: str, negative: str, label: int | None) -> int:
            # Texts that are the same tokens (of words that the model does not know) are called what they are.
            return target.add(hosted.ask(text, negative), len(target.prompts) if label is None else label)

        self.book = PromptBook(self.classes, add)
        for text in EXAMPLES:
            self.book.label(text, "")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys([self.size, *self.hosted.sizes]))

    def in_size(self, size: tuple[int, int]) -> HostedPipeline:
        """The same model, with the same weights, for pictures of another size (width, height). Raises UsageError for
        one that it does not draw."""
        if size == self.size:
            return self
        if self.hosted.sized is None:
            only = f"{self.size[0]}x{self.size[1]}"
            raise UsageError(f"image_size = {size[0]}x{size[1]} is not allowed: {self.name} draws {only} pixels")
        return HostedPipeline(self.name, self.hosted.sized(size), self.dtype, self.source)

    def _fingerprint(self) -> str:
        return checkpoint_digest(self.source)

    def labels(self, asked: str | int | Sequence[str | int], settings: GenerateSettings | None = None) -> list[int]:
        words = (settings or GenerateSettings()).with_own(self.own)
        suffix = self.own.suffix if words.quality_words else ""
        return self.book.labels(asked, words.negative_prompt or "", suffix)

    def prompt_of(self, label: int) -> str:
        return self.book.asked[label]

    def remember(self, prompts: int, busy: Callable[[], set[int]] = set) -> None:
        self.book.remember(prompts, busy)

    def refuse_negative(self, settings: GenerateSettings) -> None:
        """It is not refused."""

    def codes_drawn(self, count: int) -> int:
        return self.tokenizer.codes_drawn(count)  # type: ignore[attr-defined]

    def target_in(self, mode: str, deterministic: bool = False) -> Any:
        if mode != "off":
            raise UsageError(f"compile = {mode!r} is not allowed here: {self.name} is run by transformers (off)")
        return self.target


def load_prompted(model: str | Path, wanted: LoadSettings) -> HostedPipeline:
    """A checkpoint in the Hugging Face layout. Raises UsageError as `adapters.load.load_hosted` does."""
    hosted = load_hosted(model, wanted)
    return HostedPipeline(model_name(model), hosted, name_of(hosted.target.dtype), model)
