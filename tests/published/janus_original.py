"""Janus-Pro and Janus-1.3B as deepseek-ai publish them: model type multi_modality, one pickle in bfloat16, the config
of the janus package, tokenizer and processor files of its own classes, no generation_config.

The layout is that of the repository deepseek-ai/Janus (janus/models) and of the conversion script of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import hf_toys
from published import Published
from published.files import in_bfloat16, write_json, write_tokenizer
from published.janus import PROMPTS

BEGIN, PADDING = "<begin_of_image>", "<\uff5c\u2581pad\u2581\uff5c>"
NEW, OLD = ("<|User|>", "<|Assistant|>"), ("User", "Assistant")
WORDS = [PADDING, "<s>", BEGIN, "<image_placeholder>", "<unk>", "<end_of_image>", "User", "Assistant", ":", "</s>"]
WORDS += ["a", "red", "tulip", "small", "house", "by", "lake", "dog", "white", "old", "<|User|>", "<|Assistant|>"]
WORDS += ["ugly", "x"]


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' Janus under the names of the janus package, part by part."""
    assert len(WORDS) == hf_toys.WORDS
    parts = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.generation_embeddings.": "gen_embed.",
        "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
        "model.generation_aligner.hidden_layers.0.": "gen_aligner.layers.2.",
        "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
        "model.generation_head.vision_head.": "gen_head.vision_head.",
        "model.vqmodel.": "gen_vision_model.",
    }
    found = {}
    for key, value in state.items():
        ours = next((part for part in parts if key.startswith(part)), None)
        if ours is None:
            continue  # the tower that looks at pictures has other tensors there, see below
        name = parts[ours] + key.removeprefix(ours)
        if ours == "model.vqmodel.":
            for theirs, here in (("encoder.down.", "encoder.conv_blocks."), ("decoder.up.", "decoder.conv_blocks.")):
                name = name.replace(theirs, here).replace(".block.", ".res.")
            for number, part in enumerate((".mid.block_1.", ".mid.attn_1.", ".mid.block_2.")):
                name = name.replace(part, f".mid.{number}.")
        found[name] = value
    found["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    found["vision_model.vision_tower.blocks.0.attn.qkv.weight"] = torch.ones(96, 32)
    found["vision_model.vision_tower.norm.weight"] = torch.ones(32)
    return found | {"aligner.layers.0.weight": torch.ones(32, 32), "aligner.layers.0.bias": torch.ones(32)}


def config() -> dict[str, object]:
    """Of the janus package."""
    width = {"depth": 2, "n_embed": 32, "projector_type": "mlp_gelu"}
    parts = {
        "aligner": ("MlpProjector", {**width, "input_dim": 32}),
        "gen_aligner": ("MlpProjector", {**width, "input_dim": 4}),
        "gen_head": ("vision_head", {"image_token_embed": 32, "image_token_size": hf_toys.CODES, "n_embed": 32}),
        "gen_vision": ("VQ-16", {"image_token_size": hf_toys.CODES, "n_embed": 4}),
        "vision": ("CLIPVisionTower", {"image_size": 2 * hf_toys.GRID, "model_name": "siglip_large_patch16_384"}),
    }
    language = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "bfloat16",
        "vocab_size": hf_toys.WORDS,
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": language,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        **{f"{name}_config": {"cls": c, "model_type": name, "params": p} for name, (c, p) in parts.items()},
    }


def write(name: str) -> Callable[[Path], Path]:
    """Under the name that tells the two generations apart."""

    def into(folder: Path) -> Path:
        place = folder / name
        place.mkdir()
        state = {k: v.to(torch.bfloat16) for k, v in original(hf_toys.tiny_janus().state_dict()).items()}
        torch.save(state, place / "pytorch_model.bin")
        write_json(place / "config.json", config())
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": PADDING, "unk_token": "<unk>"}
        write_tokenizer(place, WORDS, names, add_bos_token=True, model_max_length=16384)
        about = {"add_special_token": False, "image_tag": "<image_placeholder>", "num_image_tokens": 576}
        processor = {**about, "processor_class": "VLChatProcessor", "sft_format": "deepseek"}
        write_json(place / "processor_config.json", processor)
        write_json(place / "preprocessor_config.json", {"image_processor_type": "VLMImageProcessor"})
        return place

    return into


def prompt(text: str, roles: tuple[str, str]) -> list[int]:
    """Of the authors' generation_inference.py: a turn of each, the second empty, and the begin of an image."""
    said = [roles[0], ":", *text.split(), roles[1], ":"]
    return [WORDS.index(word) for word in ("<s>", *said, BEGIN)]


def greedy(roles: tuple[str, str]) -> Callable[[Path, str], list[int]]:
    """transformers' own image loop on the same weights."""

    def tokens(folder: Path, text: str) -> list[int]:
        model = hf_toys.tiny_janus()
        model.load_state_dict(in_bfloat16(model.state_dict()))
        ids = torch.tensor([prompt(text, roles)])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
            guidance_scale=5,
            max_new_tokens=hf_toys.GRID**2,
        )
        return made[0, -(hf_toys.GRID**2) :].tolist()

    return tokens


_OWN, _SOURCE = {"guidance": 5.0}, "deepseek-ai/Janus generation_inference.py: cfg_weight, temperature"
FAMILIES = {
    "janus-pro-original": Published(write("Janus-Pro-1B"), PROMPTS, greedy(NEW), _OWN, _SOURCE),
    "janus-1.3b-original": Published(write("Janus-1.3B"), PROMPTS, greedy(OLD), _OWN, _SOURCE),
}
