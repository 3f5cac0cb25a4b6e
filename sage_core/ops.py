"""Which implementation of the mechanism decides: native, or its executable meaning in Python."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from sage_core import reference
from sage_core.errors import ConfigError

if TYPE_CHECKING:
    from sage_core import _native

Mechanism: TypeAlias = "_native.Mechanism | reference.Mechanism"


def make_mechanism(name: str) -> Mechanism:
    """``native`` (C++) or ``reference`` (Python); equal by differential test."""
    if name == "native":
        native: Mechanism = extension().Mechanism()
        return native
    if name == "reference":
        return reference.Mechanism()
    raise ConfigError(f"mechanism: expected native or reference, got {name!r}")


def native_build() -> str:
    """Compiler and architecture of the extension: part of what a replay must match."""
    return str(extension().build)


def extension() -> ModuleType:
    """The native operators. ConfigError where they cannot be imported."""
    # Imported when first needed, so that a broken build stops neither `sage doctor` nor the reference.
    try:
        from sage_core import _native
    except ImportError as error:
        raise ConfigError(
            f"mechanism native: sage_core._native cannot be imported ({error}); "
            "see `sage doctor`, or use mechanism=reference, which is slower and decides the same"
        ) from error
    return _native
