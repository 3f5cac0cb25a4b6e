"""Real engines of this machine as processes: start, wait until healthy, stop.

They run in ``.sage/live`` on the models of ``.sage/models``, which ``tools/install_live.sh`` made; each on one core, on
127.0.0.1, with its output in a file. Nothing here imports what it starts, nor anything of SAGE.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
PYTHON: Final = ROOT / ".sage/live/bin/python"
MODELS: Final = ROOT / ".sage/models"

START_TIMEOUT_S: Final = 400.0
"""A minute on a quiet machine, most of it imports; engines that start beside each other share the cores."""

# torch.compile would triple the start, and a model this small gains little. 1 GiB of KV cache is 46,000 tokens of SmolLM2.
VLLM: Final = (
    "-m",
    "vllm.entrypoints.openai.api_server",
    "--host",
    "127.0.0.1",
    "--enforce-eager",
    "--max-num-seqs",
    "16",
)
VLLM_ENV: Final = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to start an engine: arguments of Python less the port, and the model name that requests use."""

    model: str
    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


def vllm(model: str, *options: str) -> Recipe:
    """vLLM over ``.sage/models/MODEL``. The path is relative, and so is the ``root`` that ``/v1/models`` tells."""
    return Recipe(model, (*VLLM, "--model", model, "--served-model-name", model, *options), VLLM_ENV)


def llamacpp(*options: str) -> Recipe:
    """llama.cpp's server over the GGUF of SmolLM2."""
    script = str(ROOT / "tools/live_llamacpp.py")
    return Recipe("smollm2-135m", (script, "smollm2-135m-gguf/model.gguf", "--alias", "smollm2-135m", *options))


RECIPES: Final[Mapping[str, Recipe]] = {
    "smollm2": vllm("smollm2-135m", "--max-model-len", "2048", "--scheduling-policy", "priority"),
    "tiny-random": vllm("tiny-random", "--load-format", "dummy", "--dtype", "float32", "--max-model-len", "4096"),
    # float16, the default of a pooling model, has no fast kernels on a CPU.
    "minilm": vllm("minilm", "--runner", "pooling", "--dtype", "float32"),
    "llamacpp": llamacpp(),
    "llamacpp-embeddings": llamacpp("--embeddings"),
}


class Engine:
    """One running engine. It is the head of its own process group: vLLM is three processes."""

    def __init__(self, name: str, recipe: Recipe, core: int, logs: Path, more: Sequence[str] = ()) -> None:
        self.name = name
        self.model = recipe.model
        self.port = _free_port()
        self.log = logs / f"{name}-{self.port}.log"
        self.core = core
        self.started_at = time.monotonic()
        self.ready_s: float | None = None
        logs.mkdir(parents=True, exist_ok=True)
        offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(PYTHON), *recipe.arguments, "--port", str(self.port), *more],
                cwd=MODELS,
                env={**_environment(), **offline, **recipe.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> Engine:
        """Return once ``/health`` answers 200; ``ready_s`` is then the time since the start.

        Raises ``RuntimeError`` with the end of the log if the process ends or the time is over; it is killed then.
        """
        while self.ready_s is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self.process.returncode} while starting:\n{self.tail()}")
            if time.monotonic() - self.started_at > timeout_s:
                self.stop()
                raise RuntimeError(f"{self.name} was not healthy after {timeout_s:.0f} s:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    self.ready_s = time.monotonic() - self.started_at
            except (urllib.error.URLError, OSError):  # not listening yet, or 503 while the model loads
                time.sleep(0.2)
        return self

    def tail(self, lines: int = 30) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def rss_bytes(self) -> int:
        """Resident memory of all its processes; pages that they share count for each."""
        return sum(process.memory_info().rss for process in self.processes())

    def process_titled(self, title: str) -> psutil.Process:
        """The process of this engine whose title begins so: vLLM names its own ``VLLM::Worker`` and so on."""
        (found,) = (process for process in self.processes() if " ".join(process.cmdline()).startswith(title))
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process it started, and the first one."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def stop(self, patience_s: float = 20.0) -> None:
        """Ask the group to end, then make it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()

    def kill(self) -> None:
        """``kill -9`` of the whole group: the engine is gone without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(name: str, core: int, logs: Path, *more: str) -> Engine:
    """Start the engine of recipe ``name`` on ``core``; it is not healthy yet, see ``wait``. ``more`` are further options."""
    return Engine(name, RECIPES[name], core, logs, more)


def version(engine: str) -> str:
    """Version of ``vllm`` or ``llamacpp`` as installed here, short: ``0.32``, ``b11549``."""
    package = {"vllm": "vllm-cpu", "llamacpp": "xllamacpp"}[engine]
    script = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    found = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    return "b" + found.split(".")[-1] if engine == "llamacpp" else ".".join(found.split(".")[:2])


def missing() -> str | None:
    """What ``make install-live`` has yet to do here, ``None`` if nothing."""
    if not PYTHON.exists():
        return ".sage/live is missing: make install-live"
    absent = [recipe for recipe in ("smollm2-135m", "tiny-random", "minilm") if not (MODELS / recipe).exists()]
    return f".sage/models/{absent[0]} is missing: make install-live" if absent else None


def _environment() -> dict[str, str]:
    """Ours, less what points Python at our packages and caches, and a number of threads that is not one."""
    ours = ("PYTHONPATH", "PYTHONPYCACHEPREFIX", "OMP_NUM_THREADS")
    return {key: value for key, value in os.environ.items() if key not in ours}


def _free_port() -> int:
    """A port that was free a moment ago: vLLM cannot be asked for any free one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
