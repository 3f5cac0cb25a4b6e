"""What it takes to run a run again: the reproducibility checklist, written beside its rows as ``manifest.json``.

The caller states what only it knows (configuration, policy, seed, load, how the run ended); the machine, the software
and the checksums are read here. Nothing is guessed: what cannot be found out is ``"unknown"``, what is not there is
``"none"``. The file replaces its predecessor in one move, so a reader never sees half of it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.results.writer import output_error
from sage_core.errors import DataError

NAME: Final = "manifest.json"
FORMAT: Final = 1
UNKNOWN: Final = "unknown"

KEY_PACKAGES: Final = ("sage-serving", "numpy", "msgspec", "simpy", "hydra-core", "pyarrow", "pandas", "scipy")

Source: TypeAlias = Literal["simulation", "live", "emulated"]
"""Where the rows come from: virtual time, real engines, or modelled engines behind the live code."""

Status: TypeAlias = Literal["complete", "interrupted", "failed"]


class PolicyFact(msgspec.Struct, frozen=True):
    """The policy that decided, at first. switches: instants (ns) and names of those that it was changed to."""

    name: str
    parameters: dict[str, Any] = {}
    switches: tuple[tuple[int, str], ...] = ()


class LoadFact(msgspec.Struct, frozen=True):
    """The load as configured. rate: nominal offered load (requests/s), null where there is none (closed loop)."""

    rate: float | None = None
    name: str = UNKNOWN
    parameters: dict[str, Any] = {}


class FileFact(msgspec.Struct, frozen=True):
    """A file and what was in it. rows: of a Parquet file."""

    path: str
    sha256: str
    bytes: int
    rows: int | None = None


class UsageFact(msgspec.Struct, frozen=True):
    """What an engine did from joining to leaving or the end of the run; spans in ns.

    busy_ns: in iterations or batches. prefill_ns: the part of it in iterations with prompt tokens or in embedding
    batches; the rest is decoding. Null: the engine does not tell them apart. prefix_tokens: tokens to prefill of all
    admissions, of which prefix_hit_tokens were cached. itl_mean_ns: between successive tokens; null where there are none.
    batch_tokens, padded_tokens: of embedding batches, and what they cost.
    """

    busy_ns: int
    iterations: int
    preemptions: int
    prefill_ns: int | None = None
    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0
    itl_mean_ns: float | None = None
    batch_tokens: int = 0
    padded_tokens: int = 0


class ReplicaFact(msgspec.Struct, frozen=True):
    """A replica that took part; instants in ns, ``left_ns`` null if it stayed to the end, ``usage`` null if not known."""

    replica: int
    pool: str
    pool_kind: int
    node: str
    device: int
    joined_ns: int
    left_ns: int | None = None
    usage: UsageFact | None = None


class StateFact(msgspec.Struct, frozen=True):
    """An engine changed its state. at_ns: since the start."""

    at_ns: int
    engine: str
    state: str
    why: str


class EngineFact(msgspec.Struct, frozen=True):
    """A real or emulated engine of a live run. version: as its server says. round_trip_ns: to it and back while it was
    idle, null where nobody asked. states: every change, in order; the first is usually its being found healthy."""

    name: str
    url: str
    model: str
    adapter: str
    version: str = UNKNOWN
    round_trip_ns: int | None = None
    states: tuple[StateFact, ...] = ()


class PowerFact(msgspec.Struct, frozen=True):
    """Watts of one whole device: with a model loaded and nothing to do, while prefilling, while decoding. measured: the
    busy ones were measured on this hardware, not taken over from another; ``source`` says from which."""

    idle_w: float
    prefill_w: float
    decode_w: float
    measured: bool
    source: str


class DeviceFact(msgspec.Struct, frozen=True):
    """A device of the cluster, by its number: ``count`` accelerators of the kind ``hardware`` that work as one.

    hardware: name in ``sage_sim/hardware.yaml``; null for CPU workers. power: null where it is not known, and
    ``no_power`` says why. price_per_h: USD, null if unpriced.
    """

    device: int
    node: str
    hardware: str | None
    count: int
    power: PowerFact | None
    no_power: str | None
    price_per_h: float | None


class HostFact(msgspec.Struct, frozen=True):
    """What was sampled of the machine during a live run (``host.parquet``), every ``interval_s``. no_gpu: why there are no
    samples of a GPU, null where there are."""

    interval_s: float
    gpus: int
    no_gpu: str | None


class Timing(msgspec.Struct, frozen=True):
    """The run in the time of the machine it ran on. started_at: ISO 8601, UTC. load_average: when it started, over 1, 5
    and 15 minutes."""

    started_at: str
    wall_s: float
    cpu_s: float
    load_average: tuple[float, ...] = ()


class Hardware(msgspec.Struct, frozen=True):
    """The machine. gpus: one line of name, memory and driver each; empty means none was found."""

    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    network: str


class Software(msgspec.Struct, frozen=True):
    """packages: the key ones by name; packages_sha256: of every installed ``name==version``, sorted."""

    os: str
    python: str
    sage: str
    native_build: str
    cuda: str
    packages: dict[str, str]
    packages_sha256: str
    git_commit: str
    git_dirty: bool | None  # null outside a checkout


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. ``config_hash`` covers the configuration without seed, policy and output folder: runs that share it are arms of
    one comparison. ``warmup_ns`` to ``cooldown_at_ns`` is the window that counts; ``duration_ns`` is the last instant of
    the run. ``digest`` is that of the last of ``steps`` (hex, see ``sage_core.log``); ``control_s`` is time spent inside
    the plane. ``price_per_h`` is that of the whole cluster (USD/h), null if unpriced. Of a live run: its ``engines``; what the load
    ``generator`` measured of itself; why the run is ``invalid``, where it is; and what was sampled of the ``host``."""

    format: int = FORMAT
    experiment: str
    run_id: str
    source: Source
    status: Status
    policy: PolicyFact
    seed: int
    load: LoadFact
    overrides: tuple[str, ...] = ()
    config_hash: str
    config: dict[str, Any]
    warmup_ns: int = 0
    cooldown_at_ns: int | None = None
    duration_ns: int
    digest: str
    steps: int
    control_s: float
    traces: tuple[FileFact, ...] = ()
    profiles: dict[str, FileFact] = {}
    replicas: tuple[ReplicaFact, ...] = ()
    devices: tuple[DeviceFact, ...] = ()
    price_per_h: float | None = None
    counts: dict[str, int] = {}
    timing: Timing
    hardware: Hardware
    software: Software
    outputs: dict[str, FileFact] = {}
    engines: tuple[EngineFact, ...] = ()
    generator: dict[str, Any] | None = None
    invalid: tuple[str, ...] = ()
    host: HostFact | None = None


