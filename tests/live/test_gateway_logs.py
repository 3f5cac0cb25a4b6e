"""The access log: what a line holds, and that a slow or broken file never holds up a request."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sage_core.errors import ConfigError, OutputError
from sage_core.units import SECOND
from sage_live.gateway.logs import AccessLog
from sage_live.gateway.record import RequestRecord

RECORD = RequestRecord(
    request_id="abc",
    operation="chat",
    model="m",
    tenant="alice",
    outcome="responded",
    status=200,
    arrived_ns=2 * SECOND,
    ended_ns=3 * SECOND,
    dispatched_ns=2 * SECOND + 5,
    first_token_ns=2 * SECOND + 9,
    request=7,
    engine="e1",
    stream=True,
    input_tokens=10,
    output_tokens=20,
    request_bytes=300,
    response_bytes=400,
)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_what_became_of_the_request(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "log", origin_ns=1_700_000_000 * SECOND)
    log.write(RECORD)
    log.write(
        msgspec.structs.replace(RECORD, outcome="failed", status=502, dispatched_ns=None, first_token_ns=None, code="x")
    )
    log.close()
    first, second = _lines(tmp_path / "log")
    assert first == {
        "time": 1_700_000_002.0,
        "request_id": "abc",
        "operation": "chat",
        "model": "m",
        "tenant": "alice",
        "outcome": "responded",
        "status": 200,
        "e2e_ns": SECOND,
        "request": 7,
        "engine": "e1",
        "stream": True,
        "queue_ns": 5,
        "ttft_ns": 9,
        "input_tokens": 10,
        "output_tokens": 20,
        "request_bytes": 300,
        "response_bytes": 400,
    }
    assert second["code"] == "x" and "queue_ns" not in second and "ttft_ns" not in second
    assert log.dropped == 0


def test_nobody_forges_a_line(tmp_path: Path) -> None:
    evil = 'x"}\n{"status": 200, "request_id": "forged\u2028\x1b[2J'
    log = AccessLog(tmp_path / "log", 0)
    log.write(msgspec.structs.replace(RECORD, request_id=evil, tenant=evil, model=evil))
    log.close()
    raw = (tmp_path / "log").read_bytes()
    assert raw.count(b"\n") == 1 and b"\x1b" not in raw
    assert json.loads(raw)["request_id"] == evil


def test_successes_are_sampled_and_failures_are_not(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "log", 0, sample=0.25)
    for _ in range(4000):
        log.write(RECORD)
    for outcome, status in (("failed", 502), ("cancelled", 499), ("refused", 401), ("responded", 400)):
        log.write(msgspec.structs.replace(RECORD, outcome=outcome, status=status))
    log.close()
    statuses = [line["status"] for line in _lines(tmp_path / "log")]
    assert statuses[-4:] == [502, 499, 401, 400]
    assert 800 < len(statuses) - 4 < 1200  # 7 standard deviations around 1000
    none = AccessLog(tmp_path / "none", 0, sample=0)
    none.write(RECORD)
    none.close()
    assert (tmp_path / "none").read_bytes() == b""


def test_lines_reach_the_file_without_being_asked_and_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("{}\n")
    log = AccessLog(path, 0)
    log.write(RECORD)
    until = time.monotonic() + 10
    while path.read_bytes().count(b"\n") < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert [line.get("request_id") for line in _lines(path)] == [None, "abc"]
    path.write_bytes(b"")  # as a rotation that truncates in place does
    log.write(RECORD)
    log.close()
    assert len(_lines(path)) == 1


def test_a_reader_that_does_not_read_costs_lines_not_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(tmp_path / "pipe", 0, lines_max=1000)
    (writer,) = (thread for thread in threading.enumerate() if thread.name == "sage-access-log")
    begun = time.process_time()
    for _ in range(20_000):  # several times what the pipe and the buffer hold
        log.write(RECORD)
    assert time.process_time() - begun < 5
    log.close()
    assert log.dropped > 10_000
    while writer.is_alive():  # let it end within this test
        select.select([reader], [], [], 0.1)
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 1 << 20)
    os.close(reader)


def test_a_full_disk_is_survived_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    log = AccessLog(Path("/dev/full"), 0)
    log.write(RECORD)
    log.close()
    assert log.dropped == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "No space" in caplog.text


def test_without_a_path_it_goes_to_standard_error() -> None:
    program = """
from sage_live.gateway.logs import AccessLog
from sage_live.gateway.record import RequestRecord
log = AccessLog(None, 0)
log.write(RequestRecord("abc", "chat", "m", "t", "responded", 200, 0, 1))
log.close()
print("still open", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stderr)["request_id"] == "abc" and done.stdout == "still open\n"


def test_the_users_errors(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        AccessLog(tmp_path / "nowhere" / "log", 0)
    with pytest.raises(ConfigError, match="sample"):
        AccessLog(None, 0, sample=1.5)
