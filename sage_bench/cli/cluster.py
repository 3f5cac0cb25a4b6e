"""``sage cluster plan``: where the jobs of a cluster file go, and what that costs. The commands that start them are in
:mod:`sage_bench.cli.cluster_services`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sage_bench.cli import cluster_services
from sage_bench.cluster.load import read_cluster
from sage_bench.cluster.price import Price, price
from sage_bench.cluster.simulated import simulated
from sage_bench.results.writer import output_error
from sage_core.capacity import MIB_PER_GIB, MILLI, Capacity
from sage_core.cluster import Cluster
from sage_core.errors import ConfigError
from sage_core.node_selector import STRATEGIES
from sage_core.plan import Plan
from sage_core.plan import plan as planned
from sage_core.unplaceable import told

app = typer.Typer(help="Jobs on a cluster: plan, start, stop.", no_args_is_help=True)

_EXIT_UNPLACED = ConfigError.exit_code


@app.command("plan")
def plan(
    file: Annotated[Path, typer.Argument(help="A cluster file; docs/cluster.md says what is in it.")],
    strategy: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGIES)}; default: the file's own, else pack.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON on standard output.")] = False,
    sim: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the plan as a `cluster` of `sage run`; - prints only that."),
    ] = None,
) -> None:
    """Where each replica of each job would go, by which reason, and the price per hour. Exit code 2: not all have a place."""
    if as_json and sim == Path("-"):
        raise ConfigError("--sim -: is for standard output, as --json is; write the one or the other to a file")
    cluster = read_cluster(file)
    chosen: Any = strategy
    found = planned(cluster, chosen)
    if sim is not None:
        _write(sim, simulated(cluster, found))
    if as_json:
        print(json.dumps(_plain(cluster, found), indent=2))
    elif sim != Path("-"):
        _show(cluster, found)
    if found.unplaced:
        for each in found.unplaced:
            print(
                f"sage: {file}: job {each.job!r}, replica {each.replica}: no node has room: {each.why}", file=sys.stderr
            )
        raise typer.Exit(_EXIT_UNPLACED)


cluster_services.add(app)  # after `plan`, which comes first in the help


def _write(path: Path, text: str) -> None:
    if path == Path("-"):
        print(text, end="")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise output_error(path, error) from error


def _show(cluster: Cluster, found: Plan) -> None:
    console = Console(highlight=False)
    placed = Table("job", Column("replica", justify="right"), "node", "GPUs", "takes", "why", box=None)
    placed.title, placed.title_justify = f"Placement by {found.strategy}", "left"
    for each in found.placed:
        where = each.place
        gpus = ", ".join(map(str, where.gpus)) or "-"
        placed.add_row(each.job, str(each.replica), where.node, gpus, escape(told(where.needs)), where.why)
    for none in found.unplaced:
        placed.add_row(none.job, str(none.replica), "[red]none[/red]", "", "", escape(str(none.why)))
    console.print(placed, "")
    console.print(_nodes(cluster, found), "")
    cost = price(cluster, found)
    console.print(
        f"Price: {cost.total:.4g} USD/h, of which {cost.idle:.4g} for nodes without a replica.{_unknown(cost)}"
    )


def _nodes(cluster: Cluster, found: Plan) -> Table:
    right = [Column(title, justify="right") for title in ("replicas", "CPUs", "GiB", "GiB of GPUs", "USD/h")]
    table = Table("node", *right, box=None, title="Nodes: used of what there is", title_justify="left")
    for row in _usage(cluster, found):
        pairs = [f"{row[f'{what}_used']:g} of {row[what]:g}" for what in ("cpus", "memory_gib", "gpu_memory_gib")]
        usd = row["price_per_h"]
        table.add_row(row["name"], str(row["replicas"]), *pairs, "?" if usd is None else f"{usd:.4g}")
    return table


def _usage(cluster: Cluster, found: Plan) -> list[dict[str, Any]]:
    """Each node by name: what there is and what of it the plan uses."""
    capacity = Capacity(cluster.nodes)
    jobs = {job.name: job for job in cluster.jobs}
    for each in found.placed:
        capacity.take(jobs[each.job], each.place)
    rows = []
    for i, node in enumerate(capacity.nodes):
        amounts = {
            "cpus": (capacity.cpus[i], capacity.cpus_free[i], MILLI),
            "memory_gib": (capacity.memory[i], capacity.memory_free[i], MIB_PER_GIB),
            "gpu_memory_gib": (capacity.gpu_total[i], capacity.gpu_total_free[i], MIB_PER_GIB),
        }
        row: dict[str, Any] = {
            "name": node.name,
            "replicas": int(capacity.replicas[i]),
            "price_per_h": node.price_per_h,
        }
        for what, (total, free, unit) in amounts.items():
            row[what], row[f"{what}_used"] = float(total / unit), float((total - free) / unit)
        rows.append(row)
    return rows


def _unknown(cost: Price) -> str:
    return f" The price of {', '.join(cost.unknown)} is not known, and not in it." if cost.unknown else ""


def _plain(cluster: Cluster, found: Plan) -> dict[str, Any]:
    cost = price(cluster, found)
    return {
        "strategy": found.strategy,
        "placed": [
            {"job": each.job, "replica": each.replica, **msgspec.to_builtins(each.place)} for each in found.placed
        ],
        "unplaced": [
            {"job": each.job, "replica": each.replica, "reasons": each.why.reasons} for each in found.unplaced
        ],
        "nodes": _usage(cluster, found),
        "price_per_h": {"total": cost.total, "idle": cost.idle, "unknown": list(cost.unknown)},
    }
