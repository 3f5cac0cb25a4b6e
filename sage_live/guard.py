"""Runs a command so that nothing of it outlives whoever asked. Used as a script, by :mod:`sage_live.processes`.

    python guard.py PARENT GRACE_S COMMAND...

The command is the head of a process group of its own. When the guard gets SIGTERM or SIGINT, or its parent dies (kill -9
included), the group gets SIGTERM, and SIGKILL after GRACE_S seconds. When the command ends by itself, what it left behind
in its group is killed, and the guard ends with its exit code (128 + n for signal n). When the guard is killed, the kernel
kills the command.

Imports nothing but the standard library, to start in a moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_WAITED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}


def main(arguments: list[str]) -> int:
    """Run the command to its end; returns the exit code."""
    parent, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    _die_with(parent, signal.SIGTERM)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, guard)
    deadline: float | None = None
    while True:
        info = None
        if deadline is None:
            info = signal.sigwaitinfo(_WAITED)
        elif (left := deadline - time.monotonic()) > 0:
            info = signal.sigtimedwait(_WAITED, left)
        if info is None:
            _signal_group(child, signal.SIGKILL)
            deadline = time.monotonic() + grace_s + 1
        elif info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                _signal_group(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif deadline is None:
            _signal_group(child, signal.SIGTERM)
            deadline = time.monotonic() + grace_s


def _become(command: list[str], guard: int) -> NoReturn:
    try:
        os.setsid()
        _die_with(guard, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def _die_with(parent: int, number: signal.Signals) -> None:
    """Get this signal when the parent dies; at once if it has died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
