"""A server under load: is every image right, how long do requests take, and what does sharing passes bring?

    python benchmarks/serve_load.py --compile max --json benchmarks/results/serve-load.json

Starts `bozzetto serve` on loopback, sends requests of mixed classes, seeds, guidances and rules from a bounded number
of clients, some of which hang up, and compares every image with the one drawn alone in this process (in float32 a token
with a near tie may differ: these are counted apart). Then the same requests one at a time, and at last a server that is
told to stop while requests are under way.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from bozzetto import load
from bozzetto.files import write_text
from bozzetto.pipeline import ROUNDING, GeneratedImage
from bozzetto.provenance import provenance
from bozzetto.settings import GenerateSettings

PATH = "/v1/images/generations"


@dataclass(frozen=True)
class Asked:
    """One request. leaves: its client hangs up after this many seconds (None: it waits)."""

    prompt: str
    seed: int
    guidance: float
    rule: str
    leaves: float | None

    def body(self) -> dict[str, Any]:
        """As JSON."""
        spoken = {"drafter": "jacobi", "rule": self.rule, "window": 0 if self.rule == "seed-exact" else 8}
        return {"prompt": self.prompt, "seed": self.seed, "guidance_scale": self.guidance, "speculation": spoken}

    def settings(self, compile: str) -> GenerateSettings:
        """As the pipeline has them."""
        window = 0 if self.rule == "seed-exact" else 8
        return GenerateSettings("jacobi", self.rule, window, self.guidance, compile=compile)


def requests(prompts: list[str], count: int, disconnects: float, seed: int) -> list[Asked]:
    """Mixed, and the same for a seed."""
    choose = random.Random(seed)
    rules = ("seed-exact", "seed-exact", "seed-exact", "exact")
    return [
        Asked(
            choose.choice(prompts),
            choose.randrange(2**31),
            choose.choice((1.5, 2.0, 3.0)),
            choose.choice(rules),
            choose.uniform(0.05, 0.5) if choose.random() < disconnects else None,
        )
        for _ in range(count)
    ]


@contextlib.contextmanager
def serving(options: argparse.Namespace, queue: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is warm, and its address."""
    flags = ["--model", options.model, "--slots", str(options.slots), "--queue", str(queue)]
    command = [sys.executable, "-m", "bozzetto", "serve", "--port", "0", "--compile", options.compile, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        while httpx.get(f"{found[0]}/health").status_code != 200:
            time.sleep(0.2)
        yield process, found[0]
    finally:
        process.terminate()
        process.wait(120)


def send(url: str, asked: Asked) -> dict[str, Any]:
    """One request: status, seconds and what is known of the image; status 0: this client hung up; -1: no connection."""
    began = time.monotonic()
    try:
        answer = httpx.post(url + PATH, json=asked.body(), timeout=asked.leaves or 120)
    except httpx.TimeoutException:
        return {"status": 0 if asked.leaves else -2, "seconds": time.monotonic() - began}
    except httpx.TransportError:
        return {"status": -1, "seconds": time.monotonic() - began}
    told = {"status": answer.status_code, "seconds": time.monotonic() - began}
    if answer.status_code == 200:
        image = answer.json()["data"][0]
        about = image["bozzetto"]
        told |= {"sha256": about["sha256"], "passes": about["target_passes"], "png": image["b64_json"]}
    return told


def loaded(url: str, asked: list[Asked], concurrent: int, what: str) -> tuple[list[dict[str, Any]], float]:
    """All requests from this many clients at a time, and the seconds that took."""
    began = time.monotonic()
    with ThreadPoolExecutor(concurrent) as pool, tqdm(total=len(asked), desc=what) as bar:

        def one(item: Asked) -> dict[str, Any]:
            told = send(url, item)
            bar.update()
            return told

        return list(pool.map(one, asked)), time.monotonic() - began


def judged(options: argparse.Namespace, asked: list[Asked], told: list[dict[str, Any]]) -> dict[str, int]:
    """How many images are those drawn alone, and how many are not although no tie is near."""
    pipe, counts = load(options.model), {"equal": 0, "near_tie": 0, "wrong": 0}
    for item, answer in tqdm(list(zip(asked, told, strict=True)), desc="drawing them alone"):
        if answer["status"] != 200:
            continue
        settings = pipe.alone(item.settings(options.compile))
        image = pipe.generate([item.prompt], seed=item.seed, settings=settings).images[0]
        if image.sha256 == answer["sha256"]:
            counts["equal"] += 1
        else:  # a rule that is not seed-exact measures no margin
            close = image.margin is not None and image.margin < ROUNDING[pipe.dtype]
            counts["near_tie" if close else "wrong"] += 1
            if not close:
                again = pipe.generate([item.prompt], seed=item.seed, settings=settings).images[0]
                tqdm.write(f"not the image drawn alone: {item}, {answer['passes']} passes, alone {image.target_passes}")
                tqdm.write(f"{difference(answer['png'], image)}; alone twice: {again.sha256 == image.sha256}")
    return counts


def difference(png: str, image: GeneratedImage) -> str:
    """How far a served picture is from the one drawn here: a rounded pixel, or another drawing?"""
    served = np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)
    apart = np.abs(served - np.asarray(image.image).astype(int)).max(2)
    return f"{(apart > 0).sum()} pixels differ, by at most {apart.max()} of 255"


