"""Counter-based noise: every number is a pure function of (seed, stream, image index, position, ...).

The generator is splitmix64 (Steele, Lea, Flood 2014) used as a hash: each counter is folded in by one finaliser round.
All arithmetic is wrapping int64 and float64, so batch slot, batch size, process count and device do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

STREAM_TOKEN = 0  # Gumbel noise that decides the token at a position
STREAM_VERIFY = 1  # uniforms of accept/reject tests and residual draws
STREAM_DRAFT = 2  # a drafter's own draws, fresh in every pass
STREAM_ORDER = 3  # the order in which a masked model draws the places
STREAM_PICTURE = 4  # where a decoder by diffusion starts


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 counters."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


_FEW = 1 << 14  # keys, up to which torch's calls take longer than the arithmetic


def _mixed(x: np.ndarray) -> np.ndarray:
    """`_mix` of uint64."""
    x = (x ^ (x >> 30)) * np.uint64(_MIX_1 % 2**64)
    x = (x ^ (x >> 27)) * np.uint64(_MIX_2 % 2**64)
    return x ^ (x >> 31)


@lru_cache(maxsize=64)
def _mixed_number(counter: int) -> np.ndarray:
    return _mixed(np.array([counter % 2**64], dtype=np.uint64))


def fold(key: Tensor, counter: Tensor | int) -> Tensor:
    """Derive a key from a key and a counter (both int64, broadcast)."""
    counters = counter.numel() if isinstance(counter, Tensor) and counter.ndim else 1
    if key.device.type == "cpu" and key.ndim and key.numel() * counters <= _FEW:
        if isinstance(counter, Tensor):
            other = _mixed(np.atleast_1d(counter.numpy()).view(np.uint64))
        else:
            other = _mixed_number(counter)
        found = _mixed((key.numpy().view(np.uint64) ^ other) + np.uint64(_GOLDEN % 2**64))
        return torch.from_numpy(found.view(np.int64))
    return _mix((key ^ _mix(torch.as_tensor(counter, dtype=torch.int64, device=key.device))) + _GOLDEN)


def image_keys(seed: int | Tensor, stream: int, index: Tensor) -> Tensor:
    """One key per image. seed: of all, or int64 [B]; index int64 [B] -> int64 [B]."""
    root = torch.as_tensor(seed, dtype=torch.int64, device=index.device)
    return fold(fold(_mix(root + _GOLDEN), stream), index)


def uniform(key: Tensor) -> Tensor:
    """float64 uniforms in the open interval (0, 1), one per key."""
    # The largest key would round up to 1.
    if key.device.type == "cpu" and key.ndim and key.numel() <= _FEW:
        bits = key.numpy().view(np.uint64) >> 11
        return torch.from_numpy(np.minimum((bits.astype(np.float64) + 0.5) * 2.0**-53, 1 - 2.0**-53))
    return ((_shift(key, 11).double() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-53)


def gumbel(key: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, one per key; computed in float64 so that the rounding is the same everywhere."""
    return -(-uniform(key).log()).log().float()


def gumbel_rows(keys: Tensor, numbers: Tensor) -> Tensor:
    """Gumbel noise of whole vocabularies: keys int64 [n] of positions, numbers int64 [V] -> float32 [n, V]."""
    return gumbel(fold(keys[:, None], numbers))


def normal(key: Tensor) -> Tensor:
    """Standard normal noise, float32, one per key; the inverse distribution function in float64."""
    return torch.special.ndtri(uniform(key)).float()


Whole = Callable[[Tensor, int], Tensor]


class NoiseField:
    """The fixed noise [B, position, number] of a batch of images, filled in blocks as each image advances.

    seed, index: see `image_keys`; size: numbers per position; draw: what makes noise of keys (`gumbel`, `normal`);
    whole: what makes whole positions, of keys int64 [n] and a size [n, size], in its place.
    Memory is B * length * size * 4 bytes, most of it untouched until needed.
    """

    _BLOCK = 16
    whole: Whole | None = None

    def __init__(self, seed: int | Tensor, index: Tensor, length: int, size: int, draw: Callable[[Tensor], Tensor]):
        self.keys = image_keys(seed, STREAM_TOKEN, index)
        self.length, self.filled, self.draw = length, [0] * len(index), draw
        self.table = torch.empty(len(index), length, size, device=index.device)
        self.numbers = torch.arange(size, device=index.device)

    def fill(self, upto: int | Sequence[int]) -> None:
        """Make positions < upto available, of all images or of each."""
        image: list[int] = []
        position: list[int] = []
        for i, wanted in enumerate([upto] * len(self.filled) if isinstance(upto, int) else upto):
            begin, end = self.filled[i], min(-(-wanted // self._BLOCK) * self._BLOCK, self.length)
            if begin < end:
                image += [i] * (end - begin)
                position += range(begin, end)
                self.filled[i] = end
        if not image:
            return
        row, place = torch.tensor([image, position], device=self.keys.device)
        keys = fold(self.keys[row], place)
        whole = self.whole or (lambda keys, size: self.draw(fold(keys[:, None], self.numbers)))
        self.table[row, place] = whole(keys, len(self.numbers))

    def rows(self, positions: Tensor) -> Tensor:
        """Noise at positions int64 [B, W] -> [B, W, size]; positions past the end repeat the last row."""
        positions = positions.clamp_max(self.length - 1)
        return self.table[torch.arange(len(positions), device=positions.device)[:, None], positions]

    def keep(self, rows: Tensor) -> None:
        """Drop images: keep the given batch rows int64 [B']."""
        self.keys, self.table = self.keys[rows], self.table[rows]
        self.filled = [self.filled[i] for i in rows.tolist()]

    def join(self, other: NoiseField) -> None:
        """Have other images behind these."""
        self.keys, self.table = torch.cat([self.keys, other.keys]), torch.cat([self.table, other.table])
        self.filled = self.filled + other.filled


class GumbelField(NoiseField):
    """The Gumbel noise G[b, position, v] of a batch of images."""

    def __init__(self, seed: int | Tensor, index: Tensor, length: int, vocab: int, whole: Whole | None = None):
        super().__init__(seed, index, length, vocab, gumbel)
        self.whole = whole


class NormalField(NoiseField):
    """The normal noise of a batch of images by position, state and dimension: T + 1 states of D numbers each."""

    def __init__(self, seed: int | Tensor, index: Tensor, length: int, steps: int, dim: int):
        super().__init__(seed, index, length, (steps + 1) * dim, normal)
        self.shape = (steps + 1, dim)

    def rows(self, positions: Tensor) -> Tensor:
        """Noise at positions int64 [B, W] -> [B, W, T + 1, D]; positions past the end repeat the last row."""
        return super().rows(positions).unflatten(-1, self.shape)


def normal_rows(keys: Tensor, positions: Tensor, steps: int, dim: int) -> Tensor:
    """What `NormalField.rows` gives, without its table: keys int64 [B] of the images (STREAM_TOKEN); positions int64
    [B, W] inside the image -> float32 [B, W, T + 1, D]."""
    numbers = torch.arange((steps + 1) * dim, device=keys.device)
    rows = fold(keys[:, None], positions)
    return normal(fold(rows[..., None], numbers)).unflatten(-1, (steps + 1, dim))


def fresh_noise(keys: Tensor, steps: int, dim: int) -> Tensor:
    """Normal noise of whole chains, one per key: int64 [R] -> float32 [R, T + 1, D]."""
    numbers = torch.arange((steps + 1) * dim, device=keys.device)
    return normal(fold(keys[:, None], numbers)).unflatten(1, (steps + 1, dim))
