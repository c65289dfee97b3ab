"""Networks of Chameleon's architecture from the files that are published of them.

Three things differ from what transformers 5 writes: norms of queries and keys may have one row per shard that the model
was trained on (config.json: model_parallel_size) in place of one per head; the VQ model may be missing (Lumina-mGPT) or
come with its decoder (Anole), which transformers does not have. It is not needed in the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import ChameleonForConditionalGeneration

from bozzetto.adapters.source import Source
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.errors import UsageError

_VQ = "model.vqmodel."
_NORM = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_norm\.(weight|bias)")


class ChameleonLanguage(ChameleonForConditionalGeneration):
    """Without the VQ model."""

    def __init__(self, config: Any):
        super().__init__(config)
        del self.model.vqmodel


@dataclass(frozen=True)
class ChameleonFiles:
    """What a folder holds. config: of transformers; language: the language model's weights under transformers' names
    and in its shapes; vq: the VQ model's, under those of its own checkpoint (empty: there is none); codes: how many."""

    config: Any
    language: dict[str, Tensor]
    vq: dict[str, Tensor]
    codes: int


def chameleon_files(source: Source, mapped: bool = True) -> ChameleonFiles:
    """The weights, mapped from their files. mapped: whether config.json has to say which words are image tokens. Raises
    UsageError."""
    config = source.read("config.json", ChameleonForConditionalGeneration.config_class.from_pretrained)
    if not mapped and not config.vocabulary_map:
        config.vocabulary_map = {}
    source.check(ChameleonLanguage, config)
    codes = sum(str(word).startswith("IMGIMG") for word in config.vocabulary_map or ())
    if mapped and not codes:
        raise UsageError(f"{source.folder / 'config.json'}: vocabulary_map has no words for image tokens (IMGIMG...)")
    language, vq = {}, {}
    for key, value in source.tensors().items():
        if key.startswith(_VQ):
            vq[key.removeprefix(_VQ)] = value
        else:
            language[key] = _per_head(source, config, key, value)
    return ChameleonFiles(config, language, vq, codes)


def chameleon_network(source: Source, wanted: LoadSettings, files: ChameleonFiles) -> Any:
    """The language model. Raises UsageError for weights that do not fit."""
    return source.network(ChameleonLanguage, wanted, files.config, files.language)


def _per_head(source: Source, config: Any, key: str, value: Tensor) -> Tensor:
    """A norm's row for every head, [heads, head_dim], from one per shard."""
    found = _NORM.fullmatch(key)
    if found is None or value.ndim != 2:
        return value
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    if not len(value) or heads % len(value):
        raise UsageError(f"{source.name}: {key} has {len(value)} rows, which do not divide its {heads} heads")
    return value.repeat_interleave(heads // len(value), 0)


def codes_of(model: Any) -> list[int]:
    """Words of the image tokens, in the order of the codebook."""
    codes: Mapping[int, int] = model.model.vocabulary_mapping.img2bpe
    return [codes[i] for i in range(len(codes))]
