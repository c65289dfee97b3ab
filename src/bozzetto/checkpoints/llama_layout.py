"""LlamaGen in the layout of LlamaForCausalLM: jadohu/LlamaGen-T2I and -2, the targets of LANTERN (arXiv 2410.03355).

The names are Llama's, the rotations are LlamaGen's own (the code that goes with these files turns interleaved pairs by
row and column), so that no weight changes its order: queries, keys and values lie in one matrix again, the rest is
renamed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.checkpoints.store import CONFIG
from bozzetto.common.files import read_json

MARKS = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight")
_NAMES = (
    (r"model\.embed_tokens\.(.+)", r"tok_embeddings.\1"),
    (r"model\.norm\.(.+)", r"norm.\1"),
    (r"lm_head\.(.+)", r"output.\1"),
    (r"model\.(layers\.\d+)\.self_attn\.o_proj\.(.+)", r"\1.attention.wo.\2"),
    (r"model\.(layers\.\d+)\.mlp\.gate_proj\.(.+)", r"\1.feed_forward.w1.\2"),
    (r"model\.(layers\.\d+)\.mlp\.up_proj\.(.+)", r"\1.feed_forward.w3.\2"),
    (r"model\.(layers\.\d+)\.mlp\.down_proj\.(.+)", r"\1.feed_forward.w2.\2"),
    (r"model\.(layers\.\d+)\.input_layernorm\.(.+)", r"\1.attention_norm.\2"),
    (r"model\.(layers\.\d+)\.post_attention_layernorm\.(.+)", r"\1.ffn_norm.\2"),
    (r"model\.(.+)", r"\1"),
)
_FUSED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


def as_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under LlamaGen's names. What has none there keeps its own, as the parts of a matrix that is not whole
    do, so that they are named as unexpected."""
    found = {_renamed(key): value for key, value in state.items() if not key.endswith("rotary_emb.inv_freq")}
    for name in [key.removesuffix(_FUSED[0]) for key in found if key.endswith(_FUSED[0])]:
        three = [found[name + part] for part in _FUSED if name + part in found]
        if len(three) == 3 and len({part.shape[1:] for part in three}) == 1:
            for part in _FUSED:
                del found[name + part]
            found[f"{name}attention.wqkv.weight"] = torch.cat(three)
    return found


def _renamed(key: str) -> str:
    for old, new in _NAMES:
        if re.fullmatch(old, key):
            return re.sub(old, new, key)
    return key


def grid_of(folder: Path) -> int | None:
    """Tokens a side by `block_size` of the folder's config.json, None where it does not say."""
    if not (folder / CONFIG).is_file():
        return None
    tokens: Any = read_json(folder / CONFIG).get("block_size")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        return None
    side = math.isqrt(tokens)
    return side if side * side == tokens else None
