"""What the gateway says when it says no: OpenAI's shape, and OpenAI's own client understands it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_live import errors
from sage_live.errors import TYPES, ApiError

EVERY = [
    errors.bad_request("wrong", param="n"),
    errors.unauthorized(),
    errors.forbidden("no"),
    errors.model_not_found("m", ["a", "b"]),
    errors.not_found("/v2"),
    errors.method_not_allowed("PUT", ["GET", "HEAD"]),
    errors.conflict("exists"),
    errors.too_large(5),
    errors.unsupported_media("text/plain"),
    errors.rate_limited(0.2),
    errors.overloaded(3.0),
    errors.upstream_failed(),
    errors.upstream_timeout(),
    errors.internal(),
]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: f"{error.status}-{error.code}")
def test_every_error_has_openais_shape(error: ApiError) -> None:
    body = json.loads(error.body())
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == TYPES[error.status] and body["error"]["message"] == str(error)
    assert error.event() == b"data: " + error.body() + b"\n\n"


def test_what_each_status_requires_beside_the_body() -> None:
    assert (b"allow", b"GET, HEAD") in errors.method_not_allowed("PUT", ["GET", "HEAD"]).headers()
    assert (b"www-authenticate", b"Bearer") in errors.unauthorized().headers()
    assert errors.rate_limited(1.2).headers() == [(b"retry-after", b"2"), (b"retry-after-ms", b"1200")]
    assert errors.rate_limited(0.0).headers() == [(b"retry-after", b"1"), (b"retry-after-ms", b"1")]
    assert errors.internal().headers() == []


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_no_name_a_client_sends_breaks_the_answer(name: str) -> None:
    for error in (
        errors.model_not_found(name),
        errors.method_not_allowed(name, ["GET"]),
        errors.unsupported_media(name),
    ):
        message = json.loads(error.body())["error"]["message"]
        assert message.isascii() and message.isprintable() and len(message) < 2000
        assert all(b"\n" not in value and b"\r" not in value for _, value in error.headers())


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """Answers request n with the n-th error."""
    left = iter(EVERY)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            error = next(left)
            self.send_response(error.status)
            for name, value in (*error.headers(), (b"content-type", b"application/json")):
                self.send_header(name.decode(), value.decode())
            self.end_headers()
            self.wfile.write(error.body())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_openais_client_raises_its_own_exceptions(server: HTTPServer) -> None:
    openai = pytest.importorskip("openai")
    expected = {
        400: openai.BadRequestError,
        401: openai.AuthenticationError,
        403: openai.PermissionDeniedError,
        404: openai.NotFoundError,
        409: openai.ConflictError,
        429: openai.RateLimitError,
        **dict.fromkeys((500, 502, 503, 504), openai.InternalServerError),
        **dict.fromkeys((405, 413, 415), openai.APIStatusError),
    }
    base_url = f"http://127.0.0.1:{server.server_port}/v1"
    with openai.OpenAI(base_url=base_url, api_key="k", max_retries=0) as client:
        for error in EVERY:
            with pytest.raises(expected[error.status]) as raised:
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            value = raised.value
            told = (value.status_code, value.code, value.type, value.param)
            assert told == (error.status, error.code, error.type, error.param)
