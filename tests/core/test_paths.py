"""User folders follow XDG; project folders stay in ``.sage/``; asking creates nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sage_core.errors import ConfigError
from sage_core.paths import project_paths, user_paths


def test_defaults_below_home() -> None:
    paths = user_paths({"HOME": "/home/ada"})
    assert paths.config == Path("/home/ada/.config/sage-serving")
    assert paths.data == Path("/home/ada/.local/share/sage-serving")
    assert paths.models == Path("/home/ada/.local/share/sage-serving/models")
    assert paths.cache == Path("/home/ada/.cache/sage-serving")
    assert paths.logs == Path("/home/ada/.local/state/sage-serving/logs")


@pytest.mark.parametrize(
    ("variable", "field"),
    [("XDG_CONFIG_HOME", "config"), ("XDG_DATA_HOME", "data"), ("XDG_DATA_HOME", "models"),
     ("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "logs")],
)  # fmt: skip
def test_each_xdg_variable_moves_its_folder(variable: str, field: str) -> None:
    moved = getattr(user_paths({"HOME": "/home/ada", variable: "/mnt/xdg"}), field)
    assert moved.is_relative_to("/mnt/xdg/sage-serving")


@pytest.mark.parametrize("value", ["", "relative/path", "~/x"])
def test_relative_xdg_values_are_ignored(value: str) -> None:
    assert user_paths({"HOME": "/home/ada", "XDG_CACHE_HOME": value}) == user_paths({"HOME": "/home/ada"})


def test_no_home_is_needed_where_all_variables_are_set() -> None:
    env = {f"XDG_{name}_HOME": f"/x/{name.lower()}" for name in ("CONFIG", "DATA", "CACHE", "STATE")}
    assert user_paths(env).logs == Path("/x/state/sage-serving/logs")


def test_without_home_the_error_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="HOME: expected an absolute path, got ''; set HOME or XDG_DATA_HOME"):
        user_paths({})


def test_project_folders_are_in_dot_sage_and_results() -> None:
    paths = project_paths(Path("/src/sage"))
    assert paths.build == Path("/src/sage/.sage/build")
    assert paths.cache.parent == paths.logs.parent == Path("/src/sage/.sage")
    assert paths.results == Path("/src/sage/results")


def test_asking_creates_nothing(tmp_path: Path) -> None:
    asked = [*dataclasses.astuple(user_paths({"HOME": str(tmp_path)})), *dataclasses.astuple(project_paths(tmp_path))]
    assert len(asked) == 10
    assert list(tmp_path.iterdir()) == []
