"""Networks of Chameleon's family as they are published: the state, name by name, and a slow forward of it.

The forward is written from the architecture (arXiv 2405.09818; norms of queries and keys per head, whose rows repeat
over the heads of a shard, and norms after each part where swin_norm is set): the whole sequence at once, no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hf_toys
from bozzetto.autoencoders.kl16 import KL16Config, kl16_decoder, to_published

DIM, HEADS, LAYERS, FFN, HEAD = 32, 4, 2, 48, 8
VOCAB = hf_toys.WORDS + hf_toys.CODES


def config(words: Sequence[str], **more: Any) -> dict[str, Any]:
    """config.json. words: of the text, in the order of their numbers; the image tokens come after them."""
    letters = {f"IMGIMG{chr(ord('A') + i)}Z": hf_toys.WORDS + i for i in range(hf_toys.CODES)}
    vq = {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "double_latent": False,
        "embed_dim": 4,
        "latent_channels": 32,
        "num_embeddings": hf_toys.CODES,
        "num_res_blocks": 1,
        "resolution": 2 * hf_toys.GRID,
        "attn_resolutions": [],
    }
    return {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "model_type": "chameleon",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "swin_norm": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": VOCAB,
        "vocabulary_map": {**{word: i for i, word in enumerate(words)}, **letters},
        "vq_config": vq,
        **more,
    }


def language(norm_rows: int, seed: int = 0) -> dict[str, Tensor]:
    """The language model, name by name. norm_rows: of the norms of queries and keys, one per shard of training."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, around: float = 0.0, std: float = 0.25) -> Tensor:
        return around + std * torch.randn(*shape, generator=generator)

    state = {"model.embed_tokens.weight": normal(VOCAB, DIM), "lm_head.weight": normal(VOCAB, DIM)}
    state["model.norm.weight"] = normal(DIM, around=1.0)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{at}self_attn.{part}.weight"] = normal(DIM, DIM)
        for part in ("q_norm", "k_norm"):
            state[f"{at}self_attn.{part}.weight"] = normal(norm_rows, HEAD, around=1.0)
            state[f"{at}self_attn.{part}.bias"] = normal(norm_rows, HEAD)
        for part, (out, inside) in {"gate": (FFN, DIM), "up": (FFN, DIM), "down": (DIM, FFN)}.items():
            state[f"{at}mlp.{part}_proj.weight"] = normal(out, inside)
        for part in ("input", "post_attention"):
            state[f"{at}{part}_layernorm.weight"] = normal(DIM, around=1.0)
    return state


def vqgan(seed: int = 1) -> dict[str, Tensor]:
    """What generation needs of a tokenizer checkpoint, with its encoder's first layer and a part of its loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = kl16_decoder(KL16Config(2, 4, 2, 32, (1, 1), 1))
        state = {key: value.detach().clone() for key, value in to_published(decoder.state_dict(), 2).items()}
        state["quantize.embedding.weight"] = torch.randn(hf_toys.CODES, 4)
        state["encoder.conv_in.weight"] = torch.randn(32, 3, 3, 3)
        state["loss.discriminator.main.0.weight"] = torch.randn(4, 3, 4, 4)
    return state


def logits(state: Mapping[str, Tensor], tokens: Sequence[int], swin: bool = False) -> Tensor:
    """Of the word after `tokens`: float32 [VOCAB]."""
    x = state["model.embed_tokens.weight"][list(tokens)]
    for i in range(LAYERS):
        layer = {
            k.removeprefix(f"model.layers.{i}."): v for k, v in state.items() if k.startswith(f"model.layers.{i}.")
        }
        before, after = layer["input_layernorm.weight"], layer["post_attention_layernorm.weight"]
        if swin:
            x = x + _rms(_attention(layer, x), before)
            x = x + _rms(_feed_forward(layer, x), after)
        else:
            x = x + _attention(layer, _rms(x, before))
            x = x + _feed_forward(layer, _rms(x, after))
    return state["lm_head.weight"] @ _rms(x, state["model.norm.weight"])[-1]


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def _feed_forward(layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _attention(layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    length = len(x)
    q, k, v = (
        (x @ layer[f"self_attn.{part}_proj.weight"].T).view(length, HEADS, HEAD).transpose(0, 1) for part in "qkv"
    )  # [heads, length, head]
    q, k = (_turned(_normed(layer, part, value)) for part, value in (("q", q), ("k", k)))
    weight = (q @ k.transpose(1, 2) / HEAD**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    made = (weight.softmax(-1) @ v).transpose(0, 1).reshape(length, DIM)
    return made @ layer["self_attn.o_proj.weight"].T


def _normed(layer: Mapping[str, Tensor], part: str, x: Tensor) -> Tensor:
    """Over a head's numbers; the heads of a shard share a row of gains."""
    gain, shift = (layer[f"self_attn.{part}_norm.{name}"] for name in ("weight", "bias"))
    shard = torch.arange(HEADS) * len(gain) // HEADS
    centred = x - x.mean(-1, keepdim=True)
    centred = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * gain[shard][:, None] + shift[shard][:, None]


def _turned(x: Tensor) -> Tensor:
    """Rotated by position: the halves of a head are the two coordinates."""
    angle = torch.outer(torch.arange(x.shape[1]), 10000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2)))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def greedy_codes(
    state: Mapping[str, Tensor],
    given: Sequence[int],
    without: Sequence[int],
    guidance: float,
    shape: tuple[int, int],
    end: int | None = None,
    swin: bool = False,
) -> list[int]:
    """Codes drawn greedily after a prompt, guided away from `without`; shape: rows, columns; end: the word that stands
    behind each row, which is code CODES then."""
    rows, columns = shape
    drawn: list[int] = []
    for at in range(rows * (columns + (end is not None))):
        if end is not None and at % (columns + 1) == columns:
            drawn.append(hf_toys.CODES)
            continue
        words = [end if code == hf_toys.CODES else hf_toys.WORDS + code for code in drawn]
        wanted, other = (logits(state, [*p, *words], swin)[hf_toys.WORDS :] for p in (given, without))
        drawn.append(int((other + guidance * (wanted - other)).argmax()))
    return drawn
