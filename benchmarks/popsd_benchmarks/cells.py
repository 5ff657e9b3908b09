"""What is measured: a cell is one provider on one case of one shape. Results are a JSON file of cells, written after each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Loss = Literal["purified", "two"]
Status = Literal["ok", "inaccurate", "unsupported", "not installed", "left out", "out of memory", "failed"]


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
    """

    loss: Loss
    shape: Shape
    trainable_head: bool = False
    beta: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"
    spread: float = 0.1


@dataclass(kw_only=True)
class Cell:
    """One provider on one case. Times in seconds, forward and backward together.

    part: which table or plot the cell belongs to ("table", "accuracy", "tokens", "vocab", "width", "step", "profile").
    seconds: every round. ratios: of the provider's time to popsd's, round by round, paired. peak_mib: memory above inputs.
    floor_share: time of the bare matrix products over the provider's own, 1 is the floor; tflops: achieved on those products.
    errors: relative L2 against float64 of "loss", "dhidden", "dweight"; kl: the true mean KL(target ‖ student) in nats.
    kernels: of part "profile", a row per kernel or operation: name, seconds, calls, share of the step; where known also
        bytes, gb_per_s and bandwidth_share, of a copy's.
    """

    part: str
    provider: str
    case: Case
    status: Status = "ok"
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    floor_share: float | None = None
    tflops: float | None = None
    peak_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What makes the cell this cell: a resumed run skips the keys it has."""
        return json.dumps([self.part, self.provider, asdict(self.case)], sort_keys=True)


@dataclass
class Results:
    """meta: versions, device, commit, command, date. cells in the order measured."""

    meta: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    def known(self) -> set[str]:
        return {cell.key for cell in self.cells}

    def save(self, path: Path) -> None:
        """Atomically: a run that is killed keeps the cells it finished."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"meta": self.meta, "cells": [asdict(c) for c in self.cells]}, indent=1) + "\n")
        os.replace(temporary, path)


def load(path: Path) -> Results:
    """Raises ValueError for a file that is not a results file."""
    try:
        content = json.loads(path.read_text())
        return Results(content["meta"], [_cell(row) for row in content["cells"]])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results with meta and cells; got {type(error).__name__}: {error}."
        ) from error


def select(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The cells whose fields, or whose case's, have these values."""
    own = {entry.name for entry in fields(Cell)}
    return [c for c in cells if all(getattr(c if k in own else c.case, k) == v for k, v in wanted.items())]


def _cell(row: dict[str, Any]) -> Cell:
    case = dict(row["case"])
    return Cell(**{**row, "case": Case(**{**case, "shape": Shape(**case["shape"])})})
