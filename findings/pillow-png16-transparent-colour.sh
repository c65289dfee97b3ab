#!/usr/bin/env bash
# Pillow 13.0.0: of a 16-bit colour PNG with a transparent colour (tRNS) the wrong pixels become transparent.
#
# Expected: the PNG specification compares all 16 bits, so pixels of exactly the named colour become transparent and
#   no others (pypng 0.20220715.0, which also writes the files here, reads them so).
# What happens: Pillow reduces the pixels to 8 bits but keeps the 16-bit numbers of tRNS in info["transparency"];
#   convert("RGBA") compares the two. A named colour above 255 never matches: nothing is transparent. A nearly black
#   one, (255, 255, 255) of 65535, matches WHITE: white becomes transparent, and the named colour stays.
#   Of 16-bit grey ("I;16") convert("RGBA") passes over the transparent value whatever it is. No warning.
# Seen 2026-11-30: alpha [255, 255, 255] where [0, 255, 255] is right, for colour and for grey; for the nearly
#   black colour [255, 255, 0] instead of [0, 255, 255].
# Why it matters: cut-out pictures of training sets are flattened onto a background by their alpha; here the key
#   colour stays in the picture, or its white areas are filled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check pillow==13.0.0 pypng==0.20220715.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import io
import sys

import PIL
import png
from PIL import Image

print("Pillow", PIL.__version__, "pypng", png.__version__, "Python", sys.version.split()[0])


def alphas(pixels, key):
    """Alpha of each pixel of a picture of one row: by pypng and by Pillow."""
    grey = isinstance(key, int)
    row = pixels if grey else [value for pixel in pixels for value in pixel]
    file = io.BytesIO()
    png.Writer(len(pixels), 1, bitdepth=16, greyscale=grey, transparent=key).write(file, [row])
    _, _, rows, _ = png.Reader(bytes=file.getvalue()).asRGBA8()
    picture = Image.open(file)
    print(f"transparent {key}: mode {picture.mode}, info {picture.info}")
    return list(next(iter(rows)))[3::4], list(picture.convert("RGBA").getchannel("A").tobytes())


black, white = (0, 0, 0), (65535, 65535, 65535)
green, near_black = (4660, 22136, 39612), (255, 255, 255)
seen = {
    "colour": alphas([green, black, white], green),
    "nearly black": alphas([near_black, black, white], near_black),
    "grey": alphas([1000, 0, 65535], 1000),
}
for what, (by_pypng, by_pillow) in seen.items():
    print(f"{what}: alpha by pypng {by_pypng}, by Pillow {by_pillow}")
right, none, wrong = [0, 255, 255], [255, 255, 255], [255, 255, 0]
recorded = [(right, none), (right, wrong), (right, none)]
sys.exit(0 if list(seen.values()) == recorded else "not the recorded behaviour any more")
PY
