"""What several areas of the tests share: the queueing system that makes rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


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
