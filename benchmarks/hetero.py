"""Embeddings on GPUs, CPUs or both, as ``sage hetero`` does it by default: writes ``results/bench/hetero.json`` and the figure."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console

from sage_bench.cli.hetero import show
from sage_bench.figures.hetero import hetero as drawn
from sage_bench.figures.style import save
from sage_bench.hetero import CHAT_RPS, RATES, SEEDS, facts, hetero

OUT = Path("results/bench/hetero.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="simulations at a time")
    parser.add_argument("--out", type=Path, default=OUT, help="the figure goes beside it")
    parser.add_argument("--quick", action="store_true", help="two rates: to see that it works, not for figures")
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    rates = (5.0, 40.0) if options.quick else RATES
    with tempfile.TemporaryDirectory() as folder:
        found = hetero(Path(folder), rates=rates, seeds=options.seeds, jobs=options.jobs, told=console.print)
    show(found, console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.encode(facts(found, CHAT_RPS, options.seeds))
    options.out.write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")
    save(drawn(found.means(), found.crossings), options.out.with_suffix(""))
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
