"""Functions of the pipelines that come with SAGE. Yours are in modules of your own, ``module:function``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

PART_WORDS: Final = 150
PARTS_MAX: Final = 6
NUMBER_MAX: Final = 10**12


def part_count(text: str) -> int:
    """How many parts of about 150 words a text has, 6 at most."""
    return min(PARTS_MAX, max(1, -(-len(text.split()) // PART_WORDS)))


def lines(*values: str | Sequence[str]) -> str:
    """Everything on lines of its own, blank ones left out."""
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    return "\n".join(line.strip() for text in texts for line in text.splitlines() if line.strip())


def wants_more(thought: str) -> int:
    """1 if a model asked for its calculator and did not say that it is done, else 0."""
    return int("CALC" in thought and "DONE" not in thought)


def calculate(thought: str) -> str:
    """The value of the expression after CALC; what is wrong with it, or nothing where none was asked for."""
    _, asked, rest = thought.partition("CALC")
    if not asked:
        return ""
    text = rest.strip().splitlines()[0].strip(" :`=") if rest.strip() else ""
    try:
        return f"{text} = {_value(ast.parse(text, mode='eval').body)}"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError) as error:
        return f"{text}: cannot be calculated ({error})"


_OPERATORS: Final[dict[type, Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _value(node: ast.expr) -> int | float:
    """Of numbers, + - * / // % and brackets; no names, no calls, no powers: what a model writes is not trusted."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        found: int | float = node.value  # type: ignore[assignment]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        found = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        found = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("expected numbers, + - * / // % and brackets")
    if abs(found) > NUMBER_MAX:
        raise ValueError(f"a number beyond {NUMBER_MAX}")
    return found
