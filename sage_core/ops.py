"""Which implementation of the mechanism decides: native, or its executable meaning in Python."""

from __future__ import annotations

from typing import Literal, TypeAlias

from sage_core import _native, reference
from sage_core.errors import ConfigError

Mechanism: TypeAlias = _native.Mechanism | reference.Mechanism
MechanismName: TypeAlias = Literal["native", "reference"]


def make_mechanism(name: str) -> Mechanism:
    """``native`` (C++) or ``reference`` (Python); equal by differential test."""
    if name == "native":
        return _native.Mechanism()
    if name == "reference":
        return reference.Mechanism()
    raise ConfigError(f"mechanism: expected native or reference, got {name!r}")


def native_build() -> str:
    """Compiler and architecture of the extension: part of what a replay must match."""
    return _native.build
