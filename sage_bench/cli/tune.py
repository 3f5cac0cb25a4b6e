"""``sage tune``: search a policy's parameters, and say what the search is worth on requests it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sage_bench.tune import Task, Tuned


def command(
    space: Annotated[str, typer.Argument(help="A search space of SAGE (hybrid, separate) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="As for `sage run`: what the policy is tuned for."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Parameters to try; the defaults are the first.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a trial, the same for all; its value is their mean.")] = 3,
    test_seeds: Annotated[int, typer.Option(min=2, help="Other runs, on which the best meets the defaults.")] = 5,
    metric: Annotated[
        str, typer.Option(help="What is to get better: goodput_rps, slo_attainment, ...")
    ] = "goodput_rps",
    kind: Annotated[str, typer.Option(help="Of which requests: all, chat, generate, embedding.")] = "all",
    jobs: Annotated[int, typer.Option(min=1, help="Simulations at a time.")] = 2,
    results: Annotated[Path, typer.Option(help="Files go to a folder in it.")] = Path("results"),
    name: Annotated[str | None, typer.Option(help="Of that folder; by default tune_SPACE.")] = None,
) -> None:
    """Search a policy's parameters with Optuna; the same command goes on where it was interrupted."""
    # pandas, scipy and Optuna take a second, which no other command should pay for.
    import msgspec
    from rich.console import Console

    from sage_bench.config import NAME
    from sage_bench.report import WIDTH
    from sage_bench.results.writer import output_error
    from sage_bench.tune import Task, read_space, tune
    from sage_core.errors import ConfigError

    folder = name or f"tune_{Path(space).stem}"
    if not NAME.fullmatch(folder):
        raise ConfigError(f"--name: expected a plain folder name, got {folder!r}")
    task = Task(read_space(space), tuple(overrides or ()), metric, kind, trials, seeds, test_seeds, jobs)
    progress = Console(stderr=True, highlight=False)
    found = tune(task, results, folder, lambda text: progress.print(text, soft_wrap=True, markup=False))
    path = found.folder / "tune.json"
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(facts(task, found)), indent=2) + b"\n")
    except OSError as error:
        raise output_error(path, error) from error
    show(task, found, Console(highlight=False, width=WIDTH + 10))


def facts(task: Task, found: Tuned) -> dict[str, Any]:
    """All that ``tune.json`` says."""
    return {
        "task": task,
        "best": found.best,
        "best_is_default": found.default,
        "overrides": found.overrides(task.space),
        "tuned_on": {"default": found.values[0], "best": found.values[1]},
        "compared": found.compared,
    }


def show(task: Task, found: Tuned, console: Console) -> None:
    """Print each metric beside the defaults', and the best parameters as overrides."""
    from rich import box
    from rich.table import Table

    from sage_bench.metrics.definitions import METRICS

    metric = METRICS[task.metric]
    before, after = (value / metric.scale for value in found.values)
    told = f"{metric.label} of {task.kind} requests, on the {task.seeds} seeds of {len(found.history)} trials"
    if found.default:
        console.print(f"{told}: nothing was better than the defaults, {before:.4g} {metric.unit}.", soft_wrap=True)
    else:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for heading in ("metric", "requests", "default", "tuned", "difference (95 %)", "p", "verdict"):
            words = heading in ("metric", "requests", "verdict")
            table.add_column(heading, justify="left" if words else "right", no_wrap=True)
        for each in found.compared:
            of, d = METRICS[each.metric], each.difference
            values = (each.default, each.tuned, d.mean, d.low, d.high)
            default, tuned, mean, low, high = (f"{value / of.scale:.3g}" for value in values)
            name = f"{of.label} ({of.unit})"
            table.add_row(name, each.kind, default, tuned, f"{mean} [{low}, {high}]", f"{each.p:.2g}", each.verdict)
        console.print(table)
        console.print(
            f"{told}: {before:.4g} to {after:.4g} {metric.unit}. The table is of {task.test_seeds} other seeds; p of the "
            "metrics that were not tuned is adjusted (Holm).",
            soft_wrap=True,
            markup=False,
        )
        console.print(" ".join(found.overrides(task.space)), soft_wrap=True, markup=False)
    console.print(f"{found.folder}: trials.csv, trials.parquet, tune.json", soft_wrap=True, markup=False)
