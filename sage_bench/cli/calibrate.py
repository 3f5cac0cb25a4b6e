"""``sage calibrate URL``: a profile from a live engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sage_bench.calibrate.session import Report


def command(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Of the engine itself, http://HOST:PORT; it should be idle.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the profile goes, a .yaml file.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Served model; default: the engine's only one.")
    ] = None,
    kind: Annotated[Literal["llm", "embedding"], typer.Option(help="What the engine does.")] = "llm",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The model's folder or tokenizer.json, for prompts of exact lengths."),
    ] = None,
    prompts: Annotated[
        Literal["chat", "text", "ids"] | None,
        typer.Option(help="What an LLM engine is sent; default: chats if there is a tokenizer, else token ids."),
    ] = None,
    budget_s: Annotated[float, typer.Option(min=1.0, help="About how long it may take, in seconds.")] = 120.0,
    max_num_seqs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sequences in a batch, as the engine was started; else 256.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Token budget of an iteration, likewise; else 2048.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of the KV cache; default: as /metrics says.")
    ] = None,
    prompt_max: Annotated[
        int | None, typer.Option(metavar="N", min=16, help="Longest prompt or text to measure; default: what fits.")
    ] = None,
    max_batch_tasks: Annotated[int, typer.Option(metavar="N", min=1, help="Embedding: most texts of a batch.")] = 32,
    max_batch_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Embedding: most tokens of a batch.")
    ] = 16384,
    padding: Annotated[bool, typer.Option(help="Embedding: texts are padded to the longest of the batch.")] = True,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="What it runs on; default: the CPU here.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, order and held-out loads.")] = 0,
    watch_core: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Core of this machine that the engine runs on: times are then by its speed."
        ),
    ] = None,
) -> None:
    """Measure a live engine with requests by design, and write a profile of it with its held-out error."""
    # scipy takes a second, which no other command should pay for.
    from rich.console import Console

    from sage_bench.calibrate.session import Wanted, calibrate_engine
    from sage_bench.report import WIDTH

    wanted = Wanted(
        url,
        model,
        kind,
        tokenizer,
        budget_s,
        max_num_seqs,
        max_num_batched_tokens,
        kv_tokens,
        prompt_max,
        max_batch_tasks,
        max_batch_tokens,
        padding,
        device,
        seed,
        watch_core,
        prompts,
    )
    errors = Console(stderr=True, highlight=False)
    with errors.status("calibrating"):
        report = calibrate_engine(wanted, out, lambda line: errors.print(line, style="dim", markup=False))
    show(report, out, Console(highlight=False, width=WIDTH))


def show(report: Report, out: Path, console: Console) -> None:
    """Print errors beside noise, what is doubtful, and how to use the result."""
    from rich import box
    from rich.table import Table

    profile = report.profile
    console.print(
        f"{out}: {profile.kind} {profile.model.name} on {profile.engine.name} {profile.engine.version}, "
        f"{profile.hardware.device}; {report.requests} requests in {report.seconds:.0f} s",
        soft_wrap=True,
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("left out of the fit", "points", "MAPE %", "p95 %", "bias %"):
        table.add_column(heading, justify="left" if not table.columns else "right")
    for phase, error in profile.errors.items():
        table.add_row(
            f"{phase} conditions",
            f"{error.held_out}",
            f"{error.mape_pct:.2f}",
            f"{error.ape_pct_p95:.2f}",
            f"{error.bias_pct:+.2f}",
        )
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("held-out load", "latency", "requests", "mean %", "p95 %", "by request %", "noise %"):
        table.add_column(heading, justify="left" if len(table.columns) < 2 else "right")
    for each in report.figures:
        table.add_row(
            f"{100 * each.share:.0f} % of capacity",
            each.latency.upper(),
            f"{each.requests}",
            f"{each.error:+.2f}",
            f"{each.error_p95:+.2f}",
            f"{each.by_request:.2f}",
            f"{each.noise:.2f}",
        )
    console.print(table)
    console.print(f"repetitions of one condition scatter by {report.scatter_pct:.1f} % (median)")
    for line in report.doubtful:
        console.print(f"doubtful: {line}", soft_wrap=True, markup=False)
    for line in report.notes:
        console.print(f"note: {line}", soft_wrap=True, markup=False)
    key = "llm" if profile.kind == "llm" else "embed"
    console.print(f"its settings, for cluster.devices[].{key}: {report.beside}", soft_wrap=True, markup=False)
    override = f"cluster.devices=[{{node:here,{key}:{_override(report.device)}}}]"
    console.print(f"to simulate it: sage run '{override}'", soft_wrap=True, markup=False)


def _override(value: object) -> str:
    """In the grammar of Hydra's overrides, which is not quite JSON: keys stand without quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_override(inner)}" for key, inner in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else json.dumps(value)
