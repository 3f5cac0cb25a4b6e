"""Every file in conf/load makes a load that yields, keeps its rate and mix, and repeats under its seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from sage_bench.loads import ClosedLoop, OpenLoop, TraceLoad
from sage_core.errors import ConfigError
from sage_core.events import RequestArrived
from sage_core.rng import Streams
from sage_core.slo import Slo, SloTable
from sage_core.units import SECOND, RequestKind

CONF = Path(__file__).resolve().parents[2] / "conf"
ASIDE = ("recorded", "clients")  # needs a run (tests/loads/test_recorded.py); has no requests of its own
NAMES = sorted(path.stem for path in (CONF / "load").glob("*.yaml") if path.stem not in ASIDE)
CLASSES = sorted(path.stem for path in (CONF / "load" / "classes").glob("*.yaml"))
SLO = SloTable({"chat": Slo(ttft_s=1.0), "embedding": Slo(e2e_s=0.5)})

WriteTrace = Callable[..., Path]


@pytest.fixture
def make(write_trace: WriteTrace) -> Iterator[Callable[..., Any]]:
    """``make("gamma", "load.rate=3", seed=2)``: the load that Hydra composes."""
    trace = write_trace(arrival_s=[0.05 * i for i in range(2000)])
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def made(name: str, *overrides: str, seed: int = 1) -> Any:
            path = [f"load.path={trace}"] if name == "trace" and "load.path=null" not in overrides else []
            config = compose(overrides=[f"+load={name}", *path, *overrides])
            # As a partial: Hydra would turn a dataclass among the arguments into a configuration node.
            return instantiate(config.load, _partial_=True)(streams=Streams(seed), slo=SLO)

        yield made


def test_there_is_a_file_for_each_pattern_named_in_the_docs() -> None:
    named = "mixed poisson gamma constant onoff diurnal antiphase synth tenants standard trace closed adversarial"
    assert set(named.split()) <= set(NAMES)
    docs = (CONF.parent / "docs" / "loads.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in docs] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_load_yields_and_repeats(name: str, make: Callable[..., Any]) -> None:
    first, again = (list(islice(make(name).arrivals(), 500)) for _ in range(2))
    assert first == again
    assert len(first) == (10 if name == "closed" else 500)
    assert all(isinstance(arrival.request, RequestArrived) for arrival in first)
    assert all(arrival.request.input_tokens >= 1 for arrival in first)
    assert all(arrival.output_tokens <= arrival.request.output_tokens_max for arrival in first)
    assert list(islice(make(name, seed=2).arrivals(), 500)) != first


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("trace", "closed")])
def test_open_loops_keep_the_nominal_rate(name: str, make: Callable[..., Any]) -> None:
    load = make(name, "load.rate=40", "load.duration_s=3000")
    assert isinstance(load, OpenLoop)
    rows = sum(len(batch.at) for batch in load.batches())
    # Within three standard errors: 120,000 requests, but `synth` wanders for minutes, and herds of 64 are 1,900 points.
    assert rows / 3000 == pytest.approx(40, rel={"synth": 0.25, "adversarial_herd": 0.07}.get(name, 0.03))


def test_the_default_mix_is_seventy_to_thirty(make: Callable[..., Any]) -> None:
    kinds = Counter(
        a.request.kind for a in islice(make("mixed", "load.duration_s=null", "load.requests=40000").arrivals(), 40_000)
    )
    assert kinds[RequestKind.EMBEDDING] / 40_000 == pytest.approx(0.3, abs=0.01)
    half = make("mixed", "load.classes.embedding.share=0.5", "load.duration_s=2000")
    kinds = Counter(a.request.kind for a in half.arrivals())
    assert kinds[RequestKind.EMBEDDING] / kinds.total() == pytest.approx(0.5, abs=0.01)


def test_interactive_tenants_are_few_and_urgent(make: Callable[..., Any]) -> None:
    tenants = Counter(
        (a.request.tenant, a.request.priority) for a in make("tenants", "load.duration_s=2000").arrivals()
    )
    assert sorted(tenants) == [("batch", 1), ("interactive", 0)]
    assert tenants["interactive", 0] / tenants.total() == pytest.approx(0.3, abs=0.01)


def test_the_flood_comes_right_before_the_burst(make: Callable[..., Any]) -> None:
    arrivals = list(make("adversarial", "load.duration_s=400").arrivals())
    flood = [a for a in arrivals if a.request.kind == RequestKind.LLM_GENERATE]
    assert flood
    assert all(8 * SECOND <= a.at % (20 * SECOND) < 10 * SECOND for a in flood)
    assert min(a.request.input_tokens for a in flood) >= 3000
    chat = [a for a in arrivals if a.request.kind == RequestKind.LLM_CHAT]
    within = sum(10 * SECOND <= a.at % (20 * SECOND) < 12 * SECOND for a in chat)
    assert within / len(chat) == pytest.approx(0.7, abs=0.05)


def test_trace_and_closed_are_what_they_say(make: Callable[..., Any]) -> None:
    load = make("trace", "load.embedding_share=0", "load.rate_scale=2", "load.window_s=[10,20]", "load.limit=50")
    assert isinstance(load, TraceLoad)
    assert [a.at for a in load.arrivals()] == pytest.approx([0.025 * i * SECOND for i in range(50)], abs=1)
    mixed = Counter(a.request.kind for a in make("trace").arrivals())
    assert mixed[RequestKind.EMBEDDING] / mixed.total() == pytest.approx(0.3, abs=0.03)
    closed = make("closed", "load.users=3")
    assert isinstance(closed, ClosedLoop)
    assert len(list(closed.arrivals())) == 3


def test_a_trace_load_asks_for_its_file(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"load\.path: expected a trace file, as in load=trace"):
        make("trace", "load.path=null")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("load", ["mixed", "closed"])
def test_every_set_of_classes_fits_a_load(name: str, load: str, make: Callable[..., Any]) -> None:
    assert next(make(load, f"load/classes={name}").arrivals()).at >= 0
