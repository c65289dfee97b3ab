"""Gaussian laws of the next token by our kernels (gauss.h): their chains, and drafts token after token as one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bozzetto.laws.chain import Trajectory
from bozzetto.runtime.engine import MapStruct
from bozzetto.runtime.native import ADDRESS, FLOAT, NUMBER, address_of, call, structure

# `Axes` and `Drafts` of gauss.h.
_Axes = structure((NUMBER, "steps dim other"), (FLOAT, "guidance"), (ADDRESS, "ancestry std basis"))
_Drafts = structure(
    (ADDRESS, "axes network layers"),
    (MapStruct, "embed fc hidden readout"),
    (NUMBER, "threads batch copies places"),
    (FLOAT, "bound"),
    (ADDRESS, "last start noise gain offset states mean"),
)
# Sampler and axes: ancestry (four float32 [T]), std float32 [T], basis [D, D] or None, guidance or None.
Sampler = tuple[Sequence[Tensor], Tensor, Tensor | None, float | None]


def _axes(sampler: Sampler, dim: int) -> tuple[Any, Any]:
    """The structure, and what has to be kept for it."""
    ancestry, std, basis, guidance = sampler
    held = torch.stack(tuple(ancestry)), std.contiguous(), None if basis is None else basis.contiguous()
    return _Axes(len(std), dim, int(guidance is not None), guidance or 1.0, *map(address_of, held)), held


def _results(std: Tensor, *shape: int) -> tuple[Tensor, Tensor, Trajectory]:
    """Room for gains and offsets [T, R, D] and trajectories of tokens of a shape [..., D]."""
    *lead, dim = shape
    steps, rows = len(std), torch.Size(lead).numel()
    states, mean = torch.empty(*lead, steps + 1, dim), torch.empty(*lead, steps, dim)
    gain, offset = torch.empty(2, steps, rows, dim).unbind(0)
    return gain, offset, Trajectory(states, mean, std[:, None].expand(*lead, -1, 1))


def own_gaussian(centre: Tensor, variance: Tensor, sampler: Sampler, noise: Tensor) -> Trajectory:
    """Trajectories of N(centre, variance), float32 [R, D] each, with noise float32 [R, T + 1, D]."""
    axes, _held = _axes(sampler, centre.shape[1])
    *tables, found = _results(sampler[1], *centre.shape)
    given = (centre.contiguous(), variance.contiguous(), noise.contiguous(), *tables, *found[:2])
    call("bozzetto_gaussian", axes, len(centre), *given)
    return found


def own_drafts(
    parts: tuple[Any, ...], last: Tensor, start: Tensor, noise: Tensor, sampler: Sampler
) -> tuple[Tensor, Tensor, Trajectory]:
    """Drafts of a cached Gaussian drafter. parts: what `CachedGaussian.whole` says; last: its prediction [R, 1, d];
    start: int64 [B], slot of the first drafted pair; noise float32 [B, L, T + 1, D] -> gains and offsets of their laws,
    [T, B L, D], and trajectories [B, L, ...]."""
    (network, layers, *maps), (batch, places, _, dim) = parts[:-1], noise.shape
    axes, _held = _axes(sampler, dim)
    gain, offset, found = _results(sampler[1], batch, places, dim)
    given = last.contiguous(), start.contiguous(), noise.contiguous()
    sizes = torch.get_num_threads(), batch, len(last) // batch, places
    drafts = _Drafts(*map(ctypes.addressof, (axes, network, layers)), *maps, *sizes, parts[-1])
    names = ["last", "start", "noise", "gain", "offset", "states", "mean"]
    for name, part in zip(names, (*given, gain, offset, *found[:2]), strict=True):
        setattr(drafts, name, address_of(part))
    call("bozzetto_draft", drafts)
    return gain, offset, found
