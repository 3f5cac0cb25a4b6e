"""Real engines, started once a session: those that the selected tests name as fixtures, all of them at once.

Every test here is ``live``: ``make test-live`` runs them, ``make test`` does not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import live_engines  # noqa: E402
from live_engines import Engine  # noqa: E402

# vLLM gets a core for each of two; the third shares with an engine that is idle most of the time.
CORES = {"smollm2": 0, "minilm": 1, "tiny-random": 1, "llamacpp": 1}


@pytest.fixture(scope="session")
def started(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Engine]]:
    """The engines that any selected test asks for, starting; skips where they are not installed."""
    lacking = live_engines.missing()
    if lacking is not None:
        pytest.skip(lacking)
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    engines: dict[str, Engine] = {}
    try:
        for name, core in CORES.items():
            if name.replace("-", "_") in asked:
                core %= os.cpu_count() or 1
                engines[name] = live_engines.start(name, core, ROOT / ".sage/logs/live")
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()


@pytest.fixture(scope="session")
def smollm2(started: Mapping[str, Engine]) -> Engine:
    """vLLM with SmolLM2-135M-Instruct and priority scheduling, healthy."""
    return started["smollm2"].wait()


@pytest.fixture(scope="session")
def minilm(started: Mapping[str, Engine]) -> Engine:
    """vLLM with all-MiniLM-L6-v2, healthy."""
    return started["minilm"].wait()


@pytest.fixture(scope="session")
def tiny_random(started: Mapping[str, Engine]) -> Engine:
    """vLLM with the small random model, healthy: for timing and for load."""
    return started["tiny-random"].wait()


@pytest.fixture(scope="session")
def llamacpp(started: Mapping[str, Engine]) -> Engine:
    """llama.cpp's server with the GGUF of SmolLM2-135M-Instruct, healthy."""
    return started["llamacpp"].wait()
