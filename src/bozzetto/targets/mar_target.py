"""MAR ready to decode: its backbone in a compute dtype, its autoregressive schedule, the laws of its head.

There is no cache: every pass runs the whole network again on what is known so far. What a pass does not need is left
out: the last block and what follows it see the wanted places only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.common.checks import Count, Steps
from bozzetto.drafts import VECTORS
from bozzetto.errors import require
from bozzetto.laws.schedules import DiffusionSchedule, diffusion_schedule
from bozzetto.runtime.dense import Dense
from bozzetto.runtime.masked import MaskedLayers
from bozzetto.runtime.native import need_kernels
from bozzetto.targets.annealed import annealed
from bozzetto.targets.heads import DiffusionLaw, PackedDenoiser
from bozzetto.targets.mar import MAR

_LN_EPS = 1e-6
_GUIDANCES = ("linear", "constant")


@dataclass(frozen=True)
class MARSampler:
    """steps: denoising steps of a token; passes: autoregressive steps of an image; guidance_schedule: `linear` grows
    with the share of known tokens, `constant` does not; noisiest: diffusion time at which denoising starts;
    last_steps: steps of the last token (0: as of all the others), see targets/annealed.py."""

    steps: Steps = 100
    passes: Steps = 256
    guidance_schedule: str = "linear"
    noisiest: Count = 999
    last_steps: Count = 0

    def __post_init__(self) -> None:
        require(self.passes >= 1, "passes", self.passes, "a whole number >= 1")
        known = self.guidance_schedule in _GUIDANCES
        require(known, "guidance_schedule", self.guidance_schedule, " or ".join(_GUIDANCES))
        diffusion_schedule(self.steps, self.noisiest)  # raises UsageError

    @property
    def schedule(self) -> DiffusionSchedule:
        return self.with_steps(self.steps)

    def with_steps(self, steps: int) -> DiffusionSchedule:
        return diffusion_schedule(steps, self.noisiest)


def check_passes(passes: int, length: int) -> None:
    """Raise UsageError for a number of passes that `length` tokens cannot be drawn in."""
    require(1 <= passes <= length, "passes", passes, f"a whole number from 1 to {length} (tokens)")


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [..., L, C] at int64 [..., W] -> [..., W, C]."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def _packed(block: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A pre-norm transformer block (`ViTBlock`) in the compute dtype: x [R, L, dim] -> the same, or, given places int64
    [R, W], only what is there, [R, W, dim]."""
    norm1, norm2 = (_norm(part, dtype) for part in (block.norm1, block.norm2))
    maps = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    qkv, proj, fc1, fc2 = (Dense.of(part, dtype) for part in maps)

    def call(x: Tensor, at: Tensor | None = None) -> Tensor:
        q, k, v = qkv(norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if at is not None:
            x, q = _gather(x, at), _gather(q, at[:, None].expand(-1, block.heads, -1))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + proj(mixed.transpose(1, 2).flatten(2))
        return x + fc2(F.gelu(fc1(norm2(x))))

    return call


def _norm(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A layer norm in the compute dtype."""
    weight, bias = (getattr(layer, name).detach().to(dtype) for name in ("weight", "bias"))
    return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, _LN_EPS)


class MARTarget:
    """A MAR network ready to decode in `dtype` with a sampler. length: N; token_dim: D; schedule: of the denoising.

    Raises UsageError if the sampler makes more passes than there are tokens.
    """

    tokens = VECTORS
    own = False  # whether the layers are run by our kernels
    whole: MaskedLayers | None = None  # the transformer as one call of them

    @torch.no_grad()
    def __init__(self, model: MAR, sampler: MARSampler, dtype: torch.dtype = torch.float32):
        c = self.config = model.config
        self.dtype, self.length, self.token_dim = dtype, c.length, c.token_dim
        self.device = model.mask_token.device
        self.classes = torch.cat([model.class_emb.weight, model.fake_latent]).to(dtype)  # the last: no class
        self.embedding, self.bridge = Dense.of(model.z_proj, dtype), Dense.of(model.decoder_embed, dtype)
        norms = (model.z_proj_ln, model.encoder_norm, model.decoder_norm)
        self.input_norm, self.encoder_norm, self.decoder_norm = (_norm(norm, dtype) for norm in norms)
        self.encoder = [_packed(block, dtype) for block in model.encoder_blocks]
        self.decoder = [_packed(block, dtype) for block in model.decoder_blocks]
        self.encoder_places = model.encoder_pos_embed_learned[0].to(dtype)  # [buffer + N, dim]
        self.decoder_places = model.decoder_pos_embed_learned[0].to(dtype)
        self.blank = (model.mask_token + model.decoder_pos_embed_learned).to(dtype)  # [1, buffer + N, dim]
        self.condition_places = model.diffusion_pos_embed_learned[0].to(dtype)  # [N, dim]
        self.buffer = torch.arange(c.buffer, device=self.device)
        self.head = PackedDenoiser(model.diffloss.net, sampler.schedule.time, dtype)
        self._sample_with(sampler)

    def with_sampler(self, sampler: MARSampler) -> MARTarget:
        """The same network sampled in another way; weights are shared. Raises UsageError as the class."""
        other = copy.copy(self)
        other.head = self.head.retimed(sampler.schedule.time)
        other._sample_with(sampler)
        return other

    def _sample_with(self, sampler: MARSampler) -> None:
        self.sampler, self.schedule = sampler, sampler.schedule
        self.counts(sampler.passes)
        self.stages = annealed(self.head, sampler, 1.0, self.length)

    def owned(self, model: MAR) -> MARTarget:
        """The same with the layers of `model`, what it was made from, run by our kernels; on a GPU its head compiled by
        torch. Raises UsageError where there are no kernels for it."""
        other = copy.copy(self)
        if self.device.type != "cpu":
            other.head = copy.copy(self.head)
            other.head.narrow = other.head.few = torch.compile(self.head.narrow, dynamic=True)
            other._sample_with(self.sampler)
            return other
        need_kernels(self.dtype, self.device)
        other.own = True
        if self.dtype == torch.float32 or self.config.dim % 2 == 0:  # our rows are whole words
            other.whole, other.encoder, other.decoder = MaskedLayers(model, self.dtype), [], []
        other.head = PackedDenoiser(model.diffloss.net, self.schedule.time, self.dtype, own=True)
        other._sample_with(self.sampler)
        return other

    def counts(self, passes: int) -> list[int]:
        """Tokens that each autoregressive step predicts (the published cosine schedule), `passes` numbers >= 1.

        Raises UsageError for passes out of range.
        """
        masked = [self.length, *self._masked(passes)[:-1], 0]
        return [before - after for before, after in pairwise(masked)]

    def guidances(self, guidance: float, passes: int) -> list[float]:
        """Guidance scale of each autoregressive step."""
        masked, n = self._masked(passes), self.length
        if self.sampler.guidance_schedule == "constant":
            return [guidance] * passes
        return [1 + (guidance - 1) * (n - left) / n for left in masked]

    def _masked(self, passes: int) -> list[int]:
        """Tokens that each step leaves masked; the schedule says 1 for the last step too, which predicts all."""
        check_passes(passes, self.length)
        masked = [self.length]
        for step in range(1, passes + 1):
            kept = math.floor(self.length * math.cos(math.pi / 2 * step / passes))
            masked.append(max(1, min(masked[-1] - 1, kept)))
        return masked[1:]

    @torch.no_grad()
    def features(self, labels: Tensor, tokens: Tensor, known: Tensor, places: Tensor, guided: bool) -> Tensor:
        """ONE backbone pass: conditions of the head at places. labels int64 [B] (config.classes: unconditional); tokens
        float32 [B, N, D], read where known; known int64 [B, K], places int64 [B, W], in any order; guided: also
        unconditional rows, after the others -> [copies B W, dim]."""
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.config.classes)])
        if self.whole is not None:
            return self.whole(labels, tokens, known, places)
        seen = self.embedding(_gather(tokens, known).to(self.dtype))
        if guided:
            seen, known, places = seen.repeat(2, 1, 1), known.repeat(2, 1), places.repeat(2, 1)
        first = len(self.buffer)
        slots = torch.cat([self.buffer.expand(len(labels), -1), known + first], 1)
        x = torch.cat([self.classes[labels][:, None].expand(-1, first, -1), seen], 1)
        x = self.input_norm(x + self.encoder_places[slots])
        for block in self.encoder:
            x = block(x)
        x = self.bridge(self.encoder_norm(x)) + self.decoder_places[slots]
        x = self.blank.repeat(len(x), 1, 1).scatter_(1, slots[..., None].expand_as(x), x)
        for block in self.decoder[:-1]:
            x = block(x)
        x = self.decoder[-1](x, places + first)
        return (self.decoder_norm(x) + self.condition_places[places]).flatten(0, 1)

    def law(
        self, features: Tensor, shape: tuple[int, int], guidance: float | Tensor, temperature: float, done: int = 0
    ) -> DiffusionLaw:
        """Laws of the tokens at places. features [copies B W, dim]; shape: (B, W); guidance: one scale, or float32
        [B W]; done: tokens that are known."""
        schedule, head = self.stages[min(done, len(self.stages) - 1)]
        return DiffusionLaw(schedule, head, features, shape, guidance, temperature)
