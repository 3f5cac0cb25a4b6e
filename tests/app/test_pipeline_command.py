"""``sage pipeline list|check|show``, every mistake in a file as a user meets it, and the shipped pipelines simulated."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sage_bench.pipelines.file import load_pipeline, shipped
from sage_bench.pipelines.layout import laid_out
from sage_bench.pipelines.predict import predict
from sage_bench.pipelines.show import plan_notes
from sage_core.declared import OPS, Lognormal, PipelineDeclaration, Uniform
from sage_core.policy import Speed

Sage = Callable[..., Any]
Go = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
CONFIG, DATA, OUTPUT = 2, 3, 8

PLANS = {
    "rag": """\
pipeline rag
  question on embed(request)
  found on retrieve(question)
  best on retrieve(request, found)
  answer on llm(best, request)  -> response
""",
    "summarize": """\
pipeline summarize
  parts on cpu(request)
  partial0_item(request, parts) most=6 when parts >= 1
  partial0_summary on llm(partial0_item) when parts >= 1
  partial1_item(request, parts) most=6 when parts >= 2
  partial1_summary on llm(partial1_item) when parts >= 2
  partial2_item(request, parts) most=6 when parts >= 3
  partial2_summary on llm(partial2_item) when parts >= 3
  partial3_item(request, parts) most=6 when parts >= 4
  partial3_summary on llm(partial3_item) when parts >= 4
  partial4_item(request, parts) most=6 when parts >= 5
  partial4_summary on llm(partial4_item) when parts >= 5
  partial5_item(request, parts) most=6 when parts >= 6
  partial5_summary on llm(partial5_item) when parts >= 6
  partial(partial0_summary, partial1_summary, partial2_summary, partial3_summary, partial4_summary, partial5_summary)
  tidy on cpu(partial)
  whole on llm(tidy)  -> response
""",
    "agent": """\
pipeline agent
  work0_thought on llm(request)
  work0_result on tool(work0_thought)
  work0_more on cpu(work0_thought)
  work0_notes on cpu(request, work0_thought, work0_result)
  work1_thought on llm(work0_notes) when work0_more >= 1
  work1_result on tool(work1_thought) when work0_more >= 1
  work1_more on cpu(work1_thought) when work0_more >= 1
  work1_notes on cpu(work0_notes, work1_thought, work1_result) when work0_more >= 1
  work2_thought on llm(work1_notes) when work0_more >= 1 when work1_more >= 1
  work2_result on tool(work2_thought) when work0_more >= 1 when work1_more >= 1
  work2_notes on cpu(work1_notes, work2_thought, work2_result) when work0_more >= 1 when work1_more >= 1
  work(work0_notes, work1_notes, work2_notes)
  answer on llm(work)  -> response
""",
}
SMALL = """\
name: small
stages:
  question:
    op: embed
  found: {op: retrieve, query: question, size: 300}
  kind:
    op: branch
    contains: why
    chances: [3, 1]
  long:
    op: chat
    prompt: "{found} {request}"
    when: {kind: 1}
  short: {op: chat, prompt: "{request}", when: {kind: 0}}
  answer:
    op: latest
    of: [short, long]
