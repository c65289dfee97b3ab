"""One reader of pictures with stated rules: bits, orientation, transparency, colours, profiles, limits."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from bozzetto.data import read_images
from bozzetto.data.pixels import square
from bozzetto.errors import UsageError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixel(raw: bytes) -> list[int]:
    """The colour of a picture of one colour."""
    pixels = square(raw, 8, "it")[0]
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


def png16(values: np.ndarray, colour: int, transparent: bytes = b"") -> bytes:
    """A PNG with 16 bits per sample, which Pillow cannot write for colours. colour: 0 grey, 2 RGB, 4 LA, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], len(values), 16, colour, 0, 0, 0))
    middle = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREY16 = np.full((8, 8), 0x7FFF, np.uint16)


@pytest.mark.parametrize(
    "raw",
    [
        png16(GREY16, 0),
        png16(np.stack([GREY16] * 3, -1), 2),
        png16(np.stack([GREY16, GREY16 * 0 + 65535], -1), 4),
        png16(np.stack([GREY16] * 3 + [GREY16 * 0 + 65535], -1), 6),
        encoded(Image.fromarray(GREY16), "TIFF"),
        b"P5 8 8 65535\n" + GREY16.astype(">u2").tobytes(),
        encoded(Image.fromarray(np.full((8, 8), 127 / 255, np.float32)), "TIFF"),
        encoded(Image.new("L", (8, 8), 127)),
        encoded(Image.new("RGB", (8, 8), (127, 127, 127)).quantize()),
    ],
)
def test_grey_is_grey_at_every_depth(raw):
    """Pillow (13.0) gives 16-bit grey as I;16, and converts that to RGB by cutting off at 255: white."""
    assert pixel(raw) == [127] * 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((8, 8), 200.0, np.float32), "floats from 200 to 200, allowed: 0"),
        (np.full((8, 8), np.nan, np.float32), "floats from nan to nan"),
        (np.full((8, 8), 70000, np.int32), "integers of 32 bits have no agreed white"),
    ],
)
def test_depths_without_an_agreed_white_are_refused(values, said):
    with pytest.raises(UsageError, match=f"it: cannot be read.*{said}"):
        square(encoded(Image.fromarray(values), "TIFF"), 8, "it")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_exif_says(kind, orientation):
    """The file's corners, turned: orientation 6 is to be turned clockwise."""
    corners = np.array([[1, 2], [3, 4]])
    turned = {
        1: corners, 2: corners[:, ::-1], 3: corners[::-1, ::-1], 4: corners[::-1], 5: corners.T,
        6: np.rot90(corners, -1), 7: corners[::-1, ::-1].T, 8: np.rot90(corners),
    }[orientation]  # fmt: skip
    pixels = np.kron(corners * 60, np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    raw = encoded(Image.fromarray(pixels).convert("RGB"), kind, exif=exif)
    got = square(raw, 32, "it")[0][8::16, 8::16, 0]
    assert np.abs(got.astype(int) - turned * 60).max() < 8


def test_what_is_transparent_is_white():
    clear, half = (200, 0, 0, 0), (200, 0, 0, 128)
    assert pixel(encoded(Image.new("RGBA", (8, 8), clear))) == [255] * 3
    assert pixel(encoded(Image.new("RGBA", (8, 8), half))) == [227, 127, 127]
    assert pixel(encoded(Image.new("LA", (8, 8), (10, 0)))) == [255] * 3
    assert pixel(encoded(Image.new("RGBA", (8, 8), clear), "WEBP", lossless=True, exact=True)) == [255] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert pixel(encoded(palette, transparency=1)) == pixel(encoded(palette, "GIF", transparency=1)) == [255] * 3
    assert pixel(encoded(palette, transparency=0)) == [200, 0, 0]
    assert pixel(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))) == [255] * 3
    assert pixel(encoded(Image.new("L", (8, 8), 5), transparency=5)) == [255] * 3


def test_one_transparent_value_of_16_bits():
    """Pillow (13.0) compares the value of 16 bits with the high bytes of RGB, so that nothing is transparent."""
    colour = np.stack([GREY16] * 3, -1)
    assert pixel(png16(colour, 2, struct.pack(">HHH", *[0x7FFF] * 3))) == [255] * 3
    assert pixel(png16(GREY16, 0, struct.pack(">H", 0x7FFF))) == [255] * 3
    assert pixel(png16(GREY16, 0, struct.pack(">H", 0x7FFE))) == [127] * 3


def test_opaque_pixels_do_not_change():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(square(encoded(Image.fromarray(pixels)), 32, "it")[0], pixels)
    opaque = Image.fromarray(pixels)
    opaque.putalpha(255)
    assert np.array_equal(square(encoded(opaque), 32, "it")[0], pixels)


