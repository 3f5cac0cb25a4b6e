"""Fill the results section of README.md from what was run: ``make demo``, ``make bench``, then this.

No number in that section is typed: the table comes from ``results/demo``, the speed from ``results/bench/core.json``, and
the conditions under which they were taken from the manifest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from sage_bench.results.reader import load_runs
from sage_core.errors import SageError

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: filled by tools/readme_results.py -->", "<!-- /results -->"


def main() -> None:
    """Rewrite the section in place. Exit code 1 and one line when a result is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    try:
        section = "\n".join([*demo(options.results / "demo"), "", *bench(options.results / "bench" / "core.json")])
    except (SageError, OSError) as error:
        print(f"readme_results: {error}; run `make demo` and `make bench` first", file=sys.stderr)
        sys.exit(1)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    readme.write_text(f"{head}{BEGIN}\n{section}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def demo(folder: Path) -> list[str]:
    """The policies of the demo: means over seeds, +- half the 95 % interval."""
    runs = load_runs(folder)
    manifest = next(iter(runs)).manifest
    means = pd.read_csv(folder / "report" / "means.csv")
    whole = means[(means["tenant"] == "all") & (means["priority"] == "all")]
    columns = [
        ("SLO attainment (%)", "all", "slo_attainment", 100.0, 1),
        ("goodput (req/s)", "all", "goodput_rps", 1.0, 1),
        ("chat TTFT p95 (s)", "chat", "ttft_ns_p95", 1e-9, 2),
        ("chat TPOT p95 (ms)", "chat", "tpot_ns_p95", 1e-6, 1),
        ("batch E2E p95 (s)", "generate", "e2e_ns_p95", 1e-9, 1),
        ("embedding E2E p95 (s)", "embedding", "e2e_ns_p95", 1e-9, 3),
    ]
    lines = [f"| policy | {' | '.join(column[0] for column in columns)} |", f"|---|{'---|' * len(columns)}"]
    for policy in dict.fromkeys(whole["policy"]):
        cells = []
        for _, kind, metric, scale, digits in columns:
            row = whole[(whole["policy"] == policy) & (whole["kind"] == kind) & (whole["metric"] == metric)].iloc[0]
            half = (row["high"] - row["low"]) / 2 * scale
            cells.append(f"{row['mean'] * scale:.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    seeds = len({run.manifest.seed for run in runs})
    load = manifest.load
    lines += [
        "",
        f"What `make demo` printed at commit {manifest.software.git_commit[:9]}: simulated, {seeds} seeds, "
        f"{load.rate:g} requests/s on average in bursts (interactive chat and queries beside batch generation and "
        "indexing) on four H100s that each host Llama-3.1-8B and an embedding model; mean ± half the 95 % interval. SLO "
        "attainment counts all offered requests. `hybrid` buys its chat latency with the waiting time of batch work, which "
        "is in the table too. It does not win everywhere: on steady load `priority` and `slo_aware` do as well, and under "
        "floods of long prompts its chat TTFT p95 is worse than that of `fifo`; `sage run experiment=policy_comparison` "
        "shows every preset, wins and losses.",
    ]
    return lines


def bench(path: Path) -> list[str]:
    """The speed of the core."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"Speed (`make bench`, load average {figures['load_average']:.1f} on two cores): "
        f"{figures['decisions_per_cpu_s_q256_s1']:,.0f} scheduling decisions per CPU-second by the mechanism at a queue of "
        f"256 with `hybrid`, one a step ({figures['plane_decisions_per_cpu_s_q256_s1']:,.0f} with the whole control plane "
        f"around them); {figures['us_per_decision_1k_8_2']:.2f} us a decision over 1,000 queued on 8 + 2 replicas, "
        f"{figures['us_per_decision_1k_256_64']:.2f} us on 256 + 64; {figures['sim_requests_per_cpu_s']:,.0f} simulated "
        f"requests per CPU-second, results written; peak memory {figures['peak_mb_100k']:.0f} MB at 100,000 requests and "
        f"{figures['peak_mb_1m']:.0f} MB at 1,000,000.",
    ]


if __name__ == "__main__":
    main()
