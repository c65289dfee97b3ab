#!/usr/bin/env bash
# datasets 5.2.0 (with Pillow 13.0.0): a `map` that only LOOKS at a JPEG picture stores it anew at quality 75.
#
# Expected: ds.map(lambda row: {"width": row["image"].width}) adds a column and leaves the pictures as they are.
# What happens: reading row["image"] decodes it; the row is written back with the decoded picture, and a picture that
#   still says format "JPEG" is saved as JPEG with Pillow's default quality. Held bytes are replaced by worse ones
#   without a warning. A function that does not look at the picture, or one given input_columns=["image"], keeps
#   every byte. (Pictures that are files keep their path: only data sets that hold bytes, as parquet ones do.)
# Seen 2026-11-30: a quality-95 picture of 128x128 went from 9,870 bytes to 3,279, its first quantisation step from
#   2 to 8, mean difference 5.9 grey levels of 255; untouched by the other two functions.
# Why it matters: adding sizes, captions or scores to a picture data set is the usual first step, and it lowers the
#   quality of what a tokeniser is trained and measured on (its reconstructions, too, are compared with these).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
"$work/venv/bin/python" - <<'PY'
import io
import sys

import datasets
import numpy
import PIL
from PIL import Image

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "Pillow", PIL.__version__, "Python", sys.version.split()[0])

# A slope with grain, so that the JPEG quality shows.
draw = numpy.random.default_rng(0)
slope = numpy.linspace(40, 200, 128)[:, None, None] + numpy.linspace(0, 40, 128)[None, :, None]
pixels = (slope + draw.normal(0, 12, (128, 128, 3))).clip(0, 255).astype(numpy.uint8)
file = io.BytesIO()
Image.fromarray(pixels).save(file, "JPEG", quality=95)
raw = [{"bytes": file.getvalue(), "path": None}]
data = datasets.Dataset.from_dict({"image": raw}, features=datasets.Features({"image": datasets.Image()}))


def stored(mapped):
    return mapped.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


def opened(encoded):
    return Image.open(io.BytesIO(encoded))


looked = stored(data.map(lambda row: {"width": row["image"].width}))
away = stored(data.map(lambda row: {"width": 128}))
columns = stored(data.map(lambda image: {"width": image.width}, input_columns=["image"]))

before, after = opened(raw[0]["bytes"]), opened(looked)
gap = numpy.abs(numpy.asarray(before, float) - numpy.asarray(after, float)).mean()
print(f"held: {len(raw[0]['bytes'])} bytes, first quantisation step {before.quantization[0][0]}")
print(f"after a function that looks: {len(looked)} bytes, step {after.quantization[0][0]}, mean difference {gap:.1f}")
print(f"after one that does not look: unchanged is {away == raw[0]['bytes']}")
print(f"after one with input_columns: unchanged is {columns == raw[0]['bytes']}")
same = (
    before.quantization[0][0] == 2
    and after.quantization[0][0] == 8
    and len(looked) < 0.7 * len(raw[0]["bytes"])
    and gap > 1
    and away == columns == raw[0]["bytes"]
)
sys.exit(0 if same else "not the recorded behaviour any more")
PY
