"""What ``pip install .`` gives: the wheel holds the packages and the configurations, nothing else, and ``sage`` works.

The wheel is installed into a fresh virtual environment and used from an empty folder. Only the third-party packages are
borrowed from the environment that runs the tests, by a .pth file, so that the test needs no network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOPLEVEL = {"sage_bench", "sage_core", "sage_live", "sage_policies", "sage_sim"}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [BIN / "python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    done = run(*pip, ROOT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sage(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``sage`` command of a fresh environment with the wheel in it."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    done = run(
        BIN / "python",
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).stdout.strip())
    site.joinpath("borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "sage"


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == TOPLEVEL
    unwanted = [name for name in names if name.endswith((".cpp", ".hpp", ".in", ".pyc", "CMakeLists.txt"))]
    assert not unwanted
    assert any(name.startswith("sage_core/_native.") and name.endswith(".so") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_every_configuration_and_profile(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configurations = [path.relative_to(ROOT / "conf") for path in ROOT.joinpath("conf").rglob("*.yaml")]
    data = [path for folder in ("sage_sim", "sage_bench") for path in ROOT.joinpath(folder).rglob("*.yaml")]
    assert configurations
    assert {f"sage_bench/conf/{path}" for path in configurations} <= names
    assert {str(path.relative_to(ROOT)) for path in data} <= names


def test_check_wheel_contents(wheel: Path) -> None:
    done = run(BIN / "check-wheel-contents", "--toplevel", ",".join(sorted(TOPLEVEL)), wheel, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_installed_sage_is_the_wheel_and_finds_its_configurations(sage: Path, tmp_path: Path) -> None:
    where = run(
        sage.parent / "python", "-c",
        "import importlib.resources as r, sage_core._native as n, sage_bench.conf as c; "
        "print(n.__file__); print(r.files(c).joinpath('config.yaml').is_file())",
        cwd=tmp_path,
    )  # fmt: skip
    native, config = where.stdout.splitlines()
    assert Path(native).is_relative_to(sage.parent.parent)
    assert config == "True"


def test_installed_sage_explains_itself_and_is_healthy(sage: Path, tmp_path: Path) -> None:
    done = run(sage, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("run", "report", "replay", "trace", "doctor"):
        assert command in done.stdout
    done = run(sage, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["healthy"] is True
    assert list(tmp_path.iterdir()) == []


def test_installed_sage_runs_from_an_empty_folder(sage: Path, tmp_path: Path) -> None:
    done = run(sage, "run", "load.duration_s=5", "name=tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.joinpath("results/tiny").iterdir()
    assert folder.joinpath("requests.parquet").is_file()
    assert json.loads(folder.joinpath("manifest.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
