"""A pipeline from a YAML file, with errors that say which line.

A plain name (``rag``) is one of those that come with SAGE, in ``conf/pipeline``.
"""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path
from typing import Any, Final

import yaml

from sage_core.declared import DeclarationError, Declared, declared
from sage_core.errors import ConfigError, DataError

LIBRARY: Final = "sage_bench.conf"
SINGLE: Final = "single"

Lines = dict[tuple[str, ...], int]


def load_pipeline(source: str) -> Declared:
    """The pipeline in the file ``source``, or the shipped one of that name.

    ConfigError for a name that is not shipped, DataError for a file that cannot be read or is no YAML, DeclarationError,
    which names file and line, for what is wrong with the pipeline.
    """
    path, text = _read(source)
    plain, lines = parsed(path, text)
    try:
        return declared(plain)
    except DeclarationError as error:
        raise _placed(path, lines, error) from None


def read_pipeline(source: str) -> dict[str, Any]:
    """What stands in the file, checked, as plain data: for a run's configuration, which is complete in itself."""
    path, text = _read(source)
    plain, lines = parsed(path, text)
    try:
        declared(plain)
    except DeclarationError as error:
        raise _placed(path, lines, error) from None
    return plain


def shipped() -> list[str]:
    """Names of the pipelines that come with SAGE."""
    folder = importlib.resources.files(LIBRARY).joinpath("pipeline")
    names = (Path(each.name) for each in folder.iterdir())
    return sorted(name.stem for name in names if name.suffix == ".yaml" and name.stem not in (SINGLE, "file"))


def parsed(path: str, text: str) -> tuple[dict[str, Any], Lines]:
    """Keys and values, and the line (from 1) of each key by its path. DataError: no YAML, or no keys at the top."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise DataError(f"{path}{where}: not YAML: {why}") from error
    except RecursionError:
        raise DataError(f"{path}: not YAML: nested too deeply") from None
    if not isinstance(plain, dict):
        got = "nothing" if plain is None else f"a {type(plain).__name__}"
        raise DataError(f"{path}:1: expected a pipeline with name, stages and output, got {got}")
    lines: Lines = {}
    _walk(path, root, (), lines)
    return plain, lines


def _walk(file: str, node: yaml.Node | None, path: tuple[str, ...], lines: Lines, outer: tuple[int, ...] = ()) -> None:
    """Note the line of every key. DataError: a key that stands twice, of which YAML would drop one, or an alias that
    leads back into itself."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        at, line = (*path, str(key.value)), key.start_mark.line + 1
        if at in lines:
            raise DataError(f"{file}:{line}: {'.'.join(at)}: stands here a second time, first in line {lines[at]}")
        if id(value) in outer:
            raise DataError(f"{file}:{line}: {'.'.join(at)}: an alias of what it is part of")
        lines[at] = line
        _walk(file, value, at, lines, (*outer, id(node), id(value)))


def _placed(path: str, lines: Lines, error: DeclarationError) -> DeclarationError:
    """The same error, with the file and the line of the nearest key that stands in it."""
    at = error.path
    while at and at not in lines:
        at = at[:-1]
    return DeclarationError((), f"{path}:{lines[at] if at else 1}: {error}")


def _read(source: str) -> tuple[str, str]:
    if not Path(source).suffix and "/" not in source:
        if source in shipped():
            found = importlib.resources.files(LIBRARY).joinpath("pipeline", f"{source}.yaml")
            return f"conf/pipeline/{source}.yaml", found.read_text(encoding="utf-8")
        close = difflib.get_close_matches(source, shipped(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"pipeline {source!r}: no such pipeline{hint}; those of SAGE are {', '.join(shipped())}, others are files "
            "(NAME.yaml)"
        )
    try:
        return source, Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(f"{source}: {why}; give a YAML file, or one of {', '.join(shipped())}") from error
