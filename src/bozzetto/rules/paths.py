"""What a verification rule for continuous tokens is, and what it may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bozzetto.drafts.path import PathDraft, PathVerdict
from bozzetto.laws.chain import ChainLaw


@dataclass
class PathNoise:
    """All the randomness of a verification.

    fixed: float32 [B, M + 1, T + 1, D], normal noise of (seed, image, position, denoising step), the same in every
    pass: that of the sequential sampler (nothing in it for rules that do not use it); keys: int64 [B, M + 1], fresh in
    every pass and at every place, from which a rule derives whatever else it needs (laws/noise.py: fold, uniform,
    normal).
    """

    fixed: Tensor
    keys: Tensor


class PathRule:
    """A verification rule for denoising chains. Parameters are fields of a frozen dataclass, traits class variables.

    exact: the output has exactly the law of the target's chain; seed_exact: it equals sequential sampling with the same
    noise up to float rounding; needs_path: drafts carry their paths and laws; fixed_noise: drafts should be drawn with
    the noise of the sequential sampler; uses_fixed: the rule itself asks for that noise; window: every place gets a
    path of the target's law given its context, so that a window can be carried on; widest: places per pass that pay
    for one image on a two-core CPU (docs/log.md has the measurements); isotropic: only for laws with equal fixed
    deviations; bias: for rules that are not exact, what is known of the bias, in words.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    seed_exact: ClassVar[bool] = False
    needs_path: ClassVar[bool] = True
    fixed_noise: ClassVar[bool] = False
    uses_fixed: ClassVar[bool] = True
    window: ClassVar[bool] = False
    widest: ClassVar[int] = 16
    isotropic: ClassVar[bool] = False
    bias: ClassVar[str] = ""

    def verify(self, draft: PathDraft, law: ChainLaw, noise: PathNoise) -> PathVerdict:
        """law: the target's, at B (M + 1) places: those of the drafts and the one after them, each under the drafts
        before it."""
        raise NotImplementedError
