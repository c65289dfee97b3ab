"""The picture of the README: one image after the same numbers of target passes, sequential above and speculative below.

python docs/draw_race.py docs/race.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import bozzetto

CLASS, SEED, PANELS, GAP, TOP, LEFT = "sunflower", 7, 6, 6, 22, 92


def panels(drafter: str, marks: list[int]) -> Iterator[tuple[Image.Image, str]]:
    """The picture after each number of passes, and what is drawn by then."""
    pipe = bozzetto.load("flowers")
    events = list(pipe.stream([CLASS], seed=SEED, drafter=drafter, rule="seed-exact", window=16))
    for mark in marks or [len(events)]:
        event = events[min(mark, len(events)) - 1]
        done = int(event.count[0])
        yield pipe.preview(event.tokens[0], done), f"{event.number} passes: {done} tokens"


def drawn() -> Image.Image:
    """Both rows, with captions."""
    last = int(next(panels("jacobi", []))[1].split()[0])
    marks = [last * (i + 1) // PANELS for i in range(PANELS)]
    rows = [("sequential", list(panels("none", marks))), ("speculative,\nsame seed", list(panels("jacobi", marks)))]
    side = rows[0][1][0][0].width
    sheet = Image.new("RGB", (LEFT + PANELS * (side + GAP) - GAP, len(rows) * (side + TOP + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (name, found) in enumerate(rows):
        top = row * (side + TOP + GAP)
        draw.text((2, top + TOP), name, fill="black", font=font)
        for column, (picture, said) in enumerate(found):
            left = LEFT + column * (side + GAP)
            draw.text((left, top + 4), said, fill="black", font=font)
            sheet.paste(picture, (left, top + TOP))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    drawn().save(parser.parse_args().out)
