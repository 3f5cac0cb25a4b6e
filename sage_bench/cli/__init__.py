"""The ``sage`` command line: this package's ``app`` holds the commands, one module each; here is the way in."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sage_bench.cli.leave import leave
from sage_core.errors import SageError


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and a documented exit code, never a traceback."""
    sys.path.insert(0, "")  # the working directory: a user's own policy, to run it and to replay what it decided
    try:
        with _interrupts_end():
            app = command()
        app(prog_name="sage")
    except SageError as error:
        leave(error)
    except KeyboardInterrupt:
        print("sage: interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _interrupts_end() -> Iterator[None]:
    """While libraries are imported, some of which swallow KeyboardInterrupt: Ctrl-C ends the process."""
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: object) -> None:
    os.write(2, b"sage: interrupted\n")
    os._exit(130)


def command() -> typer.Typer:
    """The command that is asked for, or all; ``sage doctor`` needs little and says what to do about a broken installation."""
    try:
        from sage_bench.cli.app import app_of

        app = app_of(sys.argv[1] if len(sys.argv) > 1 else None)
        if sys.argv[1:2] == ["run"]:
            import sage_bench.loads  # noqa: F401  # what every run will ask for by name
    except ImportError as error:
        print(f"sage: the installation is broken ({error}); `sage doctor` says what to do", file=sys.stderr)
        sys.exit(1)
    return app
