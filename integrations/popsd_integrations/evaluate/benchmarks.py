"""Problems with answers: of the Hub, or of local folders and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from popsd_integrations.evaluate.settings import Task, labelled

KNOWN = {
    "aime24": "HuggingFaceH4/aime_2024",
    "aime25": "yentinglin/aime_2025",
    "hmmt25": "MathArena/hmmt_feb_2025",
}
"""The paper's three, 30 problems each, and where they are on the Hub."""
PROMPT_COLUMNS, ANSWER_COLUMNS, SPLITS = (
    ("problem", "question", "prompt"),
    ("answer", "final_answer"),
    ("test", "train"),
)


def load(
    names: Sequence[str], prompt_column: str | None = None, answer_column: str | None = None, split: str | None = None
) -> dict[str, list[Task]]:
    """The problems of each benchmark, by its label.

    names: each one of `KNOWN`, a name on the Hub, a local folder, or a .jsonl or .json file. ``label=name`` sets the label,
        which is otherwise the last part of the name.
    prompt_column, answer_column: None is the first there of PROMPT_COLUMNS and ANSWER_COLUMNS. split: None is "test"
        where there is one, otherwise "train".
    Raises ValueError where there is no problem, no such column, a problem without a question or an answer, or a label twice.
    """
    found: dict[str, list[Task]] = {}
    for name in names:
        label, place = labelled(name, Path(name).stem)
        if label in found:
            raise ValueError(f"benchmarks: expected each label once; got {label!r} again. Write label=name.")
        rows = _rows(KNOWN.get(place, place), split)
        if not rows:
            raise ValueError(f"benchmarks: expected at least one problem in {place}; got none.")
        columns = [
            _column(label, option, rows[0], wanted, usual)
            for option, wanted, usual in (
                ("prompt_column", prompt_column, PROMPT_COLUMNS),
                ("answer_column", answer_column, ANSWER_COLUMNS),
            )
        ]
        found[label] = [
            Task(label, problem, *(_text(label, problem, row, column) for column in columns))
            for problem, row in enumerate(rows)
        ]
    return found


def _column(label: str, option: str, row: Mapping[str, Any], wanted: str | None, usual: Sequence[str]) -> str:
    for name in (wanted,) if wanted else usual:
        if name in row:
            return name
    raise ValueError(
        f"{option}: expected {wanted or ' or '.join(usual)} in {label}; got the columns {sorted(row)}. Name one of them with "
        f"--{option}."
    )


def _text(label: str, problem: int, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, float) and math.isfinite(value):
        return f"{Decimal(repr(value)):f}"  # 1e-05 would be read as a product with Euler's number
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f"benchmarks: expected text or a finite number in column {column!r} of every problem; got {value!r} in problem "
            f"{problem} of {label}."
        )
    return str(value)


def _rows(name: str, split: str | None) -> list[Mapping[str, Any]]:
    path = Path(name)
    if path.suffix in (".jsonl", ".json"):
        return _rows_of_file(path)
    from datasets import load_dataset

    try:
        dataset = load_dataset(name)
    except Exception as error:  # a dozen of kinds, by what is wrong with the network, the name or a file
        raise ValueError(
            f"benchmarks: expected one of {sorted(KNOWN)}, a name on the Hub, a folder or a .jsonl file; got {name!r} "
            f"({type(error).__name__}: {error})."
        ) from error
    chosen = next((known for known in ((split,) if split else SPLITS) if known in dataset), None)
    if chosen is None:
        raise ValueError(f"dataset_test_split: expected one of {sorted(dataset)} of {name}; got {split!r}.")
    return [dict(row) for row in dataset[chosen]]


def _rows_of_file(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise ValueError(f"benchmarks: expected a file; there is none at {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        # splitlines() would also cut at U+2028 and the like, which JSON allows within text
        lines = [line for line in text.split("\n") if line.strip()]
        content = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"benchmarks: expected JSON rows in {path}; got {error}. Write one object per line."
        ) from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"benchmarks: expected a list of objects in {path}; got something else.")
    return content
