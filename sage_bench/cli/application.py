"""``sage app``: ask a declared pipeline, served by a gateway or by a control plane in this process."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sage_bench.cli.gateway import pairs
from sage_bench.client import UnifiedInferenceClient
from sage_bench.pipelines.file import load_pipeline, shipped
from sage_bench.serving import parse_engine
from sage_core.declared import Declared, Retrieve
from sage_core.errors import ConfigError, EngineError
from sage_core.paths import user_paths
from sage_live.errors import ApiError

INDEX = "indexes"
"""Folder below the user's data in which indexes are looked for that nobody named."""


def command(
    pipeline: Annotated[str, typer.Argument(help="A pipeline of SAGE (rag, summarize, agent) or a YAML file.")],
    ask: Annotated[str | None, typer.Option(help="What to ask; - reads standard input.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL[,KEY=VALUE]", help="Without a gateway: an engine, kind=embedding for embeddings; repeated."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Of a gateway that serves the pipeline, with /v1; default: the one on this machine."),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An index (`sage index build`); default: NAME below indexes/ in the user's data.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 256,
    record: Annotated[Path | None, typer.Option(help="A folder for log and rows, with --engine.")] = None,
) -> None:
    """Ask a pipeline once: its answer on standard output, the documents it comes from below it."""
    question = sys.stdin.read() if ask == "-" else ask
    if question is None or not question.strip():
        raise ConfigError('--ask: expected a question, as in sage app rag --ask "Which ports are used?"')
    if engine is None:
        if index or record is not None:
            raise ConfigError(f"{'--index' if index else '--record'}: is for --engine; a gateway has its own")
        name = load_pipeline(pipeline).pipeline.name if pipeline in shipped() or Path(pipeline).suffix else pipeline
        try:
            with UnifiedInferenceClient.create(url) as client:
                _answer(client, name, question, max_tokens)
        except EngineError as error:
            if "cannot connect" not in str(error):
                raise
            raise EngineError(
                f"{error}; start a gateway (`sage gateway start --pipeline {pipeline} ...`), or name engines with --engine"
            ) from error
        return
    declared = load_pipeline(pipeline)
    chosen = (
        [f"pipeline={pipeline}"] if pipeline in shipped() else ["pipeline=file", f"pipeline.path={_quoted(pipeline)}"]
    )
    folders = [
        f"+driver.indexes.{key}={_quoted(folder)}"
        for key, folder in _indexes(declared, pairs("--index", index or [])).items()
    ]
    engines = [_pooled(each) for each in engine]
    with UnifiedInferenceClient.create(engines=engines, overrides=[*chosen, *folders], record=record) as client:
        _answer(client, declared.pipeline.name, question, max_tokens)


def _answer(client: UnifiedInferenceClient, name: str, question: str, max_tokens: int) -> None:
    try:
        completion = client.chat(question, model=name, max_tokens=max_tokens)
    except ApiError as error:
        raise EngineError(f"{name}: {error}") from error
    print(completion.text.strip())
    if completion.sources:
        Console(stderr=True, highlight=False).print(
            f"sources: {', '.join(completion.sources)}", markup=False, style="dim"
        )


def _quoted(text: str) -> str:
    """As a value of Hydra, whose grammar means something by commas, brackets and more."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{escaped}'"


def _pooled(text: str) -> str:
    """The engine in the pool that shipped pipelines mean: ``llm``, or ``embed`` for embeddings."""
    given = parse_engine(text)
    return text if given.pool else f"{text},pool={'embed' if given.kind == 'embedding' else 'llm'}"


def _indexes(declared: Declared, given: dict[str, str]) -> dict[str, str]:
    """Folder of each index that the pipeline reads. ConfigError for one that is not there."""
    wanted = {
        one.declaration.index for group in declared.stages for one in group if isinstance(one.declaration, Retrieve)
    }
    found = {}
    for name in sorted(wanted):
        folder = Path(given.get(name, user_paths(os.environ).data / INDEX / name))
        if not folder.is_dir():
            raise ConfigError(
                f"--index {name}={folder}: no such folder; build it with `sage index build DIR --out {folder}` (--demo for "
                "Python's own texts)"
            )
        found[name] = str(folder.absolute())
    return found
