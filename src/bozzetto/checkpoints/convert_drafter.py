"""Published EAGLE drafters into drafter folders: of LlamaGen, and LANTERN's of Chameleon's models (arXiv 2410.03355),
Anole's and Lumina-mGPT's.

A layer of the latter is one of Chameleon's: a norm before the attention, a layer norm for each head's queries and keys,
rotary positions in one dimension that pair the halves of a head. They were trained on whole sequences, prompt and
picture, with the rows of the target's whole vocabulary. Pairs of a head are interleaved here: its rows change their
order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bozzetto.checkpoints.convert import check_out
from bozzetto.checkpoints.folders import CONFIG, EAGLE, LLAMAGEN, load_target, read_config, target_digest, write_model
from bozzetto.checkpoints.states import check_storable, read_state, types_in
from bozzetto.checkpoints.weights import OWN, check_fit, on_meta, open_tensors, weight_files
from bozzetto.common.checks import config_from
from bozzetto.common.files import read_json
from bozzetto.common.hub import fetched, model_name
from bozzetto.common.staging import staged_folder
from bozzetto.drafters.eagle import EagleConfig, EagleNet, Rows, eagle_config
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import LlamaGen

_EMBEDDING, _LAYER = "embed_tokens.weight", "layers.0.self_attn"


def convert_eagle(drafter: Path, model: Path, out: Path, store: str = OWN) -> str:
    """Turn a published EAGLE drafter of a LlamaGen target into a drafter folder; returns a line about it.

    drafter: a torch pickle (opened with weights_only=True) or safetensors file with `fc`, `layers.0...` and
    `embed_tokens.weight`; model: the folder of its target; store: see `save_state`. The published drafters hold the
    rows of the target's head in place of its embedding (LANTERN, arXiv 2410.03355): which of the two it is, is found by
    comparison. Those of text-conditional targets were trained behind the pairs of a caption, and get them.
    Raises UsageError for a file of another family, of another target, or with missing or misshapen keys.
    """
    check_out(out)
    state = _read_drafter(drafter, store)
    target: LlamaGen = load_target(model, LLAMAGEN)
    config = replace(eagle_config(target.config), ffn=_ffn_of(state))
    if target.config.captioned:
        config = replace(config, before="captions")
    if state["fc.weight"].shape != (config.dim, 2 * config.dim):
        wanted = (config.dim, 2 * config.dim)
        raise UsageError(
            f"{drafter}: a drafter of another target: fc.weight has shape {tuple(state['fc.weight'].shape)}, "
            f"this target wants {wanted}"
        )
    rows = state.pop(_EMBEDDING, None)
    if rows is not None:
        config = replace(config, embedding=_which_rows(drafter, rows.float(), target))
    notes = {"target_weights": target_digest(model), "target_name": read_config(model).get("name", model.name)}
    types = _write(drafter, config, state, notes, out, store)
    return (
        f"drafter of {config.dim} dimensions, tokens embedded by the target's {config.embedding} rows, weights as "
        f"{types}: {out}"
    )


def convert_lantern(drafter: Path, model: str | Path, out: Path, store: str = OWN) -> str:
    """Turn a published drafter of a Chameleon model into a drafter folder; returns a line about it.

    drafter: its folder (config.json, pytorch_model.bin), or the file of its weights; model: the target, a folder in the
    Hugging Face layout or a name on the hub; store: see `save_state`. Raises UsageError for a drafter of another
    target, told by the rows of the vocabulary that it holds, and for missing or misshapen keys.
    """
    check_out(out)
    state, target = _read_drafter(drafter, store), fetched(model)
    wanted = read_config(target)
    if wanted.get("model_type") != "chameleon":
        raise UsageError(
            f"{model}: model type {wanted.get('model_type')!r} has no published drafters (allowed: 'chameleon', which "
            "is Anole and Lumina-mGPT; a converted LlamaGen)"
        )
    config = _config(drafter, state, wanted, target / CONFIG)
    rows = state.pop(_EMBEDDING, None)
    if rows is not None:
        _check_rows(drafter, rows, target)
    name = model_name(model)
    types = _write(drafter, config, _interleaved(state, config), {"target_name": name}, out, store)
    return f"drafter of {config.dim} dimensions for {name}, behind the words of its prompts, weights as {types}: {out}"


def _write(
    drafter: Path, config: EagleConfig, state: Mapping[str, Tensor], notes: Mapping[str, str], out: Path, store: str
) -> str:
    """Write the drafter's folder; returns the types of its weights in words. Raises UsageError for keys that do not
    fit."""
    check_fit(on_meta(lambda: EagleNet(config)).state_dict(), state, drafter)
    with staged_folder(out) as folder:
        write_model(folder, EAGLE, config, state, {**notes, "converted": drafter.name}, store=store)
    return types_in(state, store)


def _read_drafter(path: Path, store: str) -> dict[str, Tensor]:
    """The weights of a published drafter, a file, or a folder that holds one. Raises UsageError for anything else."""
    files = weight_files(path) if path.is_dir() else [path]
    state = {key: value for file in files for key, value in read_state(file).items()}
    check_storable(path, state, store)
    if "fc.weight" not in state or "layers.0.self_attn.q_proj.weight" not in state:
        found = ", ".join(sorted(state)[:4]) or "nothing"
        raise UsageError(f"{path}: not an EAGLE drafter (wanted fc.weight, layers.0.self_attn...; found {found})")
    return state


def _ffn_of(state: Mapping[str, Tensor]) -> int:
    """Inner dimension of a drafter's layer; 0 where it has none, which does not fit."""
    gate = state.get("layers.0.mlp.gate_proj.weight")
    return 0 if gate is None or not gate.ndim else len(gate)


def _which_rows(path: Path, rows: Tensor, target: LlamaGen) -> Rows:
    """`head` or `tokens`: whose rows a drafter was trained with."""
    known: dict[Rows, Tensor] = {"head": target.output.weight, "tokens": target.tok_embeddings.weight}
    for name, own in known.items():
        if rows.shape == own.shape and torch.allclose(rows, own, rtol=1e-2, atol=1e-3):
            return name
    raise UsageError(f"{path}: a drafter of another target: {_EMBEDDING} holds neither its head's nor its token rows")


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
        "ffn": _ffn_of(state),
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
        of_heads = value.shape[1:] == (config.head_dim,) and len(value) > 0 and config.heads % len(value) == 0
        if key in (f"{_LAYER}.q_proj.weight", f"{_LAYER}.k_proj.weight") and value.shape == (config.dim, config.dim):
            found[key] = value.unflatten(0, (config.heads, config.head_dim))[:, order].flatten(0, 1)
        elif key.startswith((f"{_LAYER}.q_norm.", f"{_LAYER}.k_norm.")) and of_heads:
            found[key] = value.repeat_interleave(config.heads // len(value), 0)[:, order]
    return found


def _check_rows(drafter: Path, rows: Tensor, target: Path) -> None:
    """Raise UsageError unless these are the rows that the target embeds its words with."""
    for path in weight_files(target):
        if path.suffix != ".safetensors":
            continue
        with open_tensors(path) as content:
            for name in (key for key in content.keys() if key.endswith(_EMBEDDING)):  # noqa: SIM118  (not a dict)
                own = content.get_tensor(name).float()
                if own.shape == rows.shape and torch.allclose(rows.float(), own, rtol=1e-2, atol=1e-3):
                    return
                raise UsageError(
                    f"{drafter}: a drafter of another target: {_EMBEDDING} does not hold the rows of {target}"
                )
