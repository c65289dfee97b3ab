"""Pipelines of models of other libraries, conditioned by prompts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from bozzetto.checkpoints.weights import name_of
from bozzetto.common.files import digest
from bozzetto.common.hub import model_name
from bozzetto.common.images import Origin
from bozzetto.drafters.base import DraftModel
from bozzetto.drafts import VECTORS
from bozzetto.errors import UsageError
from bozzetto.methods.resources import Resources
from bozzetto.methods.table import make_sampler
from bozzetto.pipeline.conditions import EXAMPLES, PromptBook
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.pipeline.pipelines import CodePipeline, FlowPipeline
from bozzetto.rules.pathwise import Pathwise
from bozzetto.rules.reflection import Coupled


class HostedResources(Resources):
    """Drafters and neighbours for a target of another library."""

    target: Any

    def __init__(self, target: PromptedCodes, codebook: Tensor):
        whole: Any = target
        super().__init__(whole, codebook, None)

    def _load_trained(self, name: str, folder: str) -> Any:
        if name != "eagle":
            raise UsageError(f"drafter {name!r} is not allowed here: it is for LlamaGen models (none, jacobi, eagle)")
        net = load_drafter(folder, EAGLE, self.target.config, "").to(self.target.device)
        return PromptedEagle(net, self.target)

    def smaller(self, folder: str) -> DraftModel:
        raise UsageError("drafter 'model' is not allowed here: it is for LlamaGen models (none, jacobi, eagle)")

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


class _Hosted(Pipeline):
    """What pipelines of models share that another library runs. source: the folder that the model was loaded from."""

    target: Any
    hosted: Hosted
    source: Path

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys([self.size, *self.hosted.sizes]))

    def in_size(self, size: tuple[int, int]) -> Pipeline:
        if size == self.size or self.hosted.sized is None:
            return super().in_size(size)
        return self._again(self.hosted.sized(size))

    def _again(self, hosted: Hosted) -> Pipeline:
        """A pipeline of the same kind for the same model in another size."""
        raise NotImplementedError

    def _fingerprint(self) -> str:
        own, besides = checkpoint_digest(self.source), self.hosted.besides
        return hashlib.sha256(f"{own} {digest(*besides)}".encode()).hexdigest()[:16] if besides else own

    def target_in(self, mode: str, deterministic: bool = False) -> Any:
        if mode != "off":
            raise UsageError(f"compile = {mode!r} is not allowed here: {self.name} is run by transformers (off)")
        return self.target


class HostedPipeline(_Hosted, CodePipeline):
    """A model of another library that draws codes."""

    def __init__(self, name: str, hosted: Hosted, dtype: str, source: Path):
        super().__init__(name, hosted.target, hosted.pictures, prompts_of(hosted), dtype)
        self.resources = HostedResources(hosted.target, hosted.pictures.codebook)
        self.source, self.hosted, self.own = source, hosted, hosted.own

    @property
    def undecoded(self) -> str:  # type: ignore[override]
        return self.hosted.pictures.missing

    @torch.no_grad()
    def decode_here(self, tokens: Tensor, origin: Origin | None = None) -> Image.Image:
        return self.hosted.pictures.picture(tokens.to(self.target.device), origin)

    def _again(self, hosted: Hosted) -> HostedPipeline:
        return HostedPipeline(self.name, hosted, self.dtype, self.source)

    def codes_drawn(self, count: int) -> int:
        return self.tokenizer.codes_drawn(count)  # type: ignore[attr-defined]


class HostedFlowPipeline(_Hosted, FlowPipeline):
    """A model of another library that draws continuous tokens (NextStep-1). sampler: as written ("": as published);
    vae: where its autoencoder was loaded from ("": beside the weights)."""

    def __init__(self, name: str, hosted: Hosted, dtype: str, source: Path, sampler: str = "", vae: str = ""):
        self._sampler, self._vae = sampler, vae
        made, target = make_sampler(sampler) if sampler else hosted.target.sampler, hosted.target
        target.sample_with(made)
        super().__init__(name, target, hosted.pictures, prompts_of(hosted), dtype, None, None)
        self.source, self.hosted, self.own = source, hosted, hosted.own
        if sampler:  # with steps of its own
            self.own = replace(self.own, steps=made.steps, source=f"{sampler}; {self.own.source}")
        if not self.target.schedule.moving:  # then drafts of whole tokens are hardly ever kept
            self.default_drafter = "none"
            self.default_rules = {"none": Coupled.name, "jacobi": Pathwise.name}
            self.default_methods = ("none", "none/coupled", "jacobi/pathwise:epsilon=0.1")

    def _again(self, hosted: Hosted) -> HostedFlowPipeline:
        return HostedFlowPipeline(self.name, hosted, self.dtype, self.source, self._sampler, self._vae)

    def _fingerprint(self) -> str:
        folder = autoencoder_folder(self.source, self._vae)
        parts = (super()._fingerprint(), checkpoint_digest(folder), self._sampler)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def load_prompted(model: str | Path, wanted: LoadSettings, folder: Path) -> Pipeline:
    """A checkpoint in the Hugging Face layout; folder: where its files are. Raises UsageError as
    `adapters.load.load_hosted` does, and for options that are not for it."""
    name, hosted = model_name(model), load_hosted(model, wanted, folder)
    dtype = name_of(hosted.target.dtype)
    if hosted.target.tokens == VECTORS:
        return HostedFlowPipeline(name, hosted, dtype, folder, wanted.sampler, wanted.vae)
    return HostedPipeline(name, hosted, dtype, folder)