def stopped(options: argparse.Namespace, asked: list[Asked]) -> dict[str, int]:
    """A server that gets SIGTERM under load: what it had accepted by then, and what it answered."""
    with serving(options, len(asked)) as (process, url), ThreadPoolExecutor(len(asked)) as pool:
        running = [pool.submit(send, url, item) for item in asked]
        while (held := httpx.get(f"{url}/health").json()["images"]) < len(asked) // 2:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        answers = [future.result()["status"] for future in running]
        status = process.wait(120)
    return {"accepted": held, "answered": answers.count(200), "exit_status": status}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as in the module's text."""
    prompts = load(options.model).classes[:12]
    asked = requests(prompts, options.count, options.disconnects, options.seed)
    with serving(options, options.count) as (_, url):
        loaded(url, asked[: 2 * options.slots], options.concurrent, "warming up")  # measures widths, and keeps them
        told, seconds = loaded(url, asked, options.concurrent, f"{options.concurrent} clients")
        few = [item for item in asked if item.leaves is None][: options.alone]
        single, single_seconds = loaded(url, few, 1, "one at a time")
    times = sorted(answer["seconds"] for answer in told if answer["status"] == 200)
    lone = sorted(answer["seconds"] for answer in single)
    together, alone = len(times) / seconds, len(single) / single_seconds
    return {
        "requests": len(told),
        "hung_up": sum(answer["status"] == 0 for answer in told),
        "failed": sum(answer["status"] not in (0, 200) for answer in told),
        **judged(options, asked, told),
        "p50": statistics.median(times),
        "p95": times[int(0.95 * (len(times) - 1))],
        "p50_alone": statistics.median(lone),
        "images_per_second": together,
        "images_per_second_alone": alone,
        "ratio": together / alone,
        "sigterm": stopped(options, [item for item in asked if item.leaves is None][:16]),
    }


def table(found: dict[str, Any]) -> str:
    """For people."""
    term = found["sigterm"]
    return "\n".join(
        (
            f"{found['requests']} requests: {found['failed']} failed, {found['hung_up']} clients hung up",
            f"equal to those drawn alone: {found['equal']}, near ties {found['near_tie']}, wrong {found['wrong']}",
            f"seconds per request: median {found['p50']:.2f}, p95 {found['p95']:.2f} (alone {found['p50_alone']:.2f})",
            f"images per second: {found['images_per_second']:.2f}, one at a time "
            f"{found['images_per_second_alone']:.2f}: {found['ratio']:.2f}x",
            f"SIGTERM: {term['accepted']} accepted by then, {term['answered']} answered, exit {term['exit_status']}",
        )
    )


def main() -> int:
    """Measure and print; 1 where an image is wrong or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowers")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--alone", type=int, default=40, help="requests sent one at a time")
    parser.add_argument("--disconnects", type=float, default=0.05)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--compile", default="off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(table(found))
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        write_text(options.json, json.dumps({"settings": settings, **found, **provenance()}, indent=1) + "\n")
    lost = found["sigterm"]["accepted"] > found["sigterm"]["answered"]
    return int(bool(found["failed"] or found["wrong"] or lost))


if __name__ == "__main__":
    sys.exit(main())
