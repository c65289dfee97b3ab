"""Two hundred requests that mean nothing, contradict themselves or ask for what is not there, while others draw: each
is answered with its own 4xx, nothing breaks, and everybody else gets the right bytes."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bozzetto import load
from bozzetto.pipeline.pipeline import Pipeline
from serving import Live, live, until
from test_serve_api import post

HUGE, LONG = 10**300, b"9" * 5000
NUMBERS: list[Any] = ["1", [1], {"a": 1}, True, -1, 1.5, HUGE, "nan", ""]
WORDS: list[Any] = [1, [], {}, False, 0.5, "x" * 300, "no such thing", "\ud800"]
FIELDS: dict[str, list[Any]] = {
    "prompt": [1, [], {}, True, "", "x" * 1001, "\ud800", "cactus", "99", " ", "\0"],
    "model": [1, [], {"a": "b"}, True, "x" * 201, "", "no such model", "../tiny", "tiny ", "/etc/passwd"],
    "n": [*NUMBERS, 0, 11],
    "seed": [*NUMBERS, 2**63],
    "guidance_scale": ["2", [2], {}, True, 0, 0.99, 100.1, HUGE, -1e308],
    "temperature": ["1", [1], {}, True, -0.1, 1e-9, 10_001, HUGE, -HUGE],
    "top_k": [*NUMBERS, 2**31],
    "top_p": ["1", [1], {}, True, 0, -1, 1.01, HUGE],
    "negative_prompt": [1, [], {}, True, "x" * 1001, "\ud800", "thorns"],
    "quality_words": [1, 0, "true", [], {}, True],
    "size": [1, [], {}, "1x1", "32x32x32", "0x0", "32×32", "9" * 21],
    "response_format": [*WORDS, "B64_JSON", "file"],
    "output_format": [*WORDS, "gif", "PNG", "tiff"],
    "output_compression": [*NUMBERS, 101, 50],
    "quality": [*WORDS, "hd", "ultra"],
    "background": [*WORDS, "transparent"],
    "moderation": [*WORDS, "off"],
    "style": [*WORDS, "natural"],
    "user": [1, [], {}, True, "x" * 201],
    "stream": [0, 1, "true", [], {}],
    "partial_images": [*(value for value in NUMBERS if value != ""), 4],
    "speculation": [1, "jacobi", [], True, {"tricks": 1}, {"drafter": 1}, {"rule": []}, {"window": 3}, {"window": "4"}],
}
DRAFTERS = """
    magic plane block glance eagle model sketch none:a=b jacobi:: a:b:c jacobi:fill=plane jacobi:second=eagle
    jacobi:fill=x jacobi:places=0 jacobi:fresh=4 jacobi:reach=999 eagle:tree=9x9x9 eagle:stop=nan
    eagle:folder=/etc model:folder=. jacobi:folder=..
"""
RULES = """
    magic lantern:k=1500 lantern:k=0 lantern:k=-1 lantern:k=1.5 cascade lantern:delta=nan lantern:delta=inf
    lantern:delta=2 grouped:group=0 grouped:group=99999999999999999999999999 lantern:neighbours=3 exact:k=1 plain chains
    tree traversal block pathwise coupled lantern:k=16
