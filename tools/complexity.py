"""What the same RAG costs its author in three forms: lines of code, settings, processes. Writes ``complexity.json``.

*Lines*: of Python, by its own tokenizer: blank lines, comments and docstrings do not count; a statement over three lines is
three. *Configuration keys*: leaves of YAML and JSON files; a list of plain values is one. *Settings in code*: constants
of a module, in capitals, and options of its command line. *Processes*: started beside the engines, which are the same
for all. Framework code is counted for nobody: not SAGE's, not that of ``openai`` or of the standard library.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("results/bench/complexity.json")


@dataclass(frozen=True, slots=True)
class Form:
    """Files, as globs from the root of the project, and what is started."""

    files: tuple[str, ...]
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Complexity:
    files: int
    lines: int
    config_keys: int
    settings_in_code: int
    processes: int


_SERVICES = "examples/apps/baselines/rag_microservices"
FORMS: Final = {
    "declared": Form(("conf/pipeline/rag.yaml",), ("sage gateway start",)),
    "script": Form(("examples/apps/baselines/rag_script.py",), ("rag_script.py",)),
    "microservices": Form((f"{_SERVICES}/*.py", f"{_SERVICES}/*.yaml"), ("retriever.py", "generator.py", "front.py")),
}

_NO_CODE: Final = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    counted = {name: complexity(form, ROOT) for name, form in FORMS.items()}
    table = Table("", *counted, box=SIMPLE, title="the same RAG in three forms")
    for field in Complexity.__slots__:
        table.add_row(field.replace("_", " "), *(str(getattr(each, field)) for each in counted.values()))
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({name: asdict(each) for name, each in counted.items()}, indent=2) + "\n", "utf-8")
    print(f"wrote {options.out}")


def complexity(form: Form, root: Path) -> Complexity:
    """SystemExit for a glob that finds nothing, or a file of another kind."""
    paths: list[Path] = []
    for pattern in form.files:
        found = sorted(root.glob(pattern))
        if not found:
            raise SystemExit(f"{pattern}: no such file below {root}; correct FORMS in tools/complexity.py")
        paths += found
    lines = keys = settings = 0
    for path in paths:
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            lines += code_lines(text)
            settings += settings_in_code(text)
        elif path.suffix in (".yaml", ".yml", ".json"):
            keys += leaves(yaml.safe_load(text))  # JSON is YAML
        else:
            raise SystemExit(f"{path}: expected .py, .yaml or .json")
    return Complexity(len(paths), lines, keys, settings, len(form.processes))


def code_lines(text: str) -> int:
    """Lines on which something other than a comment or a docstring stands."""
    lines: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            statement.append(token)
        elif token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if any(each.type != tokenize.STRING for each in statement):  # else it is a docstring
                lines.update(line for each in statement for line in range(each.start[0], each.end[0] + 1))
            statement = []
    return len(lines)


def settings_in_code(text: str) -> int:
    """Constants in capitals at the top of a module, and options of its command line."""
    tree = ast.parse(text)
    names = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]
    options = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]
    return sum(name.isupper() and len(name) > 1 for name in names) + len(options)  # T is a type variable


def leaves(content: Any) -> int:
    """Values that somebody chose: of a mapping those of its keys, of a list of mappings those of its items."""
    if isinstance(content, Mapping) and content:
        return sum(leaves(value) for value in content.values())
    if (
        isinstance(content, Sequence)
        and not isinstance(content, str)
        and any(isinstance(each, Mapping) for each in content)
    ):
        return sum(leaves(each) for each in content)
    return 1


if __name__ == "__main__":
    main()
