"""Checkpoints of transformers by model type: what reads those that are read here, and what is said of others. Nothing
heavy is imported for either."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bozzetto.common.hub import on_hub

NEXTSTEP = "nextstep"
# Module of this folder and function in it, from a Source and LoadSettings to a Hosted.
FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "janus": ("janus", "load"),
        "multi_modality": ("janus", "load_original"),
        "emu3": ("emu3", "load"),
        "chameleon": ("chameleon", "load"),
        NEXTSTEP: ("nextstep", "load"),
        "glm_image": ("glm_image", "load"),
    }
)
_DIFFUSION = "its pictures come from a diffusion process, not from image tokens: there is nothing to draft here"
_SCALES = "it draws whole scales of a picture at once (about ten passes), not token by token: nothing to draft here"


@dataclass(frozen=True)
class _Refusal:
    """kind, name: patterns of config.json's model_type and of what the model is called, one of which fits; why: what is
    said, with the way out; without: a part of config.json whose absence tells it from what is read."""

    why: str
    kind: str = ""
    name: str = ""
    without: str = ""

    def fits(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether this is said of the model."""
        kind = str(config.get("model_type", ""))
        if self.kind and re.fullmatch(self.kind, kind):
            return not self.without or self.without not in config
        return bool(self.name and re.search(self.name, name))


_REFUSALS = (
    _Refusal("Emu3.5 is not read here: another tokenizer and templates of its own", name=r"Emu3\.5"),
    _Refusal(
        "these are the files of its authors' own code, which is not run here: take BAAI/Emu3-Gen-hf, the same weights "
        "as transformers reads them",
        kind="Emu3",
        name="^BAAI/Emu3-Gen(@|$)",
    ),
    _Refusal(f"JanusFlow is not read here: {_DIFFUSION}", kind="multi_modality", without="gen_head_config"),
    _Refusal(_DIFFUSION, kind="hunyuan_image_3_moe|bagel|showo2?|show_o2?|omnigen2?|sensenova.*|lance|transfusion"),
    _Refusal(_DIFFUSION, name=r"(?i)(^|/|--)(HunyuanImage-3|BAGEL|Show-o|OmniGen|SenseNova-U1|JanusFlow)"),
    _Refusal(_SCALES, kind="infinity|vargpt.*|var"),
    _Refusal(_SCALES, name=r"FoundationVision(/|--)(Infinity|var)\b"),
    _Refusal(
        "these are the files of its authors' own code, which is not run here: take leloy/Anole-7b-v0.1-hf, the same "
        "weights as transformers reads them",
        name=r"(^|/|--)Anole-7b-v0\.1(?!-hf)\b",
    ),
    _Refusal(
        "a LlamaGen checkpoint is converted first: bozzetto convert llamagen --gpt FILE (or this folder) --vq "
        "vq_ds16_t2i.pt (of classes: vq_ds16_c2i.pt) --out NEW",
        name=r"(?i)llamagen",
    ),
)


def way_out(name: str, config: Mapping[str, Any]) -> str:
    """What is said of a checkpoint that is known and not read; "" for others. name: as it was asked for; config: what
    its config.json holds, nothing where it has none. What is read is read by any name."""
    called = "" if config.get("model_type") in FAMILIES else _called(name)
    return next((refusal.why for refusal in _REFUSALS if refusal.fits(called, config)), "")


def _called(name: str) -> str:
    """A name on the hub, or the folder's own of a path: the folders around it say nothing of it but in the hub's
    cache."""
    if on_hub(name):
        return name
    parts = Path(name).parts or ("",)
    return next((part for part in parts if re.fullmatch(r"models--.+--.+", part)), parts[-1])
