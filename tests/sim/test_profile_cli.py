"""``sage profile`` lists every profile and shows its error table."""

from __future__ import annotations

from typer.testing import CliRunner

from sage_bench.cli.profile import app
from sage_core.errors import ConfigError
from sage_sim.profile import load_profile, profile_names

LLM = "llama-3.1-8b-a100-tp1"


def test_cli_lists_every_profile() -> None:
    result = CliRunner().invoke(app, ["list"], terminal_width=140)
    assert result.exit_code == 0
    assert all(name in result.output for name in profile_names())


def test_cli_shows_the_error_table() -> None:
    result = CliRunner().invoke(app, ["show", LLM], terminal_width=140)
    assert result.exit_code == 0
    for phase, error in load_profile(LLM).errors.items():
        row = next(line for line in result.output.splitlines() if phase in line and str(error.train) in line)
        assert f"{error.mape_pct:.2f}" in row and f"{error.ape_pct_p95:.2f}" in row


def test_cli_unknown_profile_is_a_config_error() -> None:
    result = CliRunner().invoke(app, ["show", "nope"])
    assert isinstance(result.exception, ConfigError)
