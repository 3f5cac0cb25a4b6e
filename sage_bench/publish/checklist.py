"""The reproducibility checklist (requirements 277-294) of a set of runs, read from their manifests alone.

Each field has its value, or *not captured* with the reason. This and the table of runs are the only things published that
name a date or the load of the machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sage_bench.metrics.statistics import CONFIDENCE
from sage_bench.publish.chapter import Chapter
from sage_bench.results.manifest import UNKNOWN, FileFact, Manifest
from sage_bench.results.reader import Run
from sage_bench.tables import Sheet
from sage_core.units import SECOND

_VALUES_MAX: Final = 8
"""Distinct values that a field shows; of more, how many there are."""

_LOADS_MAX: Final = 24
"""The same for loads, which are long."""

_HASH: Final = 12
"""Characters of a digest that tables show; the manifests hold all."""


def checklist(chapters: Sequence[Chapter]) -> Sheet:
    """The fields over all runs of all chapters, each once."""
    runs = runs_of(chapters)
    manifests = [run.manifest for run in runs]
    values = [
        (277, "GPU model", _gpus(manifests)),
        (278, "number of GPUs", _gpu_counts(manifests)),
        (279, "CPU", _distinct(f"{m.hardware.cpu}, {m.hardware.cores} cores" for m in manifests)),
        (280, "memory", _distinct(f"{m.hardware.memory_bytes / 2**30:.1f} GiB" for m in manifests)),
        (281, "network", _distinct(m.hardware.network for m in manifests)),
        (282, "SAGE", _distinct(_sage(m) for m in manifests)),
        (283, "engines", _engines(manifests)),
        (284, "CUDA", _distinct("not captured: no GPU on the machine" if m.software.cuda == "none" else m.software.cuda for m in manifests)),
        (285, "Python and packages", _distinct(_python(m) for m in manifests)),
        (286, "models", _models(manifests)),
        (287, "workload", _workload(manifests)),
        (288, "warm-up", _distinct(_warmup(m) for m in manifests)),
        (289, "measurement duration", _durations(manifests)),
        (290, "repetitions and error bars", _repetitions(chapters)),
        (291, "code", _code(manifests)),
        (292, "configuration", f"config.yaml in the folder of each of {len(runs)} runs; its hash in manifest.json"),
        (293, "raw data", _raw(runs)),
        (294, "commands", _distinct((_command(m) for m in manifests), most=40)),
    ]  # fmt: skip
    return Sheet(
        "Reproducibility checklist", ["requirement", "field", "value"], [[str(no), *rest] for no, *rest in values]
    )


def runs_sheet(chapters: Sequence[Chapter]) -> Sheet:
    """Every run: which it is, what made it, and how busy the machine was."""
    rows = []
    for chapter in chapters:
        for condition in chapter.conditions:
            for arm, members in condition.arms.items():
                for run in members:
                    m = run.manifest
                    rows.append(
                        [
                            m.experiment,
                            m.run_id,
                            m.source,
                            arm,
                            str(m.seed),
                            "–" if m.load.rate is None else f"{m.load.rate:g}",
                            _commit(m),
                            m.config_hash[:_HASH],
                            m.software.native_build,
                            f"{m.timing.load_average[0]:.2f}" if m.timing.load_average else "–",
                            m.timing.started_at[:19],
                        ]
                    )
    columns = [
        "experiment",
        "run",
        "source",
        "arm",
        "seed",
        "offered\n(req/s)",
        "commit",
        "configuration",
        "native build",
    ]
    unique = list(dict.fromkeys(map(tuple, rows)))  # an experiment may belong to two studies
    return Sheet("Runs", [*columns, "load of the\nmachine", "started (UTC)"], [list(row) for row in unique])


def runs_of(chapters: Sequence[Chapter]) -> list[Run]:
    """Every run of every chapter, once."""
    return list({run.folder: run for chapter in chapters for run in chapter.runs}.values())


def _distinct(values: Iterable[str], most: int = _VALUES_MAX) -> str:
    """The different values, commonest first, with the number of runs where there are several. values: of each run, each of
    them once."""
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{value} ({n} runs)" for value, n in listed[:most]]
    return "; ".join([*shown, f"and {len(listed) - most} more"] if len(listed) > most else shown)


def _gpus(manifests: Sequence[Manifest]) -> str:
    found = [gpu for m in manifests for gpu in sorted(set(m.hardware.gpus))]
    simulated = sorted({str(device.hardware) for m in manifests for device in m.devices if device.hardware})
    host = _distinct(found) if found else "not captured: the machine has none"
    return f"{host}; simulated devices: {', '.join(simulated)}" if simulated else host


def _gpu_counts(manifests: Sequence[Manifest]) -> str:
    host = _distinct(str(len(m.hardware.gpus)) for m in manifests)
    simulated = [sum(d.count for d in m.devices if d.hardware) for m in manifests if m.source == "simulation"]
    return f"{host} on the machine" + (f"; simulated: {_span(simulated, '{:g}')} a run" if any(simulated) else "")


def _sage(m: Manifest) -> str:
    commit = (
        "commit not captured: not run from a checkout" if m.software.git_commit == UNKNOWN else f"commit {_commit(m)}"
    )
    return f"{m.software.sage}, {commit}, native build {m.software.native_build}"


def _commit(m: Manifest) -> str:
    if m.software.git_commit == UNKNOWN:
        return UNKNOWN
    return m.software.git_commit[:_HASH] + (" with changes" if m.software.git_dirty else "")


def _engines(manifests: Sequence[Manifest]) -> str:
    engines = [
        text
        for m in manifests
        for text in sorted({f"{each.adapter} {each.version} ({each.model})" for each in m.engines})
    ]
    return _distinct(engines) if engines else "not captured: no engine process took part, every run is simulated"


def _python(m: Manifest) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in m.software.packages.items())
    return f"{m.software.python} on {m.software.os}; {packages}; all packages: SHA-256 {m.software.packages_sha256[:_HASH]}"


def _models(manifests: Sequence[Manifest]) -> str:
    profiles = {
        f"{name} (profile, SHA-256 {fact.sha256[:_HASH]})" for m in manifests for name, fact in m.profiles.items()
    }
    engines = {f"{each.model} ({each.adapter})" for m in manifests for each in m.engines}
    found = sorted(profiles | engines)
    return "; ".join(found) if found else "not captured: no profile and no engine is named"


def _workload(manifests: Sequence[Manifest]) -> str:
    """Arrivals and lengths of every class of requests, by experiment, and the traces with their checksums."""
    loads: dict[str, list[str]] = {}
    for m in manifests:
        loads.setdefault(f"{m.load.name}: {_load(m.load.parameters)}", []).append(m.experiment)
    listed = [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in loads.items()]
    more = [f"and {len(listed) - _LOADS_MAX} more"] if len(listed) > _LOADS_MAX else []
    traces = sorted({_file(trace) for m in manifests for trace in m.traces})
    return "; ".join([*listed[:_LOADS_MAX], *more, f"traces: {'; '.join(traces)}" if traces else "no trace file"])


def _load(parameters: Mapping[str, Any]) -> str:
    """How its requests arrive, and how long they are; the rate is in the table of runs."""
    parts = [
        f"{key} {_short(parameters[key])}" for key in ("arrivals", "fit", "path") if parameters.get(key) is not None
    ]
    for name, of in (parameters.get("classes") or {}).items():
        facts = [
            f"{key.removesuffix('_tokens')} {_short(of[key])}"
            for key in ("input_tokens", "output_tokens", "arrivals")
            if of.get(key) is not None
        ]
        parts.append(f"{name} ({', '.join([str(of.get('kind', '')), *facts]).removeprefix(', ')})")
    return ", ".join(parts)


def _short(value: Any) -> str:
    """What a value of the configuration makes: ``Uniform(low=3000, high=7000)``; of a file, its name."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}={_short(each)}" for key, each in value.items() if not str(key).startswith("_"))
        name = str(value.get("_target_", "")).rpartition(".")[2]
        return f"{name}({inside})" if inside else name
    return Path(str(value)).name if isinstance(value, str) else str(value)


