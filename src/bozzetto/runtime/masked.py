"""A masked transformer by our kernels (masked.h): a whole pass as one call."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from bozzetto.runtime.engine import LinearMap, MapStruct
from bozzetto.runtime.native import ADDRESS, NUMBER, address_of, call, structure

# `Block`, `Masked` and `Given` of masked.h; a norm is the addresses of its gain and bias.
_Block = structure((MapStruct, "qkv proj fc1 fc2"), (ADDRESS, "gain_1 bias_1 gain_2 bias_2"))
_Masked = structure(
    (NUMBER, "half dim heads depth buffer length token_dim"),
    (MapStruct, "embedding bridge"),
    (ctypes.POINTER(_Block), "encoder decoder"),
    (ADDRESS, "input_gain input_bias encoder_gain encoder_bias decoder_gain decoder_bias"),
    (ADDRESS, "classes encoder_places decoder_places blank condition_places"),
)
_Given = structure((NUMBER, "threads batch copies known places"), (ADDRESS, "labels given wanted tokens out"))


class MaskedLayers:
    """The layers of `model` (a MAR of targets/mar.py) in `dtype`, float32 or bfloat16."""

    @torch.no_grad()
    def __init__(self, model: Any, dtype: torch.dtype):
        c, self.dtype = model.config, dtype
        self.kept: list[Any] = []  # what the addresses below are of
        stacks = [self._stack(blocks) for blocks in (model.encoder_blocks, model.decoder_blocks)]
        norms = (
            part for norm in (model.z_proj_ln, model.encoder_norm, model.decoder_norm) for part in self._norm(norm)
        )
        tables = [
            torch.cat([model.class_emb.weight, model.fake_latent]),
            model.encoder_pos_embed_learned,
            model.decoder_pos_embed_learned,
            model.mask_token + model.decoder_pos_embed_learned,
            model.diffusion_pos_embed_learned,
        ]
        sizes = (int(dtype == torch.bfloat16), c.dim, c.heads, c.depth, c.buffer, c.length, c.token_dim)
        maps = (self._map(model.z_proj), self._map(model.decoder_embed))
        self.struct = _Masked(*sizes, *maps, *stacks, *norms, *map(self._float, tables))

    def _float(self, part: Tensor) -> int | None:
        self.kept.append(part.detach().float().contiguous())
        return address_of(self.kept[-1])

    def _norm(self, norm: nn.LayerNorm) -> list[int | None]:
        return [self._float(part) for part in (norm.weight, norm.bias)]

    def _map(self, layer: nn.Linear) -> Any:
        self.kept.append(LinearMap.of(layer, self.dtype))
        return self.kept[-1].struct

    def _stack(self, blocks: Any) -> Any:
        made = []
        for b in blocks:
            maps = map(self._map, (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2))
            made.append(_Block(*maps, *self._norm(b.norm1), *self._norm(b.norm2)))
        return (_Block * len(made))(*made)

    def __call__(self, labels: Tensor, tokens: Tensor, known: Tensor, places: Tensor) -> Tensor:
        """labels int64 [copies B], the last one for no class; tokens float32 [B, N, D]; known int64 [B, K]; places
        int64 [B, W] -> conditions [copies B W, dim] at places, in `dtype`."""
        given = [part.contiguous() for part in (labels, known, places, tokens)]
        out = torch.empty(len(labels) * places.shape[1], self.struct.dim, dtype=self.dtype)
        sizes = (torch.get_num_threads(), len(tokens), len(labels) // max(1, len(tokens)), known.shape[1])
        if len(out):
            parts = map(address_of, (*given, out))
            call("bozzetto_masked", self.struct, _Given(*sizes, places.shape[1], *parts))
        return out
