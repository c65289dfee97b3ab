"""Folders that hold a drafter of codes: config.json (family: one of drafters/trained.py), model.safetensors. A drafter
names the target it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bozzetto.checkpoints.convert import check_out, check_storable, read_state, types_in, write_folder
from bozzetto.checkpoints.layout import weight_files
from bozzetto.checkpoints.store import (
    CONFIG,
    OWN,
    WEIGHTS,
    check_fit,
    check_target,
    choose,
    load_llamagen,
    load_module,
    read_config,
    save_state,
    target_digest,
    write_config,
)
from bozzetto.common.checks import config_from
from bozzetto.drafters.eagle import EagleNet, Rows, eagle_config
from bozzetto.drafters.trained import TRAINED, family_of
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig

FAMILY = "eagle"
EMBEDDING = "embed_tokens.weight"


def save_drafter(
    folder: str | Path,
    net: nn.Module,
    target: Path,
    notes: dict[str, Any],
    compact: bool = False,
    store: str = "float16",
) -> None:
    """Write a drafter folder for the target in the model folder `target`. compact, store: see `save_state`."""
    folder = Path(folder)
    save_state(folder / WEIGHTS, net.state_dict(), compact, store)
    write_config(folder, {"family": family_of(net)}, net.config, {"target_weights": target_digest(target), **notes})


def load_drafter(folder: str | Path, family: str, target: LlamaGenConfig, weights: str) -> Any:
    """Read a drafter of this family for a target with this config and this digest of its weights; float32, in
    evaluation mode.

    Raises UsageError for another family, another target, or a shape that is not the target's.
    """
    folder = Path(folder)
    content, source = read_config(folder), folder / CONFIG
    kind = choose(content, "family", {family: TRAINED[family]}, source)
    config = config_from(kind.config, content.get("config"), source)
    before = getattr(config, "before", "nothing")
    allowed = ("nothing", "captions" if isinstance(target, LlamaGenConfig) else "words")
    if before not in allowed:
        raise UsageError(f"{folder}: a drafter of another target: before = {before!r} (allowed: {', '.join(allowed)})")
    if before == "words":  # it knows the whole vocabulary, and places in a line
        config = replace(config, vocab=target.vocab, grid=target.grid)
    check_target(folder, content, config, target, weights)
    return load_module(lambda: kind.net(config), folder / WEIGHTS)


def load_eagle(folder: str | Path, target: LlamaGenConfig, weights: str) -> EagleNet:
    """`load_drafter` of family eagle."""
    return load_drafter(folder, FAMILY, target, weights)


def convert_eagle(drafter: Path, model: Path, out: Path, store: str = OWN) -> str:
    """Turn a published EAGLE drafter of a LlamaGen target into a drafter folder; returns a line about it.

    drafter: a torch pickle (opened with weights_only=True) or safetensors file with `fc`, `layers.0...` and
    `embed_tokens.weight`; model: the folder of its target; store: see `save_state`. The published drafters hold the
    rows of the target's head in place of its embedding (LANTERN, arXiv 2410.03355): which of the two it is, is found by
    comparison. Those of text-conditional targets were trained behind the pairs of a caption, and get them.
    Raises UsageError for a file of another family, of another target, or with missing or misshapen keys.
    """
    check_out(out)
    state = read_drafter(drafter, store)
    target = load_llamagen(model)
    config = replace(eagle_config(target.config), ffn=ffn_of(state))
    if target.config.captioned:
        config = replace(config, before="captions")
    if state["fc.weight"].shape != (config.dim, 2 * config.dim):
        wanted = (config.dim, 2 * config.dim)
        raise UsageError(
            f"{drafter}: a drafter of another target: fc.weight has shape {tuple(state['fc.weight'].shape)}, "
            f"this target wants {wanted}"
        )
    rows = state.pop(EMBEDDING, None)
    if rows is not None:
        config = replace(config, embedding=_which_rows(drafter, rows.float(), target))
    net = EagleNet(config)
    check_fit(net.state_dict(), state, drafter)
    net.load_state_dict(state, assign=True)  # in their own types
    notes = {"target_name": read_config(model).get("name", model.name), "converted": drafter.name}
    write_folder(out, lambda folder: save_drafter(folder, net, model, notes, store=store))
    return (
        f"drafter of {config.dim} dimensions, tokens embedded by the target's {config.embedding} rows, weights as "
        f"{types_in(state, store)}: {out}"
    )


def read_drafter(path: Path, store: str) -> dict[str, Tensor]:
    """The weights of a published drafter, a file, or a folder that holds one. Raises UsageError for anything else."""
    files = weight_files(path) if path.is_dir() else [path]
    state = {key: value for file in files for key, value in read_state(file).items()}
    check_storable(path, state, store)
    if "fc.weight" not in state or "layers.0.self_attn.q_proj.weight" not in state:
        found = ", ".join(sorted(state)[:4]) or "nothing"
        raise UsageError(f"{path}: not an EAGLE drafter (wanted fc.weight, layers.0.self_attn...; found {found})")
    return state


def ffn_of(state: Mapping[str, Tensor]) -> int:
    """Inner dimension of a drafter's layer; 0 where it has none, which does not fit."""
    gate = state.get("layers.0.mlp.gate_proj.weight")
    return 0 if gate is None or not gate.ndim else len(gate)


def _which_rows(path: Path, rows: Tensor, target: LlamaGen) -> Rows:
    """`head` or `tokens`: whose rows a drafter was trained with."""
    known: dict[Rows, Tensor] = {"head": target.output.weight, "tokens": target.tok_embeddings.weight}
    for name, own in known.items():
        if rows.shape == own.shape and torch.allclose(rows, own, rtol=1e-2, atol=1e-3):
            return name
    raise UsageError(f"{path}: a drafter of another target: {EMBEDDING} holds neither its head's nor its token rows")
