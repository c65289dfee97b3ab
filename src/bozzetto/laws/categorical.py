"""The law of the next discrete token: guidance, temperature, top-k, top-p, in that order, for target and draft alike.

A law is a tensor of log-probabilities [..., V], float32; tokens outside the support have -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.errors import check_number
from bozzetto.laws.noise import fold, gumbel


@dataclass(frozen=True)
class LawSettings:
    """guidance: scale s >= 1 (1: off); temperature >= 0 (0: greedy); top_k >= 0 (0: all); 0 < top_p <= 1 (1: all).

    Scales and temperatures beyond what anybody uses are refused: logits would overflow float32."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("guidance", self.guidance, 1, 1000, "a number >= 1 (1 turns guidance off), at most 1000")
        if self.temperature != 0:
            allowed = "a number >= 0 (0 is greedy), from 0.0001 to 10000"
            check_number("temperature", self.temperature, 1e-4, 1e4, allowed)
        check_number("top_k", self.top_k, 0, 2**31 - 1, "a whole number >= 0 (0 keeps all)", whole=True)
        check_number("top_p", self.top_p, 0, 1, "a number in (0, 1]", above=True)

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0

    @property
    def filtered(self) -> bool:
        """Whether tokens are left out: by a top-k, a top-p, or all but the likeliest."""
        return bool(self.top_k) or self.top_p != 1 or not self.temperature


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of logits: uncond + (cond - uncond) * scale."""
    return uncond + (cond - uncond) * scale


def _guided(logits: Tensor, settings: LawSettings) -> Tensor:
    logits = logits.float()
    if not settings.guided:
        return logits
    cond, uncond = logits.chunk(2)
    return guide(cond, uncond, settings.guidance)


def law_of(logits: Tensor, settings: LawSettings) -> Tensor:
    """Log-probabilities [B, W, V] of raw logits [B, W, V], or of [2B, W, V] = [cond; uncond] rows when guided.

    Ties at the top-k threshold are all kept; top-p keeps the smallest set of largest probabilities that reaches p.
    """
    logits = _guided(logits, settings)
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


def greedy_margin(logits: Tensor, settings: LawSettings) -> Tensor:
    """What greedy decoding chooses by: best guided logit less the second best, [B, W]; logits as in `law_of`."""
    return _lead(_guided(logits, settings))


def row_laws(
    logits: Tensor, guidance: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """`law_of` with settings of its own for every image, without sorts. logits [B, W, V], or [2B, W, V] under guidance.

    guidance, temperature > 0, top_p: float32 [B]; top_k: int64 [B] (0: all, -1: greedy). Without top_k and top_p
    nothing is cut off. Ties at the threshold are all kept, for top-p too.
    """
    rows = (-1, 1, 1)
    if len(logits) > len(guidance):
        cond, uncond = logits.chunk(2)
        scale = guidance.view(rows)
        # A scale of 1 gives the very logits that a pass without guidance gives.
        logits = torch.where(scale == 1, cond, guide(cond, uncond, scale))
    logits = logits / temperature.view(rows)
    if top_k is None or top_p is None:
        return logits.log_softmax(-1)
    ranks, vocab = _ranks(logits), logits.shape[-1]
    counts = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).view(rows)
    least = _threshold(ranks, lambda kept: kept.sum(-1, keepdim=True) >= counts)
    log_p = logits.masked_fill(ranks < least, -math.inf).log_softmax(-1)
    p, share = log_p.exp(), top_p.view(rows)
    least = _threshold(ranks, lambda kept: (p * kept).sum(-1, keepdim=True) >= share)
    cut = log_p.masked_fill(ranks < least, -math.inf).log_softmax(-1)
    chosen = torch.where(_numbers(logits) == _best(logits)[0], 0.0, -math.inf)
    return torch.where(top_k.view(rows) < 0, chosen, torch.where(share < 1, cut, log_p))


def _ranks(x: Tensor) -> Tensor:
    """int64 of the same order as float32 values, 0 to 2^32 - 1."""
    bits = (x + 0.0).view(torch.int32).long()  # -0.0 is 0.0
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits + (1 << 31))


def _threshold(ranks: Tensor, enough: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest rank [..., 1] such that what is at or above it is enough, bit by bit from the highest."""
    found = torch.zeros_like(ranks[..., :1])
    for bit in range(31, -1, -1):
        higher = found | (1 << bit)
        found = torch.where(enough(ranks >= higher), higher, found)
    return found


def gumbel_argmax(log_p: Tensor, noise: Tensor) -> Tensor:
    """A sample of each law by the Gumbel-max trick: [..., V] x 2 -> int64 [...]."""
    return (log_p + noise).argmax(-1)


def gumbel_margin(log_p: Tensor, noise: Tensor) -> Tensor:
    """Gap between the best and the second best perturbed log-probability (inf when only one token is possible)."""
    return _lead(log_p + noise)


def _lead(perturbed: Tensor) -> Tensor:
    """The best of [..., V] less the second best; inf where there is none."""
    if perturbed.shape[-1] == 1:
        return torch.full_like(perturbed[..., 0], math.inf)
    best, second = perturbed.topk(2, dim=-1).values.unbind(-1)
    return best - second


def coin_margin(u: Tensor, log_chance: Tensor) -> Tensor:
    """How far the test u < chance is from going the other way, in log-probability: float32 [...]. u: in (0, 1);
    log_chance: may be above 0, or infinite: no rounding moves that."""
    gap = (u.double().log() - log_chance.double()).abs()
    return gap.nan_to_num(nan=math.inf, posinf=math.inf).float()


def _best(x: Tensor) -> tuple[Tensor, Tensor]:
    """Number (as float32) and value of the largest, [..., 1] each, by reductions, which are vector code."""
    best = x.amax(-1, keepdim=True)
    return torch.where(x == best, _numbers(x), math.inf).amin(-1, keepdim=True), best


def _numbers(x: Tensor) -> Tensor:
    """0, 1, ... along the last dimension; float32 counts to 2^24."""
    return torch.arange(x.shape[-1], dtype=torch.float32, device=x.device)


def weighted_draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from unnormalised weights [..., V] >= 0; never a token of zero weight. u: float64 [...], uniforms in (0, 1)
    that nothing else depends on -> (tokens int64 [...], margin float32 [...]: how far the races were from other ends,
    in log-weight).

    Two exponential races, one of about sqrt(V) groups and one within the group that won, whose noise is hashed from u.
    Rounding changes the token only where two entrants all but tie. An inverse distribution function has V boundaries,
    all of which move with the rounding of the weights: with 2,048 tokens it changed some images with the batch size.
    """
    vocab = weights.shape[-1]
    size = math.isqrt(vocab - 1) + 1  # tokens of a group
    groups = -(-vocab // size)
    parts = F.pad(weights, (0, groups * size - vocab)).unflatten(-1, (groups, size))
    keys = (u * 2.0**53).long()[..., None]
    noise = gumbel(fold(keys, torch.arange(groups + size, device=u.device)))
    races = parts.sum(-1).log(), noise[..., :groups]
    group = gumbel_argmax(*races)
    inside = parts.gather(-2, group[..., None, None].expand(*group.shape, 1, size)).squeeze(-2)
    last = inside.log(), noise[..., groups:]
    return group * size + gumbel_argmax(*last), torch.minimum(gumbel_margin(*races), gumbel_margin(*last))
