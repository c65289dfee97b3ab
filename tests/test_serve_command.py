"""`bozzetto serve` as a process: where it listens, what it refuses, and that it loses nothing when told to stop."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from bozzetto import load
from bozzetto.cli.main import main
from bozzetto.serve.guard import KEYS_VARIABLE

KEY = "a-key-of-sixteen-characters"


@contextlib.contextmanager
def started(*arguments: object, changed: str = "", **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, as soon as it listens. changed: Python that runs before the command, with `Worker`
    and `sleep`; its stderr goes to a file that `said` reads."""
    program = f"import sys\nfrom time import sleep\nfrom bozzetto.serve.worker import Worker\n{changed}\n"
    program += "from bozzetto.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", "--port", "0", *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=given)
        process.log = log  # type: ignore[attr-defined]
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, said(process)
            yield process, found[0]
        finally:
            process.kill()
            process.wait(20)


def said(process: subprocess.Popen[str]) -> str:
    """What a process has written to stderr."""
    log = process.log  # type: ignore[attr-defined]
    log.seek(0)
    return str(log.read())


@contextlib.contextmanager
def serving(*arguments: object, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, as soon as it is warm."""
    with started(*arguments, **more) as (process, url):
        end = time.monotonic() + 60
        while time.monotonic() < end and httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.1)
        yield process, url


def sha(text: str) -> str:
    return hashlib.sha256(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").tobytes()).hexdigest()


def test_a_server_that_is_told_to_stop_answers_what_it_accepted(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    with serving("--model", tiny_model, "--slots", 2) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

        def ask(seed: int) -> Any:
            try:
                slow = {"seed": seed, "speculation": {"drafter": "none"}}
                return client.images.generate(prompt="rose", n=6, extra_body=slow)
            except openai.APIConnectionError:
                return None  # came after the end

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, seed) for seed in range(8)]
            while httpx.get(f"{url}/health").json()["images"] < 24:
                time.sleep(0.005)
            held = httpx.get(f"{url}/health").json()["images"]
            process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
        assert process.wait(30) == 0
    drawn = [(seed, answer) for seed, answer in enumerate(answers) if answer is not None]
    assert 6 * len(drawn) >= held  # nothing that was accepted is lost
    for seed, answer in drawn:
        wanted = pipe.generate(["rose"], seed=seed, count=6, batch=1, drafter="none").images
        assert [sha(image.b64_json) for image in answer.data] == [image.sha256 for image in wanted]


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """A folder that can neither be there nor be made, whoever asks."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "cache")


def test_without_a_cache_it_serves_and_the_end_waits_for_nobody(tiny_model: Path, nowhere: str) -> None:
    """In every state of a connection at once; `--limit` would let it wait for a minute."""
    slow = "turn = Worker._pass\nWorker._pass = lambda *given: (sleep(0.1), turn(*given))"
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with serving("--model", tiny_model, "--limit", 60, changed=slow, BOZZETTO_CACHE=nowhere) as (process, url):
        port = int(url.rpartition(":")[2])
        halves = [
            head[:9],
            head,
            head + b"content-length: 9\r\n\r\n{",
            b"",
            b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
        ]
        open_ones = [socket.create_connection(("127.0.0.1", port)) for _ in halves]
        for one, half in zip(open_ones, halves, strict=True):
            one.sendall(half)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.images.generate, prompt="rose", extra_body={"speculation": {"drafter": "none"}})
            while not httpx.get(f"{url}/health").json()["images"]:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert asked.result().data
        assert process.wait(30) == 0 and time.monotonic() - began < 10
        for one in open_ones:
            one.close()
        assert "Traceback" not in said(process)


WARMING = "Worker._warm_up = lambda self: sleep(60)"
STUCK = "Worker._pass = lambda *given: sleep(60)\nfrom bozzetto.serve import server\nserver.GRACE = 1.0"


@pytest.mark.parametrize(
    ("changed", "draws", "signals", "status", "message"),
    [
        (WARMING, False, [signal.SIGTERM], 0, "stopping"),
        ("", True, [signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT, "stopped at once"),
        (STUCK, True, [signal.SIGTERM], 1, "2 s are over"),
    ],
    ids=["warming up", "told twice", "a pass without end"],
)
def test_the_process_ends_when_told_to(
    changed: str, draws: bool, signals: list[signal.Signals], status: int, message: str, tiny_model: Path
) -> None:
    stuck = changed or "Worker._pass = lambda *given: sleep(60)"
    begin = serving if draws else started
    with begin("--model", tiny_model, "--limit", 1, changed=stuck) as (process, url), ThreadPoolExecutor(1) as pool:
        assert httpx.get(f"{url}/health").status_code == (200 if draws else 503)
        if draws:
            asked = pool.submit(httpx.post, f"{url}/v1/images/generations", json={"prompt": "rose"}, timeout=60)
            while not httpx.get(f"{url}/health").json()["images"]:
                time.sleep(0.005)
        for number in signals:
            process.send_signal(number)
            while "stopping" not in said(process):
                time.sleep(0.005)
        assert process.wait(11) == status
        assert message in said(process) and "Traceback" not in said(process), said(process)
        if draws:
            with pytest.raises(httpx.TransportError):
                asked.result()


def test_a_warm_up_that_fails_ends_the_process_with_a_word(tiny_model: Path) -> None:
    with started("--model", tiny_model, changed="Worker._warm_up = lambda self: 1 / 0") as (process, _):
        assert process.wait(30) == 2
        assert "ZeroDivisionError" in said(process)  # at once, with its cause
        assert said(process).endswith("bozzetto: error: the models could not be served: division by zero\n")


def test_keys_come_from_a_file_or_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n\n{KEY}\n")
    for arguments, environment in ((["--api-keys", tmp_path / "keys"], {}), ([], {KEYS_VARIABLE: KEY})):
        with serving("--model", tiny_model, *arguments, **environment) as (_, url):
            assert httpx.get(f"{url}/v1/models").status_code == 401
            allowed = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
            assert [model["id"] for model in allowed.json()["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "nothing"], ["nothing", "flowers"]),
        (["--port", "70000"], ["port = 70000", "65535"]),
        (["--slots", "0"], ["slots = 0", ">= 1"]),
        (["--queue", "-1"], ["queue = -1", ">= 0"]),
        (["--limit", "0"], ["limit = 0", "above 0"]),
        (["--limit", "1e9"], ["limit = 1000000000", "at most"]),
        (["--replicas", "2"], ["--ray"]),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], ["max_replicas = 2", "3 or more"]),
        (["--compile", "fast"], ["fast"]),
        (["--api-keys", "nowhere"], ["nowhere"]),
        (["--model", "flowers", "--model", "flowers"], ["of that name"]),
        (["--host", "203.0.113.9"], ["203.0.113.9", "cannot listen"]),
    ],
)
def test_bad_options_are_one_line_and_exit_with_2(
    flags: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(text in message for text in named), message


def test_an_address_that_is_taken_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen there" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "with-an-ümlaut-that-is-long\n"])
def test_keys_that_could_be_guessed_or_are_none_are_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text(content, encoding="utf-8")
    assert main(["serve", "--api-keys", str(tmp_path / "keys")]) == 2
    assert "16 ASCII characters" in capsys.readouterr().err
