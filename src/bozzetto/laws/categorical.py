"""The law of the next discrete token: guidance, temperature, top-k, top-p, in that order, for target and draft alike.

A law is a tensor of log-probabilities [..., V], float32; tokens outside the support have -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bozzetto.errors import UsageError


@dataclass(frozen=True)
class LawSettings:
    """guidance: scale s >= 1 (1: off); temperature >= 0 (0: greedy); top_k >= 0 (0: all); 0 < top_p <= 1 (1: all)."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        checks = [
            ("guidance", self.guidance, self.guidance >= 1, "a number >= 1 (1 turns guidance off)"),
            ("temperature", self.temperature, self.temperature >= 0, "a number >= 0 (0 is greedy)"),
            (
                "top_k",
                self.top_k,
                self.top_k >= 0 and self.top_k % 1 == 0,
                "a whole number >= 0 (0 keeps all)",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]"),
        ]
        for name, value, fine, allowed in checks:
            if not (fine and math.isfinite(value)):
                raise UsageError(f"{name} = {value} is not allowed: {allowed}")

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of logits: uncond + (cond - uncond) * scale."""
    return uncond + (cond - uncond) * scale


def law_of(logits: Tensor, settings: LawSettings) -> Tensor:
    """Log-probabilities [B, W, V] of raw logits [B, W, V], or of [2B, W, V] = [cond; uncond] rows when guided.

    Ties at the top-k threshold are all kept; top-p keeps the smallest set of largest probabilities that reaches p.
    """
    logits = logits.float()
    if settings.guided:
        cond, uncond = logits.chunk(2)
        logits = guide(cond, uncond, settings.guidance)
    if settings.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter_(-1, best, 0.0)
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        threshold = logits.topk(settings.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    log_p = logits.log_softmax(-1)
    if settings.top_p < 1:
        ranked, order = log_p.sort(dim=-1, descending=True, stable=True)
        before = ranked.exp().cumsum(-1) - ranked.exp()
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= settings.top_p)
        log_p = log_p.masked_fill(dropped, -math.inf).log_softmax(-1)
    return log_p


def gumbel_argmax(log_p: Tensor, noise: Tensor) -> Tensor:
    """A sample of each law by the Gumbel-max trick: [..., V] x 2 -> int64 [...]."""
    return (log_p + noise).argmax(-1)


def gumbel_margin(log_p: Tensor, noise: Tensor) -> Tensor:
    """Gap between the best and the second best perturbed log-probability (inf when only one token is possible)."""
    best, second = (log_p + noise).topk(2, dim=-1).values.unbind(-1)
    return best - second


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Draw from unnormalised weights [..., V] >= 0 with float64 uniforms u [...]; never a zero-weight token."""
    total = weights.double().cumsum(-1)
    return (
        torch.searchsorted(total, (u * total[..., -1])[..., None], right=True)
        .squeeze(-1)
        .clamp_max(weights.shape[-1] - 1)
    )
