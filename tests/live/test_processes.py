"""Engines as child processes, for real: they come up, they go, and nothing of them stays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from sage_core.errors import ConfigError, EngineError, SageError
from sage_live.processes import EngineProcess, python_with, vllm_command

SERVER = """
    import http.server, signal, subprocess, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
    {more}
    print("serving", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
PARENT = "print('child', subprocess.Popen(['sleep', '600']).pid, flush=True)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server(port: int, more: str = "") -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(SERVER).format(more=more), str(port)]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_engine_on_another_process_port_is_not_taken_for_healthy(tmp_path: Path) -> None:
    """What answers there is healthy, and is not ours, which has not even tried to listen yet."""

    async def main() -> None:
        port = free_port()
        other = await asyncio.create_subprocess_exec(*server(port))
        try:
            await until(lambda: listening(port))
            with pytest.raises(EngineError, match=rf"port {port} is taken by another process, .*\({other.pid}\)"):
                await EngineProcess.start("web", ["sleep", "600"], port=port, logs=tmp_path)
        finally:
            other.kill()
            await other.wait()

    run(main())


def test_a_child_of_the_engine_may_be_the_one_that_listens(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        inner = textwrap.dedent(SERVER).format(more="")
        command = [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, '{port}'])",
        ]
        engine = await EngineProcess.start("web", command, port=port, logs=tmp_path)
        assert engine.running
        await engine.stop()

    run(main())


def test_an_engine_starts_is_healthy_and_stops(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        engine = await EngineProcess.start("web", server(port), port=port, logs=tmp_path)
        assert engine.running
        assert engine.url == f"http://127.0.0.1:{port}"
        assert listening(port)
        assert "serving" in engine.tail()
        assert engine.log.parent == tmp_path
        await engine.stop()
        assert not engine.running
        assert not listening(port)
        await engine.stop()  # again: nothing

    run(main())


def test_one_that_ignores_sigterm_is_killed_with_all_it_started(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        engine = await EngineProcess.start(
            "stubborn", server(port, f"{STUBBORN}; {PARENT}"), port=port, logs=tmp_path, grace_s=0.2
        )
        child = int(engine.tail().split("child ")[1].split()[0])
        assert alive(child)
        await engine.stop()
        await until(lambda: not alive(child))
        assert not listening(port)

    run(main())


def test_what_a_crashed_engine_left_behind_goes_too(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        engine = await EngineProcess.start("parent", server(port, PARENT), port=port, logs=tmp_path)
        child = int(engine.tail().split("child ")[1].split()[0])
        (leader,) = (each for each in psutil.process_iter() if each.pid == psutil.Process(child).ppid())
        leader.kill()
        assert await engine.wait() == 128 + signal.SIGKILL
        await until(lambda: not alive(child))

    run(main())


def test_one_that_ends_while_it_starts_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        command = [sys.executable, "-c", "import sys; print('no such weights'); sys.exit(3)"]
        with pytest.raises(EngineError, match=r"(?s)exit code 3.*no such weights"):
            await EngineProcess.start("broken", command, port=free_port(), logs=tmp_path)
        with pytest.raises(EngineError, match=r"(?s)exit code 127.*No such file"):
            await EngineProcess.start("absent", ["/no/such/engine"], port=free_port(), logs=tmp_path)

    run(main())


def test_one_that_never_gets_healthy_is_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        command = [sys.executable, "-c", "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"]
        with pytest.raises(EngineError, match="not healthy after 1 s") as caught:
            await EngineProcess.start("mute", command, port=free_port(), logs=tmp_path, timeout_s=1)
        assert not alive(int(str(caught.value).split("pid ")[1].split()[0]))

    run(main())


def test_no_engine_survives_a_kill_of_whoever_started_it(tmp_path: Path) -> None:
    port = free_port()
    script = f"""
        import asyncio
        from pathlib import Path
        from sage_live.processes import EngineProcess
        async def main():
            await EngineProcess.start("orphan", {server(port, PARENT)!r}, port={port}, logs=Path({str(tmp_path)!r}))
            print("up", flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 3  # the guard, the engine, and what the engine started
        assert listening(port)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()

    async def main() -> None:
        await until(lambda: not any(alive(each.pid) for each in family))
        assert not listening(port)

    run(main())


def test_an_emulated_engine_is_a_command(tmp_path: Path) -> None:
    """`sage llm serve --emulate` end to end: two engines, options of the engine, Ctrl-C."""
    port = free_port()
    command = [sys.executable, "-c", "from sage_bench.cli import main; main()", "llm", "serve"]
    options = ["--emulate", "llama-3.1-8b-h100-tp1", "--model", "small", "--max-num-seqs", "7", "--max-model-len=2048"]

    def get(url: str) -> Any:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)

    async def main() -> None:
        engine = await EngineProcess.start(
            "emulated", [*command, *options, "--port", str(port)], port=port, logs=tmp_path
        )
        models = await asyncio.to_thread(get, f"{engine.url}/v1/models")
        assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("small", 2048)]
        assert f"http://127.0.0.1:{port} emulates small" in engine.tail()
        await engine.stop()
        assert await engine.wait() == 0

    run(main())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected a model"),
        (["--emulate", "no-such"], "no-such"),
        (["--emulate", "llama-3.1-8b-h100-tp1", "--max-num-seq", "3"], "did you mean --max-num-seqs"),
        (["--emulate", "llama-3.1-8b-h100-tp1", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["--emulate", "bge-m3-h100"], "kind embedding"),
        (["--emulate", "llama-3.1-8b-h100-tp1", "--pipeline-parallel", "2"], "pipeline_parallel"),
        (["--llm-config", "{"], "--llm-config"),
        (["--llm-config", "{}"], "profile"),
        (["--embed-profile", "bge-m3-h100", "--max-num-seqs", "3"], "--emulate"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    # In this process: a second of imports each would be most of the test's time.
    from sage_bench.cli.app import app_of

    app = app_of("llm")
    with pytest.raises(SageError) as caught:
        app(["llm", "serve", *arguments], standalone_mode=False)
    assert said in str(caught.value)


def test_vllm_is_found_or_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert python_with("json", "nothing") == sys.executable
    with pytest.raises(ConfigError, match=r"no_such_module is not installed.*do this"):
        python_with("no_such_module", "do this")
    live = tmp_path / ".sage/live/bin/python"
    live.parent.mkdir(parents=True)
    live.symlink_to(sys.executable)
    assert python_with("no_such_module", "do this") == str(live)
    command = vllm_command("m", host="127.0.0.1", port=8001, arguments=["--dtype", "float32"])
    assert command[-7:] == ["m", "--host", "127.0.0.1", "--port", "8001", "--dtype", "float32"]
