"""A user's mistake is one message that names the key, file or argument, and the exit code that says whose fault it was.

Commands run in this process through ``sage_bench.cli.main``: anything but a documented error would come out as the
exception it is and fail the test. A few cases are repeated in a process of their own.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.config import composed
from sage_bench.results.manifest import read_manifest
from sage_bench.run import run
from sage_core.errors import SageError

Sage = Callable[..., Any]
SMALL = ("load.rate=20", "load.duration_s=2")
CONFIG, DATA, POLICY, OUTPUT = 2, 3, 4, 8

LLM = "cluster.devices.0.llm"
WRONG_VALUES = [
    # keys that do not exist
    ("sed=1", "unknown key 'sed' at the top level; did you mean 'seed'?"),
    ("+sed=1", "unknown key 'sed' at the top level; did you mean 'seed'?"),
    ("++sed=1", "unknown key 'sed' at the top level; did you mean 'seed'?"),
    ("cluster.deviced=1", "unknown key 'deviced' at cluster; did you mean 'devices'?"),
    (f"{LLM}.max_seqs=1", "unknown key 'max_seqs' at cluster.devices[0].llm; did you mean 'max_num_seqs'?"),
    (f"+{LLM}.max_seqs=1", "unknown key 'max_seqs' at cluster.devices[0].llm; did you mean 'max_num_seqs'?"),
    (f"{LLM}.kv_tokens=1000", f"use +{LLM}.kv_tokens=1000"),  # a key that exists and is not set
    ("record.step=false", "unknown key 'step' at record; did you mean 'steps'?"),
    ("policy.reserv=0.2", "'policy.reserv'"),
    ("+policy.reserv=0.2", "hybrid() got an unexpected keyword argument 'reserv'; it takes laxity, .*reserve"),
    ("+policy.predict.p=0.2", "TenantQuantile.__init__() got an unexpected keyword argument 'p'"),
    ("+slo.classes.chat.ttfb_s=1", "unexpected keyword argument 'ttfb_s'"),
    ("+slo.classes.search={_target_: sage_core.slo.Slo, e2e_s: 1}", "slo.classes: unknown class 'search'"),
    # choices that do not exist
    ("policy=fifoo", "Could not find 'policy/fifoo'.*fifo.*hybrid.*slo_aware"),
    ("experiment=nope", "Could not find 'experiment/nope'.*mixed.*policy_comparison"),
    ("driver=ray", "Could not find 'driver/ray'.*live.*sim"),
    ("driver.engines=[]", "config: unknown key"),
    ("policy._target_=sage_policies.presets.fifoo", "sage_policies.presets has no 'fifoo'"),
    ("policy._target_=null", "policy: None cannot be made"),
    ("slo._target_=builtins.dict", "slo._target_: expected sage_core.slo.SloTable, got dict"),
    ("load._target_=builtins.dict", "load._target_: dict has no arrivals()"),
    ("load.arrivals._target_=sage_bench.loads.Poison", "sage_bench.loads has no 'Poison'"),
    ("policy=null", "Config group override must be a string"),
    ("policy=user", "policy._target_: expected a value"),
    # wrong types and values
    ("seed=abc", "config: seed: expected `int`, got 'abc'"),
    ("policy.laxity=maybe", "policy: HybridOrder: a parameter has the wrong type.*laxity='maybe'"),
    ("seed=1.5", "config: seed: expected `int`, got 1.5"),
    ("seed=-1", "config: seed: expected `int` >= 0, got -1"),
    ("seed=1,2", "Ambiguous value for argument 'seed=1,2'.*--multirun"),
    ("seed", "Error parsing override 'seed'"),
    ("mechanism=rust", "config: mechanism: expected one of native, reference, got 'rust'"),
    ("attempts_max=0", "config: attempts_max: expected `int` >= 1, got 0"),
    ("record.steps=maybe", "config: record.steps: expected `bool`, got 'maybe'"),
    ("warmup_s=-1", "config: warmup_s: expected `float` >= 0.0, got -1"),
    ("warmup_s=inf", "config: warmup_s: expected `float` <= 1000000000.0, got inf"),
    ("cooldown_s=1e300", "config: cooldown_s: expected `float` <= 1000000000.0, got 1e+300"),
    ("driver.until_s=0", "config: driver.until_s: expected `float` > 0.0, got 0"),
    ("driver.until_s=nan", "config: driver.until_s: expected `float`"),
    ("name=../elsewhere", "config: name: expected a plain folder name"),
    ("name=null", "config: name: expected `str`, got None"),
    ("results=''", "config: results: expected `str` of length >= 1, got ''"),
    # loads
    ("load.rate=-1", "load.rate: expected a number above 0, got -1"),
    ("load.rate=0", "load.rate: expected a number above 0, got 0"),
    ("load.rate=nan", "load.rate: expected a number above 0, got nan"),
    ("load.rate=fast", "load.rate: expected a number above 0, got 'fast'"),
    ("load.duration_s=null", "load.requests, load.duration_s: set at least one"),
    ("load.duration_s=1e300", "load.duration_s: expected a number above 0 and at most 1e+09, got 1e+300"),
    ("load.requests=0", "load.requests: expected a whole number of at least 1, got 0"),
    ("load.classes.chat.share=2", "share.chat: expected a number of at least 0 and at most 1, got 2"),
    ("load.classes.chat.kind=search", "kind: expected one of chat, generate, embedding, got 'search'"),
    ("load.classes.chat.output_tokens_max=0", "output_tokens_max: expected a whole number of at least 1"),
    ("load.classes.chat.input_tokens.fit=azure2024", "fit: unknown fit 'azure2024'"),
    # policies and objectives
    ("policy=separate policy.shared_devices=[0,9]", "policy.shared_devices: expected numbers from 0 to 4, got [0, 9]"),
    ("policy.reserve=2", "policy.reserve: expected a number from 0 to 1, got 2"),
    ("policy.window_s=nan", "policy.window_s: expected a number from 0"),
    ("policy.budget_s.chat=-5", "policy.budget_s.chat: expected a number from 0"),
    ("slo.classes.chat.ttft_s=-1", "slo.ttft_s: expected seconds above 0 or null, got -1"),
    ("slo.classes.chat.ttft_s=1e300", "slo.ttft_s: expected seconds above 0 or null, got 1e+300"),
    # clusters
    ("cluster.devices=[]", "cluster.devices: expected at least one device"),
    ("cluster.devices=null", "config: cluster.devices: expected `array`, got None"),
    ("cluster.devices=[{node: a}]", "cluster.devices[0]: expected llm, embed, disaggregated or operator"),
    ("cluster.devices.0.count=0", "config: cluster.devices[0].count: expected `int` >= 1, got 0"),
    (f"{LLM}.max_num_seqs=0", "config: cluster.devices[0].llm.max_num_seqs: expected `int` >= 1, got 0"),
    (f"{LLM}.max_num_seqs=5000", "cluster.devices[0]: max_num_batched_tokens: expected at least max_num_seqs = 5000"),
    (f"+{LLM}.kv_tokens=10", "cluster.devices[0]: kv_tokens: expected at least one block of 16 tokens, got 10"),
    (
        f"+{LLM}.gpu_memory_utilization=0.1",
        "cluster.devices[0]: gpu_memory_utilization: at 0.1 the weights of .* leave no room",
    ),
    (f"+{LLM}.gpu_memory_utilization=1.5", "gpu_memory_utilization: expected `float` <= 1.0, got 1.5"),
    (f"{LLM}.profile=llama-9", "profile: no shipped profile is called 'llama-9'; known: .*llama-3.1-8b-a100-tp1"),
    (f"{LLM}.profile=bge-large-en-v1.5-l4", "cluster.devices[0].llm.profile: .* is of kind embedding, expected llm"),
    (f"+{LLM}.pool=embed", "cluster.devices[1]: pool 'embed' has llm replicas, so no embedding replica can join it"),
    (f"+{LLM}.scheduling=lifo", "cluster.devices[0].llm.scheduling: expected one of fcfs, priority, got 'lifo'"),
    (f"+{LLM}.ingress_s=1e300", "cluster.devices[0].llm.ingress_s: expected `float` <= 1000000000.0"),
    ("cluster.report_interval_s=1e-9", "cluster.report_interval_s: expected 0 .no reports. or at least 0.001"),
    ("cluster.network.delay_s=-1", "network.delay_s: expected seconds from 0 to 3600, got -1"),
    ("cluster.network.jitter_s=1e300", "network.jitter_s: expected seconds from 0 to 3600, got 1e+300"),
    ("cluster.faults=[{at_s: 1, device: 9}]", "cluster.faults[0].device: expected 0 to 4, got 9"),
    (
        "cluster.faults=[{at_s: 1, device: 0, kind: fire}]",
        "cluster.faults[0]: fault.kind: expected one of crash, drain",
    ),
    ("cluster.faults=[{at_s: -1, device: 0}]", "fault.at_s: expected seconds from 0 to 1e+09, got -1"),
    ("cluster.faults=[{at_s: 1, device: 0, restart_after_s: 1e300}]", "fault.restart_after_s: expected seconds"),
    ("cluster.faults=[{at: 1, device: 0}]", "cluster.faults[0]: object missing required field `at_s`"),
]


def assert_told(done: Any, code: int, message: str) -> None:
    """One message in the user's words. ``message``: text in it; ``.*`` stands for anything."""
    assert done.code == code, done
    assert done.err.startswith("sage: ") and "Traceback" not in done.err and "Error executing job" not in done.err
    pattern = re.escape(message).replace(r"\.\*", ".*").replace(r"\ \.no", r" \(no").replace(r"reports\.", r"reports\)")
    assert re.search(pattern, done.err, re.DOTALL), f"{message!r} is not in {done.err!r}"


