"""Sizes of stage results: by request number alone, of the declared distribution, moved by the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sage_bench.config import composed
from sage_bench.loads import Fixed, OpenLoop, Poisson, RequestClass
from sage_bench.pipelines.file import load_pipeline, shipped
from sage_bench.pipelines.staged_load import StagedLoad
from sage_bench.run import run
from sage_core.declared import Declared, declared
from sage_core.events import RequestArrived
from sage_core.load import AS_INPUT, Arrival
from sage_core.rng import Streams
from sage_core.slo import SloTable
from sage_core.units import NEVER, Nanos


class Requests:
    """A load of ``pipeline`` requests with the given numbers; each of them asks again when it ends."""

    duration_s = 7.0

    def __init__(self, pipeline: str, numbers: range | list[int]) -> None:
        self.pipeline, self.numbers = pipeline, numbers

    def arrival(self, number: int) -> Arrival:
        asked = RequestArrived(number, self.pipeline, 0, "ada", 0, 50, 99, 0, NEVER, NEVER)
        return Arrival(Nanos(number), asked, 1000 + number)

    def arrivals(self) -> Any:
        return map(self.arrival, self.numbers)

    def ended(self, now: int, request: int) -> Arrival | None:
        return self.arrival(request + 1) if request % 2 == 0 else None


def of(found: Declared, numbers: range | list[int], seed: int = 1) -> dict[int, tuple[int, ...]]:
    load = StagedLoad(Requests(found.pipeline.name, numbers), {found.pipeline.name: found}, Streams(seed))
    return {arrival.request.request: arrival.results for arrival in load.arrivals()}


def one(**stage: Any) -> Declared:
    """One stage, and one that uses it."""
    last = {"op": "map", "of": "it", "function": "m:f"}
    return declared({"name": "one", "stages": {"it": stage, "last": last}, "output": "last", "fuse": False})


def drawn(n: int = 40_000, **stage: Any) -> Any:
    return np.array([results[0] for results in of(one(**stage), range(n)).values()])


TOOL: Mapping[str, Any] = {"op": "tool", "function": "m:f"}
CHAT: Mapping[str, Any] = {"op": "chat", "prompt": "{request}"}


class TestByRequest:
    @pytest.mark.parametrize("name", shipped())
    def test_whatever_the_order_and_who_else_asks(self, name: str) -> None:
        found = load_pipeline(name)
        whole = of(found, range(3000))
        some = [2999, 5, 1024, 0, 1023, 2048, 7]
        assert of(found, some) == {number: whole[number] for number in some}
        far = [0, *range(500, 40_000, 1024), 1]  # blocks that were dropped are drawn again
        assert of(found, far)[1] == whole[1]

    def test_in_a_closed_loop(self) -> None:
        found = load_pipeline("rag")
        load = StagedLoad(Requests("rag", [4, 0, 2]), {"rag": found}, Streams(1))
        whole = of(found, range(8))
        for first in load.arrivals():
            following = load.ended(Nanos(9), first.request.request)
            assert following is not None and following.results == whole[following.request.request]
        assert load.ended(Nanos(9), 1) is None

    def test_the_seed_moves_them_and_other_pipelines_do_not(self) -> None:
        found = load_pipeline("rag")
        assert of(found, range(50), seed=1) != of(found, range(50), seed=2)
        both = StagedLoad(Requests("rag", range(50)), {"agent": load_pipeline("agent"), "rag": found}, Streams(1))
        assert {each.request.request: each.results for each in both.arrivals()} == of(found, range(50))

    def test_stages_are_drawn_apart(self) -> None:
        sizes = {"op": "tool", "function": "m:f", "size": {"uniform": {"low": 0, "high": 10**6}}}
        end = {"op": "join", "of": ["a", "b"]}
        found = declared({"name": "two", "stages": {"a": sizes, "b": sizes, "end": end}, "output": "end"})
        both = np.array([results[:2] for results in of(found, range(20_000)).values()])
        assert abs(np.corrcoef(both.T)[0, 1]) < 0.03

    def test_a_request_of_another_pipeline_is_left_as_it_is(self) -> None:
        load = StagedLoad(Requests("chat", range(2)), {"rag": load_pipeline("rag")}, Streams(1))
        assert [each.results for each in load.arrivals()] == [(), ()]

    def test_what_else_the_load_says_it_says_still_but_no_columns(self) -> None:
        inner = OpenLoop(5.0, {"c": RequestClass("chat", input_tokens=Fixed(9), output_tokens=Fixed(9), output_tokens_max=9)}, Poisson(), requests=3, streams=Streams(1), slo=SloTable({}))  # fmt: skip
        load = StagedLoad(inner, {"rag": load_pipeline("rag")}, Streams(1))
        assert load.mix is inner.mix and load.rate == 5.0
        assert not hasattr(load, "columns") and hasattr(inner, "columns")


class TestDistributions:
    def test_fixed(self) -> None:
        assert set(drawn(10, **TOOL, size=7)) == {7}
        assert set(drawn(10, **TOOL, size=0)) == {0}
        assert set(drawn(10, **CHAT, output_tokens=0)) == {1}  # an engine makes at least one

    def test_as_large_as_the_input_or_as_the_load_says(self) -> None:
        assert set(drawn(10, **TOOL)) == {AS_INPUT}
        assert list(drawn(3, **CHAT)) == [1000, 1001, 1002]

    def test_uniform(self) -> None:
        sizes = drawn(**TOOL, size={"uniform": {"low": 3, "high": 12}})
        values, counts = np.unique(sizes, return_counts=True)
        assert list(values) == list(range(3, 13))
        assert np.all(np.abs(counts / len(sizes) - 0.1) < 0.01)

    def test_lognormal(self) -> None:
        sizes = drawn(**TOOL, size={"lognormal": {"median": 200, "sigma": 0.5}})
        logs = np.log(sizes)
        assert abs(np.median(sizes) - 200) < 3
        assert abs(logs.mean() - np.log(200)) < 0.01 and abs(logs.std() - 0.5) < 0.01
        q95 = 200 * np.exp(0.5 * 1.6449)
        assert abs(np.quantile(sizes, 0.95) / q95 - 1) < 0.02

    def test_lognormal_is_cut(self) -> None:
        sizes = drawn(**TOOL, size={"lognormal": {"median": 200, "sigma": 1, "low": 150, "high": 300}})
        assert (sizes.min(), sizes.max()) == (150, 300)

    def test_branches(self) -> None:
        sizes = drawn(op="branch", contains="x", chances=[1, 0, 2, 5, 0])
        shares = np.bincount(sizes, minlength=5) / len(sizes)
        assert np.all(np.abs(shares - np.array([1, 0, 2, 5, 0]) / 8) < 0.01)
        assert shares[1] == shares[4] == 0


@pytest.mark.parametrize("policy", ["fifo", "hybrid"])
def test_a_run_gives_a_stage_what_the_load_drew(policy: str, tmp_path: Any) -> None:
    """End to end: the sizes in tasks.parquet are those drawn for that request, whatever the policy."""
    import pyarrow.parquet as pq

    overrides = ["load=pipeline/rag", "load.requests=40", f"policy={policy}", f"results={tmp_path}", "seed=3"]
    tasks = pq.read_table(run(composed(overrides)).folder / "tasks.parquet").to_pylist()
    drew = of(load_pipeline("rag"), range(40), seed=3)
    answers = {row["request"]: row["output_tokens"] for row in tasks if row["pool"] == "llm"}
    assert answers == {number: results[3] for number, results in drew.items()}
