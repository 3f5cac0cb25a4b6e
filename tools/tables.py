"""Write into the documents what the code holds as tables: life cycles (ARCHITECTURE.md) and exit codes (README.md).

``--check`` writes nothing and exits 1 if a document is out of date.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from document import ROOT, publish, with_part

from sage_core import errors, lifecycle

ARCHITECTURE, README = Path("ARCHITECTURE.md"), Path("README.md")

State = TypeVar("State", bound=Enum)


def main() -> int:
    """Write both documents, or compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    check = parser.parse_args().check
    architecture = ROOT.joinpath(ARCHITECTURE).read_text("utf-8")
    readme = ROOT.joinpath(README).read_text("utf-8")
    diagrams = [
        diagram("A request", lifecycle.REQUEST),
        diagram("A task", lifecycle.TASK),
        diagram("A replica", lifecycle.REPLICA),
    ]
    return publish(
        {
            ARCHITECTURE: with_part(ARCHITECTURE, architecture, "life cycles", "\n\n".join(diagrams)),
            README: with_part(README, readme, "exit codes", exit_codes()),
        },
        check=check,
    )


def diagram(title: str, table: Mapping[tuple[State, type], State]) -> str:
    """Mermaid state diagram; triggers that lead the same way share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (before, trigger), after in table.items():
        arrows.setdefault((before.value, after.value), []).append(trigger.__name__)
    start = next(iter(table))[0].value
    lasting = {before for before, _ in table}
    ends = [state.value for state in dict.fromkeys(table.values()) if state not in lasting]
    lines = [
        f"    [*] --> {start}",
        *(f"    {before} --> {after}: {', '.join(triggers)}" for (before, after), triggers in arrows.items()),
        *(f"    {end} --> [*]" for end in ends),
    ]
    return "\n".join([f"{title}:", "", "```mermaid", "stateDiagram-v2", *lines, "```"])


def exit_codes() -> str:
    """Markdown rows: 0, then every error of the core by its code."""
    kinds = sorted(
        (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SageError)),
        key=lambda kind: kind.exit_code,
    )
    rows = [f"| {kind.exit_code} | `{kind.__name__}` | {(kind.__doc__ or '').splitlines()[0]} |" for kind in kinds]
    return "\n".join(["| code | error | meaning |", "|---|---|---|", "| 0 | | Done. |", *rows])


if __name__ == "__main__":
    raise SystemExit(main())
