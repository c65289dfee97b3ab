"""bozzetto: speculative decoding for autoregressive image generators."""

__version__ = "0.1.0"

from bozzetto.errors import UsageError
from bozzetto.pipeline import GenerateResult, GenerateSettings, Pipeline, load

__all__ = ["GenerateResult", "GenerateSettings", "Pipeline", "UsageError", "load", "__version__"]
