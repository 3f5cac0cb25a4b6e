"""Write the table of shipped profiles into ``docs/profiles.md``, from the profiles themselves.

``--check`` writes nothing and exits 1 if the document is out of date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from document import ROOT, publish, with_part

from sage_sim.profile import Phase, Profile, load_profile, profile_names

DOCUMENT = Path("docs/profiles.md")


def main() -> int:
    """Write the document, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the document is out of date")
    check = parser.parse_args().check
    return publish(
        {DOCUMENT: with_part(DOCUMENT, ROOT.joinpath(DOCUMENT).read_text("utf-8"), PART, table())}, check=check
    )


PART = "shipped profiles"


def table() -> str:
    """One row per profile: source, and MAPE / p95 / bias on held-out points by phase, in per cent."""
    head = ["profile", "engine", "source", "decode", "prefill", "mixed", "of the bound", "KV tokens"]
    rows = [head, ["---"] * len(head), *(_row(load_profile(name)) for name in profile_names())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(profile: Profile) -> list[str]:
    bound = "not known" if profile.bound_share is None else f"{100 * profile.bound_share:.0f} %"
    phases: list[Phase] = ["decode", "prefill", "mixed"]
    return [
        f"`{profile.name}`",
        "-" if profile.source.kind == "roofline" else f"{profile.engine.name} {profile.engine.version}",
        profile.source.kind,
        *(_error(profile, phase) for phase in phases),
        bound,
        f"{profile.kv_tokens_max:,}" if profile.kind == "llm" else "-",
    ]


def _error(profile: Profile, phase: Phase) -> str:
    error = profile.errors.get(phase)
    return "-" if error is None else f"{error.mape_pct:.1f} / {error.ape_pct_p95:.1f} / {error.bias_pct:+.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
