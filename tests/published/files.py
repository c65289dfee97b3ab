"""What stand-ins of several families write: shards with their index, tokenizers of whole words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor


def write_json(path: Path, content: Any) -> None:
    """As published files are written."""
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_shards(folder: Path, state: Mapping[str, Tensor], count: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """model-0000I-of-0000N.safetensors and their index."""
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    keys = sorted(state)
    where = {key: names[i * count // len(keys)] for i, key in enumerate(keys)}
    for name in names:
        part = {key: state[key].to(dtype).contiguous().clone() for key in keys if where[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    total = sum(value.numel() * dtype.itemsize for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, words: Sequence[str], names: Mapping[str, str], **more: Any) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json of a tokenizer whose words are these, in the
    order of their numbers. names: of its special tokens by role (bos_token, ...); words in <...> are added tokens."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {*names.values(), *(word for word in words if word.startswith("<"))}
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words if word in special])
    made.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", dict(names))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", **names, **more})


def in_bfloat16(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers that files in bfloat16 hold, in float32."""
    return {key: value.to(torch.bfloat16).float() for key, value in state.items()}
