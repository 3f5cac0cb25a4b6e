"""``sage replay RUN``: decide a recorded run again and compare, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sage_bench.replaying import replay_run


def command(
    run: Annotated[Path, typer.Argument(help="A run's folder: results/<experiment>/<run id>.")],
    policy: Annotated[
        str | None, typer.Option(help="Decide with this preset instead; where it parts is reported.")
    ] = None,
    mechanism: Annotated[str | None, typer.Option(help="native or reference; default: as recorded.")] = None,
    any_build: Annotated[bool, typer.Option(help="Go on although the native build is another one.")] = False,
) -> None:
    """Re-decide RUN's log. Exit code 0: byte for byte the same; 7: it diverged, and where."""
    replayed = replay_run(run, policy=policy, mechanism=mechanism, any_build=any_build)
    print(f"{run}: {replayed.steps:,} steps re-decided, every digest equal; last {replayed.digest.hex()}")
