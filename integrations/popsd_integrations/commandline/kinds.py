"""What a value of an option may be, read from the annotation of its field, so that a wrong one is refused before any import.

It follows what transformers' argument parser does with a field, since that reads the options in the end.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def boolean(text: str) -> bool:
    """What transformers' parser takes for a truth value."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected true or false; got {text!r}.")
    return text.lower() in TRUE


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"name\": 1}}'; got {text!r}.")
    return value


def _number(kind: type, word: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {word}; got {text!r}.") from None

    return read


READERS: Mapping[str, Callable[[str], Any]] = {
    "bool": boolean,
    "int": _number(int, "a whole number"),
    "float": _number(float, "a number"),
}


class Option(NamedTuple):
    """An option of a command line. kind: bool, int, float, list, choice, json or text.

    optional: None says something too. bare: it may stand without a value.
    """

    name: str
    kind: str
    choices: tuple[str, ...] = ()
    optional: bool = False
    bare: bool = False
    default: Any = None
    help: str = ""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Give the parser this option, and ``--no_…`` of one that is on."""
        how: dict[str, Any] = {"default": argparse.SUPPRESS}
        if self.kind in READERS:
            how["type"] = _or_none(READERS[self.kind]) if self.optional else READERS[self.kind]
        if self.bare:
            how |= {"nargs": "?", "const": True}
        if self.kind == "list":
            how["nargs"] = "+"
        if self.kind == "choice":
            how["choices"] = self.choices
        parser.add_argument(f"--{self.name}", **how)
        if self.kind == "bool" and self.default is True:
            parser.add_argument(f"--no_{self.name}", action="store_false", dest=self.name, default=argparse.SUPPRESS)

    def problem(self, value: Any) -> str:
        """What is wrong with a value from a file; "" where nothing is."""
        expected = {
            "bool": (bool, "true or false"),
            "int": (int, "a whole number"),
            "float": (float | int, "a number"),
            "list": (list, "a list"),
            "choice": (str, f"one of {', '.join(self.choices)}"),
        }.get(self.kind)
        if expected is None or (value is None and self.optional):
            return ""
        kinds, words = expected
        if isinstance(value, str) and self.kind in READERS:  # 5e-6 is text in YAML
            fits = not _fails(READERS[self.kind], value)
        else:
            fits = isinstance(value, kinds) and (self.kind == "bool" or not isinstance(value, bool))
            fits = fits and (self.kind != "choice" or value in self.choices)
        quoted = (
            " Write it in quotes, or it is a truth value in YAML." if self.kind == "choice" and value is False else ""
        )
        return "" if fits else f"expected {words}; got {value!r}.{quoted}"


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() in ("none", "null") else read(text)


def _fails(read: Callable[[str], Any], text: str) -> bool:
    try:
        read(text)
    except argparse.ArgumentTypeError:
        return True
    return False


def option(
    name: str,
    annotation: str,
    default: Any = None,
    metadata: Mapping[str, Any] | None = None,
    enums: Mapping[str, tuple[str, ...]] | None = None,
) -> Option:
    """An option of the annotation of its field. metadata: the field's. enums: values of the enumerations it may name.

    >>> option("on_overflow", "Literal['error', 'drop']").choices
    ('error', 'drop')
    >>> option("vocab_size", "int | None").kind, option("masks", "dict[str, Any] | str | None").kind
    ('int', 'json')
    """
    metadata, enums = metadata or {}, enums or {}
    parts = _parts(ast.parse(annotation, mode="eval").body)
    optional = "None" in parts
    parts = [part for part in parts if part != "None"]
    if len(parts) == 2 and not optional and "str" in parts:  # transformers takes the other one of the two
        parts.remove("str")
    only = parts[0] if len(parts) == 1 else ""
    choices = tuple(map(str, metadata.get("choices") or enums.get(only, ())))
    if only.startswith("Literal["):
        choices = tuple(map(str, ast.literal_eval(only.removeprefix("Literal"))))
    kind = "choice" if choices else "list" if only.startswith("list[") else only if only in READERS else "text"
    kind = "json" if any(part.startswith("dict") for part in parts) else kind
    bare = metadata.get("nargs") == "?" or (kind == "bool" and (not optional or default is not None))
    return Option(name, kind, choices, optional, bare, default, str(metadata.get("help") or ""))


def _parts(node: ast.expr) -> list[str]:
    """The members of a union; also of typing's Optional and Union."""
    if isinstance(node, ast.BinOp):
        return [*_parts(node.left), *_parts(node.right)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [part for member in members for part in _parts(member)] + (
            ["None"] if ast.unparse(node.value) == "Optional" else []
        )
    return [ast.unparse(node)]
