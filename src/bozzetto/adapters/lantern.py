"""LANTERN's published drafters of Chameleon's models (arXiv 2410.03355): Anole's and Lumina-mGPT's.

Their layer is one of Chameleon's: a norm before the attention, a layer norm for each head's queries and keys, rotary
positions in one dimension that pair the halves of a head. They were trained on whole sequences, prompt and picture,
with the rows of the target's whole vocabulary. Pairs of a head are interleaved here: its rows change their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.checkpoints.convert import check_out, types_in, write_folder
from bozzetto.checkpoints.eagle_store import EMBEDDING, FAMILY, ffn_of, read_drafter
from bozzetto.checkpoints.layout import weight_files
from bozzetto.checkpoints.store import (
    CONFIG,
    OWN,
    WEIGHTS,
    check_fit,
    open_tensors,
    read_config,
    save_state,
    write_config,
)
from bozzetto.common.checks import config_from
from bozzetto.common.files import read_json
from bozzetto.common.hub import fetched, model_name
from bozzetto.drafters.eagle import EagleConfig, EagleNet
from bozzetto.errors import UsageError

_LAYER = "layers.0.self_attn"


def convert_lantern(drafter: Path, model: str | Path, out: Path, store: str = OWN) -> str:
    """Turn a published drafter of a Chameleon model into a drafter folder; returns a line about it.

    drafter: its folder (config.json, pytorch_model.bin), or the file of its weights; model: the target, a folder in the
    Hugging Face layout or a name on the hub; store: see `store.save_state`. Raises UsageError for a drafter of another
    target, told by the rows of the vocabulary that it holds, and for missing or misshapen keys.
    """
    check_out(out)
    state, target = read_drafter(drafter, store), fetched(model)
    wanted = read_config(target)
    if wanted.get("model_type") != "chameleon":
        raise UsageError(
            f"{model}: model type {wanted.get('model_type')!r} has no published drafters (allowed: 'chameleon', which "
            "is Anole and Lumina-mGPT; a converted LlamaGen)"
        )
    config = _config(drafter, state, wanted, target / CONFIG)
    rows = state.pop(EMBEDDING, None)
    if rows is not None:
        _check_rows(drafter, rows, target)
    state = _interleaved(state, config)
    net = EagleNet(config)
    check_fit(net.state_dict(), state, drafter)
    notes = {"target_name": model_name(model), "converted": drafter.name}

    def write(folder: Path) -> None:
        save_state(folder / WEIGHTS, state, store=store)
        write_config(folder, {"family": FAMILY}, config, notes)

    write_folder(out, write)
    return (
        f"drafter of {config.dim} dimensions for {notes['target_name']}, behind the words of its prompts, weights as "
        f"{types_in(state, store)}: {out}"
    )


def _config(drafter: Path, state: Mapping[str, Tensor], target: Mapping[str, Any], source: Path) -> EagleConfig:
    """The drafter's shape: what its own config.json says, else that of its target."""
    own = (drafter if drafter.is_dir() else drafter.parent) / CONFIG
    said = {**target, **(read_json(own) if own.is_file() else {})}
    if said.get("rope_scaling"):
        raise UsageError(f"{own}: rope_scaling = {json.dumps(said['rope_scaling'])} is not allowed: null")
    rope = said.get("rope_parameters")
    theta = said.get("rope_theta") or (rope.get("rope_theta") if isinstance(rope, Mapping) else None)
    values = {
        "dim": said.get("hidden_size"),
        "heads": said.get("num_attention_heads"),
        "ffn": ffn_of(state),
        "vocab": said.get("vocab_size"),
        "grid": 1,
        "rope_base": 10000.0 if theta is None else theta,
        "norm_eps": said.get("rms_norm_eps", 1e-5),
        "before": "words",
        "first_norm": "layers.0.input_layernorm.weight" in state,
        "head_norms": f"{_LAYER}.q_norm.weight" in state,
    }
    config: EagleConfig = config_from(EagleConfig, values, own if own.is_file() else source)
    have, wanted = tuple(state["fc.weight"].shape), target.get("hidden_size")
    if have != (config.dim, 2 * config.dim) or wanted != config.dim:
        raise UsageError(
            f"{drafter}: a drafter of another target: fc.weight has shape {have}, its states {wanted} numbers"
        )
    return config


def _interleaved(state: Mapping[str, Tensor], config: EagleConfig) -> dict[str, Tensor]:
    """Queries and keys with the two halves of a head interleaved, and norms of groups of heads for every head."""
    half = config.head_dim // 2
    order = torch.arange(config.head_dim).view(2, half).t().flatten()  # 0, half, 1, half + 1, ...
    found = dict(state)
    for key, value in state.items():
        if key in (f"{_LAYER}.q_proj.weight", f"{_LAYER}.k_proj.weight") and value.shape == (config.dim, config.dim):
            found[key] = value.unflatten(0, (config.heads, config.head_dim))[:, order].flatten(0, 1)
        elif key.startswith((f"{_LAYER}.q_norm.", f"{_LAYER}.k_norm.")) and _of_heads(value, config):
            found[key] = value.repeat_interleave(config.heads // len(value), 0)[:, order]
    return found


def _of_heads(value: Tensor, config: EagleConfig) -> bool:
    """Whether it is of shape [groups of heads, head size]."""
    return value.ndim == 2 and len(value) > 0 and config.heads % len(value) == 0 and value.shape[1] == config.head_dim


def _check_rows(drafter: Path, rows: Tensor, target: Path) -> None:
    """Raise UsageError unless these are the rows that the target embeds its words with."""
    for path in weight_files(target):
        if path.suffix != ".safetensors":
            continue
        with open_tensors(path) as content:
            for name in (key for key in content.keys() if key.endswith(EMBEDDING)):  # noqa: SIM118  (not a dict)
                own = content.get_tensor(name).float()
                if own.shape == rows.shape and torch.allclose(rows.float(), own, rtol=1e-2, atol=1e-3):
                    return
                raise UsageError(
                    f"{drafter}: a drafter of another target: {EMBEDDING} does not hold the rows of {target}"
                )