class TestConfiguration:
    @pytest.mark.parametrize(("override", "message"), WRONG_VALUES, ids=[override for override, _ in WRONG_VALUES])
    def test_wrong_overrides(self, sage: Sage, tmp_path: Path, override: str, message: str) -> None:
        named = override.split() if override.startswith("policy=separate") else [override]
        overrides = [*SMALL, f"results={tmp_path / 'results'}", *named]
        try:
            config = composed(overrides)
        except Exception:  # Hydra's own, which the command turns into ours
            done = sage("run", *overrides)
        else:  # half the time of the command, which prints just this
            with pytest.raises(SageError) as raised:
                run(config)
            done = SimpleNamespace(code=raised.value.exit_code, err=f"sage: {raised.value}\n")
        assert_told(done, CONFIG, message)
        assert not (tmp_path / "results").exists(), "nothing is written for a run that cannot be"

    def test_in_a_process_of_its_own(self, sage_process: Sage) -> None:
        done = sage_process("run", "cluster.devices.0.llm.max_num_seq=1")
        assert (done.code, done.out) == (CONFIG, "")
        assert done.err == (
            "sage: config: unknown key 'max_num_seq' at cluster.devices[0].llm; did you mean 'max_num_seqs'?\n"
        )

    def test_a_request_too_long_for_the_cache_fails_and_says_why(self, sage: Sage, tmp_path: Path) -> None:
        done = sage(
            "run", *SMALL, f"results={tmp_path}", f"+{LLM}.kv_tokens=32", f"{LLM}.profile=llama-3.1-8b-l40s-tp1"
        )
        assert done.code == 0
        assert "requests failed: KV cache too small: the task needs" in done.err


