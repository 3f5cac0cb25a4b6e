"""The ``sage`` command: one Typer app; each command is a module beside this one."""

from __future__ import annotations

import typer

from sage_bench.cli import doctor, embed, gateway, llm, policy, profile, replay, report, run, trace, validate, whatif

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate and measure control planes for LLM and embedding serving.",
    epilog="Exit codes: 0 done, 2 configuration, 3 data file, 4 policy, 5 backend, 6 our defect, 7 replay diverged, "
    "8 output cannot be written, 9 not as true to a measured run as asked, 130 interrupted.",
)
app.command("run", context_settings=run.CONTEXT, add_help_option=False)(run.command)
app.command("report")(report.command)
app.command("replay")(replay.command)
app.command("validate")(validate.command)
app.command("whatif")(whatif.command)
app.command("doctor")(doctor.doctor)
app.add_typer(gateway.app, name="gateway", help="Serve the OpenAI API from engines, the control plane in between.")
app.add_typer(trace.app, name="trace", help="Import, inspect and synthesise traces.")
app.add_typer(profile.app, name="profile", help="Calibrated profiles: list and show.")
app.add_typer(llm.app, name="llm", help="LLM engines: serve one, real or emulated.")
app.add_typer(embed.app, name="embed", help="Embedding engines: serve one.")
app.add_typer(policy.app, name="policy", help="Policies: list and show.")
