"""Models that another library runs, conditioned by prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from bozzetto.adapters.eagle import PromptedEagle
from bozzetto.adapters.load import checkpoint_digest, load_hosted
from bozzetto.adapters.nextstep import autoencoder_folder
from bozzetto.adapters.prompted import PromptedCodes
from bozzetto.adapters.source import Hosted
from bozzetto.checkpoints.folders import EAGLE, load_drafter
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.common.files import digest
from bozzetto.common.hub import model_name
from bozzetto.common.images import Origin
from bozzetto.drafters.base import DraftModel
from bozzetto.drafts import VECTORS
from bozzetto.errors import UsageError
from bozzetto.methods.resources import Resources, VectorResources
from bozzetto.methods.table import make_sampler
from bozzetto.pipeline.conditions import EXAMPLES, PromptBook
from bozzetto.pipeline.kinds import CausalVectors, Codes, TokenKind
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.pipeline.runner import Runner

# Trained drafters whose draft model can be told prompts.
PROMPTED: Mapping[str, Any] = MappingProxyType({EAGLE: PromptedEagle})


class HostedResources(Resources):
    """Drafters and neighbours for a target of another library."""

    target: Any

    def __init__(self, target: PromptedCodes, codebook: Tensor, folder: None = None):
        whole: Any = target
        super().__init__(whole, codebook, folder)

    def _load_trained(self, name: str, folder: str) -> Any:
        if name not in PROMPTED:
            self._refuse(name)
        net = load_drafter(folder, name, self.target.config, "").to(self.target.device)
        return PROMPTED[name](net, self.target)

    def smaller(self, folder: str) -> DraftModel:
        self._refuse("model")

    def _refuse(self, name: str) -> NoReturn:
        fit = ", ".join(("none", "jacobi", *PROMPTED))
        raise UsageError(f"drafter {name!r} is not allowed here: it is for LlamaGen models ({fit})")

    def neighbours(self, columns: int) -> Tensor:
        if not len(self.codebook):
            raise UsageError("this rule is not allowed here: it reads the codes' vectors, which come with a decoder")
        return super().neighbours(columns)

    def _all_neighbours(self, most: int) -> Tensor:
        """A token that is no code (an end of line) has no neighbour but itself, and is nobody's."""
        near = super()._all_neighbours(most)
        others = torch.arange(len(near), self.target.vocab, device=near.device, dtype=near.dtype)
        return torch.cat([near, others[:, None].expand(-1, most)])


def prompts_of(hosted: Hosted) -> PromptBook:
    """Prompts of a model, as its processor reads them."""
    target: Any = hosted.target

    def add(text: str, negative: str, label: int | None) -> int:
        # Texts that are the same tokens (of words that the model does not know) are called what they are.
        return target.add(hosted.ask(text, negative), len(target.prompts) if label is None else label)

    book = PromptBook([], add)
    for text in EXAMPLES:
        book.label(text, "")
    return book


class HostedRunner(Runner):
    """A network that another library runs. source: the folder that it was loaded from; wanted: how."""

    def __init__(self, name: str, hosted: Hosted, source: Path, wanted: LoadSettings):
        own = None if hosted.target.why_not() else lambda: hosted.target.body
        super().__init__(name, hosted.target, hosted.pictures, network=own)
        self.hosted, self.source, self.wanted, self.undecoded = hosted, source, wanted, hosted.pictures.missing

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys([*super().sizes, *self.hosted.sizes]))

    def in_size(self, size: tuple[int, int]) -> Pipeline | None:
        sized = self.hosted.sized
        return None if sized is None else _pipeline(HostedRunner(self.name, sized(size), self.source, self.wanted))

    def target_in(self, mode: str) -> Any:
        if self.mode(mode) == "off":
            return self.target
        if self.network is None:
            why = f"{self.name} is run by transformers (off): {self.target.why_not()}"
            raise UsageError(f"compile = {mode!r} is not allowed here: {why}")
        return super().target_in(mode)

    def fingerprint(self) -> str:
        own, besides = checkpoint_digest(self.source), self.hosted.besides
        own = _short(own, digest(*besides)) if besides else own
        if self.target.tokens != VECTORS:
            return own
        return _short(own, checkpoint_digest(autoencoder_folder(self.source, self.wanted.vae)), self.wanted.sampler)

    def picture(self, tokens: Tensor, origin: Origin | None) -> Image.Image:
        return self.pictures.picture(tokens, origin)

    def codes_drawn(self, count: int) -> int:
        return self.pictures.codes_drawn(count)


def _short(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def load_prompted(model: str | Path, wanted: LoadSettings, folder: Path) -> Pipeline:
    """A checkpoint in the Hugging Face layout; folder: where its files are. Raises UsageError as
    `adapters.load.load_hosted` does, and for options that are not for it."""
    return _pipeline(HostedRunner(model_name(model), load_hosted(model, wanted, folder), folder, wanted))


def _pipeline(runner: HostedRunner) -> Pipeline:
    hosted, sampler = runner.hosted, runner.wanted.sampler
    own, target = hosted.own, hosted.target
    kind: TokenKind
    if target.tokens == VECTORS:
        made = make_sampler(sampler) if sampler else target.sampler  # "": as published
        target.sample_with(made)
        if sampler:  # with steps of its own
            own = replace(own, steps=made.steps, source=f"{sampler}; {own.source}")
        kind = CausalVectors(runner, VectorResources(target, runner.name, None))
    else:
        kind = Codes(runner, HostedResources(target, hosted.pictures.codebook))
    return Pipeline(kind, prompts_of(hosted), runner, own)