output: answer
"""


REQUESTS = {"rag": 30, "summarize": 5, "agent": 30}
"""To simulate: the reference takes every iteration of an engine one by one."""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """``written(old, new)``: the file above with one change; ``written(text)``: that text."""

    def write(old: str | bytes, new: str | None = None) -> Path:
        path = tmp_path / "mine.yaml"
        if isinstance(old, bytes):
            path.write_bytes(old)
            return path
        if new is not None:
            assert SMALL.count(old) == 1, old
            old = SMALL.replace(old, new)
        path.write_text(old)
        return path

    return write


class TestShow:
    @pytest.mark.parametrize("name", sorted(PLANS))
    def test_the_shipped_plans(self, sage: Sage, name: str) -> None:
        assert shipped() == sorted(PLANS)
        done = sage("pipeline", "check", name)
        assert (done.code, done.out) == (0, PLANS[name])

    def test_the_list_names_all_of_them(self, sage: Sage) -> None:
        done = sage("pipeline", "list")
        assert done.code == 0
        for name in shipped():
            assert re.search(rf"^\s*{name}\s+\d+\s", done.out, re.M)

    @pytest.mark.parametrize("name", sorted(PLANS))
    def test_every_stage_has_a_row_and_the_times_add_up(self, sage: Sage, name: str) -> None:
        done = sage("pipeline", "show", name)
        assert done.code == 0
        plan = json.loads(sage("pipeline", "show", name, "--json").out)
        for stage in plan["stages"]:
            assert re.search(rf"^ .*\b{stage['stage']}\b", done.out, re.M)
        by_name = {stage["stage"]: stage for stage in plan["stages"]}
        path = [by_name[stage] for stage in plan["critical_path"]]
        assert sum(stage["end_ns"] - stage["start_ns"] for stage in path) == pytest.approx(plan["total_ns"], abs=10)
        assert path[0]["start_ns"] == 0 and path[-1]["end_ns"] == plan["total_ns"] == max(s["end_ns"] for s in path)
        assert 0 < plan["ttft_ns"] < plan["total_ns"]
        for before, after in pairwise(path):
            assert after["start_ns"] == before["end_ns"]

    def test_the_numbers_of_the_rag_by_hand(self) -> None:
        speeds = {"embed": Speed(1000.0, 10.0), "retrieve": Speed(500.0, 1.0), "llm": Speed(5000.0, 3.0, 200.0)}
        plan = predict(load_pipeline("rag"), speeds, input_tokens=100, output_tokens_max=200)
        question, found, best, answer = plan.stages
        assert (question.start_ns, question.end_ns) == (0, 1000 + 10 * 100)
        assert found.end_ns - found.start_ns == 500 + 8
        assert best.end_ns - best.start_ns == 500 + 1300 + 100
        prompt = 25 + 490 + 100  # 19 fixed words
        assert (answer.input_tokens, answer.output_tokens) == (prompt, 60)
        assert answer.end_ns - answer.start_ns == 5000 + 3 * prompt + 200 * 60
        assert plan.ttft_ns == answer.start_ns + 5000 + 3 * prompt and plan.total_ns == answer.end_ns
        assert plan.missing_pools == []

    def test_the_critical_path_is_the_longest_way_not_the_longest_stage(self, written: Callable[..., Path]) -> None:
        tool = "{op: tool, function: 'm:f', size: 10"
        stages = {
            "a": f"{tool}, pool: slow}}",
            "b": f"{tool}}}",
            "c": f"{tool}, of: b, pool: slow}}",
            "d": "{op: join, of: [a, c]}",
        }
        text = "\n".join(f"  {name}: {stage}" for name, stage in stages.items())
        file = written(f"name: diamond\nstages:\n{text}\noutput: d\n")
        speeds = {"tool": Speed(10.0), "slow": Speed(1000.0)}
        plan = predict(load_pipeline(str(file)), speeds, input_tokens=10, output_tokens_max=10)
        assert plan.critical_path == ["b", "c", "d"] and plan.total_ns == 1010

    def test_prediction_follows_cluster_and_request(self, sage: Sage) -> None:
        def total(*more: str) -> int:
            done = sage("pipeline", "show", "rag", "--json", *more)
            assert done.code == 0, done.err
            return int(json.loads(done.out)["total_ns"])

        base = total()
        assert total("--input-tokens", "4000") > base
        slower = total("cluster.devices.2.operator.fixed_s=0.1")
        assert slower == pytest.approx(base + 2 * (100_000_000 - 500_000), rel=1e-6)  # a search and a rerank
        assert total("cluster.devices.0.count=1") == base  # idle: the number of replicas does not matter

    def test_pools_that_the_cluster_does_not_have(self, sage: Sage) -> None:
        done = sage("pipeline", "show", "rag", "--cluster", "small")
        assert done.code == 0
        assert "no replica on small serves retrieve: their stages are counted as 0 ms" in done.out
        assert re.search(r"found +retrieve +retrieve \(none\)", done.out)

    def test_what_is_fused_and_what_is_not_expected_is_said(self, written: Callable[..., Path]) -> None:
        path = written("of: [short, long]\n", "of: [short, long]\n  cut: {op: map, of: answer, function: 'm:f'}\n  end: {op: map, of: cut, function: 'm:f'}\n").read_text()  # fmt: skip
        file = written(path.replace("output: answer", "output: end\ndeadlines: request"))
        plan = predict(load_pipeline(str(file)), {}, input_tokens=10, output_tokens_max=10)
        notes = "\n".join(plan_notes(plan, "none"))
        assert "fused to one task each: cut + end" in notes
        assert "-: not expected to run" in notes
        assert "every stage is due when the request is" in notes
        assert {stage.stage for stage in plan.stages if not stage.expected} == {"long"}

    @pytest.mark.parametrize("name", sorted(PLANS))
    def test_the_figure(self, sage: Sage, tmp_path: Path, name: str) -> None:
        figure = tmp_path / "figures" / "plan.svg"
        assert sage("pipeline", "show", name, "--out", figure).code == 0
        first = figure.read_text()
        for stage in load_pipeline(name).pipeline.stages:
            assert f"<!-- {stage.name} -->" in first
        sage("pipeline", "show", name, "--out", figure)
        assert figure.read_text() == first  # the same bytes twice

    @pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
    def test_other_formats(self, sage: Sage, tmp_path: Path, suffix: str, begins: bytes) -> None:
        assert sage("pipeline", "show", "rag", "--out", f"plan.{suffix}").code == 0
        assert (tmp_path / f"plan.{suffix}").read_bytes().startswith(begins)

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("--out", "plan.gif"), CONFIG, "--out plan.gif: expected a name that ends in .png, .svg, .pdf"),
            (("--out", "plan"), CONFIG, "expected a name that ends in .png"),
            (("--out", "/proc/plan.png"), OUTPUT, "/proc/plan.png"),
            (("--cluster", "smal"), CONFIG, "Could not find 'cluster/smal'"),
            (("policy=fifo",), CONFIG, "policy=fifo: expected a key of the cluster"),
            (("cluster.deviced=1",), CONFIG, "unknown key 'deviced' at cluster; did you mean 'devices'?"),
        ],
    )
    def test_wrong_arguments(self, sage: Sage, arguments: tuple[str, ...], code: int, message: str) -> None:
        done = sage("pipeline", "show", "rag", *arguments)
        assert done.code == code and message in done.err
        assert done.err.count("\n") <= 1 or "Could not find" in done.err


class TestLayout:
    def test_no_node_lies_over_another_and_edges_go_down(self) -> None:
        for name in shipped():
            plan = predict(load_pipeline(name), {}, input_tokens=10, output_tokens_max=10)
            edges = [(before, stage.stage) for stage in plan.stages for before in stage.after]
            widths = {"request": 1.0} | {stage.stage: 1.0 for stage in plan.stages}
            layout = laid_out(widths, edges)  # type: ignore[arg-type]
            assert all(layout.layer[a] < layout.layer[b] for a, b in edges)
            for one in widths:
                for other in widths:
                    if one < other and layout.layer[one] == layout.layer[other]:
                        assert abs(layout.x[one] - layout.x[other]) >= 1.0


WRONG = [
    # unknown things, with the nearest known one and the line of the key
    ("op: chat\n", "op: chatt\n", CONFIG, "mine.yaml:11: stages.long.op: unknown op 'chatt'; did you mean 'chat'?"),
    ('    prompt: "{found} {request}"\n', '    promt: "{found}"\n', CONFIG, "mine.yaml:12: stages.long.promt: unknown key 'promt'; did you mean 'prompt'?"),
    ("{found}", "{fuond}", CONFIG, "mine.yaml:12: stages.long.prompt: no stage is called 'fuond'; did you mean 'found'?"),
    ("output: answer", "output: answr", CONFIG, "mine.yaml:18: output: no stage is called 'answr'; did you mean 'answer'?"),
    ("output: answer", "outputs: answer", CONFIG, "mine.yaml:18: outputs: unknown key 'outputs'; did you mean 'output'?"),
    ("output: answer", "", CONFIG, "mine.yaml:1: key 'output' is missing"),
    ("size: 300", "size: lots", CONFIG, "mine.yaml:5: stages.found.size: expected a number of tokens"),
    # a circle
    ("    op: embed", "    op: map\n    function: 'm:f'\n    of: answer", CONFIG, "mine.yaml:3: stages.question: stages wait for one another in a circle: question -> answer -> long -> found -> question"),
    ("contains: why", "of: answer", CONFIG, "mine.yaml:6: stages.kind: stages wait for one another in a circle: kind -> answer -> short -> kind; break it"),
    # types
    ("query: question", "query: request", CONFIG, "mine.yaml:5: stages.found.query: expected vector, but 'request' is a text"),
    ("of: [short, long]", "of: [short, question]", CONFIG, "mine.yaml:17: stages.answer.of: expected text or docs, but 'question' is a vector"),
    # guards
    ("{kind: 1}", "{kinds: 1}", CONFIG, "mine.yaml:13: stages.long.when: no stage is called 'kinds'; did you mean 'kind'?"),
    ("{kind: 1}", "{kind: [2, 1]}", CONFIG, "mine.yaml:13: stages.long.when: expected outcomes from 0, the least first, got 2 and 1"),
    ("{kind: 1}", "{question: 1}", CONFIG, "mine.yaml:13: stages.long.when: 'question' is a vector, no branch"),
    ("{kind: 1}", "kind", CONFIG, "mine.yaml:13: stages.long.when: expected keys and values, got `str`"),
    ("chances: [3, 1]", "chances: [0, 0]", CONFIG, "mine.yaml:9: stages.kind.chances: expected at least one chance above 0"),
    # left over, twice, nonsense
    ("output: answer", "  more: {op: embed}\noutput: answer", CONFIG, "mine.yaml:18: stages.more: nothing uses its result"),
    ("  short:", "  long:", DATA, "mine.yaml:14: stages.long: stands here a second time, first in line 10"),
    ("  short:", "  yes:", CONFIG, "mine.yaml:2: stages: expected `str`, got `bool` as a key; write it in quotes"),
    ("  question:\n    op: embed", "  question: &a\n    op: *a", DATA, "mine.yaml:4: stages.question.op: an alias of what it is part of"),
    ("op: embed", "op: [", DATA, "mine.yaml:6: not YAML: "),
    ("op: embed", "op: !!python/object:os.system x", DATA, "mine.yaml:4: not YAML: could not determine a constructor"),
    ("op: embed", "op: *nobody", DATA, "mine.yaml:4: not YAML: found undefined alias"),
]  # fmt: skip


class TestMistakes:
    @pytest.mark.parametrize(("old", "new", "code", "message"), WRONG, ids=[message for *_, message in WRONG])
    @pytest.mark.parametrize("verb", ["check", "show"])
    def test_in_a_file(
        self, sage: Sage, written: Callable[..., Path], verb: str, old: str, new: str, code: int, message: str
    ) -> None:
        file = written(old, new)
        done = sage("pipeline", verb, file)
        assert message in done.err
        assert done.err.startswith(f"sage: {file}:") and done.err.count("\n") == 1
        assert (done.code, done.out) == (code, "")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", ":1: expected a pipeline with name, stages and output, got nothing"),
            ("# only a comment\n", ":1: expected a pipeline"),
            ("- a\n- b\n", ":1: expected a pipeline with name, stages and output, got a list"),
            ("hello", ":1: expected a pipeline with name, stages and output, got a str"),
            ("a: 1\n---\nb: 2\n", ":2: not YAML: but found another document"),
            ("a: \x01", ": not YAML: unacceptable character"),
            (b"\xff\xfe\x00\xd8", ": it is no text; give a YAML file"),
            ("[" * 5000, ": not YAML: nested too deeply"),
            ("name: x\n\tstages: 1\n", ":2: not YAML: "),
        ],
    )
    def test_a_file_that_is_no_pipeline(
        self, sage: Sage, written: Callable[..., Path], text: str | bytes, message: str
    ) -> None:
        file = written(text)
        done = sage("pipeline", "check", file)
        assert done.err.startswith(f"sage: {file}{message}")
        assert done.code == DATA and done.err.count("\n") == 1

    def test_no_file(self, sage: Sage, tmp_path: Path) -> None:
        done = sage("pipeline", "show", tmp_path / "none.yaml")
        assert done.code == DATA and "none.yaml: No such file or directory; give a YAML file" in done.err
        done = sage("pipeline", "show", f"{tmp_path}/")
        assert done.code == DATA and "Is a directory" in done.err

    @pytest.mark.parametrize(
        ("name", "hint"), [("rga", "; did you mean 'rag'?"), ("single", ""), ("file", ""), ("nope", "")]
    )
    def test_no_such_pipeline(self, sage: Sage, name: str, hint: str) -> None:
        done = sage("pipeline", "show", name)
        assert done.code == CONFIG
        assert f"pipeline {name!r}: no such pipeline{hint}; those of SAGE are agent, rag, summarize" in done.err

    def test_the_same_in_a_run(self, sage: Sage, written: Callable[..., Path]) -> None:
        file = written("op: chat\n", "op: chatt\n")
        done = sage("run", "pipeline=file", f"pipeline.path={file}")
        assert done.code == CONFIG and "mine.yaml:11: stages.long.op: unknown op 'chatt'" in done.err


class TestSimulated:
    @pytest.mark.parametrize("name", sorted(PLANS))
    def test_natively_as_by_the_reference_and_replayed(self, go: Go, sage: Sage, name: str) -> None:
        overrides = (f"load=pipeline/{name}", f"load.requests={REQUESTS[name]}", "seed=4")
        native, reference = go(*overrides), go(*overrides, "mechanism=reference")
        assert native.finish.digest == reference.finish.digest
        for table in ("requests", "tasks"):
            assert (native.folder / f"{table}.parquet").read_bytes() == (
                reference.folder / f"{table}.parquet"
            ).read_bytes()
        done = sage("replay", native.folder)
        assert done.code == 0 and "every digest equal" in done.out

    @pytest.mark.parametrize("name", ["rag", "agent"])
    def test_a_lone_request_takes_what_was_predicted(self, go: Go, sage: Sage, tmp_path: Path, name: str) -> None:
        """On an idle cluster without a network, with every size at its typical value: within 4 %, the error of the engine's
        own speed hints. An agent's second turn follows from its outcome, so only the first is asked for."""
        import pyarrow.parquet as pq
        import yaml

        plain = yaml.safe_load((ROOT / f"conf/pipeline/{name}.yaml").read_text())
        _settle(plain)
        plain["name"] = "typical"
        file = tmp_path / "typical.yaml"
        file.write_text(yaml.safe_dump(plain))
        fixed = "{_target_: sage_bench.loads.Fixed, value: 100}"
        folder = go(
            f"load=pipeline/{name}", "pipeline=file", f"pipeline.path={file}", "load.requests=1", "seed=1",
            "load.classes.question.pipeline=typical", "~load.classes.question.input_tokens", f"+load.classes.question.input_tokens={fixed}",
            "cluster.network.delay_s=0", "cluster.network.jitter_s=0",
        ).folder  # fmt: skip
        (row,) = pq.read_table(folder / "requests.parquet").to_pylist()
        plan = json.loads(sage("pipeline", "show", file, "--json", "--output-tokens-max", "128").out)
        assert row["e2e_ns"] == pytest.approx(plan["total_ns"], rel=0.04)


