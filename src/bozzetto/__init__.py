"""bozzetto: speculative decoding for autoregressive image generators."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bozzetto.checkpoints.load_settings import LoadSettings
    from bozzetto.errors import UsageError
    from bozzetto.pipeline.custom_generate import generate_fn
    from bozzetto.pipeline.loading import load
    from bozzetto.pipeline.pipeline import Pipeline
    from bozzetto.pipeline.results import GeneratedImage, GenerateResult
    from bozzetto.settings import GenerateSettings

__version__ = "0.2.0"
_HOMES = {
    "GenerateResult": "pipeline.results",
    "GenerateSettings": "settings",
    "GeneratedImage": "pipeline.results",
    "LoadSettings": "checkpoints.load_settings",
    "Pipeline": "pipeline.pipeline",
    "UsageError": "errors",
    "generate_fn": "pipeline.custom_generate",
    "load": "pipeline.loading",
}
__all__ = [
    "GenerateResult",
    "GenerateSettings",
    "GeneratedImage",
    "LoadSettings",
    "Pipeline",
    "UsageError",
    "__version__",
    "generate_fn",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when something of them is wanted, so that `bozzetto --help` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bozzetto' has no attribute {name!r}")
    return getattr(import_module(f"bozzetto.{_HOMES[name]}"), name)
