"""Janus-Pro as transformers' conversion script lays it out (deepseek-community/Janus-Pro-1B)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

import hf_toys
from published import Published
from test_hosted import write_janus

PROMPTS = ("a red tulip", "a small house by a lake", "a dog")


def write(folder: Path) -> Path:
    write_janus(folder)
    own = {"bos_token_id": hf_toys.BEGIN, "pad_token_id": hf_toys.PADDING, "guidance_scale": 5}
    own |= {"generation_kwargs": {"boi_token_id": hf_toys.IMAGE}}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


def greedy(folder: Path, text: str) -> list[int]:
    """transformers' own image loop."""
    model = transformers.JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    given = transformers.AutoProcessor.from_pretrained(folder)(text=text, generation_mode="image", return_tensors="pt")
    made = model.generate(**given, generation_mode="image", do_sample=False, guidance_scale=5, use_cache=True)
    return made[0, -(hf_toys.GRID**2) :].tolist()


FAMILIES = {
    "janus": Published(write, PROMPTS, greedy, {"guidance": 5.0}, "generation_config.json: guidance_scale"),
}
