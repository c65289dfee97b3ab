"""A server under load: is every image right, how long do requests take, and what does sharing passes bring?

    python benchmarks/serve_load.py --compile max --bad 0.1 --json benchmarks/results/serve-load.json
    python benchmarks/serve_load.py --bad 0.1 --ray 2 --json benchmarks/results/serve-load-ray.json

Starts `bozzetto serve` on loopback (--ray: replicas under Ray Serve; --url: a server that runs already is asked),
sends requests of mixed classes, seeds, guidances, methods (--methods; else many that the model has) and numbers of
images from a bounded number of clients, some of which hang up and some of which (--bad) ask for what cannot be drawn,
and compares every image with the one drawn alone in this process (with torch's passes a token with a near tie may
differ: these are counted apart). Then the same requests one at a time, a server that is told to stop while requests are
under way, more requests than a small server holds, and in every state that a client can leave a server in the seconds
from SIGTERM to the end of the process.
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
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from bozzetto import load
from bozzetto.common.files import write_text
from bozzetto.evaluate.provenance import provenance
from bozzetto.pipeline.pipeline import GeneratedImage, Pipeline
from bozzetto.serve.methods import methods_of
from bozzetto.settings import GenerateSettings

PATH = "/v1/images/generations"
_SLOW = {"drafter": "none"}
# What is asked for where a model has it, the first ones more often.
_METHODS = (
    *("jacobi/seed-exact", "jacobi/seed-exact", "jacobi/exact", "eagle/block", "eagle/seed-exact"),
    *(
        "eagle:tree=2x2x1/tree",
        "eagle/lantern++",
        "glance/block",
        "jacobi:fill=glance/exact",
        "jacobi:second=eagle/exact",
    ),
    *("none/plain", "none/coupled", "none/reflection", "jacobi/chains", "jacobi/pathwise:epsilon=0.1", "sketch/joint"),
    *("sketch/block", "model/cspd", "model/pathwise"),
)


@dataclass(frozen=True)
class Asked:
    """One request. method: DRAFTER/RULE; images: how many it is for; leaves: its client hangs up after this many
    seconds (None: it waits); bad: what makes it one that cannot be drawn (None: it is good)."""

    prompt: str
    seed: int
    guidance: float
    method: str
    images: int
    leaves: float | None
    bad: dict[str, Any] | None = None

    @property
    def spoken(self) -> dict[str, Any]:
        """Drafter, rule and window."""
        drafter, _, rule = self.method.partition("/")
        wide = drafter.startswith("jacobi") and rule == "exact"  # where a picture depends on it
        return {"drafter": drafter, "rule": rule, "window": 8 if wide else 0}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        whole = {"prompt": self.prompt, "seed": self.seed, "guidance_scale": self.guidance, "n": self.images}
        return {**whole, "speculation": self.spoken, **(self.bad or {})}

    def settings(self, compile: str) -> GenerateSettings:
        """As the pipeline has them."""
        return GenerateSettings(**self.spoken, guidance=self.guidance, compile=compile)


BAD: tuple[dict[str, Any], ...] = (
    {"speculation": {"drafter": "plane", "rule": "block"}},
    {"speculation": {"drafter": "jacobi:fill=plane"}},
    {"speculation": {"drafter": "jacobi:fill=block", "rule": "exact"}},
    {"speculation": {"drafter": "jacobi", "rule": "lantern:k=1000000"}},
    {"speculation": {"drafter": "nothing"}},
    {"speculation": {"window": 3}},
    {"n": 0},
    {"n": "many"},
    {"seed": -1},
    {"guidance_scale": 1e300},
    {"size": "1x1"},
    {"model": "nothing"},
    {"prompt": ""},
)


def methods_for(pipe: Pipeline) -> list[str]:
    """Those of the usual ones that a model has."""
    found, has = list[str](), methods_of(pipe)
    for method in _METHODS:
        (drafter, *options), rule = method.partition("/")[0].split(":"), method.partition("/")[2].partition(":")[0]
        helpers = [
            value for name, _, value in (option.partition("=") for option in options) if name in ("fill", "second")
        ]
        if rule in has.get(drafter, ()) and all(helper in has for helper in helpers):
            found.append(method)
    return found


def requests(
    prompts: list[str], methods: list[str], count: int, disconnects: float, seed: int, bad: float = 0.0
) -> list[Asked]:
    """Mixed, and the same for a seed. bad: share of those that cannot be drawn."""
    choose, spoil = random.Random(seed), random.Random(seed + 1)
    asked = [
        Asked(
            choose.choice(prompts),
            choose.randrange(2**31),
            choose.choice((1.0, 1.5, 2.0, 3.0)),
            choose.choice(methods),
            choose.choice((1, 1, 1, 2, 3)),
            choose.uniform(0.05, 0.5) if choose.random() < disconnects else None,
        )
        for _ in range(count)
    ]
    return [replace(a, leaves=None, bad=spoil.choice(BAD)) if spoil.random() < bad else a for a in asked]


@contextlib.contextmanager
def serving(
    options: argparse.Namespace, queue: int, slots: int | None = None, warm: bool = True
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address; warm: it is."""
    flags = ["--model", options.model, "--slots", str(slots or options.slots), "--queue", str(queue)]
    flags += ["--compile", options.compile, "--limit", str(options.limit), "--port"]
    flags += [str(free_port()), "--ray", "--replicas", str(options.ray)] if options.ray else ["0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bozzetto", "serve", *flags], stdout=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        while warm and httpx.get(f"{found[0]}/health", timeout=60).status_code != 200:
            time.sleep(0.2)
        yield process, found[0]
    finally:
        process.terminate()
        process.wait(options.limit + 60)


