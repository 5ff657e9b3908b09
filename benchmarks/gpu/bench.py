"""What a part is, and what it works with in its own process."""

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
from popsd_benchmarks.cases import Case
from popsd_benchmarks.command import Progress
from popsd_benchmarks.measure import FIRST_STEP, Effort, UnusableError, described, failure
from popsd_benchmarks.providers import Provider
from popsd_benchmarks.results import FINISHED, Results

UNUSABLE = 3
"""Exit status of a part whose process a CUDA failure has made unusable."""


@dataclass(frozen=True)
class Bench:
    """The results file at ``path``, and how to add to it. dry: on the CPU, at a tiny size. skip_failed: failed cells and
    records stay as they are.
    """

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
            status, text = failure(error), described(error)
            self.record(part, name, status=status or "failed", note=text)
            if status is None:
                raise UnusableError(text) from error
            error.__traceback__ = None  # its frames hold what did not fit
            if not self.dry:
                torch.cuda.empty_cache()

    def measure(self, part: str, case: Case, providers: Sequence[Provider], effort: Effort) -> None:
        """The case's cells, as `popsd bench` makes them."""
        if self.dry:
            effort = replace(effort, rounds=min(effort.rounds, 1), peak=False, compilers=False)
        options = {"out": self.path, "skip_failed": self.skip_failed, "whole": False}
        suite.run_items(
            [suite.Item(part, case, effort)], providers, self.results, progress=Progress(self.path), **options
        )


@dataclass(frozen=True)
class Part:
    """A list of programs, each in a process of its own, and then a function in another.

    seconds: at most. run: the function. programs: what follows ``python`` on their command lines; PYTEST stands for the
    correctness suite, and WORKERS for as many processes as the device's memory holds, each replaced if it dies.
    tool: what the programs run under; WORK stands for the folder of the results. environment: the programs' own.
    collect: called at the end.
    """

    name: str
    seconds: float
    run: Callable[[Bench], None] | None = None
    programs: tuple[str, ...] = ()
    tool: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    collect: Callable[[Bench, Path], None] | None = None


def forked(part: Part, bench: Bench, log: Path) -> None:
    """The part's function in its own process, which writes to the log."""
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if bench.dry:
        torch.set_num_threads(1)
    assert part.run is not None
    try:
        part.run(bench)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        unusable = isinstance(error, UnusableError) or failure(error) is None
        os._exit(UNUSABLE if unusable else 1)  # a broken context may hang in its own clearing up