"""
METHODS = [*((drafter, "auto") for drafter in ("", *DRAFTERS.split())), *(("jacobi", rule) for rule in RULES.split())]
VECTORS = [
    *(("none", rule) for rule in ("exact:k=1", "lantern", "chains", "reflection:spread=1e308", "cspd")),
    *(("jacobi", rule) for rule in ("plain", "reflection", "lantern:k=4", "joint", "pathwise:epsilon=nan")),
    *(("jacobi:spread=1e308", "pathwise"), ("jacobi:spread=0", "chains"), ("sketch", "joint"), ("eagle", "auto")),
    *(("sketch:length=0", "joint"), ("model", "cspd")),
]
RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"prompt"',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"[" * 30_000,
    b'{"a":' * 9_000,
    b'{"prompt": "rose", "speculation": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"prompt": "rose", "n": ' + LONG + b"}",
    b'{"prompt": "rose", "seed": ' + LONG + b"}",
    b'{"prompt": "rose", "guidance_scale": ' + LONG + b"}",
    b'{"prompt": "rose", "guidance_scale": 1e999}',
    b'{"prompt": "rose", "guidance_scale": NaN}',
    b'{"prompt": "rose", "guidance_scale": -Infinity}',
    b'{"prompt": "rose", "temperature": NaN}',
    b'{"prompt": "rose", "top_p": Infinity}',
    b'{"prompt": "rose", "top_k": 1e3}',
    b'{"prompt": "rose", "top_k": ' + LONG + b"}",
    b'{"prompt": "rose", "speculation": {"tv_budget": NaN}}',
    b'{"prompt": "rose", "speculation": {"tv_budget": Infinity}}',
    b'{"prompt": "rose", "n": NaN}',
    b'{"prompt": "rose" "n": 1}',
    b"prompt=rose&n=1",
    b"<prompt>rose</prompt>",
    b'{"prompt": "' + b"x" * 70_000 + b'"}',
]


def bodies() -> list[bytes]:
    """All of them; every other one asks for a stream."""
    good = {"prompt": "rose", "model": "tiny"}
    found: list[dict[str, Any]] = [{**good, name: value} for name, values in FIELDS.items() for value in values]
    for model, methods in (("tiny", METHODS), ("flow", VECTORS)):
        found += [{**good, "model": model, "speculation": {"drafter": d, "rule": r}} for d, r in methods]
    found += [{**good, "model": "flow", "speculation": {"tv_budget": 1.0}}]
    found += [{**good, "model": "flow", **law} for law in ({"top_k": 4}, {"top_p": 0.5}, {"temperature": 0})]
    found += [{**good, name: 1} for name in ("steps", "guidance", "__proto__", "Prompt", "folder")]
    found += [{}, {"n": 1}, {"model": "tiny"}]
    streams = [{"stream": True, **body} if i % 2 else body for i, body in enumerate(found)]
    return [*(json.dumps(body).encode() for body in streams), *RAW]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    from conftest import write_tiny_model, write_tiny_vectors

    folder = tmp_path_factory.mktemp("somewhere-private")
    return {
        "tiny": load(write_tiny_model(folder / "tiny")),
        "flow": load(write_tiny_vectors(folder / "flow", "flow")),
    }


@pytest.fixture(scope="module")
def server(pipes: dict[str, Pipeline]) -> Iterator[Live]:
    with live(pipes, slots=4, queue=64, warm=False) as running:
        yield running


OTHERS = [("auto", "auto"), ("none", "auto"), ("jacobi", "lantern:k=4"), ("jacobi", "seed-exact")]
GOOD = [
    {"seed": seed, "prompt": ("rose", "tulip")[seed % 2], "speculation": {"drafter": drafter, "rule": rule}}
    for seed, (drafter, rule) in enumerate(OTHERS)
]


def test_no_request_hurts_another_one_and_none_breaks_the_server(
    server: Live, pipes: dict[str, Pipeline], caplog: pytest.LogCaptureFixture
) -> None:
    draws = [pipes["tiny"].generate([g["prompt"]], seed=g["seed"], batch=1, **g["speculation"]) for g in GOOD]
    wanted = [result.images[0].sha256 for result in draws]
    bad, over, found = bodies(), threading.Event(), [list[str]() for _ in GOOD]
    assert len(bad) >= 200

    def draw(number: int) -> None:
        while not over.is_set() or not found[number]:
            status, answer, _ = post(server, {**GOOD[number], "model": "tiny"})
            found[number].append(answer["data"][0]["bozzetto"]["sha256"] if status == 200 else str(answer))

    def try_one(body: bytes) -> str | None:
        """What is wrong with the answer."""
        status, answer, headers = post(server, body)
        fine = status in (400, 404, 413) and answer["error"]["message"] and answer["error"]["type"]
        leaks = str(Path.home()) in str(answer) or "somewhere-private" in str(answer) or "Traceback" in str(answer)
        fine = fine and not leaks and headers["content-type"] == "application/json"
        return None if fine else f"{body[:200]!r}: {answer}"

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(len(GOOD)) as good, ThreadPoolExecutor(4) as crowd:
        drawing = [good.submit(draw, number) for number in range(len(GOOD))]
        try:
            wrong = [answer for answer in crowd.map(try_one, bad) if answer]
        finally:
            over.set()
        for each in drawing:
            each.result()
    assert wrong == []
    assert [set(shas) for shas in found] == [{sha} for sha in wanted]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    until(lambda: server.worker.held == 0 and not server.worker.drawn and not server.worker.jobs)
    assert server.worker.complaint() is None and server.worker.is_alive()


@pytest.mark.parametrize("given", ["application/jsonp", "text/plain", "application/x-www-form-urlencoded", ""])
def test_other_kinds_of_bodies_are_415(server: Live, given: str) -> None:
    assert post(server, {"prompt": "rose"}, content_type=given)[0] == 415
