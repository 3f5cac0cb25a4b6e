"""The tools of ``make bench-gateway``: the fake engine, the load generator that checks it, and the script over both."""

from __future__ import annotations

import base64
import contextlib
import json
import runpy
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the tools use epoll and timerfd: Linux only"),
    pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset (of util-linux) is not on PATH"),
]


@pytest.fixture(scope="module")
def loopback() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "loopback.py"))


@pytest.fixture(scope="module")
def backend(loopback: dict[str, Any]) -> Iterator[int]:
    with loopback["fake_backend"]() as port:
        yield port


def post(port: int, path: str, body: object) -> bytes:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        assert response.status == 200
        return response.read()


def stats(port: int) -> dict[str, int]:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/stats")
        told: dict[str, int] = json.loads(connection.getresponse().read())
        return told


def load(loopback: dict[str, Any], port: int, *arguments: str) -> dict[str, Any]:
    command = [str(loopback["tool"]("http_load")), "--port", str(port), "--warmup-s", "0", "--seconds", "0.2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=60)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


# --- the fake engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "content"), [("/v1/chat/completions", "message"), ("/v1/completions", "text")])
def test_it_answers_in_openai_shape(backend: int, path: str, content: str) -> None:
    # A prompt that speaks of streams is no request for one.
    answer = json.loads(post(backend, path, {"model": "fake", "prompt": '{"stream": true}', "stream": False}))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0][content]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_has_33_events_and_an_end(backend: int, path: str) -> None:
    events = post(backend, path, {"stream": True}).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    told = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len(told) == 33
    assert [event["choices"][0]["finish_reason"] for event in told] == [None] * 32 + ["stop"]
    assert told[-1]["usage"]["completion_tokens"] == 31


def test_an_input_has_its_vector_in_every_batch_and_encoding(backend: int) -> None:
    def vectors(inputs: object, encoding: str = "float") -> list[Any]:
        answer = json.loads(post(backend, "/v1/embeddings", {"input": inputs, "encoding_format": encoding}))
        assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
        return [row["embedding"] for row in answer["data"]]

    one, two, tokens = vectors("one")[0], vectors('a "quoted", [two]')[0], vectors([1, 2, 3])[0]
    assert len(one) == 384
    assert one != two and two != tokens
    assert vectors(['a "quoted", [two]', "one"]) == [two, one]
    assert vectors([[1, 2, 3], [4]])[0] == tokens
    decoded = struct.unpack("<384f", base64.b64decode(vectors("one", "base64")[0]))
    assert decoded == pytest.approx(one, rel=1e-6)


def test_a_reader_who_leaves_a_stream_is_counted(loopback: dict[str, Any]) -> None:
    with loopback["fake_backend"]("--pace-ms", "20") as port:
        with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("POST", "/v1/chat/completions", '{"stream": true}')
            assert b"assistant" in connection.getresponse().readline()
            assert stats(port)["aborted"] == 0
        deadline = time.monotonic() + 10
        while stats(port)["aborted"] == 0:
            assert time.monotonic() < deadline
        told = stats(port)
        assert (told["requests"], told["streams"], told["aborted"]) == (1, 1, 1)


# --- the load generator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "stream", "embed"])
def test_every_request_of_a_closed_loop_is_answered_and_counted(
    loopback: dict[str, Any], backend: int, kind: str
) -> None:
    before = stats(backend)["requests"]
    told = load(loopback, backend, "--kind", kind, "--connections", "4")
    assert told["failures"] == 0
    assert told["total"] == stats(backend)["requests"] - before
    assert 0 < told["p50_us"] <= told["p99_us"]


def test_an_open_loop_keeps_its_schedule_and_a_paced_stream_its_pace(loopback: dict[str, Any]) -> None:
    with loopback["fake_backend"]("--pace-ms", "5", "--chunks", "7") as port:
        told = load(loopback, port, "--kind", "stream", "--rate", "50", "--events", "9")
    assert told["n"] == told["total"] == 10  # 50 a second for 0.2 s
    assert told["failures"] == 0
    assert told["p50_us"] > 8 * 5000  # after the first event eight more and [DONE], from one tick to the ninth
    assert told["ttft_p50_us"] < told["p50_us"]


def test_a_stream_that_lacks_events_is_a_failure(loopback: dict[str, Any], backend: int) -> None:
    told = load(loopback, backend, "--kind", "stream", "--events", "34")
    assert told["failures"] == told["reasons"]["events"] > 0
    assert told["n"] == 0


