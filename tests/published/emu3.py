"""Emu3-Gen as transformers' conversion script lays it out (BAAI/Emu3-Gen-hf), in shards; drawn as a square and wide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

import hf_toys
from published import Published
from published.janus import PROMPTS
from test_hosted import write_emu3


def write(folder: Path) -> Path:
    write_emu3(folder)
    (folder / "model.safetensors").unlink()
    hf_toys.tiny_emu3().save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    own = {"bos_token_id": hf_toys.BEGIN, "pad_token_id": hf_toys.PADDING, "eos_token_id": hf_toys.WORDS - 1}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


def greedy(ratio: str, rows: int, columns: int) -> Callable[[Path, str], list[int]]:
    """transformers' generate with its guidance (3, as published), and a function that allows what the grid allows."""

    def tokens(folder: Path, text: str) -> list[int]:
        model = transformers.Emu3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        processor = transformers.AutoProcessor.from_pretrained(folder)
        asked = {"return_for_image_generation": True, "ratio": ratio, "image_area": 64 * rows * columns}
        given, none = (processor(text=[said], return_tensors="pt", **asked)["input_ids"] for said in (text, ""))
        mapping = model.model.vocabulary_mapping
        codes = [mapping.img2bpe[i] for i in range(hf_toys.CODES)]
        begin = given.shape[1]

        def allowed(_: int, seen: Tensor) -> list[int]:
            return codes if (len(seen) - begin) % (columns + 1) != columns else [mapping.eol_token_id]

        length = rows * (columns + 1)
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            negative_prompt_ids=none,
            guidance_scale=3.0,
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length,
            prefix_allowed_tokens_fn=allowed,
        )
        return [[*codes, mapping.eol_token_id].index(word) for word in made[0, begin:].tolist()]

    return tokens


_OWN, _SOURCE = {"guidance": 3.0, "top_k": 2048}, "baaivision/Emu3 image_generation.py: classifier_free_guidance, top_k"
FAMILIES = {
    "emu3": Published(write, PROMPTS, greedy("1:1", 3, 3), _OWN, _SOURCE, {"image_size": 24}),
    "emu3-wide": Published(write, PROMPTS, greedy("2:1", 2, 4), _OWN, _SOURCE, {"image_size": "32x16"}),
}
