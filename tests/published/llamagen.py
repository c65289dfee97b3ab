"""LlamaGen as its authors publish it: DDP and FSDP pickles, class- and text-conditional, with VQ-16; flan-t5's layout.

Sizes are known by their shapes, so that a tiny one is entered while a checkpoint is converted.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from bozzetto.autoencoders.llamagen_vq import LlamaGenVQConfig
from bozzetto.cli.main import main
from bozzetto.targets import llamagen
from bozzetto.targets.caption_text import clean_caption
from published import Published
from test_llamagen_vq import published_state

DIM, LAYERS, HEADS, FFN, CODES, GRID, CLASSES = 32, 2, 2, 256, 24, 16, 10
TOKENS, FEATURES = 120, 24  # of a caption
PIXELS = LlamaGenVQConfig(codes=CODES, channels=32, multipliers=(1, 1, 1, 1, 1), blocks=1, latent=8)  # VQ-16
WORDS = ("a", "red", "tulip", "small", "house", "by", "the", "lake", "dog", "in", "white", "vase")


def conditions(captioned: bool) -> dict[str, tuple[int, ...]]:
    if not captioned:
        return {"cls_embedding.embedding_table.weight": (CLASSES + 1, DIM)}
    return {
        "cls_embedding.uncond_embedding": (TOKENS, FEATURES),
        "cls_embedding.cap_proj.fc1.weight": (DIM, FEATURES),
        "cls_embedding.cap_proj.fc2.weight": (DIM, DIM),
    }


def transformer(captioned: bool) -> OrderedDict[str, Tensor]:
    """A published state dict, key by key, with laws that are not flat."""
    shapes = {**conditions(captioned), "tok_embeddings.weight": (CODES, DIM)}
    for n in range(LAYERS):
        shapes |= {f"layers.{n}.attention.wqkv.weight": (3 * DIM, DIM), f"layers.{n}.attention.wo.weight": (DIM, DIM)}
        shapes |= {f"layers.{n}.feed_forward.{w}.weight": (FFN, DIM) for w in ("w1", "w3")}
        shapes |= {f"layers.{n}.feed_forward.w2.weight": (DIM, FFN)}
        shapes |= {f"layers.{n}.{norm}.weight": (DIM,) for norm in ("attention_norm", "ffn_norm")}
    shapes |= {"norm.weight": (DIM,), "output.weight": (CODES, DIM)}
    made = torch.Generator().manual_seed(0)
    state = OrderedDict((key, torch.randn(shape, generator=made)) for key, shape in shapes.items())
    for key, value in state.items():
        state[key] = 1 + 0.1 * value if value.ndim == 1 else value * (0.7 if "output" in key else 0.25)
    return state


def with_python_state(state: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """As torch's FSDP leaves a state dict: a tensor with attributes is pickled through _rebuild_from_type_v2."""
    for value in state.values():
        value._is_flat_param = False  # type: ignore[attr-defined]
    return state


