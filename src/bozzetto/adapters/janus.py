"""Janus and Janus-Pro (Wu et al., arXiv 2410.13848; Chen et al., arXiv 2501.17811), as transformers holds them and as
their authors publish them (deepseek-ai/..., model type multi_modality).

Image tokens have an embedding of their own (a codebook entry through an aligner) and a head of their own; the decoder
between the two is the language model. Without a prompt: the same prompt with all tokens but the first and the
begin-of-image one replaced by padding, as the model's own image loop does.

Of the authors' files only what draws is read: the language model, the VQ model, and what lies between them; not the
tower that looks at pictures. The names of the weights become those of transformers' JanusForConditionalGeneration; what
the config leaves to the authors' code (the widths of the VQ model) is read off the shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, LlamaConfig

from bozzetto.adapters.pictures import HostedPictures, PictureConfig
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.adapters.source import (
    Ask,
    Hosted,
    Source,
    check_word,
    fixed_size,
    numbers,
    prompts_of,
    without,
    word_number,
)
from bozzetto.autoencoders.decoder import renamed, renamed_whole
from bozzetto.autoencoders.llamagen_vq import MODULES, hosted_config, infer_config
from bozzetto.checkpoints.folders import CONFIG
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.common.files import read_json
from bozzetto.common.hub import model_name
from bozzetto.errors import UsageError, require

# Names of weights, theirs and transformers'; a name that none of these begins or that becomes "" is not needed.
_NAMES = (
    (r"language_model\.model\.(.*)", r"model.language_model.\1"),
    (r"gen_vision_model\.quantize\.codebook_used", ""),
    (r"gen_vision_model\.(.*)", r"model.vqmodel.\1"),
    (r"gen_aligner\.layers\.0\.(.*)", r"model.generation_aligner.fc1.\1"),
    (r"gen_aligner\.layers\.(\d+)\.(.*)", r"model.generation_aligner.hidden_layers.\1.\2"),
    (r"gen_head\.output_mlp_projector\.(.*)", r"model.generation_head.proj_out.\1"),
    (r"gen_head\.vision_head\.(.*)", r"model.generation_head.vision_head.\1"),
    (r"gen_embed\.(.*)", r"model.generation_embeddings.\1"),
)
_OF_FILES = ("model_type", "torch_dtype", "dtype")  # what is said of the files, not of the network
_VQ, _HIDDEN = "model.vqmodel.", "generation_aligner.hidden_layers."
_BEGIN, _PADDING = "<begin_of_image>", "<\uff5c\u2581pad\u2581\uff5c>"
_LOOKING = ("vision_model", "aligner", "vqmodel.encoder", "vqmodel.quant_conv")
JanusDrawing = without(JanusForConditionalGeneration, *_LOOKING)
_ROLES = {"Janus-Pro": ("<|User|>", "<|Assistant|>"), "Janus-1.3B": ("User", "Assistant")}


def target(model: Any) -> PromptedCodes:
    """model: transformers JanusForConditionalGeneration (JanusDrawing will do)."""
    table = torch.arange(model.config.vq_config.num_embeddings, device=model.model.language_model.device)[None]
    with torch.no_grad():
        rows = model.prepare_embeddings_for_image_generation(table)[0]
    length = model.config.vision_config.num_image_tokens
    return PromptedCodes(model.model.language_model, rows, model.model.generation_head, length)


def janus_prompt(tokens: Sequence[int], begin_text: int, begin_image: int, padding: int) -> Prompt:
    """tokens: of the prompt, the begin-of-image one last."""
    kept = (begin_text, begin_image)
    return Prompt(tuple(tokens), tuple(token if token in kept else padding for token in tokens))


def _pictures(model: Any, grid: int) -> HostedPictures:
    """The model's own decoder."""
    vq = model.model.vqmodel.float()
    scale = 2 ** (len(model.config.vq_config.channel_multiplier) - 1)
    codebook = F.normalize(vq.quantize.embedding.weight.detach(), dim=-1)
    config = PictureConfig(grid, grid, scale)
    return HostedPictures(config, codebook, lambda codes: (vq.decode(codes.flatten(1)) + 1) / 2)


def load(source: Source, wanted: LoadSettings) -> Hosted:
    """Janus as transformers' conversion lays it out."""
    wanted.refuse(f"{source.name} has its own", "tokenizer", "vqgan")
    source.check(JanusDrawing)
    processor, network = source.processor(), source.network(JanusDrawing, wanted)
    drawn = target(network)
    grid, patches = math.isqrt(drawn.length), network.config.vq_config.num_patches
    if not grid * grid == patches * patches == drawn.length > 0:
        what = f"num_image_tokens = {drawn.length} is not allowed: the square of {patches}, image_size // patch_size"
        raise UsageError(f"{source.folder / CONFIG}: {what}")
    first, padding = (_known(source, network, processor.tokenizer, name) for name in ("bos_token_id", "pad_token_id"))
    pictures = _pictures(network, grid)
    fixed_size(source, wanted, pictures.config.size)
    begin = processor.tokenizer.convert_tokens_to_ids(processor.image_start_token)

    def tokens(text: str) -> list[int]:
        if processor.chat_template:
            said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            text = processor.apply_chat_template(said, add_generation_prompt=True)
        return numbers(processor(text=text, generation_mode="image", return_tensors="pt"))

    ask = prompts_of(tokens, lambda given: janus_prompt(given, first, begin, padding).without)
    return Hosted(drawn, pictures, ask, source.sampling(), processor.tokenizer)


