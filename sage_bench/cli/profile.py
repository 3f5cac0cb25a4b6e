"""``sage profile list`` and ``sage profile show NAME``: what is known of models on devices, and how well."""

from __future__ import annotations

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sage_sim.iteration import IterationWork
from sage_sim.profile import Phase, Profile, load_profile, profile_names

app = typer.Typer(help="Calibrated model profiles: times, errors, provenance.", no_args_is_help=True)


@app.command("list")
def list_profiles() -> None:
    """Every shipped profile with its source and the error (MAPE) on held-out points."""
    table = Table(
        Column("profile", no_wrap=True), "engine", "source", "decode %", "prefill %", "mixed %", box=SIMPLE_HEAD
    )
    for name in profile_names():
        profile = load_profile(name)
        errors = [f"{profile.errors[phase].mape_pct:.1f}" if phase in profile.errors else "-" for phase in _PHASES]
        engine = f"{profile.engine.name} {profile.engine.version}"
        table.add_row(name, engine, profile.source.kind, *errors)
    console = Console()
    console.print(table)
    console.print("Error: mean absolute error on held-out points of the fit. `sage profile show NAME` has the rest.")


@app.command()
def show(profile: str = typer.Argument(help="a shipped profile's name, or the path of a .yaml file")) -> None:
    """One profile: times of typical iterations, errors, comparisons with other measurements, memory, source, assumptions."""
    loaded = load_profile(profile)
    console = Console()
    console.print(_facts(loaded))
    console.print(_times(loaded))
    if loaded.errors:
        console.print(_errors(loaded))
    if loaded.checks:
        console.print(_checks(loaded))
    console.print("[bold]Assumptions[/bold]")
    for assumption in loaded.assumptions:
        console.print(f"- {escape(assumption)}", highlight=False)


_PHASES: tuple[Phase, ...] = ("decode", "prefill", "mixed")
_PROMPT, _CONTEXT = 512, 1024


def _facts(profile: Profile) -> Table:
    table = Table(title=profile.name, title_justify="left", show_header=False, box=None)
    hardware, source, valid = profile.hardware, profile.source, profile.valid
    memory = f"{hardware.memory_gib:g} GiB each" if hardware.memory_gib else "memory not stated"
    tdp = f"{hardware.tdp_w:g} W TDP each" if hardware.tdp_w else "TDP not stated"
    ranges = {
        "new prompt tokens an iteration": valid.prefill_tokens,
        "prompt tokens": valid.prompt_tokens,
        "decoding sequences": valid.decode_seqs,
        "cached tokens": valid.decode_kv_tokens,
        "context tokens of a sequence": valid.decode_context,
    }
    rows = [
        (
            "model",
            f"{profile.model.name}, {profile.model.precision}"
            + (f", {profile.model.parameters / 1e9:.3g} B parameters" if profile.model.parameters else ""),
        ),
        ("hardware", f"{hardware.count} x {hardware.device}, {memory}, {tdp}"),
        ("engine", f"{profile.engine.name} {profile.engine.version}"),
        ("source", f"{source.kind}: {', '.join(source.files)} ({', '.join(source.origin)}; {source.licence})"),
        ("date", source.date),
        ("method", source.method),
        ("fitted for", "; ".join(f"{seen[0]:,} to {seen[1]:,} {what}" for what, seen in ranges.items() if seen)),
    ]
    if profile.kind == "llm":
        utilization = f"at gpu_memory_utilization {profile.memory.gpu_memory_utilization:g}"
        rows.append(("kv_tokens_max", f"{profile.kv_tokens_max:,} {utilization}"))
    if profile.bound_share is not None:
        rows.append(("bound", f"at most {100 * profile.bound_share:.0f} % of the FLOP or bandwidth limit"))
    for key, value in rows:
        table.add_row(f"[bold]{key}[/bold]", escape(value))
    return table


def _times(profile: Profile) -> Table:
    """What typical iterations take by the law; the file itself has the times at knots."""
    law = profile.iteration_time()
    table = Table("iteration", Column("ms", justify="right"), title="Times", title_justify="left")
    if profile.kind == "embedding":
        for texts in (1, 32):
            batch_ps = law.batch_ps(texts * _PROMPT, texts * _PROMPT**2)
            table.add_row(f"{texts} texts of {_PROMPT} tokens", f"{batch_ps / 1e9:.3f}")
        return table
    prompt = IterationWork(0, 0, 1, _PROMPT, 0, _PROMPT**2)
    for seqs in (1, 32, 128):
        decode = IterationWork(seqs, seqs * _CONTEXT)
        table.add_row(f"{seqs} decoding, {_CONTEXT} tokens of context each", f"{law.iteration_ps(decode) / 1e9:.3f}")
    table.add_row(f"a prompt of {_PROMPT} tokens", f"{law.iteration_ps(prompt) / 1e9:.3f}")
    mixed = prompt._replace(seqs=32, kv_tokens=32 * _CONTEXT)
    table.add_row("that prompt beside 32 of those decodes", f"{law.iteration_ps(mixed) / 1e9:.3f}")
    return table


def _errors(profile: Profile) -> Table:
    table = Table("phase", "train", "held out", "MAPE %", "p95 %", "bias %", title="Error on held-out points")
    table.title_justify = "left"
    for phase, error in profile.errors.items():
        numbers = (f"{error.mape_pct:.2f}", f"{error.ape_pct_p95:.2f}", f"{error.bias_pct:+.2f}")
        table.add_row(phase, str(error.train), str(error.held_out), *numbers)
    return table


def _checks(profile: Profile) -> Table:
    table = Table("against", "points", "MAPE %", "bias %", "note", title="Compared with", title_justify="left")
    for check in profile.checks:
        row = (check.against, str(check.points), f"{check.mape_pct:.1f}", f"{check.bias_pct:+.1f}", check.note)
        table.add_row(*map(escape, row))
    return table
