"""Errors as the OpenAI API words them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException

# What looks like a file somewhere on this machine: separators between words, from a root, a home or a drive on.
_PLACE = re.compile(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?[/\\]+[^\s'\",;:()/\\]+(?:[/\\]+[^\s'\",;:()/\\]*)+")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer other than 2xx. status: HTTP; param: the field at fault; code: for programs. Starlette's kind, which
    FastAPI lets through while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """What clients get."""
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error. Text that is no valid Unicode (a lone surrogate of a request) is replaced."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    content = {"message": message, "type": kind, "param": param, "code": code}
    clean = {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in content.items()}
    return {"error": clean}


def misread(error: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a body that says what is not allowed. error: the first one that pydantic found."""
    if error["type"] == "json_invalid":
        why = f"{error.get('ctx', {}).get('error', '')} at character {error['loc'][-1]}".strip()
        return error_body(400, f"the body is no JSON: {why}", code="json_invalid")
    where = ".".join(str(part) for part in error["loc"] if part != "body") or None
    given, message = error.get("input"), error["msg"]
    if where is not None:
        value = f" = {given!r:.60}" if isinstance(given, (str, int, float)) and error["type"] != "missing" else ""
        message = f"{where}{value}: {message}"
    return error_body(400, message, where, error["type"])


def without_places(message: str, folders: Iterable[tuple[str, str]]) -> str:
    """A message without files and folders of this machine. folders: of models, and what they go by."""
    for folder, name in folders:
        message = re.sub(re.escape(folder) + r"(?:[/\\][^\s'\",;:()]*)?", name.replace("\\", r"\\"), message)
    return _PLACE.sub("...", message)