def free_port() -> int:
    """Free a moment ago: Ray has to be told one."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


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
    told["retry_after"] = answer.headers.get("retry-after")
    if answer.status_code == 200:
        told["images"] = answer.json()["data"]
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
        if answer["status"] != 200 or item.bad:
            continue
        settings = pipe.alone(item.settings(options.compile))
        if len(answer["images"]) != item.images:
            raise SystemExit(f"{len(answer['images'])} images for {item}")
        for index, served in enumerate(answer["images"]):
            about = {"seed": item.seed, "indices": [index], "settings": settings}
            image, digest = pipe.generate([item.prompt], **about).images[0], served["bozzetto"]["sha256"]
            if image.sha256 == digest:
                counts["equal"] += 1
                continue
            close = image.margin is not None and image.margin < pipe.rounding(settings)  # vectors have no margin
            counts["near_tie" if close else "wrong"] += 1
            if not close:
                again, passes = pipe.generate([item.prompt], **about).images[0], served["bozzetto"]["target_passes"]
                tqdm.write(f"not the image drawn alone: {item}, {index}: {passes} passes, alone {image.target_passes}")
                told_apart = difference(served["b64_json"], image)
                tqdm.write(f"{told_apart}; alone twice: {again.sha256 == image.sha256}")
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
        wait_for_images(url, len(asked) // 2 // max(1, options.ray))
        held = httpx.get(f"{url}/health").json()["images"]
        process.send_signal(signal.SIGTERM)
        answers = [future.result()["status"] for future in running]
        status = process.wait(options.limit + 60)
    return {"accepted": held, "answered": answers.count(200), "exit_status": status}


def wait_for_images(url: str, count: int) -> None:
    """Until a server (one of its replicas) has as many, or has drawn them faster than that can be seen."""
    end = time.monotonic() + 10
    with httpx.Client(verify=False, timeout=60) as client:
        while client.get(f"{url}/health").json()["images"] < count and time.monotonic() < end:
            time.sleep(0.005)


def overload(options: argparse.Namespace, asked: list[Asked]) -> dict[str, Any]:
    """More requests than one slot and one place in the queue (of each replica) hold, all at once."""
    many, told = [replace(item, bad={"n": 2, "speculation": _SLOW}) for item in asked], list[dict[str, Any]]()
    with serving(options, 1, slots=1) as (_, url):
        while len(told) < 10 * len(asked) and all(answer["status"] == 200 for answer in told):
            told += loaded(url, many, len(many), "too many")[0]
    refused = [answer for answer in told if answer["status"] == 429]
    return {
        "drawn": sum(answer["status"] == 200 for answer in told),
        "refused": len(refused),
        "other": sum(answer["status"] not in (200, 429) for answer in told),
        "retry_after": bool(refused) and all((answer["retry_after"] or "").isdecimal() for answer in refused),
        "slowest_refusal": max((answer["seconds"] for answer in refused), default=0.0),
    }


def raw(body: dict[str, Any] | bytes) -> bytes:
    """A request as it goes over the line."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(data) if isinstance(body, dict) else 99}\r\n\r\n".encode() + data


