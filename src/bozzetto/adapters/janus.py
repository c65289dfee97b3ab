"""Janus and Janus-Pro (Wu et al., arXiv 2410.13848; Chen et al., arXiv 2501.17811) as transformers holds them.

Image tokens have an embedding of their own (a codebook entry through an aligner) and a head of their own; the decoder
between the two is the language model. Without a prompt: the same prompt with all tokens but the first and the
begin-of-image one replaced by padding, as the model's own image loop does.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from bozzetto.adapters.pictures import janus_pictures
from bozzetto.adapters.prompted import Prompt, PromptedCodes, Shape
from bozzetto.adapters.source import Hosted, Source, fixed_size, numbers
from bozzetto.checkpoints.folders import CONFIG
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.common.images import size_of
from bozzetto.errors import UsageError, brief


class JanusDrawing(JanusForConditionalGeneration):
    """Without what looks at pictures: a fifth of Janus-Pro-1B's weights."""

    # A list: transformers 5.0 adds another one to it.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^model\.(vision_model|aligner|vqmodel\.(encoder|quant_conv))\."]

    def __init__(self, config: Any):
        super().__init__(config)
        del self.model.vision_model, self.model.aligner, self.model.vqmodel.encoder, self.model.vqmodel.quant_conv


class JanusTarget(PromptedCodes):
    """model: transformers JanusForConditionalGeneration (JanusDrawing will do) in evaluation mode, in the dtype to
    compute in."""

    @torch.no_grad()
    def __init__(self, model: Any):
        body, self.head = model.model.language_model, model.model.generation_head
        text, vocab = body.config, model.config.vq_config.num_embeddings
        length = model.config.vision_config.num_image_tokens
        table = torch.arange(vocab, device=body.device)[None]
        rows = model.prepare_embeddings_for_image_generation(table)[0]
        shape = Shape(vocab, length, text.hidden_size)
        super().__init__(body, text.num_hidden_layers, rows, shape, text.max_position_embeddings)
        self.word_rows = body.get_input_embeddings()

    def words(self, tokens: Tensor) -> Tensor:
        return self.word_rows(tokens)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        return self.head(hidden).float().to(hidden.device)


def janus_prompt(tokens: list[int], begin_text: int, begin_image: int, padding: int) -> Prompt:
    """tokens: of the prompt, the begin-of-image one last."""
    kept = (begin_text, begin_image)
    return Prompt(tuple(tokens), tuple(token if token in kept else padding for token in tokens))


def load_janus(source: Source, wanted: LoadSettings) -> Hosted:
    """Janus as transformers' conversion lays it out."""
    source.refuse(wanted, "tokenizer", "vqgan")
    source.check(JanusDrawing)
    processor, network = source.processor(), source.network(JanusDrawing, wanted)
    target = JanusTarget(network)
    grid, patches = math.isqrt(target.length), network.config.vq_config.num_patches
    if not grid * grid == patches * patches == target.length > 0:
        what = f"num_image_tokens = {target.length} is not allowed: the square of {patches}, image_size // patch_size"
        raise UsageError(f"{source.folder / CONFIG}: {what}")
    first, padding = (_known(source, network, processor.tokenizer, name) for name in ("bos_token_id", "pad_token_id"))
    pictures = janus_pictures(network, grid)
    fixed_size(source, wanted, size_of(pictures.config))
    begin = processor.tokenizer.convert_tokens_to_ids(processor.image_start_token)

    def tokens(text: str) -> list[int]:
        if processor.chat_template:
            said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            text = processor.apply_chat_template(said, add_generation_prompt=True)
        return numbers(processor(text=text, generation_mode="image", return_tensors="pt"))

    def ask(text: str, negative: str) -> Prompt:
        given = tokens(text)
        if negative:
            return Prompt(tuple(given), tuple(tokens(negative)))
        return janus_prompt(given, first, begin, padding)

    return Hosted(target, pictures, ask, source.sampling("janus"), processor.tokenizer)


def _known(source: Source, network: Any, tokenizer: Any, name: str) -> int:
    """A token's number as generation_config.json has it, else the tokenizer. Raises UsageError for one that is none."""
    said = getattr(network.generation_config, name)
    found = getattr(tokenizer, name) if said is None else said
    if type(found) is not int or not 0 <= found < network.config.text_config.vocab_size:
        file = source.folder / "generation_config.json"
        raise UsageError(f"{file}: {name} = {brief(found)} is not allowed: a token's number")
    return found
