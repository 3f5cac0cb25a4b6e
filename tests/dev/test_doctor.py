"""``sage doctor`` on sound and broken machines: what it finds, what it advises, how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sage_bench import doctor
from sage_bench.cli.doctor import command
from sage_bench.doctor import Check, Status

app = typer.Typer()
app.command()(command)

BROKEN_NATIVE = textwrap.dedent(
    """
    import importlib.abc, sys

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "sage_core._native":
                raise ImportError("_native.so: undefined symbol: _ZN4sage9Mechanism")

    sys.meta_path.insert(0, Broken())
    """
)

SAGE = "from sage_bench.cli import main; main()"


def checks_of(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(app, ["--json", *arguments])
    report = json.loads(result.output)
    assert report["healthy"] is (result.exit_code == 0)
    return result.exit_code, {row["name"]: row for row in report["checks"]}


def test_json_names_every_subject(tmp_path: Path) -> None:
    _, checks = checks_of("--results", str(tmp_path))
    assert set(checks) >= {
        "python", "packages", "native module", "memory", "results folder", "disk", "cores", "c++ compiler", "git",
        "gpu", "ray", "vllm", "sentence-transformers", "recorded traces",
    }  # fmt: skip
    for row in checks.values():
        assert row["status"] in {"ok", "missing", "optional"}
        assert row["found"]
        assert bool(row["advice"]) is (row["status"] != "ok"), row


def test_exit_code_follows_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [Check("python", Status.OK, "3.11"), Check("gpu", Status.OPTIONAL, "none", "install a driver")]
    monkeypatch.setattr("sage_bench.cli.doctor.examine", lambda results, traces: fine)
    result = CliRunner().invoke(app, ["--results", str(tmp_path)])
    assert result.exit_code == 0
    assert "Simulations and reports can run." in result.output
    assert "gpu: install a driver" in result.output

    broken = [*fine, Check("native module", Status.MISSING, "gone", "make install")]
    monkeypatch.setattr("sage_bench.cli.doctor.examine", lambda results, traces: broken)
    result = CliRunner().invoke(app, ["--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "Simulations cannot run yet." in result.output
    assert "native module: make install" in result.output


def without_native(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BROKEN_NATIVE + program, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_broken_native_module_is_reported_not_raised(tmp_path: Path) -> None:
    done = without_native(SAGE, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (row,) = (row for row in json.loads(done.stdout)["checks"] if row["name"] == "native module")
    assert row["status"] == "missing"
    assert "undefined symbol: _ZN4sage9Mechanism" in row["found"]
    assert "make install" in row["advice"]


def test_a_run_without_native_module_points_to_doctor(tmp_path: Path) -> None:
    done = without_native(SAGE, "run", "experiment=demo", cwd=tmp_path)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert "undefined symbol: _ZN4sage9Mechanism" in done.stderr
    assert "sage doctor" in done.stderr


def test_the_reference_mechanism_needs_no_native_module(tmp_path: Path) -> None:
    program = """
from sage_core.errors import ConfigError
from sage_core.ops import make_mechanism
print(make_mechanism("reference").queued())
try:
    make_mechanism("native")
except ConfigError as error:
    print(error)
"""
    done = without_native(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    queued, message = done.stdout.splitlines()
    assert queued == "0"
    assert "sage_core._native cannot be imported (_native.so: undefined symbol" in message
    assert "mechanism=reference" in message


def test_native_module_shows_its_build() -> None:
    native = pytest.importorskip("sage_core._native", reason="the native module is not built here")
    assert doctor.native() == Check("native module", Status.OK, native.build)


def test_old_python() -> None:
    check = doctor.python((3, 10, 4))
    assert check.status is Status.MISSING
    assert check.found.startswith("3.10.4")
    assert doctor.python((3, 11, 0)).status is Status.OK


def test_distribution_that_is_not_installed() -> None:
    check = doctor.packages("no-such-distribution-here")
    assert check.status is Status.MISSING
    assert check.found == "no-such-distribution-here is not installed"


def test_lacking_and_outdated_requirements_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "fake_dist-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: fake-dist\nVersion: 1.0\nRequires-Dist: numpy>=999\n"
        "Requires-Dist: absent-package-xyz>=2\nRequires-Dist: msgspec\n"
        'Requires-Dist: also-absent; extra == "dev"\nRequires-Dist: winonly; sys_platform == "win32"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.packages("fake-dist")
    assert check.status is Status.MISSING
    assert check.found == "absent or too old: numpy>=999, absent-package-xyz>=2"
    assert check.advice == "pip install 'numpy>=999' 'absent-package-xyz>=2'"


def test_memory_threshold() -> None:
    assert doctor.memory(doctor.MEMORY_BYTES_MIN).status is Status.OK
    assert doctor.memory(doctor.MEMORY_BYTES_MIN - 1).status is Status.MISSING


def test_results_folder_that_does_not_exist_yet_is_not_created(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    assert doctor.writable(wanted).status is Status.OK
    assert list(tmp_path.iterdir()) == []


def test_results_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    check = doctor.writable(blocked / "results")
    assert check.status is Status.MISSING
    assert str(blocked) in check.found
    assert "--results" in check.advice


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES_MIN", 1 << 62)
    assert doctor.disk(tmp_path).status is Status.MISSING
    monkeypatch.setattr(doctor, "DISK_BYTES_MIN", 0)
    assert doctor.disk(tmp_path / "not" / "yet").status is Status.OK


def test_absent_compiler_and_failing_program_are_optional() -> None:
    check = doctor.compiler("no-such-compiler-xyz")
    assert (check.name, check.status) == ("c++ compiler", Status.OPTIONAL)
    assert "no-such-compiler-xyz" in check.found
    assert doctor.program("false", "advice").status is Status.OPTIONAL
    assert doctor.program(sys.executable, "advice", name="interpreter").found.startswith("Python 3.")


def test_gpu_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034 MiB, 550.54'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor.gpu() == Check("gpu", Status.OK, "NVIDIA L4, 23034 MiB, 550.54")
    script.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpu().status is Status.OPTIONAL


def test_optional_package_takes_the_first_distribution_there_is() -> None:
    assert doctor.optional_package("arrays", ("absent-xyz", "numpy"), "advice").found.startswith("numpy ")
    assert doctor.optional_package("nothing", ("absent-xyz",), "pip install it") == Check(
        "nothing", Status.OPTIONAL, "not installed", "pip install it"
    )


def test_recorded_traces_are_counted(tmp_path: Path) -> None:
    assert doctor.shared_traces(tmp_path / "absent").status is Status.OPTIONAL
    for name in ("trace_a.parquet", "trace_b.parquet", "other.parquet"):
        tmp_path.joinpath(name).touch()
    assert doctor.shared_traces(tmp_path) == Check("recorded traces", Status.OK, f"2 in {tmp_path}")


def test_real_engines_and_open_files_are_told(tmp_path: Path) -> None:
    absent = doctor.real_engines(tmp_path)
    assert absent.status is doctor.Status.OPTIONAL and "make install-live" in absent.advice
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    assert doctor.real_engines(tmp_path).status is doctor.Status.OK
    assert doctor.open_files(256, 1024).status is doctor.Status.OPTIONAL
    assert doctor.open_files(256, 4096).status is doctor.Status.OK
