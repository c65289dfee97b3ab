"""The HTTP API as clients meet it: the official client, typed errors, limits, streams, and what a fuzzer sends."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from bozzetto import load
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve.schema import ImageGeneration, Speculation
from serving import Live, live, slowed, until

ROOT = Path(__file__).resolve().parent.parent
KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    from conftest import write_tiny_model

    return load(write_tiny_model(tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Live]:
    with live({"tiny": pipe}) as running:
        yield running


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def sha(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def post(server: Live, body: object, path: str = "/v1/images/generations", **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(server.url + path, data, given)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def get(server: Live, path: str, **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_the_official_client_gets_the_bytes_that_generate_draws(server: Live, pipe: Pipeline) -> None:
    wanted = pipe.generate(["rose"], seed=11, count=3, batch=1, window=4)
    extra = {"seed": 11, "speculation": {"window": 4}}
    found = server.client().images.generate(model="tiny", prompt="rose", n=3, extra_body=extra)
    assert [sha(picture(image.b64_json)) for image in found.data] == [image.sha256 for image in wanted.images]
    assert found.usage.output_tokens == 48 and found.size == "32x32" and found.output_format == "png"
    about = [image.bozzetto for image in found.data]
    assert [a["sha256"] for a in about] == [image.sha256 for image in wanted.images]
    assert [a["target_passes"] for a in about] == [image.target_passes for image in wanted.images]


@pytest.mark.parametrize(
    ("drafter", "rule"), [("none", "auto"), ("jacobi", "exact"), ("jacobi", "lantern:k=4"), ("auto", "auto")]
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_methods_and_guidance_are_those_of_generate(
    server: Live, pipe: Pipeline, drafter: str, rule: str, guidance: float
) -> None:
    wanted = pipe.generate(["tulip"], seed=4, batch=1, drafter=drafter, rule=rule, guidance=guidance, window=4)
    extra = {"seed": 4, "guidance_scale": guidance, "speculation": {"drafter": drafter, "rule": rule, "window": 4}}
    (found,) = server.client().images.generate(prompt="tulip", extra_body=extra).data
    assert sha(picture(found.b64_json)) == wanted.images[0].sha256


def test_a_stream_tells_partial_images_and_ends_with_the_whole_one(server: Live, pipe: Pipeline) -> None:
    slow = {"seed": 3, "speculation": {"drafter": "none"}}  # a token per pass, so that no partial image is skipped
    asked = {"model": "tiny", "prompt": "daisy", "stream": True, "partial_images": 3, "extra_body": slow}
    events = list(server.client().images.generate(**asked))  # type: ignore[call-overload]
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == [*["partial_image"] * 3, "completed"]
    partial = {
        event.partial_image_index: picture(event.b64_json)
        for event in events[:-1]
        if hasattr(event, "partial_image_index")
    }
    grey = {i: float((np.asarray(p) == 128).all(-1).mean()) for i, p in partial.items()}
    assert grey[0] == pytest.approx(0.75, abs=0.02) and grey[2] == pytest.approx(0.25, abs=0.02)
    done = next(event for event in events if event.type.endswith("completed"))
    assert sha(picture(done.b64_json)) == pipe.generate(["daisy"], seed=3, batch=1).images[0].sha256
    assert done.usage.output_tokens == 16


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats_are_what_they_are_called_and_lossless_ones_are(server: Live, pipe: Pipeline, kind: str) -> None:
    asked = {"prompt": "rose", "output_format": kind, "extra_body": {"seed": 1}}
    (found,) = server.client().images.generate(**asked).data  # type: ignore[call-overload]
    raw = Image.open(io.BytesIO(base64.b64decode(found.b64_json)))
    assert raw.format == kind.upper() and raw.size == (32, 32)
    if kind != "jpeg":
        assert sha(raw.convert("RGB")) == pipe.generate(["rose"], seed=1, batch=1).images[0].sha256
    asked["response_format"] = "url"
    (linked,) = server.client().images.generate(**asked).data  # type: ignore[call-overload]
    assert linked.url == f"data:image/{kind};base64,{found.b64_json}"


def test_without_a_seed_pictures_differ_and_the_answer_names_it(server: Live, pipe: Pipeline) -> None:
    first, second = (server.client().images.generate(prompt="rose") for _ in range(2))
    assert first.seed != second.seed
    again = pipe.generate(["rose"], seed=first.seed, batch=1).images[0]
    assert again.sha256 == first.data[0].bozzetto["sha256"]


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"prompt": "cactus"}, None, "daisy, rose, tulip"),
        ({"prompt": "rose", "size": "512x512"}, "size", "32x32"),
        ({"prompt": "rose", "n": 11}, "n", "10"),
        ({"prompt": "rose", "n": 0}, "n", "1"),
        ({"prompt": "rose", "n": "2"}, "n", "integer"),
        ({"prompt": ""}, "prompt", "1 character"),
        ({"prompt": "x" * 1001}, "prompt", "1000"),
        ({}, "prompt", "required"),
        ({"prompt": "rose", "quality": "hd"}, "quality", "quality = 'hd': Input should be 'auto' or 'standard'"),
        ({"prompt": "rose", "partial_images": 4}, "partial_images", "3"),
        ({"prompt": "rose", "partial_images": 2}, "partial_images", "2 pictures on the way need stream: true"),
        ({"prompt": "rose", "seed": -1}, "seed", "0"),
        ({"prompt": "rose", "seed": 2**63}, "seed", str(2**63)),
        ({"prompt": "rose", "guidance_scale": 0.5}, "guidance_scale", "1"),
        ({"prompt": "rose", "output_format": "gif"}, "output_format", "png"),
        ({"prompt": "rose", "speculation": {"drafter": "magic"}}, "speculation", "jacobi"),
        ({"prompt": "rose", "speculation": {"drafter": "jacobi", "rule": "cascade"}}, "speculation", "window"),
        ({"prompt": "rose", "speculation": {"window": 3}}, "speculation.window", "16"),
        ({"prompt": "rose", "speculation": {"drafter": "model:folder=/etc"}}, "speculation.drafter", "folder"),
        ({"prompt": "rose", "speculation": {"drafter": "eagle:folder=../.."}}, "speculation.drafter", "folder"),
        ({"prompt": "rose", "speculation": {"rule": "lantern:k=../../x"}}, "speculation.rule", "not allowed"),
        ({"prompt": "rose", "speculation": {"drafter": "jacobi", "rule": "lantern:k=99"}}, None, "15"),
        ({"prompt": "rose", "speculation": {"tv_budget": -1}}, "speculation.tv_budget", "0"),
        ({"prompt": "rose", "speculation": {"tricks": 1}}, "speculation.tricks", "not permitted"),
        ({"prompt": "\ud800"}, "prompt", "unicode"),
    ],
)
def test_bad_requests_are_400_and_name_the_field(server: Live, body: dict, param: str | None, named: str) -> None:
    status, answer, _ = post(server, body)
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), answer
    assert named.lower() in error["message"].lower()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 20000, b'{"n":' + b"9" * 5000 + b"}"]
)
def test_bodies_that_are_no_requests_are_400(server: Live, body: bytes) -> None:
    status, answer, _ = post(server, body)
    assert status == 400 and answer["error"]["message"]


def test_the_client_gets_typed_errors(server: Live) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match=r"nothing.*allowed: tiny"):
        client.images.generate(model="nothing", prompt="rose")
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt="rose", size="1x1")  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    assert client.models.retrieve("tiny").id == "tiny"
    (listed,) = client.models.list().data
    assert listed.prompts == ["daisy", "rose", "tulip"] and listed.rules["none"] == ["seed-exact"]
    assert "exact" in listed.rules["jacobi"] and "eagle" not in listed.rules and "lantern++" in listed.lossy


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"prompt": "cactus"}, "daisy, rose, tulip"),
        ({"speculation": {"rule": "lantern:k=1500"}}, "at most 15"),
        ({"speculation": {"drafter": "plane"}}, "plane"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/draw"])
def test_what_is_known_before_the_first_pass_is_400_for_a_stream_too(
    server: Live, extra: dict, named: str, path: str
) -> None:
    stream = {"stream": True} if path.endswith("generations") else {}
    status, answer, headers = post(server, {"prompt": "rose", **stream, **extra}, path)
    assert status == 400 and headers["content-type"] == "application/json" and named in answer["error"]["message"]


def test_large_bodies_other_types_and_other_methods_are_refused(server: Live) -> None:
    assert post(server, b'{"prompt": "' + b"x" * 70_000 + b'"}')[0] == 413
    assert post(server, {"prompt": "rose"}, content_type="text/plain")[0] == 415
    status, body, headers = get(server, "/v1/images/generations")
    assert status == 405 and headers["allow"] == "POST" and json.loads(body)["error"]["type"]
    assert get(server, "/v1/../../etc/passwd")[0] == get(server, "/page/../worker.py")[0] == 404


def test_a_body_of_unknown_length_is_counted_as_it_comes(server: Live) -> None:
    import httpx

    chunks = (b"x" * 10_000 for _ in range(9))
    answer = httpx.post(
        f"{server.url}/v1/images/generations", content=chunks, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413 and "bytes" in answer.json()["error"]["message"]


def test_a_page_elsewhere_cannot_reach_a_server_on_loopback(server: Live) -> None:
    status, answer, _ = post(server, {"prompt": "rose"}, Host="evil.example")
    assert status == 400 and answer["error"]["code"] == "unknown_host"


def test_every_answer_carries_the_headers_of_a_safe_page(server: Live) -> None:
    for path in ("/", "/page.js", "/page.css", "/health", "/metrics", "/nowhere", "/openapi.json"):
        _, body, headers = get(server, path)
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"] and body


def test_keys_are_asked_for_where_there_are_some(pipe: Pipeline) -> None:
    with live({"tiny": pipe}, keys=("another-key-altogether", KEY)) as guarded:
        with pytest.raises(openai.AuthenticationError, match="valid API key"):
            guarded.client("a-wrong-key-of-some-length").images.generate(prompt="rose")
        assert guarded.client(KEY).images.generate(prompt="rose").data
        assert get(guarded, "/metrics")[0] == get(guarded, "/v1/models")[0] == 401
        assert get(guarded, "/health")[0] == get(guarded, "/")[0] == 200
        assert get(guarded, "/v1/models", Authorization=f"Basic {KEY}")[0] == 401


def test_a_full_queue_is_429_and_says_when_to_come_again(pipe: Pipeline) -> None:
    with live({"tiny": pipe}, slots=1, queue=1) as small:
        slowed(small.worker, 0.1)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda seed: post(small, {"prompt": "rose", "seed": seed}), range(6)))
        assert {status for status, *_ in answers} == {200, 429}
        refused = [(answer, headers) for status, answer, headers in answers if status == 429]
        assert all(a["error"]["type"] == "rate_limit_error" and int(h["retry-after"]) >= 1 for a, h in refused)
        # More than the server ever holds is no question of time.
        status, answer, headers = post(small, {"prompt": "rose", "n": 3})
        assert (status, answer["error"]["param"], headers["retry-after"]) == (400, "n", None)
        assert "n = 3 is not allowed: this server holds 2 images" in answer["error"]["message"]
        until(lambda: small.worker.held == 0)


def test_a_request_that_takes_too_long_is_given_up(pipe: Pipeline) -> None:
    with live({"tiny": pipe}, limit=0.2) as hasty:
        slowed(hasty.worker, 0.15)
        status, answer, _ = post(hasty, {"prompt": "rose", "speculation": {"drafter": "none"}})
        assert status == 504 and "0.2 s" in answer["error"]["message"]
        until(lambda: hasty.worker.held == 0 and not hasty.worker.drawn)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(pipe: Pipeline, stream: bool) -> None:
    import httpx

    with live({"tiny": pipe}) as server:
        slowed(server.worker, 0.2)
        body = {"prompt": "rose", "n": 4, "stream": stream, "speculation": {"drafter": "none"}}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=0.7)
        assert server.worker.held == 4
        until(lambda: server.worker.held == 0 and not server.worker.drawn, seconds=2)


def test_requests_of_different_settings_share_passes(pipe: Pipeline) -> None:
    with live({"tiny": pipe}, warm=False) as server:
        slowed(server.worker, 0.02)
        bodies = [
            {"prompt": p, "seed": s, "guidance_scale": g} for s, (p, g) in enumerate([("rose", 2.0), ("tulip", 4.0)])
        ]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda body: post(server, body), bodies))
        batches = server.worker.metrics.batch.labels("tiny")
        assert batches._sum.get() > sum(b.get() for b in batches._buckets)  # images over passes: more than one
    for body, (_, answer, _) in zip(bodies, answers, strict=True):
        wanted = pipe.generate([body["prompt"]], seed=body["seed"], batch=1, guidance=body["guidance_scale"])
        assert answer["data"][0]["bozzetto"]["sha256"] == wanted.images[0].sha256


def test_a_request_that_breaks_a_model_does_not_end_the_server(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with live({"tiny": pipe}) as server:
        whole = server.worker.loops["tiny"].step
        monkeypatch.setattr(server.worker.loops["tiny"], "step", lambda: 1 / 0)
        status, answer, _ = post(server, {"prompt": "rose"})
        assert status == 500 and answer["error"]["type"] == "server_error" and "division" not in str(answer)
        assert post(server, {"prompt": "rose"})[0] == 200 and callable(whole)


def test_until_it_is_warm_a_server_says_503(pipe: Pipeline) -> None:
    with live({"tiny": pipe}) as server:
        server.worker.ready.clear()
        for status, body, headers in (get(server, "/health"), get(server, "/v1/models")):
            assert status == 503 and json.loads(body)["error"]["code"] == "starting" and headers["retry-after"]
        server.worker.ready.set()
        assert get(server, "/health")[0] == 200


def test_health_says_why_nothing_is_drawn(pipe: Pipeline) -> None:
    with live({"tiny": pipe}) as server:
        server.worker.trouble["tiny"] = "OSError (No space left on device), see the server's log"
        status, body, headers = get(server, "/health")
        error = json.loads(body)["error"]
        assert (status, error["code"], headers["retry-after"]) == (503, "failing", "5")
        assert error["message"] == "passes of tiny fail: OSError (No space left on device), see the server's log"
        assert post(server, {"prompt": "rose"})[0] == 200  # it is tried all the same, and went well:
        assert get(server, "/health")[0] == 200
        server.worker.stop()
        server.worker.join(20)
        for path in ("/health", "/v1/models"):
            status, body, _ = get(server, path)
            assert status == 503 and "is stopping" in json.loads(body)["error"]["message"]


def test_metrics_count_tokens_passes_and_answers(pipe: Pipeline) -> None:
    with live({"tiny": pipe}) as server:
        answer = server.client().images.generate(prompt="rose", n=2)
        post(server, {"prompt": "cactus"})
        lines = dict(line.rsplit(" ", 1) for line in get(server, "/metrics")[1].decode().splitlines() if line[0] != "#")
        assert float(lines['bozzetto_tokens_total{model="tiny"}']) == 32
        passes = sum(image.bozzetto["target_passes"] for image in answer.data)
        assert float(lines['bozzetto_passes_total{model="tiny"}']) == passes
        assert float(lines["bozzetto_images_in_system"]) == 0
        for status in ("200", "400"):
            assert float(lines[f'bozzetto_requests_total{{path="/v1/images/generations",status="{status}"}}']) == 1


def test_what_a_fuzzer_makes_of_the_schema_never_breaks_the_server(server: Live) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    for operation in schema.get_all_operations():
        run = settings(
            max_examples=25,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )

        @run
        @given(case=operation.ok().as_strategy())
        def against(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error], timeout=30)

        against()
    assert get(server, "/health")[0] == 200


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    from bozzetto.cli.options import Serve
    from bozzetto.cli.serve import models_of
    from bozzetto.errors import UsageError

    (tmp_path / "mine").mkdir()
    assert models_of(Serve(model=("flowers", str(tmp_path / "mine")))) == {
        "flowers": "flowers",
        "mine": str(tmp_path / "mine"),
    }
    with pytest.raises(UsageError, match="of that name"):
        models_of(Serve(model=("flowers", "flowers")))


SHOWN = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "serve.md").read_text(encoding="utf-8"), flags=re.M | re.S
)


@pytest.mark.parametrize("code", SHOWN, ids=range(len(SHOWN)))
def test_what_the_documentation_shows_works(
    code: str, server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"flowers"', '"tiny"')
    exec(compile(code, "serve.md", "exec"), {"__name__": "serve"})
    assert capsys.readouterr().out
    assert "open(" not in code or len(list(tmp_path.glob("tulip-*.png"))) == 2


def test_the_documentation_names_every_field(server: Live) -> None:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    fields = {*ImageGeneration.model_fields, *Speculation.model_fields}
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
    content = json.loads(get(server, "/openapi.json")[1])
    assert {"/v1/images/generations", "/v1/models", "/health", "/metrics"} <= set(content["paths"])
