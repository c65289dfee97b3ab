"""chameleon-7b as transformers' conversion script lays it out, and Anole (leloy/Anole-7b-v0.1-hf), which carries the
decoder of its image tokens among the weights: three shards in bfloat16, written by a transformers before 4.43.

Layout: the hub's pages (an index of 60.7 kB, 14.3 GB) and Meta's conversion script, whose names of the VQ model are
those of vqgan.ckpt behind model.vqmodel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import ChameleonForConditionalGeneration, ChameleonProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

import hf_toys
from published import Published
from published.chameleon_files import HEADS, config, greedy_codes, language, vqgan
from published.files import in_bfloat16, write_json, write_shards
from published.janus import PROMPTS
from test_hosted import TEXT, tokenizer

_OWN = {"guidance": 3.0, "temperature": 0.7, "top_p": 0.9}
_SOURCE = "facebookresearch/chameleon inference: guidance_scale_text, temperature, top_p"


def write(carried: bool) -> Callable[[Path], Path]:
    """carried: the decoder lies among the weights, else as vqgan.ckpt beside them."""

    def into(folder: Path) -> Path:
        write_json(folder / "config.json", config(TEXT, architectures=["ChameleonForConditionalGeneration"]))
        write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True})
        decoder = vqgan()
        encoder = _encoder()
        inside = {**encoder, "quantize.embedding.weight": decoder["quantize.embedding.weight"]}
        if carried:
            inside |= {k: v for k, v in decoder.items() if k.startswith(("decoder.", "post_quant_conv."))}
        else:
            torch.save({"state_dict": decoder}, folder / "vqgan.ckpt")
        write_shards(folder, {**language(HEADS), **{f"model.vqmodel.{k}": v for k, v in inside.items()}}, 3)
        images = ChameleonImageProcessorPil()
        ChameleonProcessor(images, tokenizer(), image_seq_length=hf_toys.GRID**2).save_pretrained(folder)
        return folder

    return into


def _encoder() -> dict[str, torch.Tensor]:
    """What transformers holds of the VQ model, which nothing here reads."""
    with torch.device("meta"):
        made = ChameleonForConditionalGeneration(hf_toys.tiny_chameleon().config).model.vqmodel.state_dict()
    return {key: torch.zeros(value.shape) for key, value in made.items()}


def greedy(folder: Path, text: str) -> list[int]:
    """The slow forward, guidance of text by its formula (3)."""
    given = [TEXT.index(word) for word in (*text.split(), "<sep>", "<boi>")]
    without = [TEXT.index(word) for word in ("<s>", "<boi>")]
    shape = (hf_toys.GRID, hf_toys.GRID)
    return greedy_codes(in_bfloat16(language(HEADS)), given, without, 3.0, shape)


FAMILIES = {
    "anole": Published(write(True), PROMPTS, greedy, _OWN, _SOURCE),
    "chameleon": Published(write(False), PROMPTS, greedy, _OWN, _SOURCE),
}
