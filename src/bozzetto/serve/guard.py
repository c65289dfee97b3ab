"""What stands before the app: keys, limits on bodies, headers, counting. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bozzetto.errors import UsageError
from bozzetto.serve.metrics import Metrics
from bozzetto.serve.problems import ApiError

KEYS_VARIABLE = "BOZZETTO_API_KEYS"
MOST_BYTES = 64 * 1024
TOO_LARGE = f"the body is too large: at most {MOST_BYTES} bytes are allowed"
MOST_HEAD = 32 * 1024
BODY_SECONDS = 30.0  # for all of a body, from its head on
_ONCE = (b"host", b"authorization", b"content-type", b"content-length")  # of two, others may believe the other one
_OPEN = ("/", "/health", "/page.js", "/page.css", "/openapi.json")  # without a key
_JSON = ("/v1/images/generations", "/v1/draw")  # a page elsewhere cannot send this kind of body unasked
_ABSENT = {
    "/v1/images/edits": "pictures cannot be edited",
    "/v1/images/variations": "there are no variations of pictures",
}
_KNOWN = (*_OPEN, "/metrics", "/v1/models", "/v1/images/generations", "/v1/draw")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": _POLICY,
    "cache-control": "no-store",
}


def read_keys(path: Path | None) -> tuple[str, ...]:
    """API keys, one a line, from a file or the environment (never the command line, which other users can see).
    Lines that are empty or begin with # say nothing. Raises UsageError for a file without keys, or short keys."""
    if path is not None:
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"api_keys = {str(path)!r} cannot be read: {error}") from error
    else:
        text, where = os.environ.get(KEYS_VARIABLE, ""), KEYS_VARIABLE
        if not text:
            return ()
    lines = [line.strip() for line in text.replace(",", "\n").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or any(len(key) < 16 or not key.isascii() for key in keys):
        raise UsageError(f"{where}: keys of 16 ASCII characters or more are allowed, one a line, at least one")
    return keys


def guarding(app: ASGIApp, keys: Sequence[str], hosts: Sequence[str], metrics: Metrics) -> ASGIApp:
    """An ASGI app behind all this. keys: allowed ones (none: open to all); hosts: names that requests may be for (none:
    any; a page elsewhere could else reach a server on loopback by a name of its own)."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began, status, started = time.monotonic(), 500, False

        async def out(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                present = {name.lower() for name, _ in message.get("headers", [])}
                extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            _check(scope, hosts, digests)
            await app(scope, _capped(receive), out)
        except ApiError as error:
            if not started:
                await JSONResponse(error.body(), error.status_code, error.headers)(scope, receive, out)
        finally:
            path = scope["path"] if scope["path"] in _KNOWN else "other"
            metrics.answered(path, status, time.monotonic() - began)

    return behind


def _check(scope: Scope, hosts: Sequence[str], keys: Sequence[bytes]) -> None:
    """Raises ApiError for what may not come in. keys: their digests."""
    given = [(name.lower(), value) for name, value in scope["headers"]]
    if sum(map(len, (*(part for pair in given for part in pair), scope["query_string"]))) > MOST_HEAD:
        raise ApiError(431, f"headers and query are too large: at most {MOST_HEAD} bytes are allowed")
    headers, names = dict(given), [name for name, _ in given]
    if double := [name.decode() for name in _ONCE if names.count(name) > 1]:
        raise ApiError(400, f"more than one header {double[0]!r} is not allowed")
    if b"content-length" in headers and b"transfer-encoding" in headers:
        raise ApiError(400, "content-length beside transfer-encoding is not allowed")
    host = headers.get(b"host", b"").decode("latin-1")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if hosts and name.lower() not in hosts:
        raise ApiError(400, f"host {name[:100]!r} is not served here", code="unknown_host")
    if keys and scope["path"] not in _OPEN:
        _check_key(headers.get(b"authorization", b""), keys)
    if missing := _ABSENT.get(scope["path"]):  # whatever the size and the kind of its body
        raise ApiError(404, f"{missing} here: POST /v1/images/generations draws new ones", code="unknown_url")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise ApiError(400, "content-length is not a number")
    if int(length[:20]) > MOST_BYTES:
        raise ApiError(413, TOO_LARGE, code="body_too_large")
    if scope["method"] == "POST" and scope["path"] in _JSON:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "content-type has to be application/json", code="unsupported_media_type")


def _check_key(header: bytes, keys: Sequence[bytes]) -> None:
    scheme, _, given = header.partition(b" ")
    digest = hashlib.sha256(given.strip()).digest()
    # Every key is compared, each in constant time.
    found = sum(hmac.compare_digest(digest, key) for key in keys)
    if scheme.lower() != b"bearer" or not found:
        message = "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _capped(receive: Receive) -> Receive:
    """A body is counted as it comes, and has to come in time."""
    seen, whole, end = 0, False, time.monotonic() + BODY_SECONDS

    async def counted() -> Message:
        nonlocal seen, whole
        try:
            message = await (receive() if whole else asyncio.wait_for(receive(), end - time.monotonic()))
        except asyncio.TimeoutError:
            late = f"the body did not come within {BODY_SECONDS:g} s"
            raise ApiError(408, late, code="body_too_slow", headers={"connection": "close"}) from None
        whole = whole or not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if seen > MOST_BYTES:
            raise ApiError(413, TOO_LARGE, code="body_too_large")
        return message

    return counted
