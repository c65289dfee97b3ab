"""What OpenAI's clients really send. The bodies are those of Open WebUI (routers/images.py of 2025), of LibreChat
(OpenAIImageTools.js and DALLE3.js), of Nextcloud's integration_openai 3 (OpenAiAPIService.php) and of openai 3.57."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from bozzetto import load
from bozzetto.cli.options import Serve
from bozzetto.cli.serve import aliases_of, check
from bozzetto.errors import UsageError
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve import answers
from bozzetto.serve.app import _Stream
from bozzetto.serve.problems import without_places
from serving import Live, live, slowed
from test_serve_api import picture, post, sha

ALIASES = {"gpt-image-1": "tiny", "dall-e-3": "tiny", "dall-e-2": "tiny"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    from conftest import write_tiny_model

    return load(write_tiny_model(tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Live]:
    with live({"tiny": pipe}, aliases=ALIASES, resize=True) as running:
        yield running


@pytest.fixture(scope="module")
def strict(pipe: Pipeline) -> Iterator[Live]:
    with live({"tiny": pipe}, warm=False) as running:
        yield running


def opened(image: dict[str, str]) -> Image.Image:
    text = image["b64_json"] if "b64_json" in image else image["url"].partition(",")[2]
    return Image.open(io.BytesIO(base64.b64decode(text)))


BODIES = {
    "Open WebUI": (
        {"model": "dall-e-2", "prompt": "rose", "n": 1, "size": "512x512", "response_format": "b64_json"},
        ("b64_json", "PNG", 512),
    ),
    "Open WebUI, gpt-image": (
        {"model": "gpt-image-1", "prompt": "rose", "n": 1, "size": "1024x1024"},
        ("b64_json", "PNG", 1024),
    ),
    "LibreChat": (
        {
            "model": "gpt-image-1",
            "prompt": "rose",
            "n": 1,
            "background": "auto",
            "output_format": "png",
            "quality": "auto",
            "size": "auto",
        },
        ("b64_json", "PNG", 32),
    ),
    "LibreChat, webp": (
        {
            "model": "gpt-image-1",
            "prompt": "rose",
            "n": 1,
            "background": "auto",
            "output_format": "webp",
            "output_compression": 100,
            "quality": "auto",
            "size": "1024x1024",
        },
        ("b64_json", "WEBP", 1024),
    ),
    "LibreChat, DALL-E 3": (
        {
            "model": "dall-e-3",
            "quality": "standard",
            "style": "vivid",
            "size": "1024x1024",
            "prompt": "rose",
            "n": 1,
        },
        ("url", "PNG", 1024),
    ),
    "Nextcloud": (
        {"prompt": "rose", "size": "1024x1024", "n": 1, "model": "gpt-image-1"},
        ("b64_json", "PNG", 1024),
    ),
    "Nextcloud, 2023": (
        {"prompt": "rose", "size": "1024x1024", "n": 1, "response_format": "url", "user": "admin"},
        ("url", "PNG", 1024),
    ),
}


@pytest.mark.parametrize(("body", "wanted"), BODIES.values(), ids=BODIES)
def test_bodies_of_front_ends_are_drawn(server: Live, body: dict, wanted: tuple[str, str, int]) -> None:
    status, answer, _ = post(server, body)
    assert status == 200, answer
    (image,) = answer["data"]
    field, kind, side = wanted
    found = opened(image)
    assert field in image and found.format == kind and found.size == (side, side)
    assert answer["size"] == f"{side}x{side}" and image["bozzetto"]["size"] == "32x32"
    assert image["bozzetto"]["model"] == "tiny"


def test_nulls_of_the_official_client_are_what_is_left_out(server: Live, pipe: Pipeline) -> None:
    left = ("background", "moderation", "n", "output_compression", "output_format", "partial_images", "quality")
    nulls = dict.fromkeys((*left, "model", "response_format", "size", "stream", "style"))
    extra = {"seed": 3, "guidance_scale": None, "speculation": {"drafter": None, "rule": None, "tv_budget": None}}
    found = server.client().images.generate(prompt="rose", extra_body=extra, **nulls)  # type: ignore[call-overload]
    assert sha(picture(found.data[0].b64_json)) == pipe.generate(["rose"], seed=3, batch=1).images[0].sha256
    status, answer, _ = post(server, {"prompt": None, "seed": 3})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    status, answer, _ = post(server, {"prompt": "rose", "speculation": None, "user": None, "seed": None})
    assert status == 200 and answer["data"][0]["bozzetto"]["seed"] >= 0


NEUTRAL = [
    {"quality": "auto"},
    {"quality": "standard"},
    {"background": "auto"},
    {"background": "opaque"},
    {"moderation": "auto"},
    {"moderation": "low"},
    {"style": "vivid"},
    {"output_compression": 100},
    {"user": "somebody"},
    {"stream": False},
    {"partial_images": 0},
]
MATTERS = [
    {"quality": "high"},
    {"quality": "hd"},
    {"background": "transparent"},
    {"style": "natural"},
    {"output_compression": 40},
    {"output_compression": 101, "output_format": "jpeg"},
    {"negative_prompt": "thorns"},
    {"input_fidelity": "high"},
    {"size": "64x64"},
    {"model": "gpt-image-1"},
]


@pytest.mark.parametrize("extra", NEUTRAL, ids=str)
def test_values_that_ask_for_what_is_done_anyway_are_taken(strict: Live, pipe: Pipeline, extra: dict) -> None:
    status, answer, _ = post(strict, {"prompt": "tulip", "seed": 1, **extra})
    assert status == 200, answer
    assert answer["data"][0]["bozzetto"]["sha256"] == pipe.generate(["tulip"], seed=1, batch=1).images[0].sha256


@pytest.mark.parametrize("extra", MATTERS, ids=str)
def test_what_would_be_ignored_although_it_matters_is_refused(strict: Live, extra: dict) -> None:
    status, answer, _ = post(strict, {"prompt": "tulip", **extra})
    assert status == (404 if "model" in extra else 400) and answer["error"]["param"] == next(iter(extra)), answer


def test_compression_is_the_quality_of_lossy_formats(server: Live) -> None:
    sizes = {}
    for kind in ("jpeg", "webp"):
        for strength in (0, 60, 100):
            lossy = {"output_format": kind, "output_compression": strength}
            status, answer, _ = post(server, {"prompt": "rose", "seed": 1, "size": "256x256", **lossy})
            assert status == 200 and opened(answer["data"][0]).format == kind.upper()
            sizes[kind, strength] = len(answer["data"][0]["b64_json"])
    assert sizes["jpeg", 0] < sizes["jpeg", 60] < sizes["jpeg", 100]
    assert sizes["webp", 0] < sizes["webp", 60] < sizes["webp", 100]


def test_a_scaled_picture_is_the_drawn_one_scaled_and_the_answer_says_so(server: Live, pipe: Pipeline) -> None:
    drawn = pipe.generate(["rose"], seed=6, batch=1).images[0]
    asked: dict[str, Any] = {"model": "gpt-image-1", "prompt": "rose", "size": "64x64", "stream": True}
    events = list(server.client().images.generate(**asked, partial_images=1, extra_body={"seed": 6}))
    assert [(event.size, picture(event.b64_json).size) for event in events] == [("64x64", (64, 64))] * len(events)
    about = events[-1].bozzetto
    assert (about["sha256"], about["size"], about["model"]) == (drawn.sha256, "32x32", "tiny")
    wanted = drawn.image.resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(picture(events[-1].b64_json)), np.asarray(wanted))


@pytest.mark.parametrize(
    "size", ["0x0", "15x15", "1025x1025", "99999x99999", "1024x1536", "1024", "x", "064x064", "①x①"]
)
def test_sizes_that_no_picture_can_have_are_refused(server: Live, size: str) -> None:
    status, answer, _ = post(server, {"prompt": "rose", "size": size})
    assert status == 400 and answer["error"]["param"] == "size" and "16x16 to 1024x1024" in answer["error"]["message"]


def test_aliases_are_listed_and_named(server: Live) -> None:
    listed = {model.id: model for model in server.client().models.list().data}
    assert set(listed) == {"tiny", *ALIASES} and listed["dall-e-3"].alias_of == "tiny"
    assert server.client().models.retrieve("gpt-image-1").rules == listed["tiny"].rules
    with pytest.raises(openai.NotFoundError, match="allowed: tiny, gpt-image-1"):
        server.client().images.generate(model="gpt-image-2", prompt="rose")


@pytest.mark.parametrize("alias", ["x", "=flowers", "x=", "x=tulips", "flowers=flowers"])
def test_an_alias_of_nothing_or_of_a_name_that_is_taken_is_refused(alias: str) -> None:
    with pytest.raises(UsageError, match="alias = "):
        check(Serve(alias=(alias,)))
    assert aliases_of(Serve(alias=("a=flowers", "b=flowers"))) == {"a": "flowers", "b": "flowers"}
    with pytest.raises(UsageError, match="'a' is served already"):
        check(Serve(alias=("a=flowers", "a=flowers")))


def test_a_model_may_have_a_slash_in_its_name(pipe: Pipeline) -> None:
    with live({"org/tiny": pipe}, warm=False) as server:
        assert server.client().models.retrieve("org/tiny").id == "org/tiny"
        for path in ("/v1/models/org/tiny", "/v1/models/" + urllib.parse.quote("org/tiny", safe="")):
            assert get_json(server, path)[1]["id"] == "org/tiny"
        assert [model["id"] for model in get_json(server, "/v1/models/")[1]["data"]] == ["org/tiny"]
        status, answer = get_json(server, "/v1/models/org/other")
        assert status == 404 and answer["error"]["code"] == "model_not_found"


def get_json(server: Live, path: str, method: str = "GET") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=20)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text else None


def test_balancers_may_ask_for_heads(server: Live) -> None:
    for path in ("/health", "/", "/page.js"):
        assert get_json(server, path, "HEAD") == (200, None)


def test_what_is_not_served_is_404_with_a_word(server: Live) -> None:
    big = io.BytesIO(b"\x89PNG" + b"x" * 500_000)
    client = server.client()
    with pytest.raises(openai.NotFoundError, match=r"cannot be edited here: POST /v1/images/generations"):
        client.images.edit(image=big, prompt="rose")
    with pytest.raises(openai.NotFoundError, match=r"no variations of pictures here"), pytest.deprecated_call():
        client.images.create_variation(image=io.BytesIO(b"\x89PNG"))
    with pytest.raises(openai.NotFoundError, match=r"Not Found: POST /v1/chat/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a rose"}])


def test_broken_json_is_no_field_at_fault(server: Live) -> None:
    status, answer, _ = post(server, b'{"prompt" "rose"}')
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, None, "json_invalid")
    assert "no JSON" in answer["error"]["message"] and "at character 10" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/draw"])
def test_a_stream_says_that_it_is_there_while_nothing_happens(
    strict: Live, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE", 0.02)
    slowed(strict.worker, 0.02)
    body = {"prompt": "rose", "speculation": {"drafter": "none"}, **({"stream": True} if "images" in path else {})}
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(strict.url).netloc, timeout=20)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    blocks = connection.getresponse().read().decode().split("\n\n")[:-1]
    connection.close()
    comments = [block for block in blocks if block.startswith(":")]
    assert comments and set(comments) == {": keep-alive"} and blocks[-1].startswith("event: ")
    if "images" in path:  # the official client passes them over
        events = list(strict.client().images.generate(prompt="rose", stream=True))
        assert [event.type for event in events] == ["image_generation.completed"]


def test_a_stream_that_nobody_came_to_read_is_given_up() -> None:
    import asyncio

    closed: list[bool] = []

    class Given:
        def close(self) -> None:
            closed.append(True)

    async def told() -> AsyncIterator[bytes]:
        yield b"never read"

    async def gone(*message: Any) -> Any:
        raise OSError("the connection was lost")

    async def answered() -> None:
        given: Any = Given()
        with contextlib.suppress(Exception):
            await _Stream(given, told())({"type": "http"}, gone, gone)

    asyncio.run(answered())
    assert closed == [True]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("/srv/models/tiny comes without", "tiny comes without"),
        ("/srv/models/tiny/eagle/config.json: heads = 3", "tiny: heads = 3"),
        ("'/srv/models/tiny': no such", "'tiny': no such"),
        ("a file /mnt/some-where/x.bin, and C:\\data\\x.bin or ~/x/y", "a file ..., and ... or ..."),
        ("a/b is no place, nor DRAFTER/RULE, and/or 3/4", "a/b is no place, nor DRAFTER/RULE, and/or 3/4"),
        ("runs/mine/config.json is no model", "mine is no model"),
    ],
)
def test_no_folder_of_the_server_is_in_a_message(message: str, said: str) -> None:
    assert without_places(message, [("/srv/models/tiny", "tiny"), ("runs/mine", "mine")]) == said


@pytest.mark.parametrize("drafter", ["plane", "block", "jacobi:fill=plane", "jacobi:second=glance", "model"])
def test_a_drafter_that_is_not_there_is_named_without_its_folder(strict: Live, pipe: Pipeline, drafter: str) -> None:
    status, answer, _ = post(strict, {"prompt": "rose", "speculation": {"drafter": drafter}})
    error = answer["error"]
    assert status == 400 and error["param"].startswith("speculation") and str(pipe.folder) not in str(answer)
    assert "missing" in error["message"] or "allowed: auto, none, jacobi" in error["message"], error


def test_what_one_client_drew_is_not_shown_to_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from test_hosted import write_janus

    write_janus(tmp_path / "janus")
    pipe = load(tmp_path / "janus")
    shipped, words = list(pipe.classes), "my ugly old house"
    with live({"janus": pipe}, warm=False, keys=("the-key-of-one-client", "the-key-of-another")) as server:
        one, other = server.client("the-key-of-one-client"), server.client("the-key-of-another")
        one.images.generate(model="janus", prompt=words)
        assert words in pipe.classes and words not in shipped
        (listed,) = other.models.list().data
        assert listed.prompts == shipped and other.models.retrieve("janus").prompts == shipped
        with pytest.raises(openai.BadRequestError) as refused:
            other.images.generate(model="janus", prompt=" ")
        shown = [str(refused.value), listed.model_dump_json(), server.worker.metrics.text().decode(), caplog.text]
        assert not any("ugly" in text for text in shown)
