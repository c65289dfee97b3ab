"""Watch an image being drawn: an animated GIF with one frame every few target passes.

python examples/watch_it_draw.py --model flowers --class-name tulip --out out/watch_it_draw
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import bozzetto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="flowers", help="a shipped model or a model folder")
    parser.add_argument("--out", type=Path, default=Path("out/watch_it_draw"), help="folder for the GIF")
    parser.add_argument("--class-name", default="tulip")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--every", type=int, default=4, help="target passes between two frames")
    args = parser.parse_args()

    pipe = bozzetto.load(args.model)
    frames, event = [], None
    for event in pipe.stream([args.class_name], seed=args.seed):
        if event.number % args.every == 1 or args.every == 1:
            frames.append(pipe.preview(event.tokens[0], int(event.count[0])))
    assert event is not None
    frames.append(pipe.decode(event.tokens[0]))

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.class_name}-{args.seed}.gif"
    # Each frame keeps its own palette; the finished picture stays for two seconds.
    frames = [f.quantize(256, method=Image.Quantize.MEDIANCUT) for f in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[80] * (len(frames) - 1) + [2000], loop=0)
    print(f"{len(frames)} frames of {event.number} passes: {path}")


if __name__ == "__main__":
    main()
