"""Laws of codes, draws and Gumbel noise by our kernels (laws.h, noise.h); `laws/` has the same in torch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bozzetto.laws.categorical import LawSettings, gumbel_argmax, gumbel_margin
from bozzetto.runtime.native import ADDRESS, NUMBER, address_of, call, loaded, structure


def own_gumbel_rows(keys: Tensor, vocab: int) -> Tensor:
    """As `laws.noise.gumbel_rows` for the numbers 0 to vocab - 1: keys int64 [n] -> float32 [n, V]."""
    out = torch.empty(len(keys), vocab)
    call("bozzetto_gumbel", torch.get_num_threads(), keys.contiguous(), len(keys), vocab, out)
    return out


def own_uniforms(keys: Tensor, passes: Tensor, count: Tensor, places: int, per: int) -> Tensor:
    """Fresh uniforms of the places behind `count` (decoding/kinds.py): int64 [B] thrice -> float64 [B, places, per]."""
    out = torch.empty(len(keys), places, per, dtype=torch.float64)
    call("bozzetto_uniforms", *(part.contiguous() for part in (keys, passes, count)), len(keys), places, per, out)
    return out


def own_laws(
    logits: Tensor, guidance: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """As `laws.categorical.row_laws`."""
    batch, (rows, width, vocab) = len(guidance), logits.shape
    out = torch.empty(batch, width, vocab)
    sizes = (rows // batch, batch, width, vocab)
    call(
        "bozzetto_laws", torch.get_num_threads(), logits.contiguous(), *sizes, guidance, temperature, top_k, top_p, out
    )
    return out


def own_law_of(logits: Tensor, settings: LawSettings) -> Tensor:
    """As `laws.categorical.law_of`; the numbers are those of `own_laws`."""
    return own_laws(logits.float(), *_rows_of(settings, len(logits) // (2 if settings.guided else 1)))


@lru_cache(maxsize=64)
def _rows_of(settings: LawSettings, batch: int) -> tuple[Tensor, ...]:
    """Guidance, temperature, top-k and top-p, [B] each, as `own_laws` takes them."""
    top_k, temperature = settings.top_k if settings.temperature else -1, settings.temperature or 1.0
    given = float(settings.guidance), float(temperature), int(top_k), float(settings.top_p)  # whole numbers are allowed
    return tuple(torch.full((batch,), value) for value in given)


def gumbel_draw(laws: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`gumbel_argmax` and `gumbel_margin` in one: float32 [..., V] twice -> int64 [...], float32 [...]. Our kernel and
    torch agree to the bit."""
    if not loaded() or laws.device.type != "cpu" or laws.dtype != torch.float32:
        return gumbel_argmax(laws, noise), gumbel_margin(laws, noise)
    laws, noise = torch.broadcast_tensors(laws, noise)
    lead, noise = laws.shape[:-1], noise.contiguous()
    tokens, margins = torch.empty(lead, dtype=torch.int64), torch.empty(lead)
    rows, vocab = tokens.numel(), laws.shape[-1]
    call("bozzetto_draw", torch.get_num_threads(), laws.contiguous(), noise, rows, vocab, tokens, margins)
    return tokens, margins


# `Slots` of advance.h.
_Slots = structure(
    (NUMBER, "coupled threads batch copies width widest vocab length ring room"),
    (ADDRESS, "logits guidance temperature noise inputs count drafted"),
    (ADDRESS, "tokens next next_count report keys passes drafts next_laws laws"),
)


def own_advance(
    s: Any, logits: Tensor, widest: int, length: int, coupled: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor]:
    """What follows a pass of windows whose laws have no cuts (decoding/advance.py). s: the slots, of which `tokens` are
    changed; coupled: rules/exact.py, else rules/seed_exact.py -> the next inputs int64 [B, widest] and counts, the
    report float32 [3, B]; where coupled the next drafts' laws; and the laws of the places, float32 [B, W, V]."""
    batch, (rows, width, vocab) = len(s.count), logits.shape
    sizes = batch, rows // batch, width, widest, vocab, length, s.noise.shape[1], s.tokens.shape[1]
    parts = logits, s.guidance, s.temperature, s.noise, s.inputs, s.count, s.drafted
    given = [part.contiguous() for part in parts]
    found = torch.empty(batch, widest, dtype=torch.int64), torch.empty_like(s.count), torch.empty(3, batch)
    own, next_laws = torch.empty(batch, width, vocab), None
    coins: list[Tensor | None] = [None] * 3
    if coupled:
        coins = [part.contiguous() for part in (s.keys, s.passes, s.laws)]
        next_laws = torch.empty(batch, widest - 1, vocab) if widest > 1 else None
    addresses = map(address_of, (*given, s.tokens, *found, *coins, next_laws, own))
    call("bozzetto_advance", _Slots(int(coupled), torch.get_num_threads(), *sizes, *addresses))
    return found, next_laws, own
