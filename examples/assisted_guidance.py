"""Assisted decoding under guidance: transformers' own changes the picture, ours does not.

transformers' guidance keeps a cache of its own for the unconditional sequence. Tokens that assisted decoding drafts and
takes back stay in that cache, so that guided laws are wrong from the first refused draft on, without any message. Here
a tiny Emu3 with random weights draws greedy pictures: plainly, with itself as the assistant, and by our loop.

    python examples/assisted_guidance.py
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import bozzetto

GRID, CODES, WORDS, TRIES = 4, 16, 24, 10
BEGIN, IMAGE = 1, 2


def tiny_emu3(seed: int) -> Any:
    """Random weights, 16 codes, 4 x 4 tokens."""
    words = {f"<|visual token {i:06d}|>": WORDS + i for i in range(CODES)}
    words |= {"<|extra_200|>": WORDS + CODES, "<image>": 3}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": WORDS + CODES + 1, "max_position_embeddings": 64}
    text |= {"pad_token_id": 0, "bos_token_id": BEGIN, "eos_token_id": WORDS - 1}
    pixels = {"codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32}
    pixels |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "num_attention_heads": 1}
    torch.manual_seed(seed)
    config = transformers.Emu3Config(text_config=text, vq_config=pixels, vocabulary_map=words)
    model = transformers.Emu3ForConditionalGeneration(config).eval()
    for weight in model.model.text_model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def allowed(_: int, seen: torch.Tensor) -> list[int]:
    """What the grid allows after a prompt of five: a code, or an end of line behind each row."""
    row_is_full = (len(seen) - 5) % (GRID + 1) == GRID
    return [WORDS + CODES] if row_is_full else list(range(WORDS, WORDS + CODES))


def main() -> None:
    transformers.logging.set_verbosity_error()
    differ = {"transformers, assisted": 0, "bozzetto, jacobi": 0}
    for seed in range(TRIES):
        model, prompt = tiny_emu3(seed), torch.tensor([[BEGIN, 5, 9, 7, IMAGE]])
        length = GRID * (GRID + 1)
        options: dict[str, Any] = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
        options |= {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[BEGIN, IMAGE]])}
        options |= {"attention_mask": torch.ones_like(prompt)}
        plain = model.generate(prompt, prefix_allowed_tokens_fn=allowed, **options)
        assisted = model.generate(prompt, prefix_allowed_tokens_fn=allowed, assistant_model=model, **options)
        ours = model.generate(prompt, custom_generate=bozzetto.generate_fn(GRID, GRID), **options)
        differ["transformers, assisted"] += int(not torch.equal(plain, assisted))
        differ["bozzetto, jacobi"] += int(not torch.equal(plain, ours))
    for name, count in differ.items():
        print(f"{name}: {count} of {TRIES} pictures differ from plain decoding")


if __name__ == "__main__":
    main()
