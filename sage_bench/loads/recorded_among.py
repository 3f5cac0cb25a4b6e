"""The record of a run that an earlier sweep made, found by what it is: a sweep over predictions cannot name each folder."""

from __future__ import annotations

from pathlib import Path

from sage_bench.loads.recorded import RecordedLoad
from sage_bench.results.reader import load_runs
from sage_core.errors import DataError
from sage_core.rng import Streams
from sage_core.slo import SloTable


def recorded_among(
    folder: str, policy: str, load: str, source: str, seed: int, *, streams: Streams, slo: SloTable
) -> RecordedLoad:
    """The load of the one complete and valid run below ``folder`` with that policy, class of load (``OpenLoop``), source and seed.

    Of repeated live runs it is the first. Raises :class:`DataError` where there is none, or two simulations of different
    configurations.
    """
    wanted = (policy, load, source, seed)
    found = load_runs(Path(folder)).where(
        lambda m: m.status == "complete" and not m.invalid and (m.policy.name, m.load.name, m.source, m.seed) == wanted
    )
    told = f"{folder}: of policy {policy}, {load}, {source}, seed {seed}"
    if not len(found):
        raise DataError(f"{told}: no complete and valid run; run the sweep that records it first")
    if len(found) > 1 and source == "simulation":
        raise DataError(f"{told}: {len(found)} runs; remove the folders of those that are not meant")
    first = min(found, key=lambda run: run.manifest.timing.started_at)
    return RecordedLoad(str(first.folder), streams=streams, slo=slo)
