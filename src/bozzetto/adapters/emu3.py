"""Emu3 (Wang et al., arXiv 2409.18869) as transformers holds it: image tokens and an end of line are words of the
language model's vocabulary."""

from __future__ import annotations

from typing import Any

from bozzetto.adapters.lined import LinedTarget


class Emu3Target(LinedTarget):
    """model: transformers Emu3ForConditionalGeneration in evaluation mode, in the dtype to compute in; height, width:
    of the picture in tokens."""

    def __init__(self, model: Any, height: int, width: int):
        mapping = model.model.vocabulary_mapping
        codes = [mapping.img2bpe[i] for i in range(len(mapping.img2bpe))]
        super().__init__(model.model.text_model, model.lm_head.weight, codes, mapping.eol_token_id, height, width)
