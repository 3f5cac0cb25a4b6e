"""What several areas of the tests share: the queueing system that makes rows."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest


def pytest_configure() -> None:
    """A shell without job control starts what it puts in the background with Ctrl-C ignored, and programs that the tests
    start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def queueing() -> ModuleType:
    """``tests/results/queueing.py``; importlib mode has no import path to it."""
    name = "sage_tests_queueing"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "results" / "queueing.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