def write_manifest(
    folder: Path,
    *,
    experiment: str,
    run_id: str,
    source: Source,
    status: Status,
    policy: PolicyFact,
    seed: int,
    load: LoadFact,
    config: Mapping[str, Any],
    duration_ns: int,
    digest: str,
    steps: int,
    control_s: float,
    timing: Timing,
    native_build: str,
    overrides: tuple[str, ...] = (),
    warmup_ns: int = 0,
    cooldown_at_ns: int | None = None,
    traces: Sequence[Path] = (),
    profiles: Mapping[str, Path] | None = None,
    replicas: tuple[ReplicaFact, ...] = (),
    devices: tuple[DeviceFact, ...] = (),
    price_per_h: float | None = None,
    counts: Mapping[str, int] | None = None,
    engines: tuple[EngineFact, ...] = (),
    generator: Mapping[str, Any] | None = None,
    invalid: tuple[str, ...] = (),
    host: HostFact | None = None,
    network: str | None = None,
    checkout: Path | None = None,
) -> Manifest:
    """Write ``folder/manifest.json``, last of all files: the checksums are of what is there now.

    network: what the requests travelled over; by default "simulated" or "loopback". checkout: the source tree whose
    commit is recorded, by default the one this package is in. Raises :class:`OutputError`, and :class:`DataError` for a
    trace or profile that cannot be read.
    """
    manifest = Manifest(
        experiment=experiment,
        run_id=run_id,
        source=source,
        status=status,
        policy=policy,
        seed=seed,
        load=load,
        overrides=overrides,
        config_hash=config_hash(config),
        config=dict(config),
        warmup_ns=warmup_ns,
        cooldown_at_ns=cooldown_at_ns,
        duration_ns=duration_ns,
        digest=digest,
        steps=steps,
        control_s=control_s,
        traces=tuple(file_fact(path) for path in traces),
        profiles={name: file_fact(path) for name, path in (profiles or {}).items()},
        replicas=replicas,
        devices=devices,
        price_per_h=price_per_h,
        counts=dict(counts or {}),
        timing=timing,
        hardware=hardware(network or ("simulated" if source == "simulation" else "loopback")),
        software=software(native_build, checkout or Path(__file__).resolve().parents[2]),
        outputs={
            path.name: msgspec.structs.replace(file_fact(path), path=path.name)
            for path in sorted(folder.glob("*"))
            if path.is_file() and path.name != NAME
        },
        engines=engines,
        generator=None if generator is None else dict(generator),
        invalid=invalid,
        host=host,
    )
    path = folder / NAME
    partial = path.with_suffix(".json.partial")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        os.replace(partial, path)
    except OSError as error:
        raise output_error(path, error) from error
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest at ``path``, or in the folder ``path``. Raises :class:`DataError`, which names the file."""
    file = path / NAME if path.is_dir() else path
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; expected the manifest of a run") from error
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{file}: not the manifest of a run: {error}; run it again, or point at another folder"
        ) from error
    if manifest.format != FORMAT:
        raise DataError(f"{file}: format {manifest.format}, expected {FORMAT}; read it with the version that wrote it")
    return manifest


def config_hash(config: Mapping[str, Any], without: tuple[str, ...] = ("seed", "policy", "results")) -> str:
    """Hex digest of the configuration, keys in order, less the top-level keys ``without`` (``results``: where they go) and
    what ``arm`` says that the arms of the experiment differ in."""
    kept = {key: value for key, value in config.items() if key not in without}
    arm = kept.pop("arm", None) or {}
    for path in arm.get("differs_in", ()):
        kept = _without(kept, path.split("."))
    if arm.get("differs_in"):
        kept["differs_in"] = sorted(arm["differs_in"])
    return hashlib.sha256(msgspec.json.encode(kept, order="deterministic")).hexdigest()


def _without(config: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """A copy less what stands at ``path``."""
    key, *deeper = path
    kept = dict(config)
    if deeper and isinstance(kept.get(key), Mapping):
        kept[key] = _without(kept[key], deeper)
    elif not deeper:
        kept.pop(key, None)
    return kept


def file_fact(path: Path) -> FileFact:
    """Checksum and size of a file; rows too if it is Parquet. Raises :class:`DataError`."""
    try:
        stat = path.stat()
        digest = _sha256(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    return FileFact(str(path), digest, stat.st_size, _rows(path))


def hardware(network: str) -> Hardware:
    """The machine this runs on."""
    return Hardware(_cpu(), os.cpu_count() or 1, psutil.virtual_memory().total, _gpus(), network)


def software(native_build: str, checkout: Path) -> Software:
    """What runs on it. checkout: a folder that may be in a git work tree."""
    installed = _installed()
    lines = "\n".join(f"{name}=={version}" for name, version in sorted(installed.items()))
    commit, dirty = _git(checkout)
    return Software(
        os=platform.platform(),
        python=platform.python_version(),
        sage=installed.get("sage-serving", UNKNOWN),
        native_build=native_build,
        cuda=_cuda(),
        packages={name: installed[name] for name in KEY_PACKAGES if name in installed},
        packages_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        git_commit=commit,
        git_dirty=dirty,
    )


def _rows(path: Path) -> int | None:
    if path.suffix != ".parquet":
        return None
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError):  # cut short by a full disk; its checksum still says what is there
        return None


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    """A sweep reads the same trace for every run; the last two arguments tell whether it is still the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _installed() -> dict[str, str]:
    found = importlib.metadata.distributions()
    return {name.lower(): each.version for each in found if (name := each.metadata["Name"])}


@functools.cache
def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or UNKNOWN


@functools.cache
def _gpus() -> tuple[str, ...]:
    query = "--query-gpu=name,memory.total,driver_version"
    return tuple(line.strip() for line in _output("nvidia-smi", query, "--format=csv,noheader").splitlines() if line)


@functools.cache
def _cuda() -> str:
    if not _gpus():
        return "none"
    match = re.search(r"CUDA Version:\s*([\d.]+)", _output("nvidia-smi"))
    return match[1] if match else UNKNOWN


@functools.cache
def _git(checkout: Path) -> tuple[str, bool | None]:
    """Commit and whether tracked files differ from it; read once, since the code that runs was loaded once."""
    commit = _output("git", "-C", str(checkout), "rev-parse", "HEAD").strip()
    if not commit:
        return UNKNOWN, None
    return commit, bool(_output("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no").strip())


def _output(*command: str) -> str:
    """What a command prints; empty if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
