"""Whose fault it is, in the type.

Every error a user can meet derives from :class:`SageError`; the command line prints its text without a traceback and
exits with its ``exit_code``. Messages name the file, key or argument, what was expected, and what to do.
"""

from __future__ import annotations


class SageError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class ConfigError(SageError, ValueError):
    """The user's configuration or argument is wrong."""

    exit_code = 2


class DataError(SageError, ValueError):
    """A file the user gave (trace, profile, results, log) is missing, broken or not what it claims to be."""

    exit_code = 3


class PolicyError(SageError, ValueError):
    """A policy returned something that is not a decision: NaN, the wrong shape, the wrong type."""

    exit_code = 4


class IllegalEvent(SageError, RuntimeError):
    """The driver or a backend told the plane something that cannot have happened."""

    exit_code = 5


class InvariantViolation(SageError, AssertionError):
    """The core broke one of its numbered invariants (INVARIANTS.md): a defect of ours."""

    exit_code = 6


class ReplayDivergence(SageError, RuntimeError):
    """Re-deciding a log gave other commands than were recorded."""

    exit_code = 7


class OutputError(SageError, OSError):
    """Results could not be written (no space, no permission)."""

    exit_code = 8


class FidelityError(SageError, ValueError):
    """A simulation is further from the measured run than the user allows."""

    exit_code = 9


class EngineError(SageError, ConnectionError):
    """A real engine, or a gateway, cannot be started or reached, or does not answer as it should."""

    exit_code = 10
