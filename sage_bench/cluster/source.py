"""A YAML file as plain data that still knows its lines, so that a wrong value is reported where it stands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

import msgspec
import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sage_core.errors import ConfigError

T = TypeVar("T")


class YamlSource:
    """``plain``: the data. ConfigError: not readable, not YAML, a key twice, or something that contains itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            try:
                self._root: Node | None = loader.get_single_node()
                self._check(self._root)
                self.plain: Any = None if self._root is None else loader.construct_document(self._root)
            finally:
                loader.dispose()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text, at byte {error.start}") from error
        except RecursionError:
            raise ConfigError(f"{path}: nested too deeply") from None
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            at = f":{mark.line + 1}" if mark else ""
            raise ConfigError(f"{path}{at}: not valid YAML: {problem or ' '.join(str(error).split())}") from error

    def converted(self, kind: type[T], structs: Mapping[str, type[msgspec.Struct]]) -> T:
        """The data as ``kind``. structs: the struct at each path, such as ``jobs[...].needs``, for advice on unknown keys.

        ConfigError names line and key, and says what was expected.
        """
        try:
            return msgspec.convert(self.plain, kind, strict=True)
        except msgspec.ValidationError as error:
            text, _, path = str(error).partition(" - at `$")
            raise self._explained(text, path.rstrip("`").lstrip("."), structs) from error

    def error(self, path: str, text: str) -> ConfigError:
        """A ConfigError about what stands at ``path`` (``jobs[0].name``)."""
        return ConfigError(f"{self.path}:{self.line(path)}: {path}: {text}" if path else f"{self.path}: {text}")

    def line(self, path: str) -> int:
        """The line, from 1, of the value at ``path``, or of the last thing above it that exists."""
        node, line = self._root, 1
        for step in _steps(path):
            if node is None:
                break
            line, node = _below(node, step, line)
        return line

    def _explained(self, text: str, path: str, structs: Mapping[str, type[msgspec.Struct]]) -> ConfigError:
        any_index = re.sub(r"\[\d+\]", "[...]", path)
        if unknown := re.match(r"Object contains unknown field `(.+)`", text):
            known = structs[any_index].__struct_fields__ if any_index in structs else ()
            close = difflib.get_close_matches(unknown[1], known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}" if known else ""
            return self.error(f"{path}.{unknown[1]}".lstrip("."), f"unknown key{hint}")
        if missing := re.match(r"Object missing required field `(.+)`", text):
            return self.error(path, f"the key {missing[1]!r} is missing")
        if not_text := re.search(r" - at `key` in `\$(.*)`", text):
            return self.error(not_text[1].lstrip("."), "a key is not text; put it in quotes")
        if "matching regex" in text:
            text = "Expected a name (letters, digits, and . _ - after the first)"
        if text.startswith("Invalid enum value"):
            above, _, name = any_index.rpartition(".")
            text = f"Expected one of {', '.join(get_args(get_type_hints(structs[above])[name]))}"
        value = self._value(path)
        if text.startswith("Expected") and not isinstance(value, dict | list):
            text = f"{text.partition(', got ')[0]}, got {value!r}"
        text = re.sub(r"`([a-z |]+)`", lambda found: " or ".join(_WORDS.get(w, w) for w in found[1].split(" | ")), text)
        return self.error(path, f"{text[:1].lower()}{text[1:]}")

    def _value(self, path: str) -> Any:
        value = self.plain
        for step in _steps(path):
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def _check(self, root: Node | None) -> None:
        """No key twice, of which YAML would silently keep the last, and nothing that contains itself."""
        done: set[int] = set()
        above: set[int] = set()

        def look(node: Node) -> None:
            if id(node) in above:
                raise ConfigError(f"{self.path}:{node.start_mark.line + 1}: an alias stands for what contains it")
            if id(node) in done:
                return
            above.add(id(node))
            seen: dict[str, int] = {}
            for key in (
                (key for key, _ in node.value if isinstance(key, ScalarNode)) if isinstance(node, MappingNode) else ()
            ):
                line = key.start_mark.line + 1
                if key.value in seen:
                    told = f"key {key.value!r} is here twice, first at line {seen[key.value]}"
                    raise ConfigError(f"{self.path}:{line}: {told}")
                seen[key.value] = line
            for each in _children(node):
                look(each)
            above.remove(id(node))
            done.add(id(node))

        if root is not None:
            look(root)


_WORDS: Final = {
    "object": "a mapping",
    "array": "a list",
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "bool": "true or false",
}
"""msgspec's names of types, as people who write YAML call them."""


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        yield from (value for _, value in node.value)
    elif isinstance(node, SequenceNode):
        yield from node.value


def _steps(path: str) -> Iterator[str | int]:
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        yield int(index) if index else key


def _below(node: Node, step: str | int, line: int) -> tuple[int, Node | None]:
    """The line of what is one step below, and it; the line so far and None where there is nothing."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == step:
                return key.start_mark.line + 1, value
    elif isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step].start_mark.line + 1, node.value[step]
    return line, None
