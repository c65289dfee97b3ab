"""The one way from a picture's file to pixels, for training and evaluation alike.

The first frame, turned as its EXIF orientation says; its centre square; 8 bits (of 16-bit samples the high byte, floats
from 0 to 1); colours in sRGB (by the embedded profile, if it can be used); transparent parts over white; one Lanczos
resize. docs/data.md has the rules for people.
"""

from __future__ import annotations

import io
import warnings
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from bozzetto.errors import UsageError

# Formats that a signature tells apart and that need no helper program (Pillow hands EPS to Ghostscript).
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP")
_BITS_PER_SAMPLE = 258  # of TIFF


@cache
def formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow knows (AVIF: from 11.3)."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """How files of these formats end, in lower case and with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def square(raw: bytes, size: int | tuple[int, int], where: str) -> tuple[np.ndarray, int, bool]:
    """The centre square of a picture's bytes at `size` x `size`, or the centre of another shape (width, height), uint8
    [H, W, 3]; the width of what was cut out of the file; whether it has a colour profile that cannot be used. where:
    names the picture in errors.

    Raises UsageError for what is no picture, is cut, is larger than Pillow's limit or has no agreed white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # below twice Image.MAX_IMAGE_PIXELS Pillow only warns; so it does of EXIF
            return _centre(raw, (size, size) if isinstance(size, int) else size)
    except UnidentifiedImageError as error:
        raise UsageError(f"{where}: not a picture (read are {', '.join(formats())})") from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{where}: {str(error).split(',')[0]} (Pillow's, against decompression bombs)") from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged file leads them to
        raise UsageError(f"{where}: cannot be read ({error or type(error).__name__})") from error


def _centre(raw: bytes, size: tuple[int, int]) -> tuple[np.ndarray, int, bool]:
    image: Image.Image = Image.open(io.BytesIO(raw), formats=formats())
    image.load()
    _turn(image)
    width, height = _largest(image.size, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    rgb, ignored = _rgb(_eight_bits(image.crop((left, top, left + width, top + height)), image))
    if (width, height) != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(rgb), width, ignored


def _largest(room: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The largest width and height in the ratio of `shape`, in whole pixels."""
    width = min(room[0], max(1, room[1] * shape[0] // shape[1]))
    return width, min(room[1], max(1, width * shape[1] // shape[0]))


def _turn(image: Image.Image) -> None:
    """Upright, in place; EXIF data that cannot be read say nothing."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        return


def _eight_bits(part: Image.Image, file: Image.Image) -> Image.Image:
    """Grey of more bits as L, or LA where one value is transparent; everything else has 8 bits in Pillow."""
    if part.mode not in ("I", "F") and not part.mode.startswith("I;16"):
        return part
    values = np.asarray(part)
    if part.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"floats from {values.min():g} to {values.max():g}, allowed: 0 (black) to 1 (white)")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if part.mode == "I" and file.format not in ("PNG", "PPM"):  # those are 16-bit samples in a wider mode
        raise ValueError("integers of 32 bits have no agreed white, allowed: 8 or 16 bits, or floats from 0 to 1")
    grey = Image.fromarray((values >> _spare_bits(file)).astype(np.uint8))
    if isinstance(hidden := part.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    grey.info.update({k: v for k, v in part.info.items() if k == "icc_profile"})
    return grey


def _spare_bits(file: Image.Image) -> int:
    """By how many bits samples exceed 8. TIFF samples of 12 bits come from Pillow as they are."""
    tags: Any = getattr(file, "tag_v2", {})
    return int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 8


def _rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """sRGB over white, and whether an embedded profile was of no use."""
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return _srgb(image, profile)
    hidden = image.info.get("transparency")
    if isinstance(hidden, tuple) and max(hidden) > 255:  # 16-bit RGB: Pillow keeps its pixels' high bytes only
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    whole = image.convert("RGBA")
    colour = whole.getchannel(0) if image.mode in ("L", "LA") else whole.convert("RGB")
    rgb, ignored = _srgb(colour, profile)
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), whole.getchannel("A")), ignored


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """An image without alpha as sRGB, and whether its profile was of no use."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile or image.mode == "LAB":
        transform, usable = _transform(profile, image.mode)
        if transform is not None:
            return ImageCms.applyTransform(image, transform) or image, not usable
        return image.convert("RGB"), not usable
    return image.convert("RGB"), False


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, bool]:
    """From a profile (none: the standard one of LAB) to sRGB; None where there is nothing to do. False: the profile is
    damaged, or for other colours than the picture's."""
    try:
        if profile is None:
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            return ImageCms.buildTransform(lab, srgb, mode, "RGB"), True
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return None, True
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB"), True
    except (ImageCms.PyCMSError, OSError, ImportError):  # ImportError: a Pillow without LittleCMS
        return (_transform(None, mode)[0] if mode == "LAB" and profile else None), False
