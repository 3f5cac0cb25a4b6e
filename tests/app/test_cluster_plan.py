"""``sage cluster plan``: the example, what it prints, and one line for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sage_bench.cluster.load import read_cluster
from sage_bench.cluster.price import price
from sage_core.plan import plan

Sage = Callable[..., Any]
EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster.yaml"

NODES = """\
nodes:
  - name: gpu
    cpus: 8
    memory_gib: 64
    gpus: [{type: a100_sxm, memory_gib: 80, count: 2}]
  - name: cpu
    cpus: 16
    memory_gib: 32
    price_per_h: 0.7
"""
CHAT = """\
  - name: chat
    service: llm
    model: llama
    profile: llama-3.1-8b-a100-tp1
    needs: {cpus: 2, memory_gib: 8, gpus: 1, gpu_memory_gib: 40}
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(jobs: str = CHAT, nodes: str = NODES, rest: str = "") -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(f"{nodes}{rest}jobs:\n{jobs}" if jobs else nodes + rest)
        return path

    return write


def test_the_example_is_placed_as_its_comments_say(sage: Sage) -> None:
    done = sage("cluster", "plan", EXAMPLE, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["strategy"] == "cpu_offload" and told["unplaced"] == []
    assert [(each["job"], each["node"], each["gpus"]) for each in told["placed"]] == [
        ("chat", "gpu-1", [0]),
        ("chat", "gpu-1", [1]),
        ("embed", "cpu-1", []),
        ("embed", "cpu-2", []),
    ]
    assert told["price_per_h"]["total"] == pytest.approx(2 * 3.4309 + 0.8048 + 2 * 0.714)
    assert told["price_per_h"]["idle"] == pytest.approx(0.8048)
    nodes = {each["name"]: each for each in told["nodes"]}
    assert nodes["gpu-1"]["gpu_memory_gib_used"] == 160 and nodes["cpu-1"]["cpus_used"] == 16


def test_the_tables_say_where_and_why_and_what_it_costs(sage: Sage) -> None:
    done = sage("cluster", "plan", EXAMPLE, "--strategy", "cost")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "Placement by cost" in text and "chat 0 gpu-1 0" in text
    assert "9.095 USD/h, of which" in text


@pytest.mark.parametrize("strategy", ["pack", "spread", "cost", "cpu_offload"])
def test_each_strategy_places_the_example(sage: Sage, strategy: str) -> None:
    assert sage("cluster", "plan", EXAMPLE, "--strategy", strategy).code == 0


def test_a_price_that_is_not_known_is_said_and_not_guessed(sage: Sage, written: Callable[..., Path]) -> None:
    done = sage("cluster", "plan", written(nodes=NODES.replace("    price_per_h: 0.7\n", "")))
    assert "The price of cpu is not known, and not in it." in " ".join(done.out.split())


def test_a_node_whose_price_is_not_known_is_not_said_to_add_one(sage: Sage, written: Callable[..., Path]) -> None:
    path = written(nodes=NODES.replace("a100_sxm", "unheard_of"))
    assert "inf" not in sage("cluster", "plan", path, "--strategy", "cost").out
    assert "its price is not known" in sage("cluster", "plan", path, "--strategy", "cost", "--json").out


def test_what_has_no_place_is_named_and_the_exit_code_is_2(sage: Sage, written: Callable[..., Path]) -> None:
    file = written(CHAT + "    replicas: 5\n")
    done = sage("cluster", "plan", file)
    assert done.code == 2
    assert done.err.startswith(f"sage: {file}: job 'chat', replica 4: no node has room: ") and done.err.count("\n") == 1
    assert "2 a100_sxm with 0 of 80 GiB free" in done.err
    assert json.loads(sage("cluster", "plan", file, "--json").out)["unplaced"][0]["replica"] == 4


@pytest.mark.parametrize(
    ("change", "line", "told"),
    [
        (("cpus: 16", "cpu: 16"), 7, "nodes[1].cpu: unknown key; did you mean 'cpus'?"),
        (("cpus: 16", "cpus: many"), 7, "nodes[1].cpus: expected a number, got 'many'"),
        (("cpus: 16", "cpus: -1"), 7, "nodes[1].cpus: expected a number >= 0.0, got -1"),
        (("name: cpu", "name: gpu"), 6, "nodes[1].name: 'gpu' is the name of another at line 2; names must differ"),
        (("name: cpu", "name: c p u"), 6, "nodes[1].name: expected a name (letters, digits, and . _ - after the first)"),
        (("    memory_gib: 32\n", ""), 6, "nodes[1]: the key 'memory_gib' is missing"),
        (("count: 2", "count: 0"), 5, "nodes[0].gpus[0].count: expected a whole number >= 1, got 0"),
        (("price_per_h: 0.7", "cpus: 4"), 9, "key 'cpus' is here twice, first at line 7"),
        (("service: llm", "service: llms"), 12, "jobs[0].service: expected one of llm, embedding, operator, got 'llms'"),
        (("model: llama", "modle: llama"), 13, "jobs[0].modle: unknown key; did you mean 'model'?"),
        (("profile: llama-3.1-8b-a100-tp1", "profile: llama-3.1-8b-a100-tp2"), 14, "jobs[0].profile: no shipped profile is called"),
        (("gpus: 1, gpu", "gpu"), 15, "jobs[0].needs: gpu_memory_gib and gpu_type mean nothing without gpus"),
        (("gpus: 1, gpu_memory_gib: 40", "gpu: 1"), 15, "jobs[0].needs.gpu: unknown key; did you mean 'gpus'?"),
        (("needs: {", "apart_from: [chatt]\n    needs: {"), 15, "jobs[0].apart_from[0]: no job is called 'chatt'; did you mean 'chat'?"),
        (("needs: {", "apart_from: [chat]\n    needs: {"), 15, "jobs[0].apart_from[0]: a job is kept apart from itself by anti_aff"),
        (
            ("gpu_memory_gib: 40", "gpu_memory_gib: 90"),
            15,
            "jobs[0].needs: job 'chat' fits on no node, even an empty one: it needs 1 GPU with 90 GiB free, 2 CPUs, 8 GiB; "
            "what there is: cpu: GPUs: none; gpu: GPUs: 2 a100_sxm with 80 of 80 GiB free",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_file_line_and_key(
    sage: Sage, written: Callable[..., Path], change: tuple[str, str], line: int, told: str
) -> None:
    file = written()
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(change[0], change[1]))
    done = sage("cluster", "plan", file)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith(f"sage: {file}:{line}: {told}") and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ": expected the keys nodes and jobs; see docs/cluster.md"),
        ("- 1\n", ": expected the keys nodes and jobs"),
        ("nodes: []\n", ":1: nodes: expected at least one node, got an empty list"),
        ("jobs: []\n", ": the key 'nodes' is missing"),
        ("nodes: [\n", ":2: not valid YAML: "),
        ("nodes: &a [*a]\n", ":1: an alias stands for what contains it"),
        (
            "nodes: [{name: a, cpus: 1, memory_gib: 1}]\nruntime: slurm\n",
            ":2: runtime: expected one of local, ray, got 'slurm'",
        ),
        ("nodes: 3\n", ":1: nodes: expected a list, got 3"),
        ("1: 2\n", ": a key is not text; put it in quotes"),
        (f"nodes: {'[' * 3000}{']' * 3000}\n", ": nested too deeply"),
    ],
)
def test_what_is_no_cluster_is_refused(sage: Sage, tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    done = sage("cluster", "plan", file)
    assert done.code == 2 and done.err.startswith(f"sage: {file}{told}") and done.err.count("\n") == 1, done.err


def test_a_file_that_is_not_there_is_one_line(sage: Sage) -> None:
    done = sage("cluster", "plan", "nowhere.yaml")
    assert (done.code, done.err) == (2, "sage: nowhere.yaml: cannot be read (No such file or directory)\n")


def test_list_prices_are_those_of_the_gpus(written: Callable[..., Path]) -> None:
    cluster = read_cluster(written())
    assert {node.name: node.price_per_h for node in cluster.nodes} == {"gpu": pytest.approx(6.8618), "cpu": 0.7}
    assert price(cluster, plan(cluster)).idle == 0.7


# --- to be simulated ------------------------------------------------------------------------------------------------------


def test_a_plan_can_be_simulated_as_it_is(sage: Sage, tmp_path: Path) -> None:
    out = tmp_path / "mine" / "cluster" / "planned.yaml"
    done = sage("cluster", "plan", EXAMPLE, "--sim", out)
    assert done.code == 0, done.err
    group = yaml.safe_load(out.read_text())
    assert [(each["node"], each["count"], *(each.keys() & {"llm", "embed"})) for each in group["devices"]] == [
        ("cpu-1", 1, "embed"),
        ("cpu-2", 1, "embed"),
        ("gpu-1", 2, "llm"),
    ]
    assert sum(each["count"] * each["price_per_h"] for each in group["devices"]) == pytest.approx(
        2 * 3.4309 + 2 * 0.714
    )
    ran = sage("run", "cluster=planned", "load.rate=5", "load.duration_s=2", "--config-dir", tmp_path / "mine")
    assert ran.code == 0, ran.err


def test_engines_that_share_a_gpu_are_one_device(sage: Sage, written: Callable[..., Path]) -> None:
    embed = CHAT.replace("chat", "embed").replace("llm", "embedding").replace("llama-3.1-8b-a100-tp1", "bge-m3-a100")
    done = sage("cluster", "plan", written(CHAT + embed), "--sim", "-")
    assert done.code == 0, done.err
    (device,) = yaml.safe_load(done.out)["devices"]
    assert device["llm"]["profile"] == "llama-3.1-8b-a100-tp1" and device["embed"]["profile"] == "bge-m3-a100"


def test_two_llms_on_one_gpu_cannot_be_simulated(sage: Sage, written: Callable[..., Path]) -> None:
    done = sage("cluster", "plan", written(CHAT + "    replicas: 2\n"), "--sim", "-")
    assert done.code == 2 and "chat and chat share GPU 0 of gpu; a simulated device has at most one LLM" in done.err


def test_without_a_profile_there_is_nothing_to_simulate(sage: Sage, written: Callable[..., Path]) -> None:
    done = sage("cluster", "plan", written(CHAT.replace("    profile: llama-3.1-8b-a100-tp1\n", "")), "--sim", "-")
    assert done.code == 2 and "no job that was placed has a profile" in done.err


def test_the_first_llm_of_the_file_has_the_usual_pool_wherever_it_is(sage: Sage, written: Callable[..., Path]) -> None:
    alone = "gpus: 1, gpu_type: b"
    other = (
        CHAT.replace("chat", "other").replace("model: llama", "model: else").replace("gpus: 1", "gpus: 1, gpu_type: a")
    )
    nodes = "".join(
        f"  - {{name: {kind}, cpus: 8, memory_gib: 64, gpus: [{{type: {kind}, memory_gib: 80}}]}}\n" for kind in "ab"
    )
    path = written(CHAT.replace("gpus: 1", alone) + other, nodes="nodes:\n" + nodes)
    devices = yaml.safe_load(sage("cluster", "plan", path, "--sim", "-").out)["devices"]
    assert {each["node"]: each["llm"].get("pool") for each in devices} == {"a": "else", "b": None}


def test_standard_output_has_one_thing(sage: Sage) -> None:
    done = sage("cluster", "plan", EXAMPLE, "--json", "--sim", "-")
    assert done.code == 2 and done.err.startswith("sage: --sim -: ") and not done.out
