"""The three prompts of a row of ms-swift's data, and its encodings as popsd packs them. Nothing here imports ms-swift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from popsd_integrations.commandline.options import SOLUTION_COLUMNS, WRONG_COLUMN
from popsd_integrations.huggingface.prompts import ContextBuilder, Conversation, Problem, Prompts

IGNORED = -100
_TEXT = {"input_ids", "labels", "length", "lengths"}
"""What ms-swift's template makes of a row of text."""


class Row(NamedTuple):
    """A sampled row. completion: its token ids, one of padding where the student sampled none. counts: whether it did."""

    prompts: Prompts
    completion: list[int]
    counts: bool


def conversations(
    builder: ContextBuilder,
    messages: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Any],
    *,
    reference: bool,
) -> dict[str, Conversation]:
    """What teacher and reference read, as messages that end with the user's.

    messages: of the student, without the completion. columns: further ones of the data. They hold a solution, from which
    ``builder`` writes the prompts by its templates, or the prompts themselves: ``teacher_prompt``, in place of the user's last
    message as in ms-swift, and ``reference_prompt``, which stands alone after the system's message. reference: whether one is
    needed. Raises ValueError where a column is missing, and as ``builder`` does.
    """
    given = {name: columns[name] for name in (*SOLUTION_COLUMNS, "teacher_prompt") if columns.get(name)}
    if len(given) != 1:
        raise ValueError(
            f"dataset: expected one of the columns {[*SOLUTION_COLUMNS, 'teacher_prompt']}; got {sorted(given) or 'none'}, "
            f"beside {sorted(columns.keys() - given.keys())}. ms-swift drops columns that it does not know, unless it is told "
            "--remove_unused_columns false."
        )
    if "teacher_prompt" not in given:
        (solution,) = given.values()
        wrong = columns.get(WRONG_COLUMN)
        _, *written = builder.conversations(Problem(list(messages), solution, wrong))
        return dict(zip(("teacher", "reference"), written, strict=True))
    *history, last = messages
    found: dict[str, Conversation] = {"teacher": [*map(dict, history), {**last, "content": given["teacher_prompt"]}]}
    if reference:
        if not columns.get("reference_prompt"):
            raise ValueError(
                f"dataset: expected the column 'reference_prompt' beside 'teacher_prompt'; got {sorted(columns)}. It is the "
                "solution without the question, as the reference-only teacher reads it. Pass --remove_unused_columns false, "
                "or a column 'solution' in place of both."
            )
        system = [dict(message) for message in history if message["role"] == "system"]
        found["reference"] = [*system, {**last, "content": columns["reference_prompt"]}]
    return found


def row_of(encodings: Mapping[str, Mapping[str, Any]], pad_token_id: int) -> Row:
    """One row of ms-swift's encodings, by context: "question", "teacher" and "reference", which may be missing.

    Raises ValueError for what is no text, for a response in several parts, and where the contexts carry other responses.
    """
    parts = {name: _split(name, encoding) for name, encoding in encodings.items()}
    prompts = Prompts(*(parts.get(name, parts["teacher"])[0] for name in Prompts._fields))
    completion = parts["question"][1]
    for name, (_, other) in parts.items():
        if other != completion:
            raise ValueError(
                f"{name}: expected the student's response, {completion}; got {other}. The template writes a response otherwise "
                "behind another prompt."
            )
    return Row(prompts, completion or [pad_token_id], bool(completion))


def _split(name: str, encoding: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Prompt and response of one encoding."""
    if further := sorted(key for key in encoding.keys() - _TEXT if encoding[key] is not None):
        raise ValueError(
            f"{name}: expected token ids and labels of ms-swift's template; got {further} too. Images cannot be used, nor "
            "weights of tokens (--loss_scale); the plugin's masks weigh tokens."
        )
    ids, labels = list(encoding["input_ids"]), list(encoding["labels"])
    answered = [place for place, label in enumerate(labels) if label != IGNORED]
    if not answered:
        return ids, []
    first, last = answered[0], answered[-1]
    if len(answered) != last + 1 - first:
        raise ValueError(
            f"{name}: expected one response at the end; got several, as conversations of many turns have. Set --loss_scale "
            "last_round and no multi_turn_scheduler."
        )
    return ids[:first], ids[first : last + 1]
