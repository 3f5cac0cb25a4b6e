"""Fill the results section of README.md from what was run: ``make demo bench bench-sim bench-fidelity bench-gateway
bench-loadgen bench-faults bench-live bench-real``, then this. What was measured of the live half is told where it is there.

No number in that section is typed: the table comes from ``results/demo``, speed and fidelity from ``results/bench``, and
the conditions under which they were taken from the manifest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
        of = {name: read(options.results / "bench" / f"{name}.json") for name in ("core", "sim", "fidelity")}
        parts = [demo(options.results / "demo"), bench(of["core"]), simulation(of["sim"]), fidelity(of["fidelity"])]
        parts += [
            tell(read(path))
            for name, tell in LIVE.items()
            if (path := options.results / "bench" / f"{name}.json").exists()
        ]
        section = "\n\n".join("\n".join(part) for part in parts)
    except (SageError, OSError) as error:
        print(f"readme_results: {error}; run `make demo bench bench-sim bench-fidelity` first", file=sys.stderr)
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


def read(path: Path) -> dict[str, Any]:
    """The figures of a bench."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def bench(of: dict[str, Any]) -> list[str]:
    """The speed of deciding."""
    return [
        f"Deciding (`make bench`, load average {of['load_average']:.1f} on two cores): "
        f"{of['decisions_per_cpu_s_q256_s1']:,.0f} scheduling decisions per CPU-second by the mechanism at a queue of "
        f"256 with `hybrid`, one a step ({of['plane_decisions_per_cpu_s_q256_s1']:,.0f} with the whole control plane "
        f"around them, through Python); {of['us_per_decision_1k_8_2']:.2f} us a decision over 1,000 queued on 8 + 2 replicas, "
        f"{of['us_per_decision_1k_256_64']:.2f} us on 256 + 64.",
    ]


def simulation(of: dict[str, Any]) -> list[str]:
    """The speed of simulating."""
    rate = {
        size: of[f"sim_requests_per_cpu_s{size}"] for size in ("_10k", "", "_1m", "_10m", "_1_replica", "_256_replicas")
    }
    return [
        f"Simulating (`make bench-sim`, load average {of['load_average']:.1f}; Poisson, 512 tokens in, 128 out, `hybrid`, "
        f"iteration-level engines, all results written): {rate['']:,.0f} requests per CPU-second at 100,000 requests, "
        f"{rate['_1m']:,.0f} at 1,000,000 and {rate['_10m']:,.0f} at 10,000,000 (peak memory {of['peak_mb_1m']:.0f} MB at "
        f"1,000,000); {rate['_10k']:,.0f} at 10,000, where the fixed tenth of a second of a run counts; "
        f"{rate['_1_replica']:,.0f} with one replica and {rate['_256_replicas']:,.0f} with 256.",
    ]


def fidelity(of: dict[str, Any]) -> list[str]:
    """How far the simulated engine is from measurements."""
    error = {
        (name, each): of[f"rtx4090_{name}_{each}_err_pct"]
        for name in ("ttft", "tpot", "e2e")
        for each in ("mean", "p95")
    }
    return [
        "Fidelity (`make bench-fidelity`): a measured vLLM 0.19 run (Llama-3.1-8B on an RTX 4090, 300 requests, limited by its "
        f"KV cache), mean error of TTFT {error['ttft', 'mean']:+.2f} %, TPOT {error['tpot', 'mean']:+.2f} %, end to end "
        f"{error['e2e', 'mean']:+.2f} %, p95 {error['ttft', 'p95']:+.2f}, {error['tpot', 'p95']:+.2f} and "
        f"{error['e2e', 'p95']:+.2f} %, by a profile of kernel times that has not seen the run ([docs/validate.md](docs/validate.md) says "
        f"how much of that is luck). Held out: decode {of['decode_heldout_mape_pct']:.1f} %, prefill "
        f"{of['prefill_heldout_mape_pct']:.1f} % (A100, dense sweep); steady TPOT of engines in service "
        f"{of['tpot_silicon_loo_pct']:.1f} %, leave-one-out.",
    ]


