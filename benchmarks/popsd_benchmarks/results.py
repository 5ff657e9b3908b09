"""What is measured: a cell is one provider on one case of one shape. Results are a JSON file of cells, written after each."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

Loss = Literal["purified", "two"]
Status = Literal["ok", "inaccurate", "unsupported", "not installed", "left out", "out of memory", "failed", "stopped"]
FINISHED = ("ok", "inaccurate", "unsupported", "out of memory")
"""Statuses that a rerun takes as they are. The others it measures again, where they can be measured by now."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """tokens N, vocab V rows of the head, used: leading rows in use (None: all), width D; softcap of the head or None."""

    name: str
    tokens: int
    vocab: int
    width: int
    used: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """loss: "purified" over four distributions, or the "two"-distribution generalised JSD. dtype: "float32" or "bfloat16".

    spread: how far apart the streams are, a share of the hidden states' deviation; it sets the divergence.
    deviation: of the logits' bulk.
    """

    loss: Loss
    shape: Shape
    trainable_head: bool = False
    beta: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"
    spread: float = 0.1
    deviation: float = 2.0


@dataclass(frozen=True)
class Rounds:
    """A quantity over the rounds of a measurement: its median, its quartiles, how many rounds there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Rounds | None:
        """None of no values."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], 1) if values else None
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))


@dataclass(kw_only=True)
class Cell:
    """One provider on one case. Times in seconds, forward and backward together.

    part: which table or plot the cell belongs to ("table", "accuracy", "tokens", "vocab", "width", "planning", "profile").
    status: "stopped" while it is being measured, so that a process that ends early leaves it so.
    seconds: over the rounds. ratios: of the provider's time to popsd's, paired round by round. Either may be given as the
        list of rounds. peak_mib: memory above inputs.
    floor_share: time of the bare matmuls over the provider's own, 1 is the floor; tflops: achieved on those matmuls.
    errors: relative L2 against float64 of "loss", "dhidden", "dweight"; kl: the true mean KL(target ‖ student) in nats.
    kernels: of part "profile", a row per kernel or operation: name, seconds, calls, share of the step; where known also
        bytes, gb_per_s and bandwidth_share, of a copy's.
    """

    part: str
    provider: str
    case: Case
    status: Status = "ok"
    note: str = ""
    seconds: Rounds | None = None
    ratios: Rounds | None = None
    floor_share: float | None = None
    tflops: float | None = None
    peak_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("seconds", "ratios"):
            given: Any = getattr(self, name)
            if isinstance(given, list):
                setattr(self, name, Rounds.of(given))
            elif isinstance(given, dict):
                setattr(self, name, Rounds(**given))

    @property
    def key(self) -> str:
        """What makes the cell this cell."""
        return json.dumps([self.part, self.provider, asdict(self.case)], sort_keys=True)


@dataclass
class Results:
    """meta: versions, device, commit, command, date. cells in the order measured, one per key.

    records: what is no loss beside its peers, such as a card's copy rate: dicts with "part", "name", a "status" like a
    cell's and any figures; one per part and name.
    """

    meta: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def put(self, cell: Cell) -> None:
        """In the place of an earlier one of its key."""
        _replace(self.cells, cell, lambda one: one.key)

    def record(self, part: str, name: str, status: str = "ok", **figures: Any) -> None:
        """In the place of an earlier one of its part and name."""
        row = {"part": part, "name": name, "status": status, **figures}
        _replace(self.records, row, lambda one: (one["part"], one["name"]))

    def found(self, part: str, name: str) -> dict[str, Any]:
        """The record of this part and name, or an empty one."""
        return next((row for row in self.records if (row["part"], row["name"]) == (part, name)), {})

    def save(self, path: Path) -> None:
        """Atomically, a line per cell: a run that is killed keeps the cells it finished."""
        blocks = [f' "meta": {json.dumps(self.meta)}']
        for name, rows in (("cells", list(map(_sparse, self.cells))), ("records", self.records)):
            if rows or name == "cells":
                blocks.append(f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
        os.replace(temporary, path)


def load(path: Path) -> Results:
    """Raises ValueError for a file that is not a results file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(
            content["meta"],
            [Cell(**row | {"case": case_of(row["case"])}) for row in content["cells"]],
            content.get("records", []),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results with meta and cells; got {type(error).__name__}: {error}."
        ) from error


def case_of(row: dict[str, Any]) -> Case:
    """A case from its fields."""
    return Case(**row | {"shape": Shape(**row["shape"])})


def select(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The cells whose fields, or whose case's, have these values."""
    own = {entry.name for entry in fields(Cell)}
    return [c for c in cells if all(getattr(c if k in own else c.case, k) == v for k, v in wanted.items())]


def _replace(entries: list[Any], new: Any, key: Callable[[Any], Any]) -> None:
    at = next((i for i, one in enumerate(entries) if key(one) == key(new)), len(entries))
    entries[at : at + 1] = [new]


def _sparse(one: Any) -> Any:
    """As a dict, without what has its default value."""
    if not is_dataclass(one):
        return one
    if isinstance(one, Rounds):
        return asdict(one)
    values = {entry.name: (_default(entry), getattr(one, entry.name)) for entry in fields(one)}
    return {name: _sparse(value) for name, (default, value) in values.items() if value != default}


def _default(entry: Any) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default