def _known(source: Source, network: Any, tokenizer: Any, name: str) -> int:
    """A token's number as generation_config.json has it, else the tokenizer. Raises UsageError for one that is none."""
    said = getattr(network.generation_config, name)
    found = getattr(tokenizer, name) if said is None else said
    where = f"{source.folder / 'generation_config.json'}: {name}"
    return check_word(where, found, network.config.text_config.vocab_size)


def load_original(source: Source, wanted: LoadSettings) -> Hosted:
    """Janus as its authors publish it."""
    wanted.refuse(f"{source.name} has its own", "vqgan")
    state = drawing_part(source.tensors())
    config = janus_config(source, state)
    source.check(JanusDrawing, config)
    tokenizer = source.tokenizer(wanted, "its files are those of the model that it was trained from: fetch them too")
    network = source.network(JanusDrawing, wanted, config, state)
    drawn = target(network)
    pictures = _pictures(network, config.vq_config.num_patches)
    fixed_size(source, wanted, pictures.config.size)
    return Hosted(drawn, pictures, _grammar(source, tokenizer), source.sampling(), tokenizer)


def drawing_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that draw, under transformers' names."""
    found = {}
    for key, value in state.items():
        name = renamed_whole(key, _NAMES) or ""
        if name.startswith(_VQ):
            name = renamed(name, MODULES)
        if _HIDDEN in name:  # a linear layer follows an activation: 2, 4, ... are hidden layers 0, 1, ...
            name = re.sub(r"hidden_layers\.(\d+)", lambda m: f"hidden_layers.{int(m[1]) // 2 - 1}", name)
        if name:
            found[name] = value
    return found


def janus_config(source: Source, state: Mapping[str, Tensor]) -> JanusConfig:
    """transformers' config from theirs and from the weights. Raises UsageError naming what is missing or unknown."""
    config, place = source.config, source.folder / CONFIG
    try:
        aligner, head = config["gen_aligner_config"]["params"], config["gen_head_config"]["params"]
        kind = aligner.get("projector_type", "mlp_gelu")
        require(kind == "mlp_gelu", f"{place}: projector_type", kind, "'mlp_gelu'")
        own = {k.removeprefix(_VQ): value for k, value in state.items() if k.startswith(_VQ)}
        shape = infer_config({renamed(key, MODULES, back=True): value for key, value in own.items()})
        aligned = {"projection_dim": int(aligner["n_embed"]), "num_hidden_layers": int(aligner["depth"])}
        read = {"image_token_embed_dim": int(head["image_token_embed"])}
        vq = hosted_config(shape, num_embeddings=shape.codes, **aligned, **read)
        pixels, scale = int(config["vision_config"]["params"]["image_size"]), 2 ** (len(vq.channel_multiplier) - 1)
        language = {k: v for k, v in config["language_config"].items() if k not in _OF_FILES}
        vision = JanusVisionConfig(image_size=pixels, patch_size=scale, num_image_tokens=(pixels // scale) ** 2)
        text = LlamaConfig(**{**language, "tie_word_embeddings": True})  # the head of words is not read
        return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=True)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{place}: not Janus' own layout: {error!r}") from error


def _grammar(source: Source, tokenizer: Any) -> Ask:
    """The prompts of the authors' own code: one turn of a conversation, whose roles Janus-1.3B calls otherwise."""
    path = source.folder / "processor_config.json"
    said = read_json(path) if path.is_file() else {}

    def word(key: str, usual: str) -> int:
        name = str(said.get(key, usual))
        return word_number(tokenizer, name, f"{source.name}: its tokenizer has no word {name!r}")

    begin = word("image_start_tag", _BEGIN)
    padding = word("pad_tag", _PADDING)
    known = next((roles for name, roles in _ROLES.items() if name in model_name(source.name)), None)
    newer = tokenizer.convert_tokens_to_ids("<|User|>") not in (None, tokenizer.unk_token_id)
    user, assistant = known or _ROLES["Janus-Pro" if newer else "Janus-1.3B"]

    def tokens(text: str) -> tuple[int, ...]:
        turn = f"{user}: {text.strip()}\n\n{assistant}:"
        return (tokenizer.bos_token_id, *tokenizer.encode(turn, add_special_tokens=False), begin)

    first = tokenizer.bos_token_id
    return prompts_of(tokens, lambda given: janus_prompt(given, first, begin, padding).without)
