"""Images for training: a parquet file (column `image` with bytes) or a folder of pictures, held in memory as uint8.

Crops are random squares between `crop` and the stored size, resized to `crop`, so that both native-resolution crops and
the whole square (what evaluation uses) are seen. Augmentation draws from an explicit torch.Generator.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bozzetto.errors import UsageError

if TYPE_CHECKING:
    from pyarrow import Table

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class ImageSet:
    """Square images of one size. images: uint8 [N, S, S, 3]; labels: int64 [N]; classes: names by label; enlarged: how
    many of the files held smaller squares."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    enlarged: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def concat(sets: list[ImageSet]) -> ImageSet:
        """Join sets of equal image size; labels of later sets are shifted past the earlier ones."""
        shift, labels, classes = 0, [], []
        for s in sets:
            labels.append(s.labels + shift)
            classes += s.classes
            shift += len(s.classes)
        images, enlarged = np.concatenate([s.images for s in sets]), sum(s.enlarged for s in sets)
        return ImageSet(images, np.concatenate(labels), classes, enlarged)


def _squares(files: Iterable[bytes], size: int) -> tuple[np.ndarray, int]:
    """Centre squares uint8 [N, size, size, 3], and how many of the files held smaller ones."""
    found = [_square(raw, size) for raw in files]
    return np.stack([pixels for pixels, _ in found]), sum(side < size for _, side in found)


def _square(raw: bytes, size: int) -> tuple[np.ndarray, int]:
    """The centre square, resized once, and the side that it has in the file."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image), side


def read_parquet(path: str | Path, split: str | None, size: int = 160) -> ImageSet:
    """Read one split (None: all rows) of an image parquet as `size` x `size` uint8.

    Raises UsageError for a missing file, an unknown split or a missing column.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"data file not found: {path}")
    table = pq.read_table(path)
    missing = {"image", "split"} - set(table.column_names)
    if missing:
        raise UsageError(f"{path}: missing columns {sorted(missing)}; found {table.column_names}")
    splits = table["split"].to_pylist()
    if split is not None and split not in splits:
        raise UsageError(f"{path}: unknown split {split!r}; found {sorted(set(splits))}")
    labels, classes = _classes(table)
    rows = [i for i, s in enumerate(splits) if split is None or s == split]
    column = table["image"]
    images, enlarged = _squares((column[i].as_py()["bytes"] for i in rows), size)
    return ImageSet(images, np.array([labels[i] for i in rows]), classes, enlarged)


def _classes(table: Table) -> tuple[list[int], list[str]]:
    """Labels of all rows and names by label: of columns `label` and `class_name`, else by `style`, else one class."""
    if {"label", "class_name"} <= set(table.column_names):
        labels, names = table["label"].to_pylist(), table["class_name"].to_pylist()
        by_label = dict(zip(labels, names, strict=True))
        return labels, [by_label.get(i, str(i)) for i in range(max(by_label) + 1)]
    styles = table["style"].to_pylist() if "style" in table.column_names else ["images"] * len(table)
    classes = sorted(set(styles))
    return [classes.index(style) for style in styles], classes


def read_captions(path: str | Path, split: str | None) -> list[tuple[str, str]]:
    """(caption, style) of the rows that `read_parquet` reads, in its order; no column `style`: empty styles.

    Raises UsageError for a missing file or column.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"data file not found: {path}")
    table = pq.read_table(path)
    if "caption" not in table.column_names:
        raise UsageError(f"{path}: missing column 'caption'; found {table.column_names}")
    captions = table["caption"].to_pylist()
    styles = table["style"].to_pylist() if "style" in table.column_names else [""] * len(table)
    splits = table["split"].to_pylist()
    return [(c, s) for c, s, part in zip(captions, styles, splits, strict=True) if split in (None, part)]


def read_folder(path: str | Path, size: int = 160) -> ImageSet:
    """Read pictures below `path`; sub-folder names are the classes (one class when there are none)."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise UsageError(f"no images ({', '.join(sorted(_IMAGE_SUFFIXES))}) below {path}")
    classes = sorted({p.parent.name for p in files})
    labels = np.array([classes.index(p.parent.name) for p in files])
    images, enlarged = _squares((p.read_bytes() for p in files), size)
    return ImageSet(images, labels, classes, enlarged)


def read_images(path: str | Path, split: str | None, size: int = 160) -> ImageSet:
    """A parquet file's split, or a folder (which has no splits)."""
    return read_folder(path, size) if Path(path).is_dir() else read_parquet(path, split, size)


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255.0


def augment(
    images: np.ndarray, crop: int, generator: torch.Generator, jitter: float = 0.0, flips: bool = True
) -> Tensor:
    """One random crop size per call, an offset and flip per image. uint8 [B, S, S, 3] -> float32 [B, 3, crop, crop].

    jitter: largest relative change of brightness and of contrast, drawn per image; flips: mirror every other image.
    """
    batch, size = images.shape[:2]
    side = int(torch.randint(min(crop, size), size + 1, (), generator=generator))
    offsets = torch.randint(0, size - side + 1, (batch, 2), generator=generator).tolist()
    mirrored = (torch.rand(batch, generator=generator) < (0.5 if flips else 0.0)).tolist()
    parts = []
    for image, (top, left), flip in zip(images, offsets, mirrored, strict=True):
        part = image[top : top + side, left : left + side]
        parts.append(part[:, ::-1] if flip else part)
    x = to_float(np.stack(parts))
    if side != crop:
        x = F.interpolate(x, size=(crop, crop), mode="bilinear", antialias=True, align_corners=False)
    if jitter:
        gain, lift = (1 + jitter * (2 * torch.rand(2, batch, 1, 1, 1, generator=generator) - 1)).unbind(0)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = ((x - mean) * gain + mean * lift).clamp(0, 1)
    return x


def evaluation_view(images: np.ndarray, crop: int) -> Tensor:
    """The whole square resized to `crop`. uint8 [B, S, S, 3] -> float32 [B, 3, crop, crop]."""
    x = to_float(images)
    if x.shape[-1] == crop:
        return x
    return F.interpolate(x, size=(crop, crop), mode="bilinear", antialias=True, align_corners=False)
