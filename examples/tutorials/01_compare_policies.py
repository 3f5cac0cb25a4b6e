"""Run two policies on the same requests from Python and compare them: no command line, no files to prepare."""

from __future__ import annotations

import tempfile

import pyarrow.parquet as pq

from sage_bench.config import composed
from sage_bench.run import run


def main() -> None:
    """Same seed, same arrivals: every difference is the policy's."""
    with tempfile.TemporaryDirectory() as results:
        for policy in ("least_in_flight", "hybrid"):
            result = run(
                composed(
                    [
                        f"policy={policy}",
                        "cluster=shared",
                        "load=tenants",
                        "load.rate=40",
                        "load.duration_s=30",
                        "seed=1",
                        f"results={results}",
                    ]
                )
            )
            good = pq.read_table(result.folder / "requests.parquet", columns=["good"])["good"].to_pylist()
            print(f"{policy:16} {len(good)} requests, {sum(good) / len(good):.1%} met their objectives")


if __name__ == "__main__":
    main()
