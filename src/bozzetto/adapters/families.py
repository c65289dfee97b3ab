"""Checkpoints of transformers by model type: what reads those that are read here, and what is said of others. Nothing
heavy is imported for either."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bozzetto.common.hub import on_hub

NEXTSTEP, _JANUS = "nextstep", "multi_modality"
# Module of this folder and function in it, from a Source and LoadSettings to a Hosted.
FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "janus": ("janus", "load"),
        _JANUS: ("janus", "load_original"),
        "emu3": ("emu3", "load"),
        "chameleon": ("chameleon", "load"),
        NEXTSTEP: ("nextstep", "load"),
        "glm_image": ("glm_image", "load"),
    }
)
_DIFFUSION = "its pictures come from a diffusion process, not from image tokens: there is nothing to draft here"
_SCALES = "it draws whole scales of a picture at once (about ten passes), not token by token: nothing to draft here"
_JANUS_FLOW = "multi_modality without gen_head_config"  # as we call this kind
# Patterns of config.json's model_type and of what the model is called, one of which fits ("": none does), and what is
# then said, with the way out. The first row counts.
_REFUSALS = (
    ("", r"Emu3\.5", "Emu3.5 is not read here: another tokenizer and templates of its own"),
    (
        "Emu3",
        "^BAAI/Emu3-Gen(@|$)",
        "these are the files of its authors' own code, which is not run here: take BAAI/Emu3-Gen-hf, the same weights "
        "as transformers reads them",
    ),
    (_JANUS_FLOW, "", f"JanusFlow is not read here: {_DIFFUSION}"),
    ("hunyuan_image_3_moe|bagel|showo2?|show_o2?|omnigen2?|sensenova.*|lance|transfusion", "", _DIFFUSION),
    ("", r"(?i)(^|/|--)(HunyuanImage-3|BAGEL|Show-o|OmniGen|SenseNova-U1|JanusFlow)", _DIFFUSION),
    ("infinity|vargpt.*|var", r"FoundationVision(/|--)(Infinity|var)\b", _SCALES),
    (
        "",
        r"(^|/|--)Anole-7b-v0\.1(?!-hf)\b",
        "these are the files of its authors' own code, which is not run here: take leloy/Anole-7b-v0.1-hf, the same "
        "weights as transformers reads them",
    ),
    (
        "",
        r"(?i)llamagen",
        "a LlamaGen checkpoint is converted first: bozzetto convert llamagen --gpt FILE (or this folder) --vq "
        "vq_ds16_t2i.pt (of classes: vq_ds16_c2i.pt) --out NEW",
    ),
)


def way_out(name: str, config: Mapping[str, Any]) -> str:
    """What is said of a checkpoint that is known and not read; "" for others. name: as it was asked for; config: what
    its config.json holds, nothing where it has none. What is read is read by any name."""
    kind = str(config.get("model_type", ""))
    called = "" if kind in FAMILIES else _called(name)
    if kind == _JANUS and "gen_head_config" not in config:
        kind = _JANUS_FLOW
    for kinds, names, why in _REFUSALS:
        if (kinds and re.fullmatch(kinds, kind)) or (names and re.search(names, called)):
            return why
    return ""


def _called(name: str) -> str:
    """A name on the hub, or the folder's own of a path: the folders around it say nothing of it but in the hub's
    cache."""
    if on_hub(name):
        return name
    parts = Path(name).parts or ("",)
    return next((part for part in parts if re.fullmatch(r"models--.+--.+", part)), parts[-1])
