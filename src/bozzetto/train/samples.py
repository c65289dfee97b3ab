"""Sample sheets during training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bozzetto.common.files import write_whole
from bozzetto.common.images import contact_sheet
from bozzetto.pipeline.loading import load


def sample_sheet(model: Path, out: Path, per_class: int = 4, guidance: float = 2.0, batch: int = 20) -> None:
    """Write a contact sheet of `per_class` samples of each class (one row a class) of a model folder, seed 0."""
    pipe = load(model, dtype="bfloat16", device="cpu")
    classes = [name for name in pipe.classes for _ in range(per_class)]
    result = pipe.generate(classes, seed=0, batch=batch, guidance=guidance)
    pixels = np.stack([np.asarray(i.image) for i in result.images])
    sheet = contact_sheet(pixels, columns=per_class, captions=[i.class_name for i in result.images])
    write_whole(out, sheet.save)
