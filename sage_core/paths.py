"""Where files go: the user's folders (XDG base directories) and the project's ``.sage/``.

Pure: the environment and the project root are arguments, and asking for a path touches no disk. Whoever writes there
makes the folder first, so a folder exists only once something is in it.

Rules: nothing is written to the home folder outside the XDG directories; build artefacts and tool caches of a checkout
stay in its ``.sage/``, which may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sage_core.errors import ConfigError

APPLICATION: Final = "sage-serving"
"""Folder name below the XDG directories; not ``sage``, which SageMath uses."""


@dataclass(frozen=True, slots=True)
class UserPaths:
    """Folders of one user, for all projects. Source: XDG Base Directory Specification 0.8."""

    config: Path  # settings a person edits
    data: Path  # what is worth a backup
    models: Path  # weights, tokenizers
    cache: Path  # may be deleted at any time
    logs: Path


@dataclass(frozen=True, slots=True)
class ProjectPaths:
    """Folders of one checkout."""

    root: Path
    build: Path  # the native build, one folder per wheel tag
    cache: Path  # of the developer tools
    logs: Path
    results: Path  # results/<experiment>/<run_id>/


def user_paths(env: Mapping[str, str]) -> UserPaths:
    """The user's folders. Raises ``ConfigError`` if ``env`` has neither the XDG variables nor an absolute ``HOME``."""
    data = _base(env, "XDG_DATA_HOME", ".local/share")
    return UserPaths(
        config=_base(env, "XDG_CONFIG_HOME", ".config"),
        data=data,
        models=data / "models",
        cache=_base(env, "XDG_CACHE_HOME", ".cache"),
        logs=_base(env, "XDG_STATE_HOME", ".local/state") / "logs",
    )


def project_paths(root: Path) -> ProjectPaths:
    """The folders of the checkout (or working folder) at ``root``."""
    sage = root / ".sage"
    return ProjectPaths(
        root=root, build=sage / "build", cache=sage / "cache", logs=sage / "logs", results=root / "results"
    )


def _base(env: Mapping[str, str], variable: str, default: str) -> Path:
    # The specification: "If an implementation encounters a relative path in any of these variables it should consider
    # the path invalid and ignore it."
    value = env.get(variable, "")
    if value.startswith("/"):
        return Path(value) / APPLICATION
    home = env.get("HOME", "")
    if not home.startswith("/"):
        raise ConfigError(f"HOME: expected an absolute path, got {home!r}; set HOME or {variable}")
    return Path(home) / default / APPLICATION
