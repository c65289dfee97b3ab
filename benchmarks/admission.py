"""Images that come and go: are they those drawn one by one, is memory flat, and what does sharing passes bring?

    python benchmarks/admission.py --count 200 --compile max --json benchmarks/results/admission-float32.json

Images of mixed classes, seeds, guidances, filters and rules are asked for at random; some are given up. Every finished
one is drawn again alone, and its PNG bytes compared (in float32 a token with a near tie may differ: these are counted
apart). `ratio` is the time of drawing them alone over that of drawing them together, without making pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from bozzetto import load
from bozzetto.common.files import write_text
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.scheduler import DONE, Scheduler
from bozzetto.evaluate.provenance import provenance
from bozzetto.pipeline.pipeline import ROUNDING, Pipeline
from bozzetto.settings import GenerateSettings


def resident() -> int:
    """Bytes that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mixed(choose: random.Random, compile: str) -> GenerateSettings:
    """Settings of one image. Few kinds, so that images share passes."""
    method = choose.choice([("jacobi", "seed-exact", 0), ("jacobi", "seed-exact", 0), ("jacobi", "exact", 8)])
    law = {"guidance": choose.choice([1.0, 1.5, 2.0, 3.0]), "temperature": choose.choice([0.9, 1.0])}
    cut = {"top_k": choose.choice([0, 0, 0, 200])} if method[1] == "seed-exact" else {}
    return GenerateSettings(*method, **law, **cut, compile=compile)


def png(picture: Image.Image) -> bytes:
    """The file's bytes."""
    out = io.BytesIO()
    picture.save(out, "png")
    return out.getvalue()


def draw_together(
    engine: Scheduler, count: int, choose: random.Random, compile: str
) -> tuple[list[ImageRequest], dict[int, int]]:
    """Ask for images until `count` are done; the memory after every 25 of them."""
    asked, done, memory = list[ImageRequest](), 0, dict[int, int]()
    with tqdm(total=count, unit="image", desc="together", disable=not sys.stderr.isatty()) as bar:
        while done < count:
            for _ in range(min(choose.randrange(3), engine.queue - len(engine.waiting))):
                settings = mixed(choose, compile)
                label, seed = choose.randrange(len(engine.pipe.classes)), choose.randrange(4)
                asked.append(engine.submit(label, seed=seed, index=len(asked), settings=settings))
            if choose.random() < 0.01:
                engine.cancel(choose.choice(asked[-16:]))
            finished = len(engine.step())
            done += finished
            bar.update(finished)
            memory.setdefault(done // 25 * 25, resident())
    for ticket in asked:
        engine.cancel(ticket)
    return asked, memory


def drawn_alone(pipe: Pipeline, tickets: list[ImageRequest]) -> tuple[list[Any], float]:
    """Each image by itself, and the seconds of their passes."""
    images, seconds = [], 0.0
    for ticket in tqdm(tickets, unit="image", desc="alone", disable=not sys.stderr.isatty()):
        result = pipe.generate([ticket.label], seed=ticket.seed, indices=[ticket.index], settings=ticket.settings)
        images += result.images
        seconds += result.seconds["target"] + result.seconds["draft"]
    return images, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipe = load(options.model, dtype=options.dtype)
    engine = Scheduler(pipe, slots=options.slots, queue=32)
    if options.compile != "off":  # kernels are built and passes timed before the clock runs
        for seed in (1, 0):
            warm = Scheduler(pipe, slots=options.slots, queue=32)
            draw_together(warm, options.count, random.Random(seed), options.compile)
    began = time.perf_counter()
    asked, memory = draw_together(engine, options.count, random.Random(0), options.compile)
    together = time.perf_counter() - began
    finished = [ticket for ticket in asked if ticket.status == DONE]
    drawn_alone(pipe, finished[:8])
    alone, seconds = drawn_alone(pipe, finished)
    pairs = list(zip(finished, alone, strict=True))
    wrong = [(t, i) for t, i in pairs if png(pipe.decode(t.result)) != png(i.image)]
    close = sum(i.margin is not None and i.margin < ROUNDING[options.dtype] for _, i in wrong)
    report = {
        "settings": {**vars(options), "json": None, **provenance()},
        "finished": len(finished),
        "given_up": len(asked) - len(finished),
        "different": len(wrong),
        "different_near_ties": close,
        "memory_mib": {str(done): size / 2**20 for done, size in memory.items()},
        "memory_growth": memory[max(memory)] / memory[min(50, max(memory))] - 1,
        "seconds_together": together,
        "seconds_alone": seconds,
        "ratio": seconds / together,
    }
    if options.json is not None:
        write_text(options.json, json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "settings"}, indent=1))


if __name__ == "__main__":
    main()
