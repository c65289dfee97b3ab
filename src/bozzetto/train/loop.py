"""What every training verb shares: its arithmetic, a schedule, a weight average."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bozzetto.autoencoders.vq import VQTokenizer
from bozzetto.runtime.native import products_prefer_bfloat16
from bozzetto.targets.llamagen import LlamaGen

M = TypeVar("M", bound=nn.Module)


def compute_dtype() -> torch.dtype:
    """What training computes in: the faster of bfloat16 and float32 on this processor."""
    return torch.bfloat16 if products_prefer_bfloat16() else torch.float32


def autocast() -> torch.autocast:
    """Matrix products in `compute_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() == torch.bfloat16)


def pass_over(*modules: nn.Module) -> None:
    """Draw what new modules of these kinds begin from, and drop it: recipes were made when reading a model did so, and
    what they train begins from the numbers after that."""
    for module in modules:
        kind: Any = type(module)
        if kind in (VQTokenizer, LlamaGen):
            kind(module.config)


class WeightAverage:
    """Exponential moving average of parameters, with the usual warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.live = list(parameters)
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights (call twice to restore)."""
        for p, s in zip(self.live, self.shadow, strict=True):
            kept = p.detach().clone()
            p.copy_(s)
            s.copy_(kept)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for s, saved in zip(self.shadow, state["shadow"], strict=True):
            s.copy_(saved)


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95); gains and biases do not decay."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.05) -> float:
    """Linear warm-up to `peak`, then a half cosine down to `floor * peak` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def channels_last(module: M) -> M:
    """Lay out convolution weights for the fast CPU kernels."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1], one per image: [B, C, H, W] x 2 -> [B]."""
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10))
