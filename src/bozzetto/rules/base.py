"""What a verification rule is, and what it may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bozzetto.drafts import Draft, Verdict


@dataclass
class RuleNoise:
    """All randomness of one verification, as arguments.

    gumbel: float32 [B, L + 1, V], the fixed noise of each scored position (same in every pass);
    uniforms: float64 [B, L + 1, 2] in (0, 1), fresh in every pass: one for the test, one for the redraw.
    """

    gumbel: Tensor
    uniforms: Tensor | None = None


class Rule(Protocol):
    """exact: the output has exactly the target's law. needs_law: drafts must carry log_q.
    needs_uniforms: fresh uniforms are wanted. seed_exact: output equals sequential decoding of the same seed."""

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def seed_exact(self) -> bool: ...
    @property
    def needs_law(self) -> bool: ...
    @property
    def needs_uniforms(self) -> bool: ...

    def verify(self, draft: Draft, log_p: Tensor, noise: RuleNoise) -> Verdict:
        """log_p: target log-laws float32 [B, L + 1, V] at the drafted positions and the one after."""
        ...


def leading(agree: Tensor) -> Tensor:
    """Length of the run of True from the left. bool [B, L] -> int64 [B]."""
    return agree.long().cumprod(-1).sum(-1)
