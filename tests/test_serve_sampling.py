"""A server draws as the model's authors do where a request says nothing, and as it says where it does."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bozzetto import load
from bozzetto.checkpoints.own_sampling import OwnSampling
from bozzetto.pipeline.pipeline import Pipeline
from conftest import write_tiny_vectors
from serving import Live, live
from test_hosted import EMU3_SIZE, write_emu3

OWN = OwnSampling(3.5, 0.8, 7, 0.9, source="a paper")
# The toy's context has no room for the published words.
WORDED = OwnSampling(3.0, top_k=20, suffix=" white.", negative_prompt="ugly old", source="a repository")


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Pipeline]:
    folder = tmp_path_factory.mktemp("served")
    emu3 = folder / "emu3"
    emu3.mkdir()
    write_emu3(emu3)
    made = {
        "tiny": load(tiny_model),
        "flow": load(write_tiny_vectors(folder / "flow", "flow")),
        "emu3": load(emu3, image_size=EMU3_SIZE),
    }
    made["tiny"].own, made["emu3"].own = OWN, WORDED
    made["emu3"].runner.hosted.own = WORDED  # type: ignore[attr-defined]  # of its twins of other sizes
    made["emu3"].runner.hosted.sizes = ((32, 16), (720, 720))  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="module")
def server(pipes: dict[str, Pipeline]) -> Iterator[Live]:
    with live(pipes, slots=2, queue=8, warm=False) as running:
        yield running


def post(server: Live, body: dict[str, Any], path: str = "/v1/images/generations") -> tuple[int, Any]:
    head = {"content-type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), head)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"guidance_scale": None, "temperature": None, "top_k": None, "top_p": None, "negative_prompt": None}, {}),
    ({"guidance_scale": 1.5}, {"guidance": 1.5}),
    ({"top_k": 0}, {"top_k": 0}),
    ({"top_p": 1}, {"top_p": 1.0}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"top_k": 2**31 - 1, "temperature": 1.25}, {"top_k": 2**31 - 1, "temperature": 1.25}),
    ({"negative_prompt": "", "quality_words": False}, {}),
]


@pytest.mark.parametrize(("said", "settings"), ASKED, ids=str)
@pytest.mark.parametrize("drafter", ["none", "auto"])
def test_a_request_draws_what_generate_draws(
    server: Live, pipes: dict[str, Pipeline], drafter: str, said: dict[str, Any], settings: dict[str, Any]
) -> None:
    status, answer = post(server, {"prompt": "rose", "seed": 5, "speculation": {"drafter": drafter}, **said})
    assert status == 200, answer
    wanted = pipes["tiny"].generate(["rose"], seed=5, batch=1, drafter=drafter, **settings)
    about = answer["data"][0]["bozzetto"]
    assert about["sha256"] == wanted.images[0].sha256
    law = wanted.settings.law
    told = {"guidance_scale": law.guidance, "temperature": law.temperature, "top_k": law.top_k, "top_p": law.top_p}
    assert about["sampling"] == told


def test_models_say_how_they_are_sampled(server: Live) -> None:
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
        tiny, flow, emu3 = json.loads(answer.read())["data"]
    law = {"guidance_scale": 3.5, "temperature": 0.8, "top_k": 7, "top_p": 0.9}
    assert tiny["sampling"] == {**law, "source": "a paper"} and not tiny["takes_negative_prompt"]
    assert tiny["sizes"] == [tiny["size"]]
    assert set(flow["sampling"]) == {"guidance_scale", "temperature", "steps", "source"}
    words = {"quality_words": " white.", "negative_prompt": "ugly old", "source": "a repository"}
    assert emu3["sampling"] == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 20, "top_p": 1.0, **words}
    assert emu3["takes_negative_prompt"] and emu3["sizes"][1:] == ["32x16", "720x720"]


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ({}, {}),
        ({"negative_prompt": "ugly"}, {"negative_prompt": "ugly"}),
        ({"quality_words": True}, {"quality_words": True}),
        ({"quality_words": True, "negative_prompt": ""}, {"quality_words": True, "negative_prompt": ""}),
    ],
    ids=str,
)
def test_words_around_prompts_are_those_of_generate(
    server: Live, pipes: dict[str, Pipeline], said: dict[str, Any], settings: dict[str, Any]
) -> None:
    status, answer = post(server, {"model": "emu3", "prompt": "a dog", "seed": 2, **said})
    assert status == 200, answer
    wanted = pipes["emu3"].generate(["a dog"], seed=2, batch=1, **settings).images[0]
    assert answer["data"][0]["bozzetto"]["sha256"] == wanted.sha256


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"negative_prompt": "thorns"}, "negative_prompt"),
        ({"quality_words": True}, "quality_words"),
        ({"temperature": 1e-5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"model": "flow", "negative_prompt": "thorns"}, "negative_prompt"),
        ({"model": "flow", "top_k": 3}, None),
        ({"model": "emu3", "size": "16x32"}, "size"),
        ({"model": "emu3", "negative_prompt": "<boi>"}, None),
    ],
    ids=str,
)
def test_what_a_model_has_no_use_for_is_refused(server: Live, body: dict[str, Any], param: str | None) -> None:
    status, answer = post(server, {"prompt": "rose", **body})
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_one_model_serves_its_sizes(server: Live, pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["emu3"]
    for size in ((32, 16), pipe.size, (32, 16)):
        body = {"model": "emu3", "prompt": "a dog", "seed": 3, "size": f"{size[0]}x{size[1]}"}
        status, answer = post(server, body)
        assert status == 200 and answer["size"] == body["size"], answer
        wanted = pipe.in_size(size).generate(["a dog"], seed=3, batch=1).images[0]
        assert answer["data"][0]["bozzetto"]["sha256"] == wanted.sha256
    assert set(server.worker.loops) == {"tiny", "flow", "emu3", "emu3 32x16"}
    # More tokens than the toy's context holds: an error of the request, and the server goes on.
    status, answer = post(server, {"model": "emu3", "prompt": "a dog", "size": "720x720"})
    assert status == 400 and "720x720" in answer["error"]["message"]
    assert post(server, {"prompt": "rose"})[0] == 200


def test_caches_of_sizes_that_nobody_asks_for_are_given_up(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["emu3"]
    sizes = [(8 * columns, 8) for columns in range(1, 8)]
    pipe.runner.hosted.sizes = tuple(sizes)  # type: ignore[attr-defined]
    with live({"emu3": pipe}, warm=False) as server:
        for width, height in sizes:
            assert post(server, {"prompt": "a dog", "size": f"{width}x{height}"})[0] == 200
        assert list(server.worker.loops) == ["emu3", *(f"emu3 {width}x{height}" for width, height in sizes[-4:])]