def test_colour_spaces_become_srgb():
    assert pixel(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 128)), "TIFF")) == [127] * 3
    lab = pixel(encoded(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"))
    assert max(lab) - min(lab) <= 1 and 115 <= lab[0] <= 123  # L* = 50
    assert pixel(encoded(Image.new("1", (8, 8), 1))) == [255] * 3


def profile(gamma: float) -> bytes:
    """A profile of sRGB's primaries and another tone curve, or of no use: made of sRGB's own bytes."""
    linear = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        entry = linear.index(name)
        offset, size = struct.unpack(">II", linear[entry + 4 : entry + 12])
        curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
        linear[offset : offset + size] = curve.ljust(size, b"\0")
    described = linear.index("sRGB".encode("utf-16-be"))
    linear[described : described + 8] = "Mine".encode("utf-16-be")
    return bytes(linear)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_profiles_are_used(mode):
    """Half of the light is 188 in sRGB."""
    grey = Image.new(mode, (8, 8), (128,) * 3 if mode == "RGB" else (128, 128, 128, 255))
    assert all(abs(v - 188) <= 1 for v in pixel(encoded(grey, icc_profile=profile(1.0))))


@pytest.mark.parametrize("bad", [b"nonsense", profile(1.0)[:200]])
def test_profiles_of_no_use_are_ignored_and_counted(bad, tmp_path, capsys):
    for i, kind in enumerate(("RGB", "RGB", "L")):
        Image.new(kind, (8, 8), (128,) * 3 if kind == "RGB" else 128).save(tmp_path / f"{i}.png", icc_profile=bad)
    Image.new("RGB", (8, 8), (128,) * 3).save(tmp_path / "good.png")
    assert (read_images(tmp_path, None, 8).images == 128).all()
    assert "4 pictures; 3 with a colour profile that cannot be used" in capsys.readouterr().err


def test_a_profile_for_other_colours_is_ignored():
    srgb = profile(1.0)
    assert square(encoded(Image.new("L", (8, 8), 128), icc_profile=srgb), 8, "it")[2]
    assert pixel(encoded(Image.new("L", (8, 8), 128), icc_profile=srgb)) == [128] * 3


def test_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert pixel(raw)[0] > 250 > 5 > pixel(raw)[2]


def test_the_middle_is_cut_out_and_resized_once():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    assert (square(encoded(Image.fromarray(pixels)), 8, "it")[0] == 255).all()
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8))
    once = wide.crop((10, 0, 40, 30)).resize((16, 16), Image.Resampling.LANCZOS)
    found = square(encoded(wide), 16, "it")
    assert np.array_equal(found[0], np.asarray(once)) and found[1] == 30


@pytest.mark.parametrize(
    ("shape", "box"),
    [((16, 8), (0, 2, 50, 27)), ((8, 16), (17, 0, 32, 30)), ((50, 30), None), ((5, 3), (0, 0, 50, 30))],
)
def test_the_middle_of_another_shape_is_cut_out_too(shape: tuple[int, int], box: tuple[int, ...] | None) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8))
    once = wide if box is None else wide.crop(box).resize(shape, Image.Resampling.LANCZOS)
    found = square(encoded(wide), shape, "it")
    assert found[0].shape == (shape[1], shape[0], 3) and np.array_equal(found[0], np.asarray(once))


def test_pictures_of_a_folder_are_read_in_another_shape(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a" / "0.png")
    assert read_images(tmp_path, None, (16, 8)).images.shape == (1, 8, 16, 3)


def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels: a thousandth of them in bytes."""
    raw = zlib.compress(bytes((width // 8 + 1) * height), 9)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


def test_more_pixels_than_pillows_limit_are_refused(tmp_path):
    """Pillow (13.0): DecompressionBombError above 2 x Image.MAX_IMAGE_PIXELS, only a warning below that."""
    (tmp_path / "large.png").write_bytes(bomb(15000, 13000))
    with pytest.raises(UsageError, match=r"large\.png: Image size \(195000000 pixels\) exceeds limit of 178956970"):
        read_images(tmp_path, None, 8)


def test_a_large_picture_below_the_limit_is_read_without_a_word(recwarn):
    assert pixel(bomb(9600, 9600)) == [0] * 3 and not recwarn.list


@pytest.mark.parametrize(
    "text", [b"", b"hello", b"\0\5\26\7AppleDouble", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_picture_is_named(tmp_path, text):
    (tmp_path / "x.png").write_bytes(text)
    with pytest.raises(UsageError, match=r"x\.png: not a picture"):
        read_images(tmp_path, None)


def test_a_cut_picture_is_named():
    with pytest.raises(UsageError, match=r"it: cannot be read \(.*truncated"):
        square(encoded(Image.effect_noise((64, 64), 90).convert("RGB"))[:2000], 8, "it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_damaged_pictures_are_read_or_named(kind):
    whole, rng = encoded(Image.effect_noise((24, 24), 90).convert("RGB"), kind), random.Random(0)
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 12)):
            raw[rng.randrange(min(len(raw), 120))] = rng.randrange(256)
        try:
            assert square(bytes(raw), 8, "it")[0].shape == (8, 8, 3)
        except UsageError as error:
            assert str(error).startswith("it: ")
