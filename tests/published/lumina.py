"""Lumina-mGPT as Alpha-VLLM publish it (7B-768, 7B-512, 34B-512): shards in bfloat16 without a VQ model, norms of
queries and keys of [model_parallel_size, head size], a tokenizer without a processor (7B-768) or none at all.

Layout: the hub's pages (419 keys, no preprocessor_config.json) and lumina_mgpt/model/chameleon of the repository. The
decoder is Meta's vqgan.ckpt, a pickle whose state lies under state_dict.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from published import Published
from published.chameleon_files import config, greedy_codes, language, vqgan
from published.files import in_bfloat16, write_json, write_shards, write_tokenizer
from published.janus import PROMPTS

BREAK, END, SEPARATOR, ONE, TWO = (
    "<racm3:break>",
    "<reserved08799>",
    "<reserved08706>",
    *(f"<reserved0880{i}>" for i in (1, 2)),
)
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<image>", BREAK, SEPARATOR, END, ONE, TWO, "a", "red", "tulip", "small"]
WORDS += ["house", "by", "lake", "dog", "Generate", "an", "image", "of", "prompt", ":"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_OWN, _SOURCE = {"guidance": 4.0, "top_k": 2000}, "Alpha-VLLM/Lumina-mGPT README.md: cfg, image_top_k"


def write(name: str, shards: int, inside: bool, swin: bool = False) -> Callable[[Path], Path]:
    """inside: tokenizer and decoder in the folder, else beside it."""

    def into(folder: Path) -> Path:
        place, words = folder / name, folder / (name if inside else "Lumina-mGPT-7B-768")
        for made in {place, words}:
            made.mkdir()
        more = {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "z_loss_weight": 1e-05, "dropout": 0.05}
        about = config(WORDS, model_parallel_size=shards, swin_norm=swin, mask_image_logits=False, **more)
        write_json(place / "config.json", about)
        write_json(place / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})
        write_shards(place, language(shards), 2)
        write_tokenizer(words, WORDS, NAMES)
        torch.save({"state_dict": vqgan()}, (place if inside else folder) / "vqgan.ckpt")
        return place

    return into


def greedy(shards: int, width: str, rows: int, columns: int, swin: bool = False) -> Callable[[Path, str], list[int]]:
    """The slow forward on the whole sequence, guidance by its formula (4), line ends where the grid has them.

    The prompt is that of the repository's README and its conversation; height and width follow in a word each, and
    guidance leads away from begin of image and size alone (inference_solver.py)."""

    def tokens(folder: Path, text: str) -> list[int]:
        said = f"Generate an image of {width} according to the following prompt : {text}".split()
        size = [f"<reserved0880{codes // 2}>" for codes in (rows, columns)]
        begin = [WORDS.index(word) for word in (BREAK, *size)]
        words = [word if word in WORDS else "<unk>" for word in ("<s>", *said, SEPARATOR)]
        given = [WORDS.index(word) for word in words] + begin
        state, end = in_bfloat16(language(shards)), WORDS.index(END)
        return greedy_codes(state, given, begin, 4.0, (rows, columns), end, swin)

    return tokens


_BESIDE = {"tokenizer": "{model}/../Lumina-mGPT-7B-768", "vqgan": "{model}/../vqgan.ckpt"}
FAMILIES = {
    "lumina": Published(
        write("Lumina-mGPT-7B-768", 1, True),
        PROMPTS,
        greedy(1, "32x32", 2, 2),
        _OWN,
        _SOURCE,
        {"image_size": 32},
    ),
    "lumina-without-words": Published(
        write("Lumina-mGPT-7B-512", 1, False),
        PROMPTS,
        greedy(1, "64x32", 2, 4),
        _OWN,
        _SOURCE,
        {"image_size": "64x32", **_BESIDE},
    ),
    "lumina-34b": Published(
        write("Lumina-mGPT-34B-512", 2, False, swin=True),
        PROMPTS,
        greedy(2, "32x32", 2, 2, swin=True),
        _OWN,
        _SOURCE,
        {"image_size": 32, **_BESIDE},
    ),
}
