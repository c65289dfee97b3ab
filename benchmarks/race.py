"""The race at the end of `make demo`: sequential decoding against speculation that draws the very same pictures.

    python benchmarks/race.py

One image at a time, method after method, so that what else the machine does falls on all of them; of each the best
of a few images, after one that warms up. Seconds are those of decoding tokens; making the picture comes on top, the
same for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import bozzetto
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline

SEQUENTIAL = "none/seed-exact"
METHODS = ("jacobi/seed-exact", "jacobi:fill=glance:fresh=1/seed-exact", "eagle:tree=chain-5/seed-exact")


def race(pipe: Pipeline, methods: Sequence[str], images: int, seed: int) -> dict[str, tuple[float, list[str]]]:
    """By method: seconds of the quickest image, and digests of the pictures. The first method is what others race."""
    found: dict[str, tuple[float, list[str]]] = {method: (float("inf"), []) for method in methods}
    for number in range(images + 1):
        for method in methods:
            drafter, rule = method.rsplit("/", 1)
            result = pipe.generate(seed=seed, indices=[number], settings=GenerateSettings(drafter, rule))
            seconds, pictures = found[method]
            seconds = min(seconds, result.seconds["total"] - result.seconds["decode"]) if number else seconds
            found[method] = seconds, [*pictures, result.images[0].sha256]
    return found


def told(pipe: Pipeline, found: dict[str, tuple[float, list[str]]]) -> str:
    """The result in lines, the winner's last."""
    (_, (base, wanted)), *rows = found.items()
    engine = "our kernels" if pipe.target_in("auto").own else "torch"
    lines = [f"race: {pipe.name}, {pipe.dtype}, {engine}, {torch.get_num_threads()} threads, one image at a time"]
    for method, (seconds, pictures) in sorted(rows, key=lambda row: -row[1][0]):
        same = "yes" if pictures == wanted else "NO"
        times = f"{base / seconds:.2f} times faster" if seconds <= base else f"{seconds / base:.2f} times slower"
        lines.append(f"{base:.2f} s sequential, {seconds:.2f} s {method}: {times}, same bytes: {same}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowers")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="seed-exact ones")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(argv)
    pipe = bozzetto.load(options.model)
    print(told(pipe, race(pipe, (SEQUENTIAL, *options.methods), options.images, options.seed)))


if __name__ == "__main__":
    main()
