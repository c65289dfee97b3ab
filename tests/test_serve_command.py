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
import threading
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
from bozzetto.cli import main
from bozzetto.serve.guard import KEYS_VARIABLE

KEY = "a-key-of-sixteen-characters"


@contextlib.contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, as soon as it is warm."""
    command = [sys.executable, "-m", "bozzetto", "serve", "--port", "0", *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        found = re.search(r"http://\S+", said)
        assert found, process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        end = time.monotonic() + 60
        while time.monotonic() < end and httpx.get(f"{found[0]}/health").status_code != 200:
            time.sleep(0.1)
        yield process, found[0]
    finally:
        process.kill()
        process.wait(20)


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
