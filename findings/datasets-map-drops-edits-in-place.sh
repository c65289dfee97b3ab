#!/usr/bin/env bash
# datasets 5.2.0 (with Pillow 13.0.0): `map` throws away what was drawn onto a picture that came from a file.
#
# Expected: a function given to `map` that changes row["image"] (paste, ImageDraw, thumbnail, putalpha: all of them
#   work in place) and returns it gives a data set of changed pictures, as it does for pictures held as bytes.
# What happens: a PIL picture opened from a file keeps its `filename`, and the Image feature stores that name instead
#   of the pixels. The mapped data set shows the files as they were, without a warning. `.copy()` before the edit,
#   or a data set whose pictures are bytes, keeps the edit: the same function means two things.
# Seen 2026-11-30: from files 0 of 4 pictures changed and thumbnails are still 64x64; after copy() 4 of 4;
#   from bytes 4 of 4.
# Why it matters: masking, watermark removal and downscaling before tokenising are done this way; a tokeniser or an
#   image generator is then trained on the untouched pictures.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
"$work/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import datasets
import numpy
import PIL
from PIL import Image

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "Pillow", PIL.__version__, "Python", sys.version.split()[0])

for name in ("bird", "boat"):
    Path("pictures", name).mkdir(parents=True)
    for index in range(2):
        Image.new("RGB", (64, 64), (200, 100, 50 + index)).save(Path("pictures", name, f"{index}.png"))


def paint(row):
    row["image"].paste((0, 0, 0), (0, 0, 32, 32))
    return {"image": row["image"]}


def paint_copy(row):
    picture = row["image"].copy()
    picture.paste((0, 0, 0), (0, 0, 32, 32))
    return {"image": picture}


def shrink(row):
    row["image"].thumbnail((16, 16))
    return {"image": row["image"]}


def changed(data):
    return sum(not numpy.asarray(row["image"].convert("RGB"))[:32, :32].any() for row in data)


files = datasets.load_dataset("imagefolder", data_dir="pictures", split="train")
raw = [{"bytes": path.read_bytes(), "path": None} for path in sorted(Path("pictures").rglob("*.png"))]
held = datasets.Dataset.from_dict({"image": raw}, features=datasets.Features({"image": datasets.Image()}))

painted = files.map(paint)
stored = painted.cast_column("image", datasets.Image(decode=False))[0]["image"]
seen = {
    "painted, from files": changed(painted),
    "painted, a copy": changed(files.map(paint_copy)),
    "painted, from bytes": changed(held.map(paint)),
    "thumbnail, from files": files.map(shrink)[0]["image"].size,
    "thumbnail, from bytes": held.map(shrink)[0]["image"].size,
    "bytes stored for a painted file": stored["bytes"],
}
for what, value in seen.items():
    print(f"{what}: {value}")
recorded = [0, 4, 4, (64, 64), (16, 16), None]
sys.exit(0 if list(seen.values()) == recorded else f"not the recorded behaviour any more: {recorded}")
PY
