"""Views of stored pictures: random ones for training, the whole one for evaluation.

Crops are random squares between `crop` and the stored size, resized to `crop`, so that both native-resolution crops and
the whole square (what evaluation uses) are seen. Augmentation draws from an explicit torch.Generator.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255.0


def augment(
    images: np.ndarray, crop: int, generator: torch.Generator, jitter: float = 0.0, flips: bool = True
) -> Tensor:
    """One random crop size per call, an offset and flip per image. uint8 [B, S, S, 3] -> float32 [B, 3, crop, crop].

    jitter: largest relative change of brightness and of contrast, drawn per image; flips: mirror every other image.
    """
    batch, size = images.shape[:2]
    side = int(torch.randint(min(crop, size), size + 1, (), generator=generator))
    offsets = torch.randint(0, size - side + 1, (batch, 2), generator=generator).tolist()
    mirrored = (torch.rand(batch, generator=generator) < (0.5 if flips else 0.0)).tolist()
    parts = []
    for image, (top, left), flip in zip(images, offsets, mirrored, strict=True):
        part = image[top : top + side, left : left + side]
        parts.append(part[:, ::-1] if flip else part)
    x = to_float(np.stack(parts))
    if side != crop:
        x = F.interpolate(x, size=(crop, crop), mode="bilinear", antialias=True, align_corners=False)
    if jitter:
        gain, lift = (1 + jitter * (2 * torch.rand(2, batch, 1, 1, 1, generator=generator) - 1)).unbind(0)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = ((x - mean) * gain + mean * lift).clamp(0, 1)
    return x


def evaluation_view(images: np.ndarray, crop: int) -> Tensor:
    """The whole square resized to `crop`. uint8 [B, S, S, 3] -> float32 [B, 3, crop, crop]."""
    x = to_float(images)
    if x.shape[-1] == crop:
        return x
    return F.interpolate(x, size=(crop, crop), mode="bilinear", antialias=True, align_corners=False)
