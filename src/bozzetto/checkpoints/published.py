"""How the authors of known families sample their models: the numbers of their own commands, with where they stand.
(Families that are read by adapter files have theirs there.)

The temperature is 1 and nothing is filtered where a command says nothing of it. Sources are public repositories and the
files in them; they were read there, no weights were run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from bozzetto.checkpoints.own_sampling import OwnSampling, with_stated
from bozzetto.common.files import read_json

_QUALITY = " masterpiece, film grained, best quality."
_POOR = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
# Guidance of the published figures (FID); the demonstration takes 4 and top-k 2000.
_LLAMAGEN = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}
MAR_SAMPLER = {"steps": 100, "passes": 256, "guidance_schedule": "linear"}  # of all sizes
_MAR = {"B": 2.9, "L": 3.0, "H": 3.2}
_FID = "FoundationVision/LlamaGen, GETTING_STARTED.md (sampling for FID)"
_MAR_USUAL = OwnSampling(**MAR_SAMPLER, source="LTH14/mar, README.md (evaluation)")  # type: ignore[arg-type]


PUBLISHED: Mapping[str, OwnSampling] = MappingProxyType(
    {
        "janus": OwnSampling(5.0, source="deepseek-ai/Janus, generation_inference.py"),
        "emu3": OwnSampling(
            3.0, top_k=2048, negative_prompt=_POOR, suffix=_QUALITY, source="baaivision/Emu3, image_generation.py"
        ),
        # Meta's inference code, which Anole's carries: with a prompt and no picture in it, guidance is the one of text.
        "chameleon": OwnSampling(
            3.0,
            0.7,
            top_p=0.9,
            source="GAIR-NLP/anole, chameleon/inference/chameleon.py (of facebookresearch)",
        ),
        "lumina-mgpt": OwnSampling(4.0, top_k=2000, source="Alpha-VLLM/Lumina-mGPT, README.md"),
        # Guidance is the second stage's: the tokens are drawn without.
        "glm-image": OwnSampling(1.0, 0.9, top_p=0.75, source="zai-org/GLM-Image, README.md (note)"),
        # The first README of the repository takes 50 steps, a last one of 0.04 and a norm: it is another sampler.
        "nextstep-1": OwnSampling(
            7.5, steps=28, negative_prompt=_POOR, suffix=_QUALITY, source="stepfun-ai/NextStep-1-Large, model page"
        ),
        "nextstep-1.1": OwnSampling(7.5, steps=28, negative_prompt=_POOR, source="stepfun-ai/NextStep-1.1, model page"),
        **{f"llamagen-c2i-{size}": OwnSampling(guidance, source=_FID) for size, guidance in _LLAMAGEN.items()},
        "llamagen-t2i": OwnSampling(
            7.5, top_k=1000, source="FoundationVision/LlamaGen, autoregressive/sample/sample_t2i.py"
        ),
        **{f"mar-{size}": replace(_MAR_USUAL, guidance=guidance) for size, guidance in _MAR.items()},
    }
)
# Of which a generation_config.json may say more, and of what: other numbers in it are of text, which Janus writes too
# and Chameleon mostly. (It was made for a copy of one model; the table is of the family.)
STATED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "janus": ("guidance",),
        "emu3": ("guidance", "temperature", "top_k", "top_p"),
        "glm-image": ("temperature", "top_k", "top_p"),
    }
)


def published(family: str) -> OwnSampling:
    """What is known of a family ("llamagen-c2i-B", "mar-H", "emu3"); the usual values of one that is not."""
    return PUBLISHED.get(family, OwnSampling())


def sampling_of(family: str, folder: Path) -> OwnSampling:
    """What is known of a family, with what the folder's generation_config.json says of pictures: the file itself, for
    transformers puts its own usual values (top-k 50) beside. Raises UsageError for a bad value in it."""
    own, file = published(family), folder / "generation_config.json"
    if family not in STATED or not file.exists():
        return own
    return with_stated(own, STATED[family], read_json(file), file)


def family_of(config: Mapping[str, object]) -> str:
    """What the table calls the family of a transformers config.json."""
    kind, names = config.get("model_type"), config.get("architectures")
    if kind == "chameleon" and isinstance(names, list) and any("XLLMX" in str(name) for name in names):
        return "lumina-mgpt"
    if kind == "nextstep":
        return "nextstep-1.1" if "genloss_type" in config else "nextstep-1"
    return {"multi_modality": "janus", "glm_image": "glm-image"}.get(str(kind), str(kind))
