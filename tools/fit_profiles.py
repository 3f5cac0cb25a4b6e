"""Rebuild every shipped profile from public measurements: ``python tools/fit_profiles.py --data ../shared/data``.

Writes ``sage_sim/profiles/<name>.yaml`` and prints the held-out errors. The same data give the same files. ``--check``
writes nothing and fails when a shipped file differs from what its source gives. The recipes are in
``tools/profile_fit/recipes.py`` and ``library.py``; what the keys mean is in ``docs/profiles.md``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml
from profile_fit import library, recipes
from profile_fit.fit import BoundError

from sage_sim.profile import PROFILES, Profile

RECIPES = recipes.RECIPES | library.RECIPES
HEADER = "# Made by tools/fit_profiles.py from public measurements; do not edit. Keys: docs/profiles.md.\n"


def to_yaml(profile: Profile) -> str:
    """The file's text: keys in the order of the schema, unknown values left out."""
    return HEADER + yaml.dump(
        msgspec.to_builtins(profile), Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=False
    )


def build(name: str, data: Path) -> Profile:
    """One profile by its recipe."""
    return RECIPES[name](name, data)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 when ``--check`` finds a difference or a fit is refused, 2 when the data are not there."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped profiles from public measurements.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the calibration tables")
    parser.add_argument("--only", metavar="NAME", choices=sorted(RECIPES), help="build this profile alone")
    parser.add_argument("--check", action="store_true", help="compare with the shipped files instead of writing them")
    chosen = parser.parse_args(arguments)
    if not (chosen.data / "hardware_specs.csv").exists():
        print(
            f"fit_profiles: no hardware_specs.csv in {chosen.data}: give the data folder with --data", file=sys.stderr
        )
        return 2
    differing = []
    for name in [chosen.only] if chosen.only else RECIPES:
        try:
            profile = build(name, chosen.data)
        except BoundError as error:
            print(f"fit_profiles: {name}: refused: {error}", file=sys.stderr)
            return 1
        path, text = PROFILES / f"{name}.yaml", to_yaml(profile)
        if not chosen.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            differing.append(name)
        print(_line(profile))
    for name in differing:
        print(f"fit_profiles: {name}.yaml differs from what its source gives; run without --check", file=sys.stderr)
    return 1 if differing else 0


class _Dumper(yaml.SafeDumper):
    """Block style, but ranges and rows of a table flow."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, all(isinstance(item, int | float) for item in sequence))

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, "held_out" in mapping)


def _line(profile: Profile) -> str:
    parts = [
        f"{phase} {error.mape_pct:5.2f}/{error.ape_pct_p95:5.2f}/{error.bias_pct:+5.2f} % (n={error.held_out})"
        for phase, error in profile.errors.items()
    ]
    return f"{profile.name:34} bound {profile.bound_share or 0:5.3f}  {'  '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
