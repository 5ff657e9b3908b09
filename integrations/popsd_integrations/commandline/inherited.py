"""The options that ``popsd train`` inherits, read from the source of the installed TRL and transformers.

Importing them takes ten seconds, reading their source a twentieth of one. So a misspelt option is answered at once.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from popsd_integrations.commandline.kinds import Option, option

SOURCES = (
    ("transformers/training_args.py", "TrainingArguments"),
    ("trl/trainer/base_config.py", "_BaseConfig"),
    ("trl/trainer/distillation_config.py", "DistillationConfig"),
    ("trl/trainer/model_config.py", "ModelConfig"),
    ("trl/scripts/utils.py", "ScriptArguments"),
    ("trl/scripts/utils.py", "DatasetMixtureConfig"),
)
"""Files and classes, a derived class after its base."""
ENUMERATIONS = ("transformers/trainer_utils.py", "transformers/training_args.py")


@functools.cache
def inherited() -> dict[str, Option]:
    """The options by name. Raises ImportError, named after the package, where one of the two is not installed."""
    enums: dict[str, tuple[str, ...]] = {}
    found: dict[str, Option] = {}
    try:
        for file in ENUMERATIONS:
            enums |= {node.name: values for node in _classes(file) if (values := _values(node))}
        for file, name in SOURCES:
            (node,) = (node for node in _classes(file) if node.name == name)
            found |= {field.name: field for field in _fields(node, enums)}
    except (OSError, SyntaxError, ValueError):
        return _imported()
    return found


def _imported() -> dict[str, Option]:
    """The names alone, where a class is not where it was in the versions of TRL and transformers that are known."""
    from trl import DatasetMixtureConfig, DistillationConfig, ModelConfig, ScriptArguments

    classes = (DistillationConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
    return {
        entry.name: Option(entry.name, "text", bare=True) for each in classes for entry in fields(each) if entry.init
    }


@functools.cache
def _classes(file: str) -> list[ast.ClassDef]:
    package, _, path = file.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}", name=package)
    source = (Path(spec.submodule_search_locations[0]) / path).read_text(encoding="utf-8")
    return [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def _values(node: ast.ClassDef) -> tuple[str, ...]:
    """The values of an enumeration of texts."""
    return tuple(
        line.value.value
        for line in node.body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
    )


def _fields(node: ast.ClassDef, enums: dict[str, tuple[str, ...]]) -> list[Option]:
    found = []
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        annotation = ast.unparse(line.annotation)
        if annotation.startswith("ClassVar") or _keyword(line.value, "init") is False:
            continue
        default = line.value.value if isinstance(line.value, ast.Constant) else _keyword(line.value, "default")
        metadata = {name: _keyword(line.value, "metadata", name) for name in ("nargs", "choices")}
        found.append(option(line.target.id, annotation, default, metadata, enums))
    return found


def _keyword(call: ast.expr | None, name: str, entry: str | None = None) -> Any:
    """A literal that ``dataclasses.field`` is given, or that stands in a dictionary which it is given. None for another."""
    found = next((x.value for x in call.keywords if x.arg == name), None) if isinstance(call, ast.Call) else None
    if entry is not None:
        pairs = zip(found.keys, found.values, strict=True) if isinstance(found, ast.Dict) else ()
        found = next((value for key, value in pairs if isinstance(key, ast.Constant) and key.value == entry), None)
    try:
        return None if found is None else ast.literal_eval(found)
    except ValueError:
        return None
