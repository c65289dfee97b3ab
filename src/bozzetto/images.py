"""Pictures for people: from numbers, and on contact sheets."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 4


def one_core() -> None:
    """Let the calling thread compute on one core. (A thread takes over the setting of the process when it first asks
    for it: unless that is done now, somebody who sets it elsewhere in the meantime would undo this.)"""
    torch.get_num_threads()
    torch.set_num_threads(1)
    _mkl_on_one_core()


def _mkl_on_one_core() -> None:
    """The same for MKL, whose number of threads torch sets for the whole process: what one thread sets, others get."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not library.is_file():
        return
    set_here = getattr(ctypes.CDLL(str(library)), "MKL_Set_Num_Threads_Local", None)
    if set_here is not None:
        set_here(1)


def to_picture(pixels: Tensor) -> Image.Image:
    """float [3, H, W] in [0, 1] -> PIL RGB."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def contact_sheet(images: np.ndarray, columns: int, captions: list[str] | None = None, scale: int = 1) -> Image.Image:
    """Tile uint8 images [N, H, W, 3] on white, row by row, with optional captions below each.

    scale: integer enlargement (nearest neighbour).
    """
    count, height, width = images.shape[:3]
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    line = 14 if captions else 0
    cell_w, cell_h = width * scale + _GAP, height * scale + line + _GAP
    sheet = Image.new("RGB", (columns * cell_w + _GAP, rows * cell_h + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(count):
        x, y = _GAP + (i % columns) * cell_w, _GAP + (i // columns) * cell_h
        tile = Image.fromarray(images[i])
        if scale != 1:
            tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        if captions:
            draw.text((x + 2, y + height * scale + 1), captions[i], fill=(60, 60, 60))
    return sheet
