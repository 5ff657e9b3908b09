"""The file of completions, which a run that was killed goes on with, and the order in which they are made.

A line is one completion. A batch is written by one call, and only a batch that is whole is kept when a run goes on. What is
sampled in a batch depends on its own seed. So the file ends the same, however often its run was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popsd_integrations.evaluate.checkpoints import Checkpoint
from popsd_integrations.evaluate.settings import FILE, SamplingConfig, Task
from popsd_integrations.run_folder import write_whole
from popsd_integrations.scoring import scorer_code

SETTINGS = "settings.json"
Key = tuple[str, str, int, int]
"""Label of the checkpoint, benchmark, problem, sample."""


class Batch(NamedTuple):
    """Completions that are sampled together, of one checkpoint and one benchmark."""

    checkpoint: Checkpoint
    rows: list[tuple[Task, int]]

    @property
    def keys(self) -> list[Key]:
        return [(self.checkpoint.label, task.benchmark, task.problem, sample) for task, sample in self.rows]


def plan(
    checkpoints: Sequence[Checkpoint], tasks: Mapping[str, Sequence[Task]], samples: int, size: int
) -> list[Batch]:
    """All batches in order: checkpoint by checkpoint, benchmark by benchmark, problem by problem."""
    batches = []
    for checkpoint in checkpoints:
        for problems in tasks.values():
            rows = [(task, sample) for task in problems for sample in range(samples)]
            batches += [Batch(checkpoint, rows[first : first + size]) for first in range(0, len(rows), size)]
    return batches


def key(record: Mapping[str, Any]) -> Key:
    return record["model"], record["benchmark"], record["problem"], record["sample"]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for a last one that was cut off.

    Raises ValueError where another line is no record, or a completion is there twice.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []  # a cut may go through a character
    records: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found = key(record)
            record["text"], record["expected"], record["tokens"], record["finish"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # behind the last newline there is nothing, or part of a line
                break
            raise ValueError(
                f"generations: expected a completion in line {number} of {path}; got "
                f"{line[:80].decode(errors='replace')!r} ({error}). Delete the line; the same command makes it again."
            ) from error
        if found in records:
            raise ValueError(
                f"generations: expected each completion once in {path}; line {number} is another one of sample {found[3]} "
                f"of problem {found[2]} of {found[1]} by {found[0]}. Delete one of the two lines."
            )
        records[found] = record
    return list(records.values())


def describe_missing(kept: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """How many completions that were asked for are not in ``records``, and of what; empty where all are there.

    kept: settings.json. A checkpoint of which it does not say what was asked for is expected to have what others have.
    """
    there = {key(record) for record in records}
    others = {name: {"problems": 0, "samples": 0} for name in dict.fromkeys(record["benchmark"] for record in records)}
    for _, name, problem, sample in there:
        others[name]["problems"] = max(others[name]["problems"], problem + 1)
        others[name]["samples"] = max(others[name]["samples"], sample + 1)
    parts, total, asked = [], 0, 0
    for label, checkpoint in kept["checkpoints"].items():
        for name, size in checkpoint.get("asked", others).items():
            wanted = {(label, name, p, s) for p in range(size["problems"]) for s in range(size["samples"])}
            asked += len(wanted)
            if count := len(wanted - there):
                total += count
                parts.append(f"{count} of {label} on {name}")
    return f"{total} of {asked} completions: {', '.join(parts)}" if parts else ""


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these lines, at once."""
    write_whole(path, lambda file: file.write("".join(map(_line, records)).encode()))


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines by one call of the system."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, "".join(map(_line, records)).encode())
    finally:
        os.close(descriptor)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def open_folder(
    folder: Path,
    config: SamplingConfig,
    scorer: str,
    checkpoints: Sequence[Checkpoint],
    tasks: Mapping[str, Sequence[Task]],
    samples: int,
) -> list[dict[str, Any]]:
    """What is there of this evaluation, after settings.json has been written. Nothing is generated.

    Raises ValueError where the folder holds completions of other settings, of another checkpoint under the same label, or
    of other problems under the same benchmark.
    """
    kept = read_settings(folder) if (folder / FILE).exists() else None
    if kept is not None:
        check_same(kept, config, folder)
        if kept["scorer"] != scorer:
            raise ValueError(
                f"eval_scorer: expected {kept['scorer']!r}, by which the completions in {folder} were judged; got {scorer!r}. "
                f"Judge them again: --from {folder / FILE} --eval_scorer {scorer}."
            )
        if kept.get("scorer_code", scorer_code(scorer)) != scorer_code(scorer):
            raise ValueError(
                f"eval_scorer: expected {scorer} as it was when it judged the completions in {folder}; it was edited. "
                f"Judge them again: --from {folder / FILE} --eval_scorer {scorer}."
            )
        for checkpoint in checkpoints:
            weights = kept["checkpoints"].get(checkpoint.label, {"weights": checkpoint.weights})["weights"]
            if weights != checkpoint.weights:
                raise ValueError(
                    f"output_dir: expected completions of {checkpoint.path} under {checkpoint.label!r} in {folder}; got "
                    "those of other weights. Pass another output_dir, or another label."
                )
    records = read(folder / FILE)
    for record in records:
        known = tasks.get(record["benchmark"], [])
        task = known[record["problem"]] if record["problem"] < len(known) else None
        if known and (task is None or (task.question, task.answer) != (record["question"], record["expected"])):
            raise ValueError(
                f"output_dir: expected completions of the problems of {record['benchmark']}; problem {record['problem']} "
                f"in {folder} is another one. Pass another output_dir."
            )
    known_checkpoints = {} if kept is None else kept["checkpoints"]
    asked = {name: {"problems": len(problems), "samples": samples} for name, problems in tasks.items()}
    for x in checkpoints:
        before = known_checkpoints.get(x.label, {}).get("asked", {})
        known_checkpoints[x.label] = {"run": x.run, "path": x.path, "weights": x.weights, "asked": before | asked}
    content = {"settings": config.plain(), "scorer": scorer, "scorer_code": scorer_code(scorer)}
    write_settings(folder, content | {"checkpoints": known_checkpoints})
    return records


def write_settings(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace settings.json at once."""
    write_whole(folder / SETTINGS, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the completions of a folder were made with. Raises ValueError where they are missing."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        content["settings"], content["scorer"], content["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"generations: expected the settings they were made with in {folder / SETTINGS}; got none that can be read "
            f"({type(error).__name__}). Copy it from where the completions were made."
        ) from error
    return dict(content)


def check_same(kept: Mapping[str, Any], config: SamplingConfig, folder: Path) -> None:
    """Raise ValueError where completions in ``folder`` were sampled with other settings."""
    different = config.differences(kept["settings"])
    if different:
        raise ValueError(
            f"generations: expected those in {folder} to be of the same model and settings; different are "
            f"{', '.join(different)}. Restore these options, or pass another output_dir."
        )


def missing(
    path: Path, records: Sequence[dict[str, Any]], batches: Sequence[Batch]
) -> tuple[dict[Key, dict[str, Any]], list[Batch]]:
    """The records that are there, and the batches to do. The file is left with whole batches only.

    Records that are not planned stay in the file: of another checkpoint, say, or of more samples than are asked for now.
    """
    known = {key(record): record for record in records}
    todo = [batch for batch in batches if any(k not in known for k in batch.keys)]
    for k in (k for batch in todo for k in batch.keys):
        known.pop(k, None)
    if path.exists():
        write(path, list(known.values()))  # half a line at the end would spoil the next one
    return known, todo
