"""Pictures for people: from numbers, and on contact sheets."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MOST_PIXELS = 2**25  # of a contact sheet, 100 MB
_GAP, _LINE = 4, 14  # around a tile; of a caption
_SMALLEST, _READABLE = 16, 64  # tiles, and those that are wide enough for a caption


@dataclass(frozen=True)
class Origin:
    """What an image is drawn for: decoders that read the prompt, or draw noise of their own, ask for it. text: the
    prompt or class; seed, index: of the image."""

    text: str
    seed: int
    index: int


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


class ContactSheet:
    """Pictures of one size, tiled on white row by row as they come, with optional captions below each.

    Many pictures are shown smaller, so that the sheet has at most `most` pixels; where they would be smaller than 16
    pixels wide, only the first ones are (`shown`)."""

    def __init__(self, count: int, size: tuple[int, int], columns: int, captions: bool, most: int = MOST_PIXELS):
        width, height = size
        self.line = _LINE if captions else 0
        self.shown, self.columns, self.tile = count, max(1, min(columns, count)), size
        if count * (width + _GAP) * (height + self.line + _GAP) > most:
            side = max(_SMALLEST, math.isqrt(most // count) - _GAP)
            self.line = _LINE if captions and side >= _READABLE else 0
            share = min(1.0, (side - self.line) / max(size))
            self.tile = (max(1, int(width * share)), max(1, int(height * share)))
            self.shown = min(count, most // ((self.tile[0] + _GAP) * (self.tile[1] + self.line + _GAP)))
            self.columns = max(1, math.isqrt(self.shown))
        self.cell = (self.tile[0] + _GAP, self.tile[1] + self.line + _GAP)
        rows = -(-self.shown // self.columns)
        self.picture = Image.new("RGB", (self.columns * self.cell[0] + _GAP, rows * self.cell[1] + _GAP), "white")
        self.count = 0

    def add(self, picture: Image.Image, caption: str = "") -> None:
        """Put the next one on the sheet, if it is to be shown."""
        number, self.count = self.count, self.count + 1
        if number >= self.shown:
            return
        x, y = _GAP + (number % self.columns) * self.cell[0], _GAP + (number // self.columns) * self.cell[1]
        self.picture.paste(picture if picture.size == self.tile else picture.resize(self.tile), (x, y))
        if self.line:
            draw = ImageDraw.Draw(self.picture)
            draw.text((x + 2, y + self.tile[1] + 1), _fitting(draw, caption, self.tile[0]), fill=(60, 60, 60))


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of a text, on one line, as there is room for."""
    text = " ".join(text.split())
    while text and (length := draw.textlength(text)) > width:
        text = text[: min(len(text) - 1, int(len(text) * width / length))]
    return text


def contact_sheet(images: np.ndarray, columns: int, captions: list[str] | None = None, scale: int = 1) -> Image.Image:
    """Tile uint8 images [N, H, W, 3] on white, row by row, with optional captions below each.

    scale: integer enlargement (nearest neighbour).
    """
    count, height, width = images.shape[:3]
    size = (width * scale, height * scale)
    sheet = ContactSheet(count, size, columns, bool(captions))
    for number, pixels in enumerate(images):
        tile = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
        sheet.add(tile, captions[number] if captions else "")
    return sheet.picture
