"""How to load a model: one frozen dataclass that every verb, the server and `bozzetto.load` fill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bozzetto.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadSettings:
    """How to load a model. dtype: of the target's passes; device: as torch names it; captions: features file of a
    text-conditional model (models/captions.py), whose captions then stand for the classes; image_size: pixels per
    side, where a model has a choice (0: its usual one).

    Raises UsageError for an unknown dtype and for a device that is not there.
    """

    dtype: str = "float32"
    device: str = "cpu"
    captions: str | Path | None = None
    image_size: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r} (allowed: {', '.join(DTYPES)})")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"device {self.device!r} is not available here: {reason}") from error

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