def _file(fact: FileFact) -> str:
    rows = "" if fact.rows is None else f", {fact.rows:,} rows"
    return f"{Path(fact.path).name} (SHA-256 {fact.sha256[:_HASH]}{rows})"


def _warmup(m: Manifest) -> str:
    text = f"first {m.warmup_ns / SECOND:g} s" if m.warmup_ns else "none"
    if m.cooldown_at_ns is not None:
        text += f", and from {m.cooldown_at_ns / SECOND:g} s on"
    return f"{text}: rows kept, flagged and not counted" if m.warmup_ns or m.cooldown_at_ns is not None else text


def _durations(manifests: Sequence[Manifest]) -> str:
    return f"{_span([m.duration_ns / SECOND for m in manifests], '{:,.1f}')} s a run, {sum(m.duration_ns for m in manifests) / SECOND:,.0f} s in all"


def _repetitions(chapters: Sequence[Chapter]) -> str:
    seeds = [
        len({run.manifest.seed for run in arm})
        for chapter in chapters
        for condition in chapter.conditions
        for arm in condition.arms.values()
    ]
    return f"{_span(seeds, '{:g}')} seeds an arm; error bars and ±: {CONFIDENCE:.0%} intervals over seeds"


def _code(manifests: Sequence[Manifest]) -> str:
    return f"this repository at {_distinct(_commit(m) for m in manifests)}; an experiment is conf/experiment/NAME.yaml"


def _raw(runs: Sequence[Run]) -> str:
    files = [fact for run in runs for name, fact in run.manifest.outputs.items() if name.endswith(".parquet")]
    rows = sum(
        run.manifest.outputs[name].rows or 0
        for run in runs
        for name in ("requests.parquet",)
        if name in run.manifest.outputs
    )
    return f"{len(files)} Parquet files with {rows:,} requests, {sum(f.bytes for f in files) / 1e6:,.1f} MB; SHA-256 of each in manifest.json"


def _command(m: Manifest) -> str:
    experiment = _choice(m, "experiment")
    return (
        f"sage run experiment={experiment}"
        if experiment
        else f"sage run name={m.experiment} with the overrides in manifest.json"
    )


def _choice(m: Manifest, group: str) -> str | None:
    """What was chosen for a group of the configuration on the command line, if that is recorded."""
    found: str | None = next((each.partition("=")[2] for each in m.overrides if each.startswith(f"{group}=")), None)
    return found


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
