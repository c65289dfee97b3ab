"""Replicas under Ray Serve answer as one server does; Ray Data draws the files that one process draws."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from bozzetto import load
from bozzetto.cli.main import main
from bozzetto.cli.options import Serve
from bozzetto.serve.worker import Worker

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
    from bozzetto.cli.serve_ray import serve_on_ray

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


def test_a_full_replica_says_so_at_once_and_its_health(cluster: None) -> None:
    """Ray Serve 2.60.0 with max_ongoing_requests = slots + queue: three requests were drawn, seven others and /health
    had no answer after two minutes; with max_queued_requests they had 503 in plain text without Retry-After."""
    from bozzetto.cli.serve_ray import serve_on_ray

    url, seen = "http://127.0.0.1:18766", list[Any]()

    def draw(seed: int) -> httpx.Response:
        slow = {"prompt": "rose", "seed": seed, "speculation": {"drafter": "none"}}
        return httpx.post(f"{url}/v1/images/generations", json=slow, timeout=100)

    def fill() -> None:
        with ThreadPoolExecutor(10) as pool:
            asked = [pool.submit(draw, seed) for seed in range(10)]
            done = list(as_completed(asked))
            while httpx.get(f"{url}/health", timeout=10).json()["images"]:
                pass
        seen.extend(future.result() for future in done)

    serve_on_ray(Serve(model=("flowers",), ray=True, slots=1, queue=1, port=18766), wait=fill)
    status = [answer.status_code for answer in seen]
    assert status == [429] * 8 + [200] * 2  # who is refused does not wait for who is drawn
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in seen[:8])
    assert all(answer.json()["error"]["code"] == "queue_full" for answer in seen[:8])


def test_a_replica_that_draws_nothing_is_ill(tiny_model: Path) -> None:
    from bozzetto.cli.serve_ray import Replica

    pipe, replica = load(tiny_model), Replica()
    worker = Worker(lambda: {"tiny": pipe}, warm=False)
    replica.app = SimpleNamespace(state=SimpleNamespace(worker=worker))
    worker.start()
    assert worker.settled.wait(20)
    replica.check_health()
    worker.trouble["tiny"] = "OSError"
    with pytest.raises(RuntimeError, match="passes of tiny fail"):
        replica.check_health()
    worker.stop()
    worker.join(20)


def test_ray_data_writes_the_files_that_one_process_writes(cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    options = ["sample", "--model", str(tiny_model), "--count", "10", "--batch", "3", "--npz"]
    assert main([*options, "--out", str(tmp_path / "0")]) == 0
    for workers in ("1", "2"):
        assert main([*options, "--ray", workers, "--out", str(tmp_path / workers)]) == 0
    files = [(tmp_path / name / "samples.npz").read_bytes() for name in ("0", "1", "2")]
    assert files[0] == files[1] == files[2]
    assert main([*options, "--ray", "2", "--out", str(tmp_path / "2")]) == 0  # nothing is left to do


def test_scaling_settings_reach_ray(tiny_model: Path) -> None:
    from bozzetto.cli.serve_ray import application

    fixed = application(Serve(model=(str(tiny_model),), ray=True, replicas=3))
    scaled = application(Serve(model=(str(tiny_model),), ray=True, replicas=2, max_replicas=5, ongoing=4))
    assert fixed._bound_deployment.num_replicas == 3
    config = scaled._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 4)
    for deployment in (fixed._bound_deployment, scaled._bound_deployment):  # ours is full long before Ray's is
        assert deployment._deployment_config.max_ongoing_requests > 8 + 64 + 500
        assert deployment._deployment_config.max_queued_requests > 0
