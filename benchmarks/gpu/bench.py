"""What a part is, and what it works with in its own process."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from popsd_benchmarks import suite
from popsd_benchmarks.command import Progress
from popsd_benchmarks.measure import FIRST_STEP, Effort, UnusableError, failure
from popsd_benchmarks.plan import Item
from popsd_benchmarks.providers import Provider
from popsd_benchmarks.results import FINISHED, Case, Results, load

UNUSABLE = 3
"""Exit status of a part whose process a CUDA failure has made unusable."""


@dataclass(frozen=True)
class Bench:
    """What a part works with, in its own process. dry: on the CPU, at a tiny size."""

    results: Results
    path: Path
    dry: bool = False
    skip_failed: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def record(self, part: str, name: str, **figures: Any) -> None:
        self.results.record(part, name, **figures)
        self.results.save(self.path)
        if figures.get("status") != "stopped":
            shown = {k: round(x, 4) if isinstance(x, float) else x for k, x in figures.items()}
            print(part, name, shown, flush=True)

    @contextmanager
    def attempt(self, part: str, name: str) -> Iterator[bool]:
        """Whether to measure this record now; an exception becomes its status, unless it leaves nothing to go on with."""
        status = self.results.found(part, name).get("status")
        wanted = status not in FINISHED and not (status == "failed" and self.skip_failed)
        if wanted:
            self.record(part, name, status="stopped", note=FIRST_STEP)
        try:
            yield wanted
        except Exception as error:
            status, text = failure(error), f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.record(part, name, status=status or "failed", note=text)
            if status is None:
                raise UnusableError(text) from error
            error.__traceback__ = None  # its frames hold what did not fit
            if not self.dry:
                torch.cuda.empty_cache()

    def measure(self, part: str, case: Case, providers: Sequence[Provider], effort: Effort) -> None:
        """The case's cells, as `popsd bench` makes them."""
        work = [Item(part, case, replace(effort, peak=effort.peak and not self.dry))]
        options = {"out": self.path, "skip_failed": self.skip_failed}
        suite.run_items(work, providers, self.results, progress=Progress(), **options)


@dataclass(frozen=True)
class Part:
    """seconds: at most. cases: selections of the correctness suite, pytest's arguments, run first, a process each.
    run: what is then measured. gib: of the device's memory. modules: imported by ``run``. tool: what all of it runs under.
    """

    name: str
    seconds: float
    run: Callable[[Bench], None] | None = None
    cases: tuple[str, ...] = ()
    gib: float = 0.0
    modules: tuple[str, ...] = ()
    tool: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    collect: Callable[[Bench, Path], None] | None = None


def child(part: Part, bench: Bench) -> int:
    """The part itself, in its own process."""
    assert part.run is not None
    try:
        part.run(bench)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        unusable = isinstance(error, UnusableError) or failure(error) is None
        os._exit(UNUSABLE if unusable else 1)  # a broken context may hang in its own clearing up
    return 0


def forked(part: Part, path: Path, dry: bool, skip_failed: bool, log: Path) -> None:
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if dry:
        torch.set_num_threads(1)
    sys.exit(child(part, Bench(load(path), path, dry, skip_failed)))