class TestFiles:
    def test_no_trace_named(self, sage: Sage) -> None:
        assert_told(sage("run", "load=trace"), CONFIG, "load.path: expected a trace file")

    def test_a_trace_that_is_not_there(self, sage: Sage, tmp_path: Path) -> None:
        path = tmp_path / "nope.parquet"
        assert_told(sage("run", "load=trace", f"load.path={path}"), DATA, f"{path}: no such trace file")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"arrival_s": [float("nan") if i == 7 else 0.2 * i for i in range(40)]}, "arrival_s.*nan"),
            ({"arrival_s": [9.0 if i == 7 else 0.2 * i for i in range(40)]}, "row 8.*arrival_s"),
            ({"arrival_s": [-1.0 + 0.2 * i for i in range(40)]}, "row 0.*arrival_s"),
            ({"prompt_tokens": pa.array([0 if i == 7 else 10 for i in range(40)], pa.int32())}, "row 7.*prompt_tokens"),
            ({"prompt_tokens": pa.array([None if i == 7 else 9 for i in range(40)], pa.int32())}, "prompt_tokens"),
            ({"prompt_tokens": ["many"] * 40}, "column prompt_tokens: expected type int32"),
            ({"kind": ["poem"] * 40}, "kind.*poem"),
        ],
        ids=["nan", "unsorted", "negative", "no prompt", "null", "text", "unknown kind"],
    )
    def test_a_broken_row(
        self, sage: Sage, damaged_trace: Callable[..., Path], columns: dict[str, Any], message: str
    ) -> None:
        path = damaged_trace(**columns)
        done = sage("run", "load=trace", f"load.path={path}")
        assert_told(done, DATA, str(path))
        assert_told(done, DATA, message)

    def test_a_missing_column(self, sage: Sage, trace: Path, tmp_path: Path) -> None:
        path = tmp_path / "narrow.parquet"
        pq.write_table(pq.read_table(trace).drop_columns(["kind"]), path)
        assert_told(sage("run", "load=trace", f"load.path={path}"), DATA, f"{path}: column kind is missing")

    @pytest.mark.parametrize("content", [b"", b"arrival_s,prompt_tokens\n0,1\n"], ids=["empty", "CSV"])
    def test_another_format(self, sage: Sage, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "trace.parquet"
        path.write_bytes(content)
        assert_told(sage("run", "load=trace", f"load.path={path}"), DATA, f"{path}: not a Parquet file")

    def test_a_trace_cut_short(self, sage: Sage, trace: Path, tmp_path: Path) -> None:
        path = tmp_path / "cut.parquet"
        path.write_bytes(trace.read_bytes()[:-500])
        assert_told(sage("run", "load=trace", f"load.path={path}"), DATA, f"{path}: not a Parquet file")

    def test_a_window_without_requests(self, sage: Sage, trace: Path) -> None:
        done = sage("run", "load=trace", f"load.path={trace}", "load.window_s=[100,200]")
        assert_told(done, CONFIG, "load.window_s: no request in [100.*200].*ends at 7.800 s")

    def test_a_profile_that_is_not_there(self, sage: Sage, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        assert_told(sage("run", f"{LLM}.profile={path}"), DATA, f"profile {path}: cannot be read")

    @pytest.mark.parametrize(("text", "message"), [("[", "YAML"), ("{}", "missing"), ("a: 1", "a")])
    def test_a_broken_profile(self, sage: Sage, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        done = sage("run", f"{LLM}.profile={path}")
        assert_told(done, DATA, f"profile {path}")
        assert_told(done, DATA, message)


POLICIES = """
from dataclasses import replace
import numpy as np
from sage_core.policy import Limits, Policy
from sage_policies.presets import fifo

class Order:
    static = False
    def __init__(self, answer):
        self.score = lambda now, queued: answer(queued)

class Route:
    live, load_weight = False, 0.0
    def __init__(self, answer):
        self.score = lambda now, tasks, replicas: answer(len(tasks), len(replicas))

class Admit:
    retry_after_ns = 0
    def __init__(self, answer):
        self.score = lambda now, arrivals, replicas: answer(len(arrivals))

class Limit:
    def __init__(self, answer):
        self.limit = lambda now, replicas, queue: answer(len(replicas))

class Waits:
    def limit(self, now, replicas, queue):
        whole = np.full(len(replicas), 8)
        return Limits(whole, whole, whole, whole, np.full(len(replicas), now + 1000))

class Predict:
    name = "mine"
    def __init__(self, answer):
        self.predict = lambda *facts: answer()
    def observe(self, *facts):
        pass

class Unteachable(Predict):
    def observe(self, *facts):
        raise KeyError("never seen this tenant")

def mine(**parts):
    return replace(fifo(), name="mine", **parts)

def order_nan(): return mine(order=Order(lambda q: np.full(len(q), np.nan)))
def order_long(): return mine(order=Order(lambda q: np.zeros(len(q) + 1)))
def order_none(): return mine(order=Order(lambda q: None))
def order_text(): return mine(order=Order(lambda q: "first"))
def order_raises(): return mine(order=Order(lambda q: 1 / 0))
def order_writes(): return mine(order=Order(lambda q: q.priority.fill(0)))
def order_no_such_column(): return mine(order=Order(lambda q: q.true_output_tokens))
def route_nan(): return mine(route=Route(lambda t, r: np.full((t, r), np.nan)))
def route_flat(): return mine(route=Route(lambda t, r: np.zeros(t)))
def route_raises(): return mine(route=Route(lambda t, r: {}["replica"]))
def admit_nan(): return mine(admit=Admit(lambda n: np.full(n, np.nan)))
def admit_raises(): return mine(admit=Admit(lambda n: [][n]))
def limit_none(): return mine(limit=Limit(lambda r: None))
def limit_fraction(): return mine(limit=Limit(lambda r: Limits(*[np.full(r, 1.5)] * 5)))
def limit_raises(): return mine(limit=Limit(lambda r: None + 1))
def predict_fraction(): return mine(predict=Predict(lambda: 2.5))
def predict_negative(): return mine(predict=Predict(lambda: -1))
def predict_nan(): return mine(predict=Predict(lambda: float("nan")))
def predict_raises(): return mine(predict=Predict(lambda: 1 / 0))
def observe_raises(): return mine(predict=Unteachable(lambda: 1))
def no_order(): return mine(order=None)
def not_an_order(): return mine(order=object())
def limit_waits(): return mine(limit=Waits())
def not_a_policy(): return "fifo"
def raises(): raise RuntimeError("no model file")
def climbs(): return replace(fifo(), name="../../climbs")
def nameless(): return replace(fifo(), name="")
"""

BROKEN_POLICIES = [
    ("order_nan", POLICY, "order Order: score of task .* is NaN at now="),
    ("order_long", POLICY, "order Order: expected scores of shape (1,), got (2,)"),
    ("order_none", POLICY, "order Order: expected scores of shape (1,), got ()"),
    ("order_text", POLICY, "order Order: scores must be numbers, got str"),
    ("order_raises", POLICY, "policy mine: ZeroDivisionError: division by zero (.*broken_policies.py:.* in <lambda>)"),
    ("order_writes", POLICY, "policy mine: ValueError: assignment destination is read-only"),
    ("order_no_such_column", POLICY, "policy mine: AttributeError: .*true_output_tokens"),
    ("route_nan", POLICY, "route Route: score of task .* on replica .* is NaN at now="),
    ("route_flat", POLICY, "route Route: expected scores of shape (1, "),
    ("route_raises", POLICY, "policy mine: KeyError: 'replica' (.*broken_policies.py:"),
    ("admit_nan", POLICY, "admit Admit: score of task .* is NaN"),
    ("admit_raises", POLICY, "policy mine: IndexError: list index out of range (.*broken_policies.py:"),
    ("limit_none", POLICY, "limit Limit: tasks_max must have one entry a replica"),
    ("limit_fraction", POLICY, "limit Limit: tasks_max must be whole numbers"),
    ("limit_raises", POLICY, "policy mine: TypeError: .*(.*broken_policies.py:"),
    ("limit_waits", POLICY, "policy mine: its limit has put off the queued tasks 10,000 times in a row"),
    ("predict_fraction", POLICY, "predict mine: expected a whole number of tokens.*got 2.5"),
    ("predict_negative", POLICY, "predict mine: expected a whole number of tokens.*got -1"),
    ("predict_nan", POLICY, "predict mine: expected a whole number of tokens.*got nan"),
    ("predict_raises", POLICY, "policy mine: ZeroDivisionError: division by zero (.*broken_policies.py:"),
    ("observe_raises", POLICY, "policy mine: KeyError: 'never seen this tenant' (.*broken_policies.py:"),
    ("no_order", POLICY, "policy mine: order NoneType has no score, static; see sage_core.policy.Order"),
    ("not_an_order", POLICY, "policy mine: order object has no score, static; see sage_core.policy.Order"),
    ("not_a_policy", CONFIG, "broken_policies.not_a_policy must return a sage_core.policy.Policy, got str"),
    ("raises", CONFIG, "policy: broken_policies.raises cannot be made: RuntimeError: no model file"),
    ("climbs", CONFIG, "policy: broken_policies.climbs names itself '../../climbs'; expected a plain folder name"),
    ("nameless", CONFIG, "policy: broken_policies.nameless names itself ''; expected a plain folder name"),
    ("fifo_", CONFIG, "policy: broken_policies.fifo_ cannot be made: broken_policies has no 'fifo_'"),
]


@pytest.fixture(scope="module")
def authors_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("author")
    (folder / "broken_policies.py").write_text(POLICIES)
    (folder / "no_syntax.py").write_text("def policy(:\n")
    (folder / "imports_nothing.py").write_text("import package_that_is_not_there\n")
    return folder


class TestPolicies:
    """A policy of the user's own, which is wrong."""

    @pytest.mark.parametrize(("name", "code", "message"), BROKEN_POLICIES, ids=[name for name, *_ in BROKEN_POLICIES])
    def test_it_is_named(
        self, sage: Sage, authors_folder: Path, tmp_path: Path, name: str, code: int, message: str
    ) -> None:
        target = f"policy._target_=broken_policies.{name}"
        done = sage("run", *SMALL, "policy=user", target, f"results={tmp_path / 'results'}", cwd=authors_folder)
        assert_told(done, code, message)
        assert not list(tmp_path.glob("*climbs*"))
        if (
            name.startswith(("order", "route", "limit")) and name != "limit_waits"
        ):  # what the mechanism asks, the reference asks in its own way
            done = sage("run", *SMALL, "policy=user", target, "mechanism=reference", cwd=authors_folder)
            assert_told(done, code, message)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (
                "not_there.policy",
                "not_there.policy cannot be made: no module 'not_there'; modules are looked for in the",
            ),
            ("no_syntax.policy", "no_syntax.policy cannot be made: SyntaxError: invalid syntax (no_syntax.py, line 1)"),
            ("imports_nothing.policy", "no module 'package_that_is_not_there'"),
            ("broken_policies", "broken_policies cannot be made: .*callable"),
        ],
    )
    def test_its_module_cannot_be_used(self, sage: Sage, authors_folder: Path, target: str, message: str) -> None:
        done = sage("run", *SMALL, "policy=user", f"policy._target_={target}", cwd=authors_folder)
        assert_told(done, CONFIG, message)


class TestOutput:
    @pytest.mark.parametrize("mode", [(), ("-m", "seed=1,2")], ids=["one", "sweep"])
    @pytest.mark.parametrize(
        ("parent", "why"), [("/proc", "No such file or directory"), ("/dev/null", "Not a directory")]
    )
    def test_a_folder_that_cannot_be_made(self, sage: Sage, mode: tuple[str, ...], parent: str, why: str) -> None:
        done = sage("run", *SMALL, f"results={parent}/results", *mode)
        assert_told(done, OUTPUT, f"{parent}/results.*: cannot be written: {why}; check the path")

    def test_a_file_in_the_way(self, sage: Sage, tmp_path: Path) -> None:
        (tmp_path / "results").write_text("")
        done = sage("run", *SMALL, f"results={tmp_path / 'results'}")
        assert_told(done, OUTPUT, f"{tmp_path / 'results'}.*: cannot be written: .*choose another output folder")

    def test_a_file_size_limit(self, sage_process: Sage, tmp_path: Path) -> None:
        """The tables that fit are readable and the manifest says that the run failed."""
        if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
            pytest.skip("a file size limit is in force already")
        under = ("sh", "-c", 'ulimit -f 40; exec "$@"', "sh")
        done = sage_process("run", "load.rate=40", "load.duration_s=30", f"results={tmp_path}", under=under)
        assert_told(done, OUTPUT, ".parquet: cannot be written: File too large; raise the file size limit")
        (folder,) = (tmp_path / "run").iterdir()
        assert read_manifest(folder).status == "failed"
        assert pq.read_table(folder / "replicas.parquet").num_rows > 0

    def test_a_full_disk(self, sage_process: Sage, tmp_path: Path) -> None:
        """A real one: a file system of its own, in a namespace of its own."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = f'mount -t tmpfs -o size=300k tmpfs "{disk}" && exec "$@"'
        under = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
        if shutil.which("unshare") is None or subprocess.run([*under, "true"], capture_output=True).returncode:
            pytest.skip("user namespaces are not allowed here")
        done = sage_process("run", "load.rate=100", "load.duration_s=60", f"results={disk}", under=under)
        assert_told(done, OUTPUT, f"{disk}/run/.*: cannot be written: No space left on device; free some space there")


class TestReport:
    def test_nothing_there(self, sage: Sage, tmp_path: Path) -> None:
        assert_told(sage("report", tmp_path), DATA, f"{tmp_path}: holds no runs")
        assert_told(sage("report", tmp_path / "nope"), DATA, f"{tmp_path / 'nope'}: no such folder")

    def test_another_programs_folder(self, sage: Sage, trace: Path, tmp_path: Path) -> None:
        shutil.copy(trace, tmp_path / "part-0.parquet")
        assert_told(sage("report", tmp_path), DATA, f"{tmp_path}: holds no runs")
        shutil.copy(trace, tmp_path / "requests.parquet")
        assert_told(sage("report", tmp_path), DATA, f"{tmp_path / 'manifest.json'}: missing")
        (tmp_path / "manifest.json").write_text('{"name": "an npm package"}')
        assert_told(sage("report", tmp_path), DATA, f"{tmp_path / 'manifest.json'}: not the manifest of a run")

    @pytest.mark.parametrize("content", [None, b"", b"PAR1", b"not Parquet at all"])
    def test_a_damaged_table(self, sage: Sage, recorded: Path, content: bytes | None) -> None:
        path = recorded / "requests.parquet"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert_told(sage("report", recorded, "--no-figures"), DATA, f"{path}: ")

    def test_columns_of_another_table(self, sage: Sage, recorded: Path) -> None:
        shutil.copy(recorded / "tasks.parquet", recorded / "requests.parquet")
        assert_told(sage("report", recorded, "--no-figures"), DATA, "requests.parquet: no column ")

    def test_nowhere_to_write(self, sage: Sage, recorded: Path) -> None:
        done = sage("report", recorded, "--out", "/proc/report", "--no-figures")
        if done.code == DATA:  # every request of this short run lies within the warm-up
            assert "warm-up" in done.err
        else:
            assert_told(done, OUTPUT, "/proc/report")

    def test_an_unknown_baseline(self, sage: Sage, tmp_path: Path) -> None:
        assert sage("run", *SMALL, f"results={tmp_path}").code == 0
        assert_told(sage("report", tmp_path, "--baseline", "best"), CONFIG, "baseline: no run of policy 'best'")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("policy", "show", "best"), CONFIG, "unknown policy 'best'; known: fifo"),
        (("profile", "show", "best"), CONFIG, "no shipped profile is called 'best'; known: "),
        (("trace", "inspect", "nope.parquet"), DATA, "nope.parquet: no such trace file"),
    ],
)
def test_other_commands(sage: Sage, arguments: tuple[str, ...], code: int, message: str) -> None:
    assert_told(sage(*arguments), code, message)
