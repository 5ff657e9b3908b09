"""A cell is one provider on one case. Results are a JSON file of cells, written after each.

With them goes where they come from: POPSD_COMMIT names the commit where the source has no repository.
"""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from popsd_benchmarks.cases import Case, Shape, operations

PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "orda-kernel", "numpy")
Status = Literal["ok", "inaccurate", "unsupported", "not installed", "left out", "out of memory", "failed", "stopped"]
FINISHED = ("ok", "inaccurate", "unsupported", "out of memory")
"""Statuses that a rerun takes as they are. The others it measures again, where they can be measured by now."""


@dataclass(frozen=True)
class Rounds:
    """A quantity over the rounds of a measurement: its median, its quartiles, how many rounds there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """None of no values."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], 1) if values else None
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))


@dataclass(kw_only=True)
class Cell:
    """One provider on one case. Times in seconds, forward and backward together.

    part: which table or plot it belongs to. status: "stopped" while it is being measured, so that a process that ends early
    leaves it so. seconds: over the rounds. others: share of the processors, or of a GPU's memory, that other processes had
    meanwhile. peak_mib: memory above inputs. errors: relative L2 against float64 of "loss", "dhidden", "dweight". kl: the true
    mean KL(target ‖ student) in nats. kernels: of part "profile", a row per kernel or operation: name, seconds, calls, share
    of the step; where known also bytes, gb_per_s and bandwidth_share, of a copy's.
    """

    part: str
    provider: str
    case: Case
    status: Status = "ok"
    note: str = ""
    seconds: Rounds | None = None
    others: float | None = None
    peak_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, Case]:
        """What makes the cell this cell."""
        return self.part, self.provider, self.case

    @property
    def tflops(self) -> float | None:
        """Achieved on the matmuls that the case needs."""
        return operations(self.case) / self.seconds.median / 1e12 if self.seconds else None


def ratio(one: Cell | None, other: Cell | None) -> float | None:
    """Of their median times, which come from one run. Every ratio is this one, so that it is what the times say."""
    return one.seconds.median / other.seconds.median if one and other and one.seconds and other.seconds else None


def named(cells: Iterable[Cell], provider: str) -> Cell | None:
    """Of the cells of one case, this provider's."""
    return next((cell for cell in cells if cell.provider == provider), None)


@dataclass
class Results:
    """meta: versions, device, commit, command, date. cells: in the order measured, one per key. records: what is no loss
    beside its peers, such as a card's copy rate: "part", "name", a "status" like a cell's and any figures.
    """

    meta: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def put(self, cell: Cell) -> None:
        """In the place of an earlier one of its key."""
        _replace(self.cells, cell, [one.key == cell.key for one in self.cells])

    def record(self, part: str, name: str, status: str = "ok", **figures: Any) -> None:
        """In the place of an earlier one of its part and name."""
        row = {"part": part, "name": name, "status": status, **figures}
        _replace(self.records, row, [one is self.found(part, name) for one in self.records])

    def found(self, part: str, name: str) -> dict[str, Any]:
        """The record of this part and name, or an empty one."""
        return next((row for row in self.records if (row["part"], row["name"]) == (part, name)), {})

    def continued(self, now: dict[str, Any]) -> Self:
        """With the session of these ``meta`` noted. Raises ValueError where its cells would not compare with new ones."""
        for name in ("versions", "device", "threads"):
            if self.meta.get(name) != now[name]:
                raise ValueError(
                    f"out: expected a results file measured with {name} {now[name]}; got one with {self.meta.get(name)}. "
                    "Name another file, or delete this one."
                )
        session = {name: now[name] for name in ("commit", "command", "date", "load")}
        return replace(self, meta={**self.meta, "continued": [*self.meta.get("continued", []), session]})

    def save(self, path: Path) -> None:
        """Atomically, a line per cell: a run that is killed keeps the cells it finished."""
        cells = ",\n  ".join(json.dumps(_sparse(asdict(cell))) for cell in self.cells)
        records = ",\n  ".join(map(json.dumps, self.records))
        text = f' "meta": {json.dumps(self.meta)},\n "cells": [\n  {cells}\n ],\n "records": [\n  {records}\n ]'
        temporary = path.with_suffix(".tmp")
        temporary.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
        os.replace(temporary, path)


def load(path: Path) -> Results:
    """Raises ValueError for a file that is not a results file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(content["meta"], list(map(_cell_of, content["cells"])), content.get("records", []))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected results with meta and cells; got {got}.") from error


def _cell_of(row: dict[str, Any]) -> Cell:
    case = Case(**row["case"] | {"shape": Shape(**row["case"]["shape"])})
    known = {entry.name: row[entry.name] for entry in fields(Cell) if entry.name in row}  # older files hold ratios too
    return Cell(**known | {"case": case} | ({"seconds": Rounds(**row["seconds"])} if "seconds" in row else {}))


def select(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The cells whose fields, or whose case's, have these values."""
    own = {entry.name for entry in fields(Cell)}
    return [c for c in cells if all(getattr(c if k in own else c.case, k) == v for k, v in wanted.items())]


def _replace(entries: list[Any], new: Any, same: list[bool]) -> None:
    at = same.index(True) if True in same else len(entries)
    entries[at : at + 1] = [new]


def _sparse(row: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing."""
    kept = {name: value for name, value in row.items() if value not in (None, "", {}, [])}
    return {name: _sparse(value) if isinstance(value, dict) else value for name, value in kept.items()}


def describe(device: str) -> dict[str, Any]:
    """The ``meta`` of results measured now."""
    import torch

    return {
        "versions": _versions(),
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "commit": os.environ.get("POPSD_COMMIT") or _commit(),
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


def _versions() -> dict[str, str]:
    import torch

    import popsd

    found = {"popsd": popsd.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _device(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    model = re.search(r"model name\s+: (.*)", path.read_text(encoding="utf-8")) if path.exists() else None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Of the source that runs, "+" where it has changes; None outside a repository."""
    git, where = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"], Path(__file__).parent
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(git, cwd=where, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def _command() -> str:
    """As typed, less this machine's folders."""
    return re.sub(r"(?<![^\s=])/\S*/", "", shlex.join(["python", *sys.orig_argv[1:]]))