def llama_layout(state: OrderedDict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of LlamaForCausalLM, as jadohu/LlamaGen-T2I has them."""
    found = {"model.embed_tokens.weight": state["tok_embeddings.weight"], "lm_head.weight": state["output.weight"]}
    found["model.norm.weight"] = state["norm.weight"]
    found |= {f"model.{key}": value for key, value in state.items() if key.startswith("cls_embedding.")}
    names = {"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj"}
    names |= {"feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    for n in range(LAYERS):
        found |= {f"model.layers.{n}.{new}.weight": state[f"layers.{n}.{old}.weight"] for old, new in names.items()}
        for name, part in zip("qkv", state[f"layers.{n}.attention.wqkv.weight"].chunk(3), strict=True):
            found[f"model.layers.{n}.self_attn.{name}_proj.weight"] = part
    return {key: value.contiguous() for key, value in found.items()}


def write_llama(folder: Path, state: OrderedDict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(llama_layout(state), folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM, "input_type": "t2i"}
    config |= {"num_hidden_layers": LAYERS, "block_size": GRID**2, "cls_token_num": TOKENS, "vocab_size": CODES}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_t5(folder: Path, dim: int = FEATURES) -> Path:
    """flan-t5's files: shards with the decoder in them, tokenizer.json."""
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"▁{word}", -2 - i / 10) for i, word in enumerate(WORDS)),
    ]
    text = transformers.T5Tokenizer(vocab=[*words, *((c, -9.0) for c in "▁abcdefghijklmnopqrstuvwxyz")], extra_ids=2)
    shape = {"d_model": dim, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
    config = transformers.T5Config(
        vocab_size=len(text), feed_forward_proj="gated-gelu", tie_word_embeddings=False, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="24KB")
    text.save_pretrained(folder)
    return folder


def write(captioned: bool, save: Callable[[OrderedDict[str, Tensor], Path], Any], folder: Path) -> Path:
    """The published files, converted by the command line."""
    torch.save({"model": published_state(PIXELS)}, folder / "vq_ds16.pt")
    gpt = folder / f"{'t2i_XL_stage1' if captioned else 'c2i_B'}_256.pt"
    save(transformer(captioned), gpt)
    words = ["--text-encoder", str(write_t5(folder / "flan-t5-xl"))] if captioned else []
    with mock.patch.dict(llamagen.SHAPES, {"XL" if captioned else "B": (DIM, LAYERS, HEADS)}):
        arguments = ["--gpt", str(gpt), "--vq", str(folder / "vq_ds16.pt"), "--out", str(folder / "converted")]
        assert main(["convert", "llamagen", *arguments, *words]) == 0
    return folder / "converted"


def ddp(state: OrderedDict[str, Tensor], path: Path) -> None:
    torch.save({"model": state}, path)


def fsdp(state: OrderedDict[str, Tensor], path: Path) -> None:
    torch.save(with_python_state(state), path)
    assert b"_rebuild_from_type_v2" in path.read_bytes()


class Slow:
    """The published network without a cache, one sequence at a time, from its own state dict."""

    def __init__(self, state: dict[str, Tensor]):
        self.w = {key: value.double() for key, value in state.items()}

    def rotation(self, lead: int) -> tuple[Tensor, Tensor]:
        """cos and sin [lead + N, hd/2]; those of conditions are zero."""
        quarter = DIM // HEADS // 4
        rate = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        cell = torch.arange(GRID**2)
        angle = torch.cat([(cell // GRID)[:, None] * rate, (cell % GRID)[:, None] * rate], 1)
        blank = torch.zeros(lead, 2 * quarter, dtype=torch.float64)
        return torch.cat([blank, angle.cos()]), torch.cat([blank, angle.sin()])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]

    def states(self, lead: Tensor, mask: Tensor, tokens: list[int]) -> Tensor:
        """lead [T, d], mask bool [T] -> hidden states after the final norm, [T + n, d]."""
        x = torch.cat([lead, self.w["tok_embeddings.weight"][torch.tensor(tokens, dtype=torch.int64)]])
        size, n = DIM // HEADS, len(x)
        cos, sin = (part[:n, None] for part in self.rotation(len(lead)))
        open_ = torch.cat([mask, torch.ones(n - len(mask), dtype=torch.bool)])
        sight = torch.ones(n, n, dtype=torch.bool).tril() & open_ | torch.eye(n, dtype=torch.bool)

        def turned(part: Tensor) -> Tensor:  # [n, H, hd]
            a, b = part[..., ::2], part[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

        for layer in range(LAYERS):
            at = f"layers.{layer}"
            q, k, v = (self.norm(f"{at}.attention_norm", x) @ self.w[f"{at}.attention.wqkv.weight"].t()).chunk(3, -1)
            q, k, v = turned(q.view(n, HEADS, size)), turned(k.view(n, HEADS, size)), v.view(n, HEADS, size)
            weight = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
            weight = weight.masked_fill(~sight, -torch.inf).softmax(-1)
            x = x + torch.einsum("hqk,khd->qhd", weight, v).flatten(1) @ self.w[f"{at}.attention.wo.weight"].t()
            h = self.norm(f"{at}.ffn_norm", x)
            gate, up = (h @ self.w[f"{at}.feed_forward.{name}.weight"].t() for name in ("w1", "w3"))
            x = x + (gate * gate.sigmoid() * up) @ self.w[f"{at}.feed_forward.w2.weight"].t()
        return self.norm("norm", x)

    def greedy(self, given: Tensor, without: Tensor, mask: Tensor, guidance: float) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < GRID**2:
            c, u = (self.states(lead, mask, tokens)[-1] @ self.w["output.weight"].t() for lead in (given, without))
            tokens.append(int((u + guidance * (c - u)).argmax()))
        return tokens

    def caption(self, features: Tensor) -> Tensor:
        h = features.double() @ self.w["cls_embedding.cap_proj.fc1.weight"].t()
        return torch.nn.functional.gelu(h, approximate="tanh") @ self.w["cls_embedding.cap_proj.fc2.weight"].t()


def greedy_class(folder: Path, asked: str, guidance: float) -> list[int]:
    content = torch.load(folder.parent / "c2i_B_256.pt", weights_only=True)
    state = content.get("model", content)
    assert all(torch.equal(value, state[key]) for key, value in transformer(False).items())
    return _greedy_class(asked, guidance)


@functools.cache
def _greedy_class(asked: str, guidance: float) -> list[int]:
    slow = Slow(transformer(False))
    rows = slow.w["cls_embedding.embedding_table.weight"]
    return slow.greedy(rows[int(asked)][None], rows[CLASSES][None], torch.ones(1, dtype=torch.bool), guidance)


def caption_features(folder: Path, text: str) -> tuple[Tensor, Tensor]:
    """What LlamaGen's demo makes of a prompt: features [T, C] padded on the left, zero there, and the mask [T]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer([clean_caption(text)], max_length=TOKENS, padding="max_length", truncation=True)
    encoder = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask = (torch.tensor(given[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    count = int(mask.sum())
    return torch.cat([states[count:] * 0, states[:count]]), mask[0].flip(0).bool()


def greedy_caption(folder: Path, text: str, guidance: float) -> list[int]:
    slow = Slow(torch.load(folder.parent / "t2i_XL_stage1_256.pt", weights_only=True)["model"])
    features, mask = caption_features(folder.parent / "flan-t5-xl", text)
    given, without = (slow.caption(part) for part in (features, slow.w["cls_embedding.uncond_embedding"]))
    return slow.greedy(given, without, mask, guidance)


SAMPLE = "FoundationVision/LlamaGen: autoregressive/sample/"
CLASS = ({"guidance": 2.0}, SAMPLE + "sample_c2i_ddp.py, README")
CAPTION = ({"guidance": 7.5, "top_k": 1000}, SAMPLE + "sample_t2i.py")
PROMPTS = ("a red tulip", "a small house by the lake", "a dog")
FAMILIES = {
    "llamagen-c2i": Published(partial(write, False, ddp), ("2", "0", "7"), partial(greedy_class, guidance=2.0), *CLASS),
    "llamagen-c2i-fsdp": Published(
        partial(write, False, fsdp), ("2", "1", "9"), partial(greedy_class, guidance=2.0), *CLASS
    ),
    "llamagen-t2i": Published(partial(write, True, ddp), PROMPTS, partial(greedy_caption, guidance=7.5), *CAPTION),
}
