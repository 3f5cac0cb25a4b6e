"""What ``sage validate RUN`` prints."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sage_bench.figures.style import SOURCES
from sage_bench.validate.compare import STATISTICS, Latency
from sage_bench.validate.live import RunFidelity

_LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "queue": "queue time", "send_lag": "send lag"}


def show_run(fidelity: RunFidelity, console: Console) -> None:
    """Print the tables and the notes."""
    console.print(
        f"{fidelity.recorded}: {fidelity.compared:,} of {fidelity.requests:,} counted requests compared, {SOURCES[fidelity.source]}"
        f"{''.join(f', simulated with {each}' for each in fidelity.overrides)}",
        soft_wrap=True,
        markup=False,
    )
    console.print(_errors(fidelity))
    if any(not each.p99_certain for of in fidelity.kinds.values() for each in of.values()):
        console.print("* p99 of fewer than 662 samples: the luck of a few requests, not a property of either system.")
    if fidelity.against is not None:
        console.print(
            f"noise: {fidelity.against} against the first run, by distribution.", soft_wrap=True, markup=False
        )
    if (slow := fidelity.slowness) is not None:
        console.print(
            f"simulated at the speed of the watched core: the engine's work took {slow.mean:.2f} times as long as by the profile (in "
            f"half of all half seconds at least {slow.p50:.2f}, in one of twenty {slow.p95:.2f})",
            soft_wrap=True,
        )
    if fidelity.client:
        console.print(_client(fidelity))
    for side, outcomes in fidelity.outcomes.items():
        if set(outcomes) != {"responded"}:
            console.print(f"{side}: {', '.join(f'{count:,} {name}' for name, count in outcomes.items())}")
    for warning in fidelity.warnings:
        console.print(f"[yellow]note:[/yellow] {escape(warning)}", soft_wrap=True)


def _errors(fidelity: RunFidelity) -> Table:
    noisy = fidelity.noise_pct is not None
    table = _table("latency", "", "measured", "simulated", "error %", *(["noise %"] if noisy else []))
    for kind, latencies in fidelity.kinds.items():
        for name, each in latencies.items():
            unit, scale = _unit(each.mean.measured)
            for statistic in STATISTICS:
                of = getattr(each, statistic)
                label = f"{kind} {_LABELS[name]} ({unit})" if statistic == "mean" else ""
                cells = [f"{of.measured * scale:.3f}", f"{of.simulated * scale:.3f}", _signed(of.error_pct)]
                if fidelity.noise_pct is not None:
                    cells.append(_signed(fidelity.noise_pct.get(kind, {}).get(name, {}).get(statistic)))
                table.add_row(label, _doubt(statistic, each), *cells)
            by_request = "" if each.by_request_mape_pct is None else f"{each.by_request_mape_pct:.2f}"
            table.add_row("", "mean |error| of a request", "", "", by_request, end_section=True)
    makespan = fidelity.makespan_s
    table.add_row(
        "makespan (s)", "", f"{makespan.measured:.3f}", f"{makespan.simulated:.3f}", _signed(makespan.error_pct)
    )
    return table


def _client(fidelity: RunFidelity) -> Table:
    """What the client saw beside what the plane saw: what lies between is the network, HTTP and the client itself."""
    table = _table("seen by the client", "", "client", "in the plane", "difference %")
    for kind, view in (fidelity.client or {}).items():
        for name, spread in view.latencies.items():
            unit, scale = _unit(spread.mean)
            of_plane = fidelity.kinds.get(kind, {}).get(name)
            for statistic in STATISTICS:
                seen = getattr(spread, statistic)
                known = None if of_plane is None else getattr(of_plane, statistic).measured
                label = f"{kind} {_LABELS[name]} ({unit})" if statistic == "mean" else ""
                table.add_row(
                    label,
                    statistic,
                    f"{seen * scale:.3f}",
                    "" if known is None else f"{known * scale:.3f}",
                    _signed(100 * (seen - known) / known if known else None),
                    end_section=statistic == STATISTICS[-1],
                )
        if view.failed:
            table.add_row(
                f"{kind}: {view.failed:,} of {view.answered + view.failed:,} not answered well", "", "", "", ""
            )
    return table


def _unit(mean_s: float) -> tuple[str, float]:
    return ("ms", 1e3) if mean_s < 0.1 else ("s", 1.0)


def _doubt(statistic: str, each: Latency) -> str:
    return f"{statistic} *" if statistic == "p99" and not each.p99_certain else statistic


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    return table
