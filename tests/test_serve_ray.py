"""Replicas under Ray Serve answer as one server does; Ray Data draws the files that one process draws."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
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
from bozzetto.options import Serve

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine; workers find the package as this process does."""
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


def test_two_replicas_pass_what_one_server_passes(cluster: None, tiny_model: Path) -> None:
    from bozzetto.serve.on_ray import serve_on_ray

    seen: list[Any] = []
    options = Serve(model=(str(tiny_model),), ray=True, replicas=2, port=18765)
    serve_on_ray(options, wait=lambda: seen.append(ask("http://127.0.0.1:18765", tiny_model)))
    assert seen == [None]


def ask(url: str, folder: Path) -> None:
    """What the official client does with one server, and which processes answered."""
    from ray import serve

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    status = serve.status().applications["bozzetto"].deployments["bozzetto"]
    assert sum(status.replica_states.values()) == 2
    wanted = load(folder).generate(["rose"], seed=2, count=8, batch=1)

    def draw(seed: int) -> list[str]:
        answer = client.images.generate(model="tiny", prompt="rose", n=8, extra_body={"seed": seed})
        raw = [Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))) for image in answer.data or []]
        return [hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() for image in raw]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(draw, [2] * 6))
    assert answers == [[image.sha256 for image in wanted.images]] * 6
    kinds = [e.type for e in client.images.generate(prompt="rose", stream=True, partial_images=1)]
    assert kinds[-1] == "image_generation.completed"
    with pytest.raises(openai.BadRequestError, match="daisy"):
        client.images.generate(prompt="cactus")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="nothing", prompt="rose")
    assert httpx.get(url).headers["x-frame-options"] == "DENY" and httpx.get(f"{url}/health").status_code == 200


def test_ray_data_writes_the_files_that_one_process_writes(cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    options = ["sample", "--model", str(tiny_model), "--count", "10", "--batch", "3", "--npz"]
    assert main([*options, "--out", str(tmp_path / "0")]) == 0
    for workers in ("1", "2"):
        assert main([*options, "--ray", workers, "--out", str(tmp_path / workers)]) == 0
    files = [(tmp_path / name / "samples.npz").read_bytes() for name in ("0", "1", "2")]
    assert files[0] == files[1] == files[2]
    assert main([*options, "--ray", "2", "--out", str(tmp_path / "2")]) == 0  # nothing is left to do


def test_scaling_settings_reach_ray(tiny_model: Path) -> None:
    from bozzetto.serve.on_ray import application

    fixed = application(Serve(model=(str(tiny_model),), ray=True, replicas=3))
    scaled = application(Serve(model=(str(tiny_model),), ray=True, replicas=2, max_replicas=5, ongoing=4))
    assert fixed._bound_deployment.num_replicas == 3
    config = scaled._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 4)
