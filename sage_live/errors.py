"""What the gateway says when it says no: OpenAI's error body, so that every OpenAI client raises its own exception.

Clients choose the exception by the *status* (openai-python, ``_base_client.py: _make_status_error``) and show the rest, so
the status is the contract. ``type`` and ``code`` follow what api.openai.com sends: a wrong key and an unknown model are both
of type ``invalid_request_error`` and told apart by ``code`` (``invalid_api_key``, ``model_not_found``); overload is
``service_unavailable_error`` with ``server_is_overloaded``. Source: https://platform.openai.com/docs/guides/error-codes.

No message repeats a key or a prompt: what a client sent is named, not quoted, unless it is an identifier such as a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from sage_core.errors import SageError

TYPES: Final = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    501: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
    504: "server_error",
    505: "invalid_request_error",
}
"""Every status the gateway answers with by itself, and its ``error.type``. What an engine answers passes unchanged."""

_encoder = msgspec.json.Encoder()


class ApiError(SageError):
    """A request ends with ``status`` (a key of ``TYPES``) and OpenAI's error body.

    ``param`` names the field of the body that is wrong; ``retry_after_s`` is when it makes sense to come back;
    ``extra_headers`` are what the status requires beside it (``allow``, ``www-authenticate``).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        extra_headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.extra_headers = extra_headers

    def body(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``: all four, null where there is none, as OpenAI does."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return _encoder.encode({"error": error})

    def event(self) -> bytes:
        """The same as a server-sent event: how a stream says that it broke, once its status has left."""
        return b"data: " + self.body() + b"\n\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """``retry-after`` in whole seconds, rounded up (RFC 9110, 10.2.3), and in ms, which OpenAI's clients prefer."""
        headers = list(self.extra_headers)
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
            headers.append((b"retry-after-ms", b"%d" % max(1, math.ceil(self.retry_after_s * 1000))))
        return headers


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the body or a header is not what the API documents."""
    return ApiError(400, message, param=param, code=code)


def unauthorized(message: str = "Send a valid API key as `Authorization: Bearer KEY`.") -> ApiError:
    """401: no key, or none that is known. The two are not told apart to whoever is guessing."""
    return ApiError(401, message, code="invalid_api_key", extra_headers=((b"www-authenticate", b"Bearer"),))


def forbidden(message: str) -> ApiError:
    """403: the key is known and may not do this."""
    return ApiError(403, message, code="permission_denied")


def model_not_found(model: str, served: Sequence[str] = ()) -> ApiError:
    """404: no engine serves ``model``; ``served`` are the names that would have worked."""
    known = f" Served: {', '.join(served)}." if served else ""
    return ApiError(404, f"The model {_shown(model)} is not served here.{known}", code="model_not_found", param="model")


def not_found(what: str) -> ApiError:
    """404: no such endpoint or engine; ``what`` names it."""
    return ApiError(404, f"{_shown(what)} does not exist here.", code="not_found")


def method_not_allowed(method: str, allowed: Sequence[str]) -> ApiError:
    """405; RFC 9110, 15.5.6 wants the methods that work in ``allow``."""
    names = ", ".join(allowed)
    return ApiError(
        405,
        f"Method {_shown(method)} is not allowed here; use {names}.",
        code="method_not_allowed",
        extra_headers=((b"allow", names.encode()),),
    )


def conflict(message: str) -> ApiError:
    """409: an engine of that name exists, or it is in no state for this."""
    return ApiError(409, message, code="conflict")


def too_large(limit_bytes: int) -> ApiError:
    """413: the body is over the gateway's limit."""
    return ApiError(413, f"The body is larger than {limit_bytes} bytes.", code="request_too_large")


def unsupported_media(content_type: str) -> ApiError:
    """415: a body that is not JSON."""
    return ApiError(
        415, f"Expected content-type application/json, got {_shown(content_type)}.", code="unsupported_media_type"
    )


def rate_limited(retry_after_s: float, message: str = "Rate limit reached for this tenant.") -> ApiError:
    """429: this tenant has used its allowance, or this request was not admitted; come back after ``retry_after_s``."""
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)


def overloaded(retry_after_s: float, message: str = "The gateway is at its limit of live requests.") -> ApiError:
    """503: everybody has to wait: the gateway is full, draining, or no engine is healthy."""
    return ApiError(503, message, code="server_is_overloaded", retry_after_s=retry_after_s)


def upstream_failed(
    message: str = "The engine failed before it answered, and the request could not be retried.",
) -> ApiError:
    """502: the engine closed, refused or answered something that is not HTTP."""
    return ApiError(502, message, code="upstream_failed")


def upstream_timeout(message: str = "The engine did not answer in time.") -> ApiError:
    """504."""
    return ApiError(504, message, code="upstream_timeout")


def internal() -> ApiError:
    """500: a defect of ours. What happened is in the log under the request id, not in the answer."""
    return ApiError(500, "The gateway has a defect; its log names this request id.", code="internal_error")


def _shown(name: str, limit: int = 80) -> str:
    """A name a client sent, safe and short enough for a message: quoted, control characters escaped."""
    return ascii(name if len(name) <= limit else name[:limit] + "...")


REASON_MAX: Final = 500


def reason_of(error: Exception) -> str:
    """What went wrong, to be told and written down: one that others wrote may say anything, or raise when it is asked."""
    try:
        text = str(error) if isinstance(error, SageError) else f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text[:REASON_MAX].encode(errors="replace").decode()
