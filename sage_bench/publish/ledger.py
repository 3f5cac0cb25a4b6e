"""The claims ledger: every claim with its number, its outcome and the runs behind it, and every claim nobody could make.

A claim whose sign is wrong stays and says so. A claim template of the requirements (257-276) that no study fills is listed
as not measured, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

from sage_bench.publish.chapter import Chapter
from sage_bench.studies.findings import Claim, Outcome
from sage_bench.tables import Sheet

TEMPLATES: Final[Mapping[int, str]] = {
    257: "reduces p99 latency by [X] % against [baseline] under mixed load",
    258: "improves throughput by [Y]x while p95 stays below [Z] ms",
    259: "achieves [A] % SLO attainment against [B] %",
    260: "reduces the variance of utilisation by [C] % across CPU and GPU nodes",
    261: "improves tool-selection accuracy by [D] %",
    262: "reduces planning latency by [E] % at [F] % success",
    263: "evaluated with up to [G] GPU nodes and [H] clients",
    264: "supports [I] req/s with [J] engines",
    265: "cuts configuration complexity by [Y] %, or enables [X] % faster development",
    266: "CPU-only nodes give [X] % of GPU performance for embedding-heavy load",
    267: "an insight, such as FIFO degrades p99 by [C]x",
    268: "an [X]x speedup, or p99 lower by [Y] %",
    269: "5.1: a tight distribution with a p99 of [X] ms",
    270: "5.2: sustains [Y] % more throughput before saturation",
    271: "5.3: without isolation p99 rises to [A] ms",
    272: "5.4: [X]x on [N] GPUs, near-linear scaling",
    273: "5.5: CPU embedding slightly slower, LLM token throughput up",
    274: "near-linear scaling up to [N] backends; negligible overhead for large models",
    275: "minimal control-plane overhead, shown by scaling",
}
"""What each asks for, in square brackets what has to be measured."""

COMPLETE: Final = 276
"""Every contribution has a number and an experiment: a claim about this ledger."""

UNMEASURED: Final[Mapping[int, str]] = {
    261: "there is no agent suite here: no tool selection is scored",
    262: "there is no agent suite here: no planning is timed",
    265: "configuration is counted where a study does so; no study of developers was made",
}
"""Why no run of ours can fill these."""

OUTCOMES: Final[Sequence[Outcome]] = ("holds", "does not hold", "no significant difference", "stated", "not measured")


def ledger(chapters: Sequence[Chapter]) -> list[Claim]:
    """Claims in the order of the chapters, then the templates that none of them fills, then what this adds up to."""
    claims = [claim for chapter in chapters for claim in chapter.findings.claims]
    filled = {claim.requirement for claim in claims}
    missing = [
        Claim(
            f"template-{number}",
            number,
            asked,
            UNMEASURED.get(number, "no study of this report states it"),
            "not measured",
            (),
        )
        for number, asked in TEMPLATES.items()
        if number not in filled
    ]
    return [*claims, *missing, _complete(claims)]


def tally(claims: Sequence[Claim]) -> str:
    """How many of each outcome, as a sentence."""
    counts = [(name, sum(claim.outcome == name for claim in claims)) for name in OUTCOMES]
    return f"Of {len(claims)} claims: {', '.join(f'{name} {n}' for name, n in counts)}."


def ledger_sheet(claims: Sequence[Claim]) -> Sheet:
    """As a table, a row a claim."""
    rows = [
        [
            claim.id,
            str(claim.requirement or ""),
            claim.asked,
            claim.text,
            claim.outcome,
            ", ".join(claim.evidence),
        ]
        for claim in claims
    ]
    return Sheet("Claims", ["id", "requirement", "asked", "found", "outcome", "evidence"], rows)


def ledger_json(claims: Sequence[Claim]) -> str:
    """As JSON, an object a claim."""
    return json.dumps([asdict(claim) for claim in claims], indent=2, ensure_ascii=False) + "\n"


def _complete(claims: Sequence[Claim]) -> Claim:
    """Requirement 276 of the claims that were decided: each has a number, and (by construction) runs that show it."""
    decided = [claim for claim in claims if claim.outcome != "not measured"]
    bare = [claim.id for claim in decided if not re.search(r"\d", claim.text)]
    asked = "every claim has a number and an experiment"
    if not decided:
        return Claim("ledger-complete", COMPLETE, asked, "no claim was decided", "not measured", ())
    evidence = tuple(dict.fromkeys(name for claim in decided for name in claim.evidence))
    text = f"{len(decided) - len(bare)} of {len(decided)} decided claims state a number and name their runs"
    without = f"; without a number: {', '.join(bare)}" if bare else ""
    return Claim("ledger-complete", COMPLETE, asked, text + without, "does not hold" if bare else "holds", evidence)
