"""``sage replay``: the same decisions byte for byte, or the first step that differs and exit code 7."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_bench.results.manifest import read_manifest
from sage_bench.run import RunResult
from sage_core.events import RequestArrived
from sage_core.log import Chain, decode_events

Sage = Callable[..., Any]
Go = Callable[..., RunResult]
SMALL = ("load.rate=30", "load.duration_s=3")


def edit(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Rewrite the log of ``folder`` as ``change`` leaves it (in place, or what it returns)."""
    path = folder / "steps.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows, schema=table.schema), path)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


class TestEqual:
    def test_as_recorded_and_by_the_reference(self, sage: Sage, recorded: Path) -> None:
        manifest = read_manifest(recorded)
        for extra in ((), ("--mechanism", "reference"), ("--mechanism", "native")):
            done = sage("replay", recorded, *extra)
            assert (done.code, done.err) == (0, "")
            assert f"{manifest.steps:,} steps re-decided, every digest equal; last {manifest.digest}" in done.out

    @pytest.mark.parametrize(
        "overrides",
        [
            ("load=closed", "load.requests=100"),
            ("driver.until_s=2",),
            ("mechanism=reference",),
            ("cluster=shared", "policy=separate", "cluster.faults=[{at_s: 1, device: 2, kind: drain}]"),
            ("policy=hybrid_without/laxity",),
            ("policy/predict=oracle",),
            ("policy/predict=none", "policy=slo_aware"),
        ],
        ids=lambda overrides: overrides[0].partition("=")[2],
    )
    def test_other_runs(self, sage: Sage, go: Go, overrides: tuple[str, ...]) -> None:
        load = () if overrides[0].startswith("load=closed") else SMALL
        result = go(*load, *overrides)
        done = sage("replay", result.folder)
        assert (done.code, done.err) == (0, "")
        assert result.finish.digest.hex() in done.out

    def test_a_trace_is_not_needed_to_replay_it(self, sage: Sage, go: Go, trace: Path, tmp_path: Path) -> None:
        there = tmp_path / "moved.parquet"
        shutil.copy(trace, there)
        folder = go("load=trace", f"load.path={there}").folder
        there.unlink()
        assert sage("replay", folder).code == 0

    def test_an_oracle_needs_the_trace_again(self, sage: Sage, go: Go, trace: Path, tmp_path: Path) -> None:
        there = tmp_path / "moved.parquet"
        shutil.copy(trace, there)
        folder = go("load=trace", f"load.path={there}", "policy/predict=oracle").folder
        assert sage("replay", folder).code == 0
        there.unlink()
        done = sage("replay", folder)
        assert done.code == 3 and "moved.parquet: no such trace file" in done.err

    def test_an_oracle_of_a_closed_loop_cannot_be_asked_again(self, sage: Sage, go: Go) -> None:
        folder = go("load=closed", "load.requests=60", "policy/predict=oracle").folder
        done = sage("replay", folder)
        assert done.code == 7 and "the oracle cannot be replayed with a closed loop" in done.err


class TestDiverged:
    """The step named is the first one that is not as recorded."""

    def test_a_changed_event(self, sage: Sage, recorded: Path) -> None:
        found = []

        def change(rows: list[dict[str, Any]]) -> None:
            for index, row in enumerate(rows):
                at = row["events"].find(b"RequestArrived")
                if index > 100 and at >= 0:
                    # Input tokens one higher: the last byte of an integer in the array after tag and strings.
                    events = decode_events(index, row["events"])
                    first = next(e for e in events if isinstance(e, RequestArrived))
                    encoded = _uint(first.input_tokens)
                    place = row["events"].index(encoded, at)
                    row["events"] = (
                        row["events"][:place] + _uint(first.input_tokens + 1) + row["events"][place + len(encoded) :]
                    )
                    found.append(index + 1)
                    return

        edit(recorded, change)
        done = sage("replay", recorded)
        assert done.code == 7
        assert f"replay diverged at step {found[0]} at " in done.err
        assert "event   RequestArrived(" in done.err and "command " in done.err

    def test_a_changed_digest(self, sage: Sage, recorded: Path) -> None:
        def change(rows: list[dict[str, Any]]) -> None:
            rows[200]["digest"] = bytes([rows[200]["digest"][0] ^ 1]) + rows[200]["digest"][1:]

        edit(recorded, change)
        done = sage("replay", recorded)
        assert done.code == 7 and "replay diverged at step 201 at " in done.err

    def test_a_changed_instant(self, sage: Sage, recorded: Path) -> None:
        edit(recorded, lambda rows: rows[300].update(now=rows[300]["now"] + 1))
        done = sage("replay", recorded)
        assert done.code == 7 and "replay diverged at step 301 at " in done.err

    def test_swapped_rows(self, sage: Sage, recorded: Path) -> None:
        def change(rows: list[dict[str, Any]]) -> None:
            rows[400], rows[401] = rows[401], rows[400]

        edit(recorded, change)
        done = sage("replay", recorded)
        assert done.code == 7 and "replay diverged at step 401 at " in done.err

    def test_a_lost_row(self, sage: Sage, recorded: Path) -> None:
        edit(recorded, lambda rows: rows[:50] + rows[51:])
        done = sage("replay", recorded)
        assert done.code == 7 and "replay diverged at step 51 at " in done.err

    def test_a_log_cut_short(self, sage: Sage, recorded: Path) -> None:
        edit(recorded, lambda rows: rows[:-10])
        done = sage("replay", recorded)
        steps = read_manifest(recorded).steps
        assert done.code == 7
        assert f"the log ends at step {steps - 10} with digest" in done.err and f"says {steps} steps" in done.err

    def test_an_empty_log(self, sage: Sage, recorded: Path) -> None:
        edit(recorded, lambda rows: rows.clear())
        done = sage("replay", recorded)
        assert done.code == 7 and "the log ends at step 0" in done.err

    def test_a_forged_log_parts_from_the_manifest(self, sage: Sage, recorded: Path) -> None:
        """Whoever changes an event and computes all digests anew still meets the manifest's."""

        def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            chain = Chain()
            steps = [chain.step(row["now"], (), ()) for row in rows[:20]]
            return [{"step": number, **step._asdict()} for number, step in enumerate(steps)]

        edit(recorded, change)
        done = sage("replay", recorded)
        assert done.code == 7 and "the log ends at step 20" in done.err

    def test_another_policy(self, sage: Sage, recorded: Path) -> None:
        for policy in ("fifo", "round_robin"):
            done = sage("replay", recorded, "--policy", policy)
            assert done.code == 7 and "replay diverged at step " in done.err

    def test_another_configuration_of_the_same_policy(self, sage: Sage, recorded: Path) -> None:
        path = recorded / "config.yaml"
        text = path.read_text()
        assert text.count("prefill_depth: 2.0") == 1
        path.write_text(text.replace("prefill_depth: 2.0", "prefill_depth: 0.01"))
        done = sage("replay", recorded)
        assert done.code == 7 and "replay diverged at step " in done.err


