"""Which columns of a dataset hold what, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from popsd_integrations.commandline.options import SOLUTION_COLUMNS

QUESTIONS = ("prompt", "problem", "question", "instruction", "query", "input")
SOLUTIONS = (
    *SOLUTION_COLUMNS,
    *("reference_solution", "reference", "rationale", "explanation", "generated_solution", "response", "output"),
    *("completion", "answer"),
)
"""The likelier first. An answer alone tells a teacher little, and in some data it is the whole solution."""
ANSWERS = ("answer", "final_answer", "expected_answer")


class Columns(NamedTuple):
    """The columns of the questions, the solutions and, where there is another one, the answers."""

    prompt: str
    solution: str
    answer: str | None


def chosen_columns(columns: Sequence[str], prompt: str | None, solution: str | None) -> Columns:
    """The columns of a split. prompt, solution: those that were named, or None.

    Raises ValueError where a named one is missing, or none has a name that is known.
    """
    prompt = _chosen("prompt_column", "the questions", columns, prompt, QUESTIONS)
    solution = _chosen("solution_column", "the reference solutions", columns, solution, SOLUTIONS)
    if prompt == solution:
        raise ValueError(f"solution_column: expected another column than prompt_column; got {solution!r} for both.")
    return Columns(prompt, solution, next((name for name in ANSWERS if name in columns and name != solution), None))


def _chosen(option: str, what: str, columns: Sequence[str], named: str | None, usual: Sequence[str]) -> str:
    if named is not None:
        if named not in columns:
            raise ValueError(f"{option}: expected one of the columns {list(columns)}; got {named!r}.")
        return named
    for name in usual:
        if name in columns:
            return name
    raise ValueError(
        f"{option}: expected a column with {what}, called {', '.join(usual[:3])} or the like; got the columns "
        f"{list(columns)}. Name it with --{option}."
    )
