"""Janus and Janus-Pro as their authors publish them (deepseek-ai/..., model type multi_modality), read as they are.

Only what draws is read: the language model, the VQ model, and what lies between them; not the tower that looks at
pictures. The names of the weights become those of transformers' JanusForConditionalGeneration; what the config leaves
to the authors' code (the widths of the VQ model) is read off the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from bozzetto.adapters.janus import JanusDrawing, JanusTarget, janus_prompt
from bozzetto.adapters.pictures import janus_pictures
from bozzetto.adapters.prompted import Prompt
from bozzetto.adapters.source import Ask, Hosted, Source, fixed_size
from bozzetto.autoencoders.kl16 import numbered
from bozzetto.autoencoders.llamagen_vq import MODULES
from bozzetto.checkpoints.folders import CONFIG
from bozzetto.checkpoints.load_settings import LoadSettings
from bozzetto.common.files import read_json
from bozzetto.common.hub import model_name
from bozzetto.common.images import size_of
from bozzetto.errors import UsageError

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
_ROLES = {"Janus-Pro": ("<|User|>", "<|Assistant|>"), "Janus-1.3B": ("User", "Assistant")}


def load_janus_original(source: Source, wanted: LoadSettings) -> Hosted:
    """Janus as its authors publish it."""
    source.refuse(wanted, "vqgan")
    state = renamed(source.tensors())
    config = janus_config(source, state)
    source.check(JanusDrawing, config)
    tokenizer = source.tokenizer(wanted, "its files are those of the model that it was trained from: fetch them too")
    network = source.network(JanusDrawing, wanted, config, state)
    target = JanusTarget(network)
    pictures = janus_pictures(network, config.vq_config.num_patches)
    fixed_size(source, wanted, size_of(pictures.config))
    return Hosted(target, pictures, _grammar(source, tokenizer), source.sampling("janus"), tokenizer)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that draw, under transformers' names."""
    found = {}
    for key, value in state.items():
        for theirs, ours in _NAMES:
            if match := re.fullmatch(theirs, key):
                name = match.expand(ours)
                break
        else:
            continue
        if name.startswith(_VQ):
            for part, other in MODULES:
                name = name.replace(part, other)
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
        if (kind := aligner.get("projector_type", "mlp_gelu")) != "mlp_gelu":
            raise UsageError(f"{place}: projector_type = {kind!r} is not allowed: 'mlp_gelu'")
        vq = _vq_config(state, int(aligner["n_embed"]), int(head["image_token_embed"]), int(aligner["depth"]))
        pixels, scale = int(config["vision_config"]["params"]["image_size"]), 2 ** (len(vq.channel_multiplier) - 1)
        language = {k: v for k, v in config["language_config"].items() if k not in _OF_FILES}
        vision = JanusVisionConfig(image_size=pixels, patch_size=scale, num_image_tokens=(pixels // scale) ** 2)
        text = LlamaConfig(**{**language, "tie_word_embeddings": True})  # the head of words is not read
        return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=True)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{place}: not Janus' own layout: {error!r}") from error


def _vq_config(state: Mapping[str, Tensor], width: int, head: int, depth: int) -> JanusVQVAEConfig:
    """width, depth: of the aligner; head: what the head reads."""
    levels = numbered(state, f"{_VQ}encoder.down.")
    widths = [len(state[f"{_VQ}encoder.down.{n}.block.0.conv1.weight"]) for n in range(levels)]
    base = len(state[f"{_VQ}encoder.conv_in.weight"])
    codes, dim = state[f"{_VQ}quantize.embedding.weight"].shape
    return JanusVQVAEConfig(
        embed_dim=dim,
        num_embeddings=codes,
        latent_channels=len(state[f"{_VQ}encoder.conv_out.weight"]),
        base_channels=base,
        channel_multiplier=[n // base for n in widths],
        num_res_blocks=numbered(state, f"{_VQ}encoder.down.0.block."),
        projection_dim=width,
        num_hidden_layers=depth,
        image_token_embed_dim=head,
    )


def _grammar(source: Source, tokenizer: Any) -> Ask:
    """The prompts of the authors' own code: one turn of a conversation, whose roles Janus-1.3B calls otherwise."""
    path = source.folder / "processor_config.json"
    said = read_json(path) if path.is_file() else {}
    begin = word(source, tokenizer, str(said.get("image_start_tag", _BEGIN)))
    padding = word(source, tokenizer, str(said.get("pad_tag", _PADDING)))
    known = next((roles for name, roles in _ROLES.items() if name in model_name(source.name)), None)
    newer = tokenizer.convert_tokens_to_ids("<|User|>") not in (None, tokenizer.unk_token_id)
    user, assistant = known or _ROLES["Janus-Pro" if newer else "Janus-1.3B"]

    def tokens(text: str) -> tuple[int, ...]:
        turn = f"{user}: {text.strip()}\n\n{assistant}:"
        return (tokenizer.bos_token_id, *tokenizer.encode(turn, add_special_tokens=False), begin)

    def ask(text: str, negative: str) -> Prompt:
        if negative:
            return Prompt(tokens(text), tokens(negative))
        return janus_prompt(list(tokens(text)), tokenizer.bos_token_id, begin, padding)

    return ask


def word(source: Source, tokenizer: Any, name: str) -> int:
    """The number of a word that has to be there."""
    found = tokenizer.convert_tokens_to_ids(name)
    if found is None or found == tokenizer.unk_token_id:
        raise UsageError(f"{source.name}: its tokenizer has no word {name!r}")
    return int(found)
