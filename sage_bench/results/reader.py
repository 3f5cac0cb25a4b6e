"""Runs read back: manifests at once, tables when asked for.

A run is a folder with a ``manifest.json``; :func:`load_runs` finds every run below a folder. Whatever is not a run's
own file (empty, cut short, another program's Parquet) is a :class:`DataError` that names it; nothing is skipped, since
a comparison that quietly lost one of its runs is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sage_bench.results.manifest import NAME, Manifest, read_manifest
from sage_bench.results.schema import HOST, REPLICAS, REQUESTS, STEPS, TASKS
from sage_core.errors import DataError

TABLES: Final = {"requests": REQUESTS, "tasks": TASKS, "replicas": REPLICAS, "steps": STEPS, "host": HOST}


class Run:
    """One run. Tables are read anew by each call: hold on to what is used twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """``name`` is one of :data:`TABLES`; all its columns, or the given ones. Raises :class:`DataError`."""
        return read_table(self.folder / f"{name}.parquet", TABLES[name], columns)

    def frame(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The same for pandas: labels are categories, a column with nulls is float64 (exact up to 104 days in ns)."""
        frame: pd.DataFrame = self.table(name, columns).to_pandas()
        return frame

    def has(self, name: str) -> bool:
        """Whether the run wrote that table (``tasks`` and ``steps`` may be switched off)."""
        return (self.folder / f"{name}.parquet").is_file()

    def __repr__(self) -> str:
        m = self.manifest
        return f"Run({m.experiment}/{m.run_id}: {m.policy.name}, seed {m.seed}, {m.source}, {m.status})"


class Runs:
    """Runs in the order of their folders."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = list(runs)

    def where(self, keep: Callable[[Manifest], bool]) -> Runs:
        """Those whose manifest satisfies ``keep``."""
        return Runs([run for run in self._runs if keep(run.manifest)])

    def by(self, key: Callable[[Manifest], str]) -> dict[str, Runs]:
        """Groups by a text, in sorted order of it."""
        groups: dict[str, list[Run]] = {}
        for run in self._runs:
            groups.setdefault(key(run.manifest), []).append(run)
        return {name: Runs(groups[name]) for name in sorted(groups)}

    def source(self) -> str:
        """The one source all of them share.

        Raises :class:`DataError` if simulated, live and emulated runs are mixed: a figure or a comparison of policies
        must not confuse the policy with the world it ran in.
        """
        sources = sorted({run.manifest.source for run in self._runs})
        if len(sources) != 1:
            folders = ", ".join(str(self.by(lambda m: m.source)[source][0].folder) for source in sources)
            raise DataError(
                f"runs of different sources ({', '.join(sources)}) in one comparison: {folders}; "
                "keep them in separate folders"
            )
        return sources[0]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __getitem__(self, index: int) -> Run:
        return self._runs[index]


def load_runs(path: Path) -> Runs:
    """Every run at or below ``path``, sorted by folder. Raises :class:`DataError`."""
    if not path.exists():
        raise DataError(f"{path}: no such folder; expected the results of `sage run`")
    if path.is_file():
        raise DataError(f"{path}: is a file; expected a folder of runs, each with its {NAME}")
    folders = {file.parent for file in path.rglob(NAME)}
    orphans = sorted(file.parent for file in path.rglob("requests.parquet") if file.parent not in folders)
    if orphans:
        raise DataError(
            f"{orphans[0] / NAME}: missing; the run did not get to its end, so remove its folder or run it again"
        )
    if not folders:
        raise DataError(f"{path}: holds no runs (no {NAME} in it or below); expected the results of `sage run`")
    return Runs([Run(folder) for folder in sorted(folders)])


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file that must have the columns of ``schema`` with their types; more are ignored.

    Raises :class:`DataError`: the file is missing, empty, cut short, not Parquet, or of other columns.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; the run was made without it, or it was removed")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty (0 bytes); the run was killed before it wrote anything, so remove it")
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            for field in schema:
                index = found.get_field_index(field.name)
                if index < 0:
                    raise DataError(f"{path}: no column {field.name!r}; it was not written by `sage run`")
                if found.field(index).type != field.type:
                    raise DataError(
                        f"{path}: column {field.name!r} is {found.field(index).type}, expected {field.type}; "
                        "it was not written by `sage run`"
                    )
            return file.read(columns=list(columns) if columns is not None else schema.names)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as Parquet ({reason}); it is cut short or not ours") from error
