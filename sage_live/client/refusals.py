"""A server's no as an exception: the same whether it came over HTTP, inside a stream, or from this process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from sage_core.errors import EngineError
from sage_live.errors import TYPES, ApiError

_TEXT_MAX: Final = 300

_STATUS_OF: Final = {
    "invalid_api_key": 401,
    "model_not_found": 404,
    "rate_limit_exceeded": 429,
    "server_is_overloaded": 503,
    "upstream_failed": 502,
    "upstream_timeout": 504,
}
"""What the gateway's codes mean where there is no status: in the middle of a stream, whose status has left."""


class NoAnswerInTime(EngineError, TimeoutError):
    """The call's ``timeout_s`` passed."""


def refusal(status: int, body: bytes, headers: Mapping[bytes, bytes]) -> ApiError:
    """From an answer that is not 200. OpenAI's error body, and what other servers send instead."""
    try:
        told: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = None
    error = told.get("error", told) if isinstance(told, dict) else {}
    if not isinstance(error, dict):
        error = {"message": error}
    text = error.get("message") or error.get("detail") or body[:_TEXT_MAX].decode("utf-8", "replace")
    return _error(status, str(text) or f"The server answered {status}.", error, _retry_after_s(headers))


def refusal_in_stream(event: bytes) -> ApiError | None:
    """From the data of a server-sent event, if it is an error."""
    if b'"error"' not in event:
        return None
    try:
        told: Any = msgspec.json.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    error = told.get("error") if isinstance(told, dict) else None
    if not error:
        return None
    if not isinstance(error, dict):
        error = {"message": error}
    code = error.get("code")
    status = code if isinstance(code, int) else _STATUS_OF.get(str(code), 500)
    return _error(status, str(error.get("message", "The stream broke.")), error, None)


def _error(status: int, message: str, told: Mapping[str, Any], retry_after_s: float | None) -> ApiError:
    known = status if status in TYPES else 500 if status >= 500 else 400
    code, param, kind = told.get("code"), told.get("param"), told.get("type")
    error = ApiError(
        known,
        message,
        code=None if code is None else str(code),
        param=None if param is None else str(param),
        retry_after_s=retry_after_s,
    )
    error.status = status
    if isinstance(kind, str):
        error.type = kind
    return error


def _retry_after_s(headers: Mapping[bytes, bytes]) -> float | None:
    """In ms, which is not standard and finer, or in s; a date is not understood."""
    for name, unit in ((b"retry-after-ms", 1e-3), (b"retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if wait_s >= 0 and math.isfinite(wait_s):
            return wait_s
    return None