def gateway(of: dict[str, Any]) -> list[str]:
    """What the gateway costs."""
    ours, other = "ours", "vllm_router"
    pairs = {
        name: (of.get(f"{ours}_{key}"), of.get(f"{other}_{key}"))
        for name, key in (
            ("JSON chat at 64 connections", "chat_c64_cpu_us"),
            ("33-event streams at 16", "stream_c16_cpu_us"),
            ("embeddings at 16", "embed_c16_cpu_us"),
            ("a chunk (paced, 33 a stream)", "paced_chunk_cpu_us"),
            ("a chunk (paced, 329 a stream)", "paced_long_chunk_cpu_us"),
        )
    }
    told = "; ".join(
        f"{name} {mine:.0f}" + ("" if theirs is None else f" ({theirs:.0f})")
        for name, (mine, theirs) in pairs.items()
        if mine is not None
    )
    floor = of.get("bare_relay_paced_long_chunk_cpu_us")
    kernel = "" if floor is None else f" (a bare relay from socket to socket: {floor:.0f})"
    return [
        f"Gateway (`make bench-gateway`, load average {of['load_average']:.1f}; a fast fake engine, the whole control plane in "
        f"the path): CPU-microseconds a request, `vllm-router` in the same run in brackets: {told}{kernel}. An arriving request "
        f"whose engine is idle has left after {of['idle_dispatch_p99_us']:.0f} us (p99).",
    ]


def loadgen(of: dict[str, Any]) -> list[str]:
    """What the load generator can do."""
    return [
        f"Load generator (`make bench-loadgen`, load average {of['load_average']:.1f}): {of['loadgen_chat_achieved']:,.0f} requests/s "
        f"from one process with a send lag p99 of {of['loadgen_chat_send_lag_p99_ms']:.2f} ms and "
        f"{of['loadgen_chat_cpu_us']:.0f} CPU-us a request; streams of 16 chunks {of['loadgen_stream16_cpu_us']:.0f} CPU-us.",
    ]


def live(of: dict[str, Any]) -> list[str]:
    """Simulation against live code on emulated engines: what of it was measured."""
    told = []
    if "fidelity" in of:
        errors = {key: value["mean_pct"] for key, value in of["fidelity"].items() if isinstance(value, dict)}
        worst = {}
        for kind in ("chat", "embedding"):
            mine = [key for key in errors if f"_{kind}_" in key]
            first = max(mine, key=lambda key: abs(errors[key]))
            worst[kind] = f"{abs(errors[first]):.1f} % ({first.replace('_', ' ')})"
        told.append(
            f"mean TTFT, TPOT and E2E of chat at three loads within {worst['chat']}, E2E of embeddings of a few milliseconds, with "
            f"the way to the engine calibrated, within {worst['embedding']}"
        )
    if "ranking" in of:
        ranked = of["ranking"]
        taus = ", ".join(
            f"{name.replace('_', ' ')} {value['kendall_tau']:+.2f}"
            for name, value in ranked.items()
            if isinstance(value, dict)
        )
        told.append(
            f"order of {len(ranked['policies'])} policies on a mixed load at high utilisation, Kendall's tau between live and "
            f"simulated: {taus}"
        )
    load = of["load_average_before"]
    return [
        f"Live against simulated, on emulated engines (`make bench-live`, load average {load:.1f}): {'; '.join(told)}."
    ]


def real(of: dict[str, Any]) -> list[str]:
    """Simulation against a real engine."""
    parts = []
    for found in of.values():
        if "runs" not in found:
            continue  # measured by another method, before a core was watched
        loads: dict[str, dict[str, dict[str, float]]] = {}
        for key, value in found.items():
            if isinstance(value, dict):
                load, _, latency = key.rpartition("_")
                loads.setdefault(load, {})[latency] = value
        rows = []
        for load, latencies in loads.items():
            cells = [
                f"{each['mean_pct']:+.1f} ({each['mean_pct_low']:+.1f} to {each['mean_pct_high']:+.1f}), p95 {each['p95_pct']:+.1f}"
                for each in (latencies[name] for name in ("ttft", "tpot", "e2e"))
            ]
            e2e = latencies["e2e"]
            rows.append(f"| {load} | {e2e['requests']} | {' | '.join(cells)} | {e2e['noise_pct']:.0f} |")
        parts.append(
            f"{found['engine']}, {found['runs']} live runs of each load in turn with calibration by {found['calibration_requests']} "
            f"requests (`make bench-real`, load average {found['load_average_before']:.1f}): error of the simulated mean in %, in brackets "
            "where the middle 95 % of it lie when the runs are drawn anew; noise: how far the mean E2E of two live runs of that "
            "load, one after the other, are apart.\n\n"
            "| load | requests | TTFT | TPOT | E2E | noise |\n|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return ["\n\n".join(parts)]


LIVE = {"gateway": gateway, "loadgen": loadgen, "live": live, "real": real}
"""Benches of the live half, and how they are told."""


if __name__ == "__main__":
    main()
