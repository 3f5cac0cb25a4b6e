"""The columns of a run's Parquet files: the contract between recording and everything that reads results.

A run is a folder ``results/<experiment>/<run_id>/``:

==================  ==================================================================================================
requests.parquet    one row per request that arrived
tasks.parquet       one row per dispatched task (attempts are tasks of their own)
replicas.parquet    reports of the replicas, as the plane saw them
steps.parquet       the log: what ``sage replay`` re-decides
host.parquet        who used the machine, once a second; of live runs alone
core_speed.parquet  how fast the engine's core was (sage_bench/core_speed.py); of live runs with ``driver.watch_core`` alone
manifest.json       what is needed to run it again: configuration, seeds, versions, hardware, checksums
config.yaml         the composed configuration
sources.sha256      digest of the code that ran it (sage_bench/sweep/sources.py): what a sweep takes for done
==================  ==================================================================================================

Instants and spans are integer nanoseconds; instants count from the start of the run. A null instant did not happen.
"""

from __future__ import annotations

import pyarrow as pa

_LABEL = pa.dictionary(pa.int32(), pa.string())

OUTCOMES = ("responded", "rejected", "cancelled", "failed")
KINDS = ("chat", "generate", "embedding")

REQUESTS = pa.schema(
    [
        ("request", pa.int64()),
        ("kind", _LABEL),  # one of KINDS
        ("tenant", _LABEL),
        ("priority", pa.int32()),
        ("pipeline", _LABEL),
        ("scheduled_ns", pa.int64()),  # latencies count from here
        ("arrived_ns", pa.int64()),  # the plane saw it
        ("dispatched_ns", pa.int64()),  # first task sent to a replica
        ("first_token_ns", pa.int64()),  # of the last generating stage; null where nothing is generated
        ("ended_ns", pa.int64()),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),  # generated in all
        ("output_tokens_max", pa.int64()),
        ("ttft_due_ns", pa.int64()),  # null: no such objective
        ("due_ns", pa.int64()),
        ("outcome", _LABEL),  # one of OUTCOMES
        ("reason", _LABEL),  # why, where it was not responded; null otherwise
        ("tasks", pa.int32()),  # dispatched for it, retries included
        ("retries", pa.int32()),
        ("replica", pa.int64()),  # of the last dispatched task; null if none
        ("node", _LABEL),
        ("queue_ns", pa.int64()),  # time its tasks spent queued in the plane, summed
        ("ttft_ns", pa.int64()),
        (
            "tpot_ns",
            pa.float64(),
        ),  # (e2e - ttft) / (tokens of that stage - 1); null below 2 tokens, or where all came at once (not streamed)
        ("e2e_ns", pa.int64()),  # null unless responded
        ("ttft_ok", pa.bool_()),  # null: no such objective. Requests that did not respond are false, never null.
        ("tpot_ok", pa.bool_()),
        ("e2e_ok", pa.bool_()),
        ("good", pa.bool_()),  # responded and no objective missed; true without objectives
        ("warmup", pa.bool_()),  # scheduled before the end of warm-up (or after the cool-down began): kept, not counted
    ]
)

TASKS = pa.schema(
    [
        ("task", pa.int64()),
        ("request", pa.int64()),
        ("stage", pa.int32()),
        ("op", _LABEL),
        ("pool", _LABEL),
        ("attempt", pa.int32()),
        ("replica", pa.int64()),
        ("node", _LABEL),
        ("device", pa.int64()),
        ("queued_ns", pa.int64()),
        ("dispatched_ns", pa.int64()),
        ("first_token_ns", pa.int64()),
        ("ended_ns", pa.int64()),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),  # size of the result: generated, or of passages, or an outcome
        ("batch", pa.int64()),  # number of the Dispatch command within the run
        ("batch_tasks", pa.int32()),  # tasks in that command
        ("outcome", _LABEL),  # finished, cancelled, failed, lost (its replica left); null: on it when the run ended
    ]
)

REPLICAS = pa.schema(
    [
        ("at_ns", pa.int64()),
        ("replica", pa.int64()),
        ("pool", _LABEL),
        ("node", _LABEL),
        ("device", pa.int64()),
        ("running", pa.int64()),
        ("waiting", pa.int64()),
        ("kv_blocks_free", pa.int64()),
        ("in_flight", pa.int64()),  # dispatched and not ended, counted by the plane's own commands
    ]
)

STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("now", pa.int64()),
        ("events", pa.binary()),  # MessagePack array of tagged events
        ("digest", pa.binary(16)),  # of the commands, chained over the run
    ]
)

HOST = pa.schema(
    [
        ("at_ns", pa.int64()),
        ("what", _LABEL),  # machine, generator, gateway, an engine that the run started, gpu0, gpu1, ...
        ("cpu_cores", pa.float64()),  # CPU time over the time since the sample before; null for a GPU
        ("memory_bytes", pa.int64()),  # resident, of all its processes; of the machine: what is not available
        ("gpu_share", pa.float64()),  # of the time in which some kernel ran
        ("power_w", pa.float64()),
    ]
)

CORE_SPEED = pa.schema([("at_ns", pa.int64()), ("probe_ns", pa.int64())])  # of every probe: when, and how long it took