class TestBuild:
    def test_another_build_is_refused_unless_told_to_go_on(self, sage: Sage, recorded: Path) -> None:
        edit_manifest(recorded, lambda manifest: manifest["software"].update(native_build="built elsewhere"))
        done = sage("replay", recorded)
        assert done.code == 7
        assert "decided by native build built elsewhere" in done.err and "--any-build" in done.err
        assert sage("replay", recorded, "--any-build").code == 0
        assert sage("replay", recorded, "--mechanism", "reference").code == 0, "the reference is not a build"

    def test_a_run_of_the_reference_names_no_build(self, sage: Sage, go: Go) -> None:
        folder = go(*SMALL, "mechanism=reference").folder
        assert read_manifest(folder).software.native_build == "reference"
        assert sage("replay", folder).code == 0
        assert sage("replay", folder, "--mechanism", "native").code == 0


class TestDamaged:
    def test_undecodable_events(self, sage: Sage, recorded: Path) -> None:
        edit(recorded, lambda rows: rows[7].update(events=b"\xc1" + rows[7]["events"]))
        done = sage("replay", recorded)
        assert done.code == 3 and "log step 8: events cannot be decoded" in done.err

    def test_nulls(self, sage: Sage, recorded: Path) -> None:
        for column in ("events", "digest", "now"):
            fresh = recorded.parent / column
            shutil.copytree(recorded, fresh)
            edit(fresh, lambda rows, column=column: rows[7].update({column: None}))  # type: ignore[misc]
            done = sage("replay", fresh)
            assert done.code == 3 and str(fresh / "steps.parquet") in done.err, column

    @pytest.mark.parametrize("cut", [0, 3, 2000])
    def test_a_file_cut_short(self, sage: Sage, recorded: Path, cut: int) -> None:
        path = recorded / "steps.parquet"
        path.write_bytes(path.read_bytes()[:cut])
        done = sage("replay", recorded)
        assert done.code == 3 and f"{path}: cannot be read as Parquet" in done.err

    def test_no_log(self, sage: Sage, go: Go) -> None:
        folder = go(*SMALL, "record.steps=false").folder
        done = sage("replay", folder)
        assert done.code == 3 and "steps.parquet: there is no log" in done.err and "record.steps=false" in done.err

    def test_another_table_in_its_place(self, sage: Sage, recorded: Path) -> None:
        shutil.copy(recorded / "tasks.parquet", recorded / "steps.parquet")
        done = sage("replay", recorded)
        assert done.code == 3 and "steps.parquet: not a log" in done.err

    @pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
    @pytest.mark.parametrize("text", [None, "", "{", "5"])
    def test_no_or_broken_companions(self, sage: Sage, recorded: Path, name: str, text: str | None) -> None:
        (recorded / name).unlink()
        if text is not None:
            (recorded / name).write_text(text)
        done = sage("replay", recorded)
        assert done.code == 3 and str(recorded / name) in done.err and "Traceback" not in done.err

    def test_no_run_at_all(self, sage: Sage, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "nowhere"):
            done = sage("replay", path)
            assert done.code == 3 and str(path) in done.err

    @pytest.mark.parametrize(("option", "value"), [("--policy", "best"), ("--mechanism", "rust")])
    def test_wrong_arguments(self, sage: Sage, recorded: Path, option: str, value: str) -> None:
        done = sage("replay", recorded, option, value)
        assert done.code == 2 and option.lstrip("-") in done.err and repr(value) in done.err


def _uint(value: int) -> bytes:
    """A MessagePack unsigned integer, as short as can be."""
    for limit, tag, size in ((1 << 7, None, 1), (1 << 8, 0xCC, 1), (1 << 16, 0xCD, 2), (1 << 32, 0xCE, 4)):
        if value < limit:
            return (b"" if tag is None else bytes([tag])) + value.to_bytes(size, "big")
    raise AssertionError(value)
