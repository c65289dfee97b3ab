"""What a verification rule is, and what it may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bozzetto.drafts import Draft, Verdict


@dataclass
class RuleNoise:
    """All that a verification may use besides draft and law.

    gumbel: float32 [B, M + 1, V], the fixed noise of each scored place (same in every pass), for rules that ask for it;
    uniforms: float64 [B, M + 1, U] in (0, 1), fresh in every pass: one for the test, one for the redraw, and with
    second guesses two for each of their tokens;
    slack: float32 [B], what is left of each image's budget of bias (None: no limit);
    greedy: decoding is greedy and the laws given are the plain ones, from which a relaxed rule makes its choice.
    """

    gumbel: Tensor | None = None
    uniforms: Tensor | None = None
    slack: Tensor | None = None
    greedy: bool = False


class Rule:
    """A verification rule. Parameters are fields of a frozen dataclass, traits are class variables.

    exact: the output has exactly the target's law; seed_exact: it equals sequential decoding of the same seed;
    needs_law: drafts must carry their laws (or be certain); needs_gumbel, needs_uniforms: noise that is wanted;
    needs_hidden: drafts must carry the drafter's hidden states; window: every place of a chain gets a token of the
    target's law given its context, so that a window can be carried on; beside: windows may have second guesses;
    trees: trees are welcome, not just chains;
    bias: for rules that are not exact, what bounds the bias, in words.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    seed_exact: ClassVar[bool] = False
    needs_law: ClassVar[bool] = True
    needs_gumbel: ClassVar[bool] = False
    needs_uniforms: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False
    window: ClassVar[bool] = False
    beside: ClassVar[bool] = False
    trees: ClassVar[bool] = True
    bias: ClassVar[str] = ""

    def verify(self, draft: Draft, log_p: Tensor, noise: RuleNoise) -> Verdict:
        """log_p: target log-laws float32 [B, M + 1, V] at the root and at every drafted node."""
        raise NotImplementedError


def leading(agree: Tensor) -> Tensor:
    """Length of the run of True from the left. bool [B, L] -> int64 [B]."""
    return agree.long().cumprod(-1).sum(-1)
