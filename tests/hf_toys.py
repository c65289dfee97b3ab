"""Models of other libraries with tiny random configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from bozzetto.adapters import chameleon as chameleon_family
from bozzetto.adapters import emu3 as emu3_family
from bozzetto.adapters import glm_image
from bozzetto.adapters import janus as janus_family
from bozzetto.adapters.prompted import Prompt, PromptedCodes

WORDS = 24  # of text, in every vocabulary
BEGIN, IMAGE, PADDING = 1, 2, 0  # begin of text, begin of image
GRID, CODES = 3, 8
LINE = 6  # the word that ends a line of Lumina-mGPT's
PROMPTS = ([BEGIN, 5, 9, IMAGE], [BEGIN, 7, IMAGE], [BEGIN, 11, 12, 13, 14, IMAGE])
NEGATIVE = [BEGIN, 20, IMAGE]
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VQ: dict[str, Any] = {"num_res_blocks": 1, "base_channels": 32, "embed_dim": 4, "latent_channels": 32}


def _ready(kind: Any, config: Any, seed: int = 0) -> Any:
    """A model with laws that are not flat."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "vqmodel" not in name:
                torch.nn.init.normal_(weight, std=0.25)
    return model.requires_grad_(False)


def tiny_janus() -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 6,
        "patch_size": 2,
        "projection_dim": 32,
        "num_image_tokens": GRID * GRID,
    }
    vq = {
        **_VQ,
        "num_embeddings": CODES,
        "channel_multiplier": [1, 1],
        "num_patches": GRID,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    }
    text = {**_TEXT, "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 64}
    config = transformers.JanusConfig(
        text_config={**text, "model_type": "llama"}, vision_config=vision, vq_config=vq, image_token_id=3
    )
    model = _ready(transformers.JanusForConditionalGeneration, config)
    model.generation_config.update(bos_token_id=BEGIN, pad_token_id=PADDING, eos_token_id=None)
    model.generation_config.generation_kwargs = {"boi_token_id": IMAGE}
    return model


def tiny_emu3() -> Any:
    vocabulary = {f"<|visual token {i:06d}|>": WORDS + i for i in range(CODES)}
    vocabulary |= {"<|extra_200|>": WORDS + CODES, "<image>": 3}
    vq = {
        "codebook_size": CODES,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
        "num_attention_heads": 1,
        "temporal_downsample_factor": 2,
    }
    text = {**_TEXT, "num_key_value_heads": 2, "vocab_size": WORDS + CODES + 1, "max_position_embeddings": 64}
    text |= {"pad_token_id": PADDING, "bos_token_id": BEGIN, "eos_token_id": WORDS - 1}
    config = transformers.Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary)
    return _ready(transformers.Emu3ForConditionalGeneration, config)


def tiny_chameleon() -> Any:
    letters = {f"IMGIMG{chr(ord('A') + i)}Z": WORDS + i for i in range(CODES)}
    vq = {**_VQ, "num_embeddings": CODES, "channel_multiplier": [1, 1], "resolution": 2 * GRID, "attn_resolutions": []}
    config = transformers.ChameleonConfig(
        **_TEXT,
        num_key_value_heads=4,
        vocab_size=WORDS + CODES,
        max_position_embeddings=64,
        vocabulary_map={**letters, "<image>": 3},
        vq_config=vq,
    )
    return _ready(transformers.ChameleonForConditionalGeneration, config)


GRIDS = ((1, 3), (2, 3))  # GLM-Image's preview and picture: as many tokens as the others draw


def tiny_glm(words: int = WORDS, pad: int = PADDING, end: int = CODES + 2, layers: int = 2, seed: int = 5) -> Any:
    """Image tokens are the first words, after them the two that begin and end a picture."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    text = {**_TEXT, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    text |= {
        "num_hidden_layers": layers,
        "vocab_size": words + CODES,
        "vision_vocab_size": CODES + 4,
        "pad_token_id": pad,
    }
    text |= {"eos_token_id": end, "max_position_embeddings": 512}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "patch_size": 16,
    }
    config = transformers.GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32},
        image_token_id=words + CODES - 1,
        image_start_token_id=CODES,
        image_end_token_id=end,
    )
    model = _ready(transformers.GlmImageForConditionalGeneration, config, seed)
    model.lm_head.weight[CODES:] = 0  # nothing but image tokens is likely, as in a trained model
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight *= 6  # where a token lies matters
    model.generation_config.update(eos_token_id=end, pad_token_id=pad)
    return model


def janus() -> PromptedCodes:
    """A tiny Janus that knows PROMPTS as labels 0, 1, 2."""
    target = janus_family.target(tiny_janus())
    for tokens in PROMPTS:
        target.add(janus_family.janus_prompt(tokens, BEGIN, IMAGE, PADDING))
    return target


def emu3() -> PromptedCodes:
    """A tiny Emu3 that knows PROMPTS as labels 0, 1, 2."""
    return _with_prompts(emu3_family.target(tiny_emu3(), GRID, GRID))


def chameleon() -> PromptedCodes:
    """A tiny Chameleon that knows PROMPTS as labels 0, 1, 2."""
    return _with_prompts(chameleon_family.target(tiny_chameleon(), GRID, GRID))


def lumina() -> PromptedCodes:
    """The tiny Chameleon with an end of line, that knows PROMPTS as labels 0, 1, 2."""
    return _with_prompts(chameleon_family.target(tiny_chameleon(), GRID, GRID, LINE))


def glm() -> PromptedCodes:
    """A tiny GLM-Image that knows PROMPTS as labels 0, 1, 2."""
    return _with_prompts(glm_image.target(tiny_glm(), *GRIDS))


def _with_prompts(target: PromptedCodes) -> PromptedCodes:
    for tokens in PROMPTS:
        target.add(Prompt(tuple(tokens), tuple(NEGATIVE)))
    return target


TARGETS = {"janus": janus, "emu3": emu3, "chameleon": chameleon, "lumina": lumina, "glm": glm}
LINED = ("emu3", "lumina")  # families whose rows of tokens have an end
