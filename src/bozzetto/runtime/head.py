"""Small networks by our kernels: denoising heads (head.h), one call of the narrow layers or all steps of many tokens; a
glance (glance.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bozzetto.laws.chain import Trajectory
from bozzetto.runtime.engine import LinearMap, MapStruct
from bozzetto.runtime.native import ADDRESS, FLOAT, NUMBER, address_of, call, structure

# `HeadBlock`, `Denoiser` and `Chain` of head.h.
_Block = structure((MapStruct, "up down"), (ADDRESS, "gain bias"))
_Denoiser = structure(
    (NUMBER, "half width depth token_dim out_dim"),
    (MapStruct, "input output"),
    (ctypes.POINTER(_Block), "blocks"),
    (MapStruct, "condition change"),
)
_Chain = structure(
    (NUMBER, "threads places copies steps learned"),
    (ADDRESS, "conditions times coefficients guidance"),
    (FLOAT, "temperature"),
    (ADDRESS, "noise"),
    (NUMBER, "width"),
    (ADDRESS, "drafted draft_mean keys states mean std"),
)


class Coupled(NamedTuple):
    """Draft chains that chains are coupled with by reflection: states [B, M, T + 1, D], mean [B, M, T, D]; keys: int64
    [B, M + 1], of the coins and of the last place, which has no draft."""

    states: Tensor
    mean: Tensor
    keys: Tensor


class NarrowLayers:
    """The layers of a head that see the noisy token. blocks: (norm, first map, second map); into, out: in float32;
    condition, change: maps of conditions, and of these with embedded times to modulations."""

    @torch.no_grad()
    def __init__(
        self,
        into: nn.Linear,
        out: nn.Linear,
        blocks: Sequence[tuple[nn.LayerNorm, nn.Linear, nn.Linear]],
        condition: LinearMap,
        change: LinearMap,
    ):
        self.dtype, self.condition = change.dtype, condition
        self.out_dim, self.token_dim = out.out_features, into.in_features
        maps = [LinearMap.of(layer, torch.float32) for layer in (into, out)]
        self.kept: list[Any] = [*maps, change]  # what the addresses below are of
        made = []
        for norm, *layers in blocks:
            both = [LinearMap.of(layer, self.dtype) for layer in layers]
            gains = [part.detach().float().contiguous() for part in (norm.weight, norm.bias)]
            made.append(_Block(*(m.struct for m in both), *map(address_of, gains)))
            self.kept += [*both, *gains]
        self.blocks = (_Block * len(made))(*made)
        sizes = (int(self.dtype == torch.bfloat16), into.out_features, len(made), self.token_dim, self.out_dim)
        self.struct = _Denoiser(*sizes, *(m.struct for m in maps), self.blocks, condition.struct, change.struct)

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x float32 [R, D] under modulations [..., R, C] in the head's type -> float32 [..., R, out_dim]."""
        x, modulation = x.float().contiguous(), modulation.contiguous()
        rows = modulation.shape[:-1].numel()
        out = torch.empty(*modulation.shape[:-1], self.out_dim)
        call("bozzetto_narrow", torch.get_num_threads(), self.struct, x, len(x), modulation, rows, out)
        return out

    def chains(
        self,
        conditions: Tensor,
        times: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        temperature: float,
        noise: Tensor | None,
        draft: Coupled | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All steps of P tokens: conditions [copies P, C], embedded times [T, width] in the head's type; coefficients
        float32 [T, 3], or [T, 5] with learned variances; guidance float32 [P]; noise float32 [P, T + 1, D], of state 0
        and each step, or `draft` -> states [P, T + 1, D], means [P, T, D], deviations [P, T, D] (of coefficients where
        they are fixed: [P, T, 1])."""
        steps, rows = len(times), len(conditions)
        places, learned = len(guidance), coefficients.shape[1] == 5
        states, mean = torch.empty(places, steps + 1, self.token_dim), torch.empty(places, steps, self.token_dim)
        std = torch.empty_like(mean) if learned else coefficients[:, 2:3].expand(places, -1, -1)
        given = [self.condition.given(conditions), times.contiguous(), coefficients.contiguous(), guidance.contiguous()]
        noise = noise if noise is None else noise[:, : steps + 1]  # it may be that of more steps
        parts = [noise, None, None, None] if draft is None else [None, *draft]
        held = [part if part is None else part.contiguous() for part in parts]
        sizes = (torch.get_num_threads(), places, rows // max(1, places), steps, int(learned))
        chain = _Chain(*sizes, *map(address_of, given))
        chain.temperature, chain.width = temperature, 0 if draft is None else draft.keys.shape[1]
        names = ("noise", "drafted", "draft_mean", "keys", "states", "mean", "std")
        for name, part in zip(names, (*held, states, mean, std if learned else None), strict=True):
            setattr(chain, name, address_of(part))
        if places:
            call("bozzetto_chain", self.struct, chain)
        return states, mean, std


# `Cspd` of cspd.h.
_Cspd = structure(
    (NUMBER, "batch length steps dim width released tries"),
    (FLOAT, "heat last"),
    (ADDRESS, "states mean std drafted draft_mean draft_std keys tokens accepted"),
)


def own_cspd(
    target: Trajectory, draft: Trajectory, keys: Tensor, released: bool, heat: float, tries: int, last: float
) -> tuple[Tensor, Tensor]:
    """What rules/cspd.py decides: target [B, M + 1, ...], draft [B, M, ...], keys int64 [B, M + 1] -> tokens float32
    [B, M + 1, D], accepted int64 [B]. heat: inner temperature; last: deviation of a last step without noise."""
    batch, length, steps, dim = draft.mean.shape
    width = max(target.std.shape[-1], draft.std.shape[-1])
    paths = [part for path in (target, draft) for part in (*path[:2], path.std.expand(*path.std.shape[:-1], width))]
    held = [part.contiguous() for part in (*paths, keys)]
    tokens, accepted = torch.empty(batch, length + 1, dim), torch.empty(batch, dtype=torch.int64)
    sizes = (batch, length, steps, dim, width, int(released), tries, heat, last)
    call("bozzetto_cspd", _Cspd(*sizes, *map(address_of, (*held, tokens, accepted))))
    return tokens, accepted


# `Glance` and `Look` of glance.h.
_Glance = structure(
    (NUMBER, "half dim narrow grid tokens_around features_around"),
    (ADDRESS, "around"),
    (MapStruct, "of_feature last around_map gate_up down"),
    (ADDRESS, "of_token gain shift column norm"),
)
_Look = structure(
    (NUMBER, "threads batch copies width places room token_room"), (ADDRESS, "hidden kept tokens count committed out")
)


class GlanceLayers:
    """A glance's layers (drafters/glance.py). around: distances of tokens and of features that a place looks at; maps:
    of features, of the last one, of what is around, gated, down; tables: [K, d] gain and shift, [grid, d], [d]."""

    @torch.no_grad()
    def __init__(
        self,
        grid: int,
        around: tuple[tuple[int, ...], tuple[int, ...]],
        maps: Sequence[LinearMap],
        of_token: Tensor,
        tables: Sequence[Tensor],
    ):
        self.dtype, self.dim = of_token.dtype, tables[-1].numel()
        held = [torch.tensor([*around[0], *around[1]]), of_token.contiguous()]
        held += [part.detach().float().contiguous() for part in tables]
        self.kept = [*maps, *held]  # what the addresses below are of
        sizes = (int(self.dtype == torch.bfloat16), self.dim, of_token.shape[1], grid, *map(len, around))
        structs, (distances, *rest) = [m.struct for m in maps], map(address_of, held)
        self.struct = _Glance(*sizes, distances, *structs, *rest)

    def __call__(
        self, hidden: Tensor, kept: Tensor, tokens: Tensor, count: Tensor, committed: Tensor, places: int
    ) -> Tensor:
        """As `GlanceFill.forward`, to features [R, places, d]; `kept` is changed in place."""
        (batch, copies, room, _), width = kept.shape, hidden.shape[1]
        given = [part.contiguous() for part in (hidden, kept, tokens, count, committed)]
        out = torch.empty(len(hidden), places, self.dim, dtype=self.dtype)
        sizes = (torch.get_num_threads(), batch, copies, width, places, room, tokens.shape[1])
        call("bozzetto_glance", self.struct, _Look(*sizes, *map(address_of, (*given, out))))
        return out