class Wrong(BaseHTTPRequestHandler):
    """Answers whatever it is asked with `status` and `body`."""

    protocol_version = "HTTP/1.1"
    status: ClassVar[int]
    body: ClassVar[bytes]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("kind", "status", "body", "reason"),
    [
        ("chat", 200, b'{"choices": [], "usage": {}}', "body"),
        ("chat", 503, b"{}", "status 503"),
        ("embed", 200, b'{"data": [{"embedding": [0.5, 0.5]}]}', "vector"),
    ],
)
def test_a_wrong_answer_is_a_failure_with_its_reason(
    loopback: dict[str, Any], kind: str, status: int, body: bytes, reason: str
) -> None:
    handler = type("Handler", (Wrong,), {"status": status, "body": body})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            told = load(loopback, server.server_port, "--kind", kind)
        finally:
            server.shutdown()
            thread.join()
    assert told["failures"] == told["reasons"][reason] > 0
    assert told["n"] == 0


# --- the script ------------------------------------------------------------------------------------------------------


def test_the_script_measures_a_peer_and_refuses_one_that_fails(loopback: dict[str, Any], tmp_path: Path) -> None:
    engine = loopback["tool"]("fake_backend")
    out = tmp_path / "gateway.json"
    # Peers that answer by themselves: one as the engine does, one with shorter streams, one that cannot be started.
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "gateway.py"), "--quick", "--systems", "", "--out", str(out),
            "--cells", "chat_c16,stream_c16,paced", "--peer", "same", f"{engine} --port {{port}} --pace-ms 5",
            "--peer", "short", f"{engine} --port {{port}} --chunks 7", "--peer", "none", str(tmp_path / "none"),
        ],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    figures = json.loads(out.read_text())
    assert done.returncode == 1 and "refused, for failed requests: short_stream_c16" in done.stderr
    assert list(figures["skipped"]) == ["none"]
    assert set(figures["refused"]) == {"short_stream_c16", "short_paced"}
    assert figures["short_stream_c16_cpu_us"] is None
    # Both programs share nothing but the load: what one CPU-second buys is what one core does in a second, or more.
    assert 1 < figures["same_chat_c16_cpu_us"] < 2e6 / figures["same_chat_c16_rps"]
    assert figures["same_chat_c16_p50_us"] - figures["direct_chat_c16_p50_us"] == pytest.approx(
        figures["same_chat_c16_added_p50_us"], abs=0.02
    )
    assert figures["same_paced_chunk_cpu_us"] > 0
    assert figures["same_paced_ttft_added_us"] < 100_000  # the first event never waits for the pace
    assert figures["direct_chat_c16_rps"] > 0
    assert "direct_chat_c16_cpu_us" not in figures


def test_the_floor_is_measured_and_long_streams_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "gateway.json"
    script = str(ROOT / "benchmarks" / "gateway.py")
    options = ["--quick", "--systems", "bare_relay", "--cells", "chat_c16,paced_long,stream_c16", "--out", str(out)]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["bare_relay_paced_long_chunk_cpu_us"] > 0 and figures["bare_relay_chat_c16_cpu_us"] > 0
    assert not figures["refused"]


def test_the_script_names_what_it_does_not_know(tmp_path: Path) -> None:
    for option in ("--systems", "--cells"):
        command = [sys.executable, str(ROOT / "benchmarks" / "gateway.py"), option, "chat_c17"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
        assert done.returncode == 1
        assert f"{option}: chat_c17: expected some of" in done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (110.0, 90.0, "met"),
        (110.0, 80.0, "MISSED"),
        (130.0, 110.0, "MISSED"),
        (110.0, None, "not measured"),
        (None, 90.0, "not measured"),
    ],
)
def test_a_target_is_met_by_both_limits_missed_or_not_measured(
    ours: float | None, theirs: float | None, verdict: str
) -> None:
    """JSON chat: at most 120 us, and at most 1.3 times vllm_router's of the same run."""
    command = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gateway, rich; "
        f"rich.print(gateway.compared({{'ours_chat_c64_cpu_us': {ours}, 'vllm_router_chat_c64_cpu_us': {theirs}}}))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True)
    row = next(line for line in done.stdout.splitlines() if "chat_c64" in line)
    assert row.strip().endswith(verdict)
