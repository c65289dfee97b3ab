"""GLM-Image as published (zai-org/GLM-Image): a pipeline of diffusers, whose parts lie in folders of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, GlmImageProcessor, PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

import hf_toys
from hf_toys import CODES
from published import Published

PROMPTS = ("a red tulip", 'a small house with "lake" on it', "a dog")
PIXELS = 32  # one token, after a preview of 16 x 16
# Image tokens are the first words, then those that begin and end a picture; then text.
DIT = [f"<|dit_token_{i}|>" for i in range(CODES + 2)]
TEXT = [
    "<pad>",
    "<unk>",
    "<|image|>",
    "<sop>",
    "<eop>",
    "1",
    "16",
    *["a", "red", "tulip", "small", "house", "with", "on", "it", "dog", "lake"],
]
TEMPLATE = (
    "{%- for m in messages -%}{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for item in m.content -%}"
    f"{{%- if item.type == 'image' -%}}{DIT[CODES]}<|image|>{DIT[CODES + 1]}{{%- elif item.type == 'text' -%}}"
    "{{ item.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
)
INDEX = {
    "_class_name": "GlmImagePipeline",
    "_diffusers_version": "0.37.0.dev0",
    "processor": ["transformers", "GlmImageProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "ByT5Tokenizer"],
    "transformer": ["diffusers", "GlmImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
}
OWN = {"do_sample": True, "temperature": 0.9, "top_p": 0.75, "top_k": CODES + 4}  # all words of the head


def processor() -> GlmImageProcessor:
    words = DIT + TEXT
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    grids = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    names = {"bos_token": DIT[CODES], "eos_token": DIT[CODES + 1], "pad_token": "<pad>", "unk_token": "<unk>"}
    text = PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=grids, padding_side="left", **names)
    return GlmImageProcessor(GlmImageImageProcessorPil(), text, chat_template=TEMPLATE)


def write_encoder(folder: Path) -> None:
    """The first stage: bfloat16, in shards."""
    words = len(DIT) + len(TEXT)
    model = hf_toys.tiny_glm(
        words - CODES, pad=len(DIT), end=CODES + 1, layers=1, seed=7
    )  # whose greedy pictures hold many tokens
    model.generation_config.update(**OWN)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="16KB")


def write(folder: Path) -> Path:
    write_encoder(folder / "vision_language_encoder")
    processor().save_pretrained(folder / "processor")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4}
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        scaled = {"latents_mean": [0.1] * 4, "latents_std": [1.2] * 4}
        AutoencoderKL(**blocks, **kinds, **scaled, layers_per_block=1).save_pretrained(folder / "vae")
        sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8}
        sizes |= {"num_attention_heads": 2, "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8}
        made = GlmImageTransformer2DModel(**sizes, prior_vq_quantizer_codebook_size=CODES)
        made.save_pretrained(folder / "transformer")
        text = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    shift = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True, "time_shift_type": "linear"}
    FlowMatchEulerDiscreteScheduler(**shift).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    return folder


def greedy(folder: Path, text: str) -> list[int]:
    """transformers' generate, asked as diffusers' pipeline asks it but for the greediness."""
    encoder = folder / "vision_language_encoder"
    model = transformers.GlmImageForConditionalGeneration.from_pretrained(encoder, dtype=torch.float32).eval()
    said = [[{"role": "user", "content": [{"type": "text", "text": text}]}]]
    shape = {"target_h": PIXELS, "target_w": PIXELS}
    given = GlmImageProcessor.from_pretrained(folder / "processor").apply_chat_template(
        said, tokenize=True, return_dict=True, return_tensors="pt", **shape
    )
    made = model.generate(**given, max_new_tokens=258, do_sample=False)
    return made[0, given["input_ids"].shape[1] :][:257].tolist()


FAMILIES = {
    "glm-image": Published(
        write,
        PROMPTS,
        greedy,
        {"guidance": 1.0, "temperature": 0.9, "top_p": 0.75},
        "zai-org/GLM-Image, README.md (note) and its generation_config.json",
        options={"image_size": PIXELS},
    ),
}
