"""Errors as the OpenAI API words them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

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
