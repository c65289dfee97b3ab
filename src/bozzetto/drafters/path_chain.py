"""A trained drafter of continuous tokens: one Gaussian after another (drafters/path_sketch.py)."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.outlook import Outlook
from bozzetto.drafts import Layout, PathDraft
from bozzetto.laws.chain import Ancestry, Path
from bozzetto.laws.gaussian import AffineChain, gaussian_tables
from bozzetto.laws.noise import fold, fresh_noise

_NARROW, _WIDE = -2.0, 1.0  # log deviations of a token between which the law's width is told apart
_NOBODYS = 1e3  # a number that is no token's: tokens have a deviation of 1


class PathSketcher(Protocol):
    """A cheap causal model of vectors with its own cache. basis: float32 [D, D], orthogonal, the axes of its laws."""

    basis: Tensor

    def begin(self, labels: Tensor, guided: bool, max_nodes: int) -> None: ...

    def take_in(self, seen: Observation) -> Tensor:
        """What a pass committed -> the prediction for the next token, hidden states [R, 1, d]."""
        ...

    def put_out(self, tokens: Tensor, parent: Tensor, layout: Layout) -> Tensor:
        """A level of drafts, tokens float32 [B, n, D], as in `drafters.grow.Sketcher.grow` -> hidden states [R, n, d]
        that predict their children."""
        ...

    def gaussian(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [..., d] -> centre and variance of the token along the axes, float32 [..., D]."""
        ...

    def keep(self, rows: Tensor) -> None: ...


class SketchChain:
    """Drafts `length` tokens per pass. ancestry, std [T]: the target's sampler; stop: an image's draft ends where its
    next token is reached with less than this chance (drafters/outlook.py; 0: nowhere), for rules that compare tokens
    with the target's own: what is left of the draft are numbers that no target draws."""

    name = "sketch"
    wants_features = True

    def __init__(
        self, sketcher: PathSketcher, length: int, ancestry: Ancestry, std: Tensor, dim: int, stop: float = 0.0
    ):
        self.sketcher, self.length, self.dim = copy.copy(sketcher), length, dim
        self.ancestry, self.std, self.stop = ancestry, std, stop

    @property
    def max_nodes(self) -> int:
        return self.length

    @property
    def max_depth(self) -> int:
        return self.length

    def begin(self, start: Start) -> None:
        self.start, self.keys, self.passes = start, start.keys, 0
        self.seen: Observation | None = None
        self.outlook = Outlook(len(start.keys), self.stop, start.keys.device) if self.stop else None
        self.sketcher.begin(start.labels, start.settings.guided, self.length)

    def observe(self, seen: Observation) -> None:
        if self.outlook is not None:
            self.outlook.observe(seen)
        self.seen = seen

    def keep(self, rows: Tensor) -> None:
        self.sketcher.keep(rows)
        if self.outlook is not None:
            self.outlook.keep(rows)
        self.keys = self.keys[rows]
        if self.seen is not None:
            self.seen = self.seen.keep(rows)

    def propose(self, batch: int, limit: int) -> PathDraft:
        self.passes += 1
        length = min(limit, self.length)
        if self.outlook is not None:
            self.outlook.begin(0 if self.seen is None else length)
        if self.seen is None or length < 1:  # nothing is known before the first pass
            return PathDraft(torch.zeros(batch, 0, self.dim, device=self.keys.device))
        hidden = self.sketcher.take_in(self.seen)
        noise = self._noise(self.seen.start + self.seen.committed, length)
        laws: list[Any] = []
        paths: list[Path] = []
        for place in range(length):
            laws.append(self._law(hidden, (batch, 1)))
            paths.append(self._draw(laws[-1], noise[:, place]))
            if not self._goes_on(place, hidden):
                break
            if place + 1 < length:
                at = torch.full((1, 1), place, device=self.keys.device)
                sees = torch.ones(1, 1, place + 1, dtype=torch.bool, device=self.keys.device)
                hidden = self.sketcher.put_out(paths[-1].token[:, None], at, Layout(at, at, sees))
        path = Path(*(torch.stack(parts, 1) for parts in zip(*paths, strict=True)))
        if self.start.with_laws:
            return PathDraft(path.token, path, self._together(laws, batch))
        if self.outlook is None:
            return PathDraft(path.token)
        present = self.outlook.present[:, 1 : len(paths) + 1, None]
        return PathDraft(path.token.masked_fill(~present, _NOBODYS))

    def _goes_on(self, place: int, hidden: Tensor) -> bool:
        """Whether any image drafts on after a place, whose law hidden [R, 1, d] gave."""
        if self.outlook is None:
            return True
        at = torch.tensor([place], device=hidden.device)
        return self.outlook.go_on(at, at[None] + 1, self._flatness(hidden))

    def _flatness(self, hidden: Tensor) -> Tensor:
        """How wide the drafter's law is: [R, 1, d] -> [B, 1] in [0, 1]."""
        _, variance = self.sketcher.gaussian(hidden[: len(self.keys)])
        return (0.5 * variance.log().mean(-1) - _NARROW) / (_WIDE - _NARROW)

    def _noise(self, position: Tensor, length: int) -> Tensor:
        """float32 [B, length, T + 1, D] for positions from int64 [B] on: the sequential sampler's where the rule wants
        that, else fresh."""
        offset = torch.arange(length, device=position.device)
        if self.start.fixed_noise:
            return self.start.noise.rows(position[:, None] + offset)
        keys = fold(fold(self.keys, self.passes)[:, None], offset)
        return fresh_noise(keys.flatten(), len(self.std), self.dim).unflatten(0, keys.shape)

    def _law(self, hidden: Tensor, shape: tuple[int, int]) -> AffineChain:
        """Of the next token of each image, guided: hidden [R, 1, d]."""
        settings = self.start.settings
        gain, offset = gaussian_tables(*self.sketcher.gaussian(hidden[:, 0]), self.ancestry)
        if settings.guided:  # means are linear in the prediction: so are gains and offsets
            (gain, other), (offset, without) = gain.chunk(2, 1), offset.chunk(2, 1)
            gain = torch.lerp(other, gain, settings.guidance)
            offset = torch.lerp(without, offset, settings.guidance)
        std = self.std * settings.temperature
        return AffineChain(gain, offset, self.ancestry, std, shape, self.sketcher.basis)

    def _draw(self, law: Any, noise: Tensor) -> Path:
        """One path per image: noise float32 [B, T + 1, D]."""
        return law.sample(noise)

    def _together(self, laws: list[AffineChain], batch: int) -> AffineChain:
        """One law of all drafted places, numbered image by image."""
        gain, offset = (torch.stack([getattr(law, n) for law in laws], 2).flatten(1, 2) for n in ("gain", "offset"))
        return AffineChain(gain, offset, self.ancestry, laws[0].std, (batch, len(laws)), self.sketcher.basis)
