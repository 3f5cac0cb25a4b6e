"""How patient a job manager is."""

from __future__ import annotations

import msgspec

from sage_core.errors import ConfigError
from sage_core.units import SECOND


class JobOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Spans in nanoseconds.

    start_timeout_ns: from Start to healthy, else it is killed. grace_ns: from Stop to Kill. kill_again_ns: between Kills of
    one that does not exit. unhealthy_max_ns: then it is stopped, and counts as crashed. backoff_first_ns, backoff_max_ns:
    the delay after a crash, doubling. jitter: up to so much of the delay is taken off, by ``seed``. stable_ns: healthy for
    so long, the delay starts from the beginning. crashes_max within crash_window_ns: failed. starting_max: instances of a
    node that may be starting at one time, since reading weights is slow; 0: no limit.
    """

    start_timeout_ns: int = 600 * SECOND
    grace_ns: int = 30 * SECOND
    kill_again_ns: int = 10 * SECOND
    unhealthy_max_ns: int = 60 * SECOND
    backoff_first_ns: int = SECOND
    backoff_max_ns: int = 300 * SECOND
    jitter: float = 0.1
    seed: int = 0
    stable_ns: int = 600 * SECOND
    crashes_max: int = 5
    crash_window_ns: int = 3600 * SECOND
    starting_max: int = 0

    def __post_init__(self) -> None:
        for name in (each for each in self.__struct_fields__ if each.endswith("_ns")):
            if getattr(self, name) < 1:
                raise ConfigError(f"jobs.{name}: expected 1 ns or more, got {getattr(self, name)}")
        if not 0 <= self.jitter <= 1 or self.crashes_max < 1 or self.starting_max < 0:
            raise ConfigError("jobs: expected jitter from 0 to 1, crashes_max from 1, starting_max from 0")