STATES: dict[str, bytes | None] = {  # what a client has sent when SIGTERM comes (None: nobody is there)
    "warming up": None,
    "idle": None,
    "a connection without a request": b"",
    "half a head": raw({})[:40],
    "half a body": raw(b"{"),
    "a kept connection": b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "drawing": raw({"prompt": "PROMPT", "n": 2, "speculation": _SLOW}),
    "a stream that nobody reads": raw({"prompt": "PROMPT", "n": 8, "stream": True, "partial_images": 3}),
    "told twice": raw({"prompt": "PROMPT", "n": 2, "speculation": _SLOW}),
}


def ending(options: argparse.Namespace, state: str, sent: bytes | None) -> dict[str, Any]:
    """Seconds from SIGTERM to the end of the process, its status, and whether what was drawn arrived."""
    with serving(options, 8, warm=state != "warming up") as (process, url), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(options.limit + 60)
        if sent is not None:
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(sent)
            if b"prompt" in sent:
                wait_for_images(url, 1)
            if state.endswith("nobody reads"):
                time.sleep(2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if state == "told twice":
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        answer = b"".join(iter(lambda: client.recv(65536), b"")) if state == "drawing" else b""
        status = process.wait(options.limit + 60)
    seconds = time.monotonic() - began
    arrived = answer.startswith(b"HTTP/1.1 200") if state == "drawing" else None
    allowed = (143, -15) if state == "told twice" else (0,)  # -15: the second signal came when it had just ended
    fine = seconds <= options.limit + 10 and status in allowed and arrived is not False
    return {"seconds": seconds, "exit_status": status, "arrived": arrived, "fine": fine}


def endings(options: argparse.Namespace, prompt: str) -> dict[str, dict[str, Any]]:
    """`ending` in every state. Under Ray connections are Ray's: the first states and those of images."""
    limited = argparse.Namespace(**{**vars(options), "limit": options.ending_limit})
    found: dict[str, dict[str, Any]] = {}
    for state, sent in tqdm(STATES.items(), desc="SIGTERM"):
        if not options.ray or state in ("idle", "drawing", "told twice"):
            found[state] = ending(limited, state, spoken(sent, prompt))
    return found


def spoken(sent: bytes | None, prompt: str) -> bytes | None:
    """With the prompt, and the length that the body has with it."""
    if sent is None or b"PROMPT" not in sent:
        return sent
    return raw({**json.loads(sent.partition(b"\r\n\r\n")[2]), "prompt": prompt})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as in the module's text."""
    pipe = load(options.model)
    prompts, methods = pipe.classes[:12], options.methods or methods_for(pipe)
    asked = requests(prompts, methods, options.count, options.disconnects, options.seed, options.bad)
    images = sum(item.images for item in asked)
    running = contextlib.nullcontext((None, options.url)) if options.url else serving(options, images)
    with running as (_, url):
        good = [replace(item, images=1) for item in asked if item.leaves is None and item.bad is None]
        loaded(url, good[: 2 * options.slots], options.concurrent, "warming up")  # measures widths, and keeps them
        told, seconds = loaded(url, asked, options.concurrent, f"{options.concurrent} clients")
        single, single_seconds = loaded(url, good[: max(1, options.alone)], 1, "one at a time")
    found = (
        {"methods": methods}
        | figures(options, asked, told, seconds)
        | {"p50_alone": statistics.median(a["seconds"] for a in single)}
    )
    found["images_per_second_alone"] = len(single) / single_seconds
    found["ratio"] = found["images_per_second"] / found["images_per_second_alone"]
    if not options.url:
        found["sigterm"] = stopped(options, good[:16])
        found["overload"] = overload(options, good[: 10 * max(1, options.ray)])
        found["endings"] = endings(options, prompts[0]) if options.endings else {}
    return found


def figures(
    options: argparse.Namespace, asked: list[Asked], told: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Of the requests that came together."""
    good = [answer for item, answer in zip(asked, told, strict=True) if not item.bad]
    bad = [answer["status"] for item, answer in zip(asked, told, strict=True) if item.bad]
    times = sorted(answer["seconds"] for answer in good if answer["status"] == 200)
    drawn = sum(len(answer["images"]) for answer in good if answer["status"] == 200)
    return {
        "requests": len(told),
        "hung_up": sum(answer["status"] == 0 for answer in good),
        "failed": sum(answer["status"] not in (0, 200) for answer in good),
        "bad": len(bad),
        "bad_not_refused": sum(not 400 <= status < 500 for status in bad),
        **judged(options, asked, told),
        "p50": statistics.median(times),
        "p95": times[int(0.95 * (len(times) - 1))],
        "images_per_second": drawn / seconds,
    }


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [
        ", ".join(sorted(set(found["methods"]))),
        f"{found['requests']} requests: {found['failed']} failed, {found['hung_up']} clients hung up; "
        f"{found['bad']} bad ones, {found['bad_not_refused']} of them not refused",
        f"equal to those drawn alone: {found['equal']}, near ties {found['near_tie']}, wrong {found['wrong']}",
        f"seconds per request: median {found['p50']:.2f}, p95 {found['p95']:.2f} (alone {found['p50_alone']:.2f})",
        f"images per second: {found['images_per_second']:.2f}, one at a time "
        f"{found['images_per_second_alone']:.2f}: {found['ratio']:.2f}x",
    ]
    if "sigterm" in found:
        term, much = found["sigterm"], found["overload"]
        lines += [
            f"SIGTERM: {term['accepted']} accepted by then, {term['answered']} answered, exit {term['exit_status']}",
            f"too many at once: {much['drawn']} drawn, {much['refused']} refused with 429 (Retry-After: "
            f"{much['retry_after']}, within {much['slowest_refusal']:.2f} s), {much['other']} neither",
        ]
        for state, end in found["endings"].items():
            how = "" if end["fine"] else "  NOT AS IT SHOULD BE"
            lines.append(f"SIGTERM, {state}: {end['seconds']:.1f} s, exit {end['exit_status']}{how}")
    return "\n".join(lines)


def as_it_should_be(found: dict[str, Any]) -> bool:
    """No image wrong, no good request failed, every bad one refused, nothing accepted lost, an end in every state."""
    fine = not (found["failed"] or found["wrong"] or found["bad_not_refused"])
    if "sigterm" in found:
        much = found["overload"]
        fine &= found["sigterm"]["accepted"] <= found["sigterm"]["answered"] and found["sigterm"]["exit_status"] == 0
        fine &= bool(much["refused"] and much["drawn"] and much["retry_after"] and not much["other"])
        fine &= all(end["fine"] for end in found["endings"].values())
    return fine


def main() -> int:
    """Measure and print; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowers")
    parser.add_argument("--methods", nargs="+", metavar="DRAFTER/RULE", help="in place of those that the model has")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--alone", type=int, default=40, help="requests sent one at a time, 1 or more")
    parser.add_argument("--disconnects", type=float, default=0.05)
    parser.add_argument("--bad", type=float, default=0.0, help="share of requests that cannot be drawn")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--endings", action="store_true", help="SIGTERM in every state")
    parser.add_argument("--ending-limit", type=float, default=30.0, help="--limit of servers that are ended")
    parser.add_argument("--ray", type=int, default=0, help="replicas under Ray Serve (0: without Ray)")
    parser.add_argument("--url", help="a server that runs already, with the same model and enough room")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(table(found))
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        write_text(options.json, json.dumps({"settings": settings, **found, **provenance()}, indent=1) + "\n")
    return int(not as_it_should_be(found))


if __name__ == "__main__":
    sys.exit(main())
