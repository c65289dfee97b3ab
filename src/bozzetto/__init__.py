"""bozzetto: speculative decoding for autoregressive image generators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bozzetto.custom_generate import generate_fn
    from bozzetto.errors import UsageError
    from bozzetto.loading import load
    from bozzetto.pipeline import GenerateResult, GenerateSettings, Pipeline

__version__ = "0.1.0"
__all__ = ["GenerateResult", "GenerateSettings", "Pipeline", "UsageError", "__version__", "generate_fn", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when something of them is wanted, so that `bozzetto --help` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'bozzetto' has no attribute {name!r}")
    if name == "UsageError":
        from bozzetto.errors import UsageError

        return UsageError
    if name == "generate_fn":
        from bozzetto.custom_generate import generate_fn

        return generate_fn
    from bozzetto import loading, pipeline

    return getattr(loading if name == "load" else pipeline, name)
