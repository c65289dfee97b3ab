"""What a verification rule is, and what it may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from bozzetto.common.written import Written
from bozzetto.drafts import CODES, Draft, Verdict

T = TypeVar("T")


@dataclass
class Noise:
    """All that a verification may use besides draft and law.

    fixed: noise of each scored place that is the same in every pass, for rules that ask for it: Gumbel noise float32
    [B, M + 1, V] of codes, normal noise float32 [B, M + 1, T + 1, D] of vectors, that of the sequential sampler;
    uniforms: float64 [B, M + 1, U] in (0, 1), fresh in every pass, of codes: one for the test, one for the redraw, and
    with second guesses two for each of their tokens;
    slack: float32 [B], what is left of each image's budget of bias (None: no limit);
    greedy: decoding is greedy and the laws given are the plain ones, from which a relaxed rule makes its choice;
    keys: int64 [B, M + 1], of vectors, fresh in every pass and at every place, from which a rule derives whatever else
    it needs (laws/noise.py: fold, uniform, normal);
    neighbours: int [V, columns], of codes: the nearest other ones of each, for rules that read them;
    own: whether our kernels may decide.
    """

    fixed: Tensor | None = None
    uniforms: Tensor | None = None
    slack: Tensor | None = None
    greedy: bool = False
    keys: Tensor | None = None
    neighbours: Tensor | None = None
    own: bool = False


@dataclass(frozen=True)
class Rule(Written):
    """A verification rule. Parameters are fields of a frozen dataclass, traits are class variables.

    tokens: what it verifies, `codes` or `vectors` (denoising chains); exact: the output has exactly the target's law;
    seed_exact: it equals sequential decoding of the same seed (vectors: up to float rounding); alone: it drafts inside
    the head and needs no drafter;
    needs_law: drafts must carry their laws (or be certain), of vectors their trajectories; needs_hidden: the drafter's
    hidden states; fixed_noise: drafts should be drawn with the noise of the sequential sampler; needs_fixed,
    needs_uniforms: noise that the rule itself asks for;
    window: every place of a chain gets a token of the target's law given its context, so that a window can be carried
    on; widest: places per pass that pay for one image on a two-core CPU (docs/log.md has the measurements); beside:
    windows may have second guesses; trees: trees are welcome, not just chains; ragged: chains may be of different
    lengths; isotropic: only for laws with equal fixed deviations;
    sequential: without drafts it is the sequential sampler by name; fused: images may come and go; couples: each place
    is coupled with its draft as `exact.couple` does; masked: masked models may use it; blind: drafts are verified
    without seeing each other; columns: of the table of nearest codes, that it reads (0: none);
    bias: for rules that are not exact, what bounds the bias, in words; about: what it does, in a sentence.
    """

    name: ClassVar[str]
    tokens: ClassVar[str] = CODES
    exact: ClassVar[bool] = False
    seed_exact: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    needs_law: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False
    fixed_noise: ClassVar[bool] = False
    needs_fixed: ClassVar[bool] = False
    needs_uniforms: ClassVar[bool] = True
    window: ClassVar[bool] = False
    widest: ClassVar[int] = 16
    beside: ClassVar[bool] = False
    trees: ClassVar[bool] = True
    ragged: ClassVar[bool] = False
    isotropic: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    couples: ClassVar[bool] = False
    masked: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    columns: ClassVar[int] = 0
    bias: ClassVar[str] = ""
    about: ClassVar[str] = ""

    def verify(self, draft: Draft, law: Any, noise: Noise) -> Verdict:
        """law: the target's at the root and at every drafted node: log-laws float32 [B, M + 1, V] of codes; of vectors
        a ChainLaw of B (M + 1) places, each under the drafts before it."""
        raise NotImplementedError


def given(part: T | None, rule: Rule, what: str) -> T:
    """A part of the noise or of the draft that a rule cannot do without."""
    if part is None:
        raise ValueError(f"rule {rule.name!r} needs {what}")
    return part


def leading(agree: Tensor) -> Tensor:
    """Length of the run of True from the left. bool [B, L] -> int64 [B]."""
    return agree.long().cumprod(-1).sum(-1)
