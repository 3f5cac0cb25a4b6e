"""``sage hetero``: embeddings on GPUs, on CPUs or on both: latency, throughput, cost and energy, and where the cheaper changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sage_bench.hetero import Crossing, Hetero


def command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="As for `sage run`, for all arms: policy=slo_aware load.duration_s=30."
        ),
    ] = None,
    rates: Annotated[str, typer.Option(metavar="R,R,...", help="Documents a second.")] = "5,10,20,30,40,80,120,160,240",
    arms: Annotated[str, typer.Option(metavar="A,A,...", help="Of shared, gpu, mixed, cpu.")] = "shared,gpu,mixed,cpu",
    chat: Annotated[float, typer.Option(help="Chat requests a second, beside the documents.")] = 12.0,
    seeds: Annotated[int, typer.Option(help="Repetitions; 5 or more for intervals.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Simulations at a time.")] = 1,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Runs go to DIR/hetero, tables and the figure beside them.")
    ] = Path("results"),
) -> None:
    """Simulate the same requests on four clusters, which embed on LLM GPUs, a GPU of their own, CPUs, or GPU and CPU."""
    # pandas, scipy and matplotlib take a second, which no other command should pay for.
    import msgspec
    from rich.console import Console

    from sage_bench.figures.hetero import hetero as drawn
    from sage_bench.figures.style import save
    from sage_bench.hetero import facts, hetero
    from sage_bench.report import WIDTH
    from sage_bench.results.writer import output_error

    console = Console(highlight=False, width=WIDTH + 10)
    with Console(stderr=True).status("simulating") as status:
        found = hetero(
            out,
            arms=[each for each in arms.split(",") if each],
            rates=_numbers(rates),
            seeds=seeds,
            chat_rps=chat,
            overrides=overrides or [],
            jobs=jobs,
            told=lambda text: status.update(text),
        )
    folder = out / "hetero"
    encoded = msgspec.json.encode(facts(found, chat, seeds))
    try:
        found.points.to_csv(folder / "points.csv", index=False)
        (folder / "hetero.json").write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")
    except OSError as error:
        raise output_error(folder, error) from error
    written = save(drawn(found.means(), found.crossings), folder / "hetero")
    show(found, console)
    names = ", ".join(["points.csv", "hetero.json", *(path.name for path in written)])
    console.print(f"\n{folder}: {names}", soft_wrap=True, markup=False)


def show(found: Hetero, console: Console) -> None:
    """Print a row for each rate and arm, the cheapest marked, and the crossovers."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    headings = (
        "docs\n(1/s)", "embed on", "SLO chat\n(%)", "SLO docs\n(%)", "TTFT p95\n(s)", "embedding\np50 (s)", "embedding\np95 (s)",
        "served\n(req/s)", "cost\n(USD/1k)", "cost good\n(USD/1k)", "energy\n(kJ/1k)",
    )  # fmt: skip
    for heading in headings:
        least = len("shared *") if heading == "embed on" else None
        table.add_column(heading, justify="right" if least is None else "left", no_wrap=True, min_width=least)
    means = found.means()
    for rate, part in means.groupby("rate"):
        cheapest = part["cost"].min()
        for i, row in enumerate(part.to_dict("records")):
            table.add_row(
                f"{rate:g}" if i == 0 else "",
                f"{row['arm']}{' *' if row['cost'] == cheapest and len(part) > 1 else ''}",
                *(f"{100 * row[name]:.1f}" for name in ("slo_chat", "slo_embedding")),
                *(f"{row[name] / 1e9:.3g}" for name in ("ttft_ns_p95", "embedding_ns_p50", "embedding_ns_p95")),
                f"{row['throughput_rps']:.1f}",
                *(f"{row[name]:.4f}" for name in ("cost_per_1k", "cost")),
                f"{row['energy_j_per_1k'] / 1e3:.2f}",
                end_section=i + 1 == len(part),
            )
    console.print(table)
    console.print(
        "* cheapest per 1,000 good requests (USD/1k good). p95: of requests in a run. All simulated; means over seeds.",
        style="dim",
    )
    for each in found.crossings:
        console.print(told(each), soft_wrap=True, markup=False)
    if not found.crossings:
        console.print("The cheaper arm does not change between these rates.")
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)


def told(each: Crossing) -> str:
    """A crossover in a sentence."""
    spread = "" if each.low is None or each.high is None else f" (95 %: {each.low:.4g} to {each.high:.4g})"
    low, high = each.between
    changed, seeds = each.seeds
    return (
        f"{each.expense}: below {each.rate:.4g} documents/s{spread} {each.below} takes less, above it {each.above}; "
        f"simulated at {low:g} and {high:g}, {changed} of {seeds} seeds"
    )


def _numbers(text: str) -> list[float]:
    from sage_core.errors import ConfigError

    found: list[Any] = []
    for each in text.split(","):
        try:
            found.append(float(each))
        except ValueError as error:
            raise ConfigError(f"--rates: expected numbers with commas between them, got {each!r}") from error
    return found
