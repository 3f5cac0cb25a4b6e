"""``sage pipeline list|check|show``: what a request goes through, checked, predicted and drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sage_core.errors import ConfigError

if TYPE_CHECKING:
    from sage_bench.pipelines.predict import Prediction
    from sage_core.policy import Speed

app = typer.Typer(no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="FILE|NAME", help="A YAML file, or a name from `sage pipeline list`.")]


@app.command("list")
def list_() -> None:
    """The pipelines that come with SAGE."""
    from rich.console import Console
    from rich.table import Table

    from sage_bench.pipelines.file import load_pipeline, shipped

    table = Table("pipeline", "stages", "pools", "what it is", box=None)
    for name in shipped():
        found = load_pipeline(name)
        pools = dict.fromkeys(stage.op.pool for stage in found.pipeline.stages if not stage.free)
        table.add_row(name, str(len(found.pipeline.stages)), ", ".join(pools), found.description)
    Console(highlight=False, width=_width()).print(table)


@app.command()
def check(file: Source) -> None:
    """Check a pipeline and print its plan; nothing is run. An error names file and line."""
    from sage_bench.pipelines.file import load_pipeline

    print(load_pipeline(file).pipeline.plan())


@app.command()
def show(
    file: Source,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Of the cluster, as for `sage run`: cluster.devices.0.count=4."),
    ] = None,
    cluster: Annotated[str, typer.Option(metavar="NAME", help="On which it is predicted: conf/cluster.")] = "pipelines",
    input_tokens: Annotated[int, typer.Option(min=1, help="Of the request.")] = 100,
    output_tokens_max: Annotated[int, typer.Option(min=1, help="What the client allows.")] = 256,
    out: Annotated[Path | None, typer.Option(metavar="FIGURE", help="Draw it there: .png, .svg or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Stages, pools, critical path and predicted time of a pipeline on a cluster that is idle."""
    from sage_bench.pipelines.file import load_pipeline
    from sage_bench.pipelines.predict import predict

    declared = load_pipeline(file)
    plan = predict(
        declared, _speeds(cluster, overrides or []), input_tokens=input_tokens, output_tokens_max=output_tokens_max
    )
    if out is not None:
        from sage_bench.pipelines.draw import write_figure  # Matplotlib takes a second, which a table need not wait for

        write_figure(plan, out)
    if json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(plan), indent=2).decode())
        return
    _print(plan, cluster)
    if out is not None:
        print(f"drawn in {out}")


def _speeds(cluster: str, overrides: list[str]) -> dict[str, Speed]:
    """Of the pools of a configured cluster."""
    from sage_bench.compose import device_makers, make_parts
    from sage_bench.config import checked, composed
    from sage_bench.pipelines.predict import speeds_of

    for each in overrides:
        if not each.lstrip("+~").startswith("cluster"):
            raise ConfigError(f"{each}: expected a key of the cluster, such as cluster.devices.0.count=4")
    config, _ = checked(composed([f"cluster={cluster}", *overrides]))
    return speeds_of(joined for make in device_makers(make_parts(config)) for joined in make(0).joined())


def _print(plan: Prediction, cluster: str) -> None:
    from rich.console import Console

    from sage_bench.pipelines.show import plan_notes, plan_table

    console = Console(highlight=False, width=_width())
    console.print(f"{plan.pipeline}: {plan.description}" if plan.description else plan.pipeline, markup=False)
    console.print(plan_table(plan))
    for note in plan_notes(plan, cluster):
        console.print(note, soft_wrap=True, markup=False)


def _width() -> int | None:
    """Of what is printed: a terminal's own, else enough for most tables."""
    return None if sys.stdout.isatty() else 140
