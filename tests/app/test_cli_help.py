"""The command line explains itself: every command, its arguments, and the exit codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from sage_bench.cli import command
from sage_core import errors
from sage_policies.presets import PRESETS

Sage = Callable[..., Any]


def commands(of: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, with the words that lead to it."""
    for name, sub in of.commands.items():
        if hasattr(sub, "commands"):
            yield from commands(sub, (*path, name))
        else:
            yield (*path, name), sub


ROOT = typer.main.get_command(command())
COMMANDS = dict(commands(ROOT))


def plain(text: str) -> str:
    """Without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def test_the_commands_of_the_design_are_there() -> None:
    assert set(COMMANDS) >= {
        ("run",), ("report",), ("replay",), ("doctor",), ("trace", "import"), ("trace", "inspect"), ("trace", "synth"),
        ("policy", "list"), ("policy", "show"), ("profile", "list"), ("profile", "show"),
    }  # fmt: skip


def test_alone_it_prints_help(sage: Sage) -> None:
    text = plain(sage().out)
    assert "Usage: sage" in text
    for path in COMMANDS:
        assert path[0] in text


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != ("run",)], ids=" ".join)
def test_help_names_every_argument(sage: Sage, path: tuple[str, ...]) -> None:
    done = sage(*path, "--help")
    assert (done.code, done.err) == (0, "")
    text = plain(done.out)
    assert f"Usage: sage {' '.join(path)}" in text
    for parameter in COMMANDS[path].params:
        for name in [parameter.metavar] if parameter.metavar else parameter.opts:
            assert name in text, f"{' '.join(path)} --help does not name {name}"
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{' '.join(path)}: {parameter.name} is not explained"
    assert COMMANDS[path].help, f"{' '.join(path)} says nothing about itself"


def test_help_of_run_lists_groups_and_keys(sage: Sage) -> None:
    done = sage("run", "--help")
    assert (done.code, done.err) == (0, "")
    for line in (
        "policy: edf, fifo, hybrid",
        "experiment: ablation",
        "cluster:",
        "load:",
        "slo:",
        "seed: 0",
        "warmup_s: 0.0",
    ):
        assert line in done.out, line
    assert done.out.startswith("sage run GROUP=CHOICE") and "Examples:" in done.out


def test_a_wrong_command_or_option_says_so(sage: Sage) -> None:
    for arguments, name in ((("simulate",), "simulate"), (("replay", ".", "--fast"), "--fast"), (("replay",), "run")):
        done = sage(*arguments)
        assert done.code == 2 and name in done.err and "Traceback" not in done.err


def test_exit_codes_are_documented_and_distinct(sage: Sage) -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.SageError)]
    codes = {c.__name__: c.exit_code for c in classes if c is not errors.SageError}
    assert len(set(codes.values())) == len(codes) == 9
    text = plain(sage("--help").out)
    documented = dict(re.findall(r"(\d+) ([a-z][a-z ]*)", text[text.index("Exit codes:") :]))
    assert {int(code) for code in documented} == {0, 130, *codes.values()}
    words = {
        "ConfigError": "configuration", "DataError": "data file", "PolicyError": "policy", "IllegalEvent": "backend",
        "InvariantViolation": "our defect", "ReplayDivergence": "replay diverged",
        "OutputError": "output cannot be written", "FidelityError": "not as true to a measured run as asked", "EngineError": "engine not reachable",
    }  # fmt: skip
    assert {name: documented[str(code)].strip() for name, code in codes.items()} == words


def test_lists(sage: Sage) -> None:
    done = sage("policy", "list")
    assert done.code == 0 and all(name in done.out for name in PRESETS)
    for name in PRESETS:
        shown = sage("policy", "show", name)
        assert shown.code == 0 and "predict" in shown.out
    assert "starvation_bypass" in sage("policy", "show", "hybrid").out
    assert "llama-3.1-8b-a100-tp1" in sage("profile", "list").out