def _settle(node: Any) -> None:
    """Every size to its typical value, every branch to its first outcome."""
    if isinstance(node, dict):
        if "output_tokens" in node:
            node["output_tokens"] = node["output_tokens"]["lognormal"]["median"]
        if "chances" in node:
            node["chances"] = [1]
        for value in node.values():
            _settle(value)


class TestTheDocument:
    TEXT = (ROOT / "docs/pipelines.md").read_text()

    @pytest.mark.parametrize("op", sorted(OPS))
    def test_has_every_key_of_every_op(self, op: str) -> None:
        own = set(OPS[op].__struct_fields__) - {"when", "pool"}
        assert self._keys(f"### {op}") == own

    def test_has_every_key_of_a_file_and_of_any_stage(self) -> None:
        assert self._keys("## A file") == set(PipelineDeclaration.__struct_fields__)
        assert self._keys("### Of every stage") == {"op", "when", "pool"}

    def test_has_every_key_of_a_size(self) -> None:
        keys = {"fixed", "uniform", "lognormal", *Uniform.__struct_fields__, *Lognormal.__struct_fields__}
        assert {key for key in keys if f"`{key}`" not in self.TEXT} == set()

    def _keys(self, heading: str) -> set[str]:
        """First column of the first table under a heading, up to the next one."""
        section = re.split(r"^#+ ", self.TEXT.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
        return set(re.findall(r"^\| `(\w+)` \|", section, re.M))

    def test_its_python_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        (program,) = re.findall(r"```python\n(.*?)```", self.TEXT, re.S)
        (printed,) = re.findall(r"```python\n.*?```\n\n```\n(.*?)```", self.TEXT, re.S)
        exec(compile(program, "docs/pipelines.md", "exec"), {"__name__": "document"})
        assert capsys.readouterr().out == printed

    def test_its_yaml_is_a_pipeline(self, sage: Sage, tmp_path: Path) -> None:
        for number, text in enumerate(re.findall(r"```yaml\n(name: .*?)```", self.TEXT, re.S)):
            file = tmp_path / f"{number}.yaml"
            file.write_text(text)
            assert sage("pipeline", "show", file).code == 0

    def test_its_commands_are_there(self) -> None:
        module = importlib.import_module("sage_bench.cli.pipeline")
        known = {command.name or command.callback.__name__ for command in module.app.registered_commands}
        assert set(re.findall(r"sage pipeline (\w+)", self.TEXT)) == known


def test_a_prediction_goes_to_json_and_back() -> None:
    plan = predict(load_pipeline("agent"), {}, input_tokens=10, output_tokens_max=10)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=type(plan)) == plan
