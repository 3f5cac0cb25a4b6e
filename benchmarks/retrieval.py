"""What the CPU stages of a pipeline cost: search, chunking, rerank; ``results/bench/retrieval.json``.

Recall against time: the same index is searched with more and less effort, the number of candidates that the graph proposes,
and what it finds is held against exact search. ``shipped``: the effort that :class:`VectorIndex` uses.

One core. Times are of one thread's CPU, medians over repetitions. Each stage is fitted as ``fixed_s`` and a time for each
unit, which is how an operator of a simulated cluster is written (``cluster.devices[].operator``); ``error_pct`` is the
largest relative error of the fit. Vectors are random in clusters, as those of texts are, with 384 dimensions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import sage_live.retrieval.index as retrieval
from sage_bench.figures.style import MARKERS, legend_above, line, plain_log, save, styled
from sage_bench.results.manifest import hardware
from sage_live.retrieval.chunk import Chunk, chunks
from sage_live.retrieval.corpus import python_topics
from sage_live.retrieval.index import Hit, VectorIndex
from sage_live.retrieval.rerank import rerank

DIMENSIONS = 384
SIZES = (1_000, 10_000, 100_000)
HITS = (1, 4, 10, 32)
RERANKED = (8, 16, 32, 64)
WORDS = (100, 1_000, 10_000)
QUERIES = 200
RECALL_OF = (1, 10)
EFFORTS = (10, 16, 32, 64, 128, 256)
"""Candidates held during a search, and proposed by it."""
OUT = Path("results/bench/retrieval.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="no index of 100,000 vectors, which takes minutes to build"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    console = Console(highlight=False, width=100)
    figures: dict[str, Any] = {
        "machine": {
            "cpu": hardware("").cpu,
            "cores": 1,
            "python": platform.python_version(),
            "usearch": version("usearch"),
            "numpy": version("numpy"),
            "load_average": os.getloadavg()[0],
        },
        "dimensions": DIMENSIONS,
    }
    text = " ".join(text for _, text in python_topics())
    pieces = list(chunks(text, "python"))
    figures["search"] = {str(size): search(size, pieces, console) for size in (SIZES[:-1] if options.quick else SIZES)}
    figures["exact"] = fitted({size: each["exact_s"] for size, each in of_sizes(figures["search"])}, "vector")
    figures["chunking"] = chunking(text)
    figures["rerank"] = reranking(pieces)
    console.print(shown(figures))
    console.print(trade_off(figures["search"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    for path in (options.out, *save(recall_figure(figures["search"]), options.out.with_suffix(""))):
        console.print(f"wrote {path}")


def search(size: int, pieces: Sequence[Chunk], console: Console) -> dict[str, Any]:
    """Building, searching for several k, brute force, and recall@10 of queries near the vectors."""
    vectors, queries = drawn(size)
    began = time.thread_time()
    index = VectorIndex.build(vectors, [pieces[place % len(pieces)] for place in range(size)])
    build_s = time.thread_time() - began
    console.print(f"built {size:,} vectors in {build_s:.1f} s")
    by_k = {k: median_s([partial(index.search, query, k) for query in queries]) for k in HITS}
    exact_s = median_s([partial(index.exact, query, 10) for query in queries[:20]])
    found = sum(len(scores(index.search(query, 10)) & scores(index.exact(query, 10))) for query in queries[:100])
    return {
        "build_s": build_s,
        "recall_at_10": found / 1000,
        "exact_s": exact_s,
        "efforts": by_effort(index, queries[:100]),
    } | fitted(by_k, "hit")


def by_effort(index: VectorIndex, queries: NDArray[np.float32]) -> list[dict[str, float]]:
    """Time of a search for 10 and recall at each k of ``RECALL_OF``, by effort; the last row is as shipped."""
    exact = {k: [scores(index.exact(query, k)) for query in queries] for k in RECALL_OF}
    found = []
    for effort in (*EFFORTS, None):
        with searched_with(index, effort) as used:
            row: dict[str, float] = {"effort": used, "shipped": effort is None}
            row["search_s"] = median_s([partial(index.search, query, 10) for query in queries])
            for k, wanted in exact.items():
                hits = sum(
                    len(scores(index.search(query, k)) & best) for query, best in zip(queries, wanted, strict=True)
                )
                row[f"recall_at_{k}"] = hits / (k * len(queries))
        found.append(row)
    return found


@contextmanager
def searched_with(index: VectorIndex, effort: int | None) -> Iterator[int]:
    """``index`` with another effort for a while; None: its own. Yields the effort of a search for 10."""
    if effort is None:
        yield max(retrieval.PROPOSALS_MIN, 10 * retrieval.PROPOSALS_PER_HIT)
        return
    changes: list[tuple[object, str, int]] = [
        (retrieval, "PROPOSALS_MIN", effort),
        (retrieval, "PROPOSALS_PER_HIT", 1),
        (index._graph, "expansion_search", effort),
    ]
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield effort
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def scores(hits: Sequence[Hit]) -> set[float]:
    """Chunks repeat here, scores do not."""
    return {hit.score for hit in hits}


def chunking(text: str) -> dict[str, Any]:
    words = text.split(" ")
    parts = {count: " ".join(words[:count]) for count in WORDS}
    times = {len(part.split()): median_s([partial(cut, part) for _ in range(15)]) for part in parts.values()}
    return fitted(times, "word")


def cut(text: str) -> list[Chunk]:
    return list(chunks(text, "python"))


def reranking(pieces: Sequence[Chunk]) -> dict[str, Any]:
    query = "what is raised when a name is not found in the enclosing scope"
    hits = [Hit(chunk, 1 - place / 1000) for place, chunk in enumerate(pieces)]
    times = {
        count: median_s([partial(rerank, query, hits[first : first + count], 4) for first in range(100)])
        for count in RERANKED
    }
    return fitted(times, "hit")


def drawn(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors, about fifty around each of some centres; and queries, each near one of them."""
    draw = np.random.Generator(np.random.PCG64(size))
    centres = draw.standard_normal((max(size // 50, 1), DIMENSIONS), np.float32)
    vectors = centres[draw.integers(0, len(centres), size)] + draw.standard_normal((size, DIMENSIONS), np.float32)
    near = vectors[draw.integers(0, size, QUERIES)]
    return vectors, near + draw.standard_normal((QUERIES, DIMENSIONS), np.float32)


def median_s(calls: Sequence[Callable[[], object]]) -> float:
    """CPU seconds of a call: the median of all, after a round that warms up."""
    for call in calls[: len(calls) // 4]:
        call()
    times = []
    for call in calls:
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return statistics.median(times)


def fitted(times: dict[int, float], unit: str) -> dict[str, Any]:
    """``fixed_s`` and ``per_UNIT_s``, neither negative, by least squares on relative errors, beside what was measured."""
    from scipy.optimize import nnls

    units = np.array(list(times), float)
    measured = np.array(list(times.values()))
    (fixed, each), _ = nnls(np.stack([np.ones_like(units), units], axis=1) / measured[:, None], np.ones_like(units))
    errors = (fixed + each * units) / measured - 1
    return {
        "fixed_s": float(fixed),
        f"per_{unit}_s": float(each),
        "error_pct": float(100 * np.abs(errors).max()),
        "measured_s": {str(count): seconds for count, seconds in times.items()},
    }


def of_sizes(figures: dict[str, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(int(size), each) for size, each in figures.items()]


def shown(figures: dict[str, Any]) -> Table:
    table = Table("stage", "fixed, us", "each, us", "unit", "error, %", "recall@10", title="CPU time on one core")
    rows = {f"search, {int(size):,} vectors": (each, "hit") for size, each in figures["search"].items()}
    rows |= {
        "exact": (figures["exact"], "vector"),
        "chunking": (figures["chunking"], "word"),
        "rerank": (figures["rerank"], "hit"),
    }
    for name, (each, unit) in rows.items():
        recall = each.get("recall_at_10")
        table.add_row(
            name,
            f"{1e6 * each['fixed_s']:.1f}",
            f"{1e6 * each[f'per_{unit}_s']:.4f}",
            unit,
            f"{each['error_pct']:.0f}",
            "" if recall is None else f"{recall:.3f}",
        )
    return table


def trade_off(search: dict[str, dict[str, Any]]) -> Table:
    """Recall by effort, beside what it costs and what exact search does."""
    recalls = [f"recall_at_{k}" for k in RECALL_OF]
    table = Table(
        "vectors", "effort", "search, us", *recalls, title="recall against exact search, CPU time of a search for 10"
    )
    for size, each in search.items():
        for row in each["efforts"]:
            effort = f"{row['effort']} (shipped)" if row["shipped"] else str(row["effort"])
            table.add_row(
                f"{int(size):,}", effort, f"{1e6 * row['search_s']:.0f}", *(f"{row[name]:.3f}" for name in recalls)
            )
        table.add_row(f"{int(size):,}", "exact", f"{1e6 * each['exact_s']:.0f}", *["1.000"] * len(recalls))
    return table


def recall_figure(search: dict[str, dict[str, Any]]) -> Figure:
    """Recall@10 over the time of a search, a line an index; hollow: as shipped, a cross: exact."""
    with styled(1, 2.3) as (figure, (axes,)):
        for number, (size, each) in enumerate(search.items()):
            swept = [row for row in each["efforts"] if not row["shipped"]]
            (shipped,) = (row for row in each["efforts"] if row["shipped"])
            look = line(number)
            axes.plot(
                [1e6 * row["search_s"] for row in swept],
                [row["recall_at_10"] for row in swept],
                **look,
                marker=MARKERS[number],
                label=f"{int(size):,} vectors",
            )
            axes.plot(
                1e6 * shipped["search_s"], shipped["recall_at_10"], "o", mfc="none", ms=8, color=look["color"], zorder=4
            )
            axes.plot(1e6 * each["exact_s"], 1.0, "x", ms=6, color=look["color"], zorder=4)
        axes.set_xscale("log")
        axes.set_xlabel("CPU time of a search for 10 (us)\nring: as shipped; cross: exact search")
        axes.set_ylabel("recall@10")
        plain_log(axes.xaxis)
        legend_above(figure, axes)
        return figure


if __name__ == "__main__":
    main()
