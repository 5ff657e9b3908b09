"""One case, several providers: each in turn, round by round in one process, so that other load hits all of them alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from popsd_benchmarks import memory
from popsd_benchmarks.accuracy import Judge
from popsd_benchmarks.problems import Problem, make_problem, operations
from popsd_benchmarks.providers import FLOOR, OURS, Provider, Step
from popsd_benchmarks.results import Case, Cell, Rounds, Status

T = TypeVar("T")

JUDGED_ROWS = 64
WHOLE_TILES = 512
"""Tokens with which kernels take the path of large problems: with fewer a row is split among several programs."""
QUIET = 0.1
"""Share of the machine that others may take before the cells say so: with as many threads as cores, one that waits holds
up all, and a step on two cores took ten times as long beside two busy processes."""
CPU_MEMORY_SHARE = 0.7
"""Of the machine's memory, above which full logits are not tried on a CPU."""
FIRST_STEP = "ended in its first step"
"""Note of a cell that is being tried: whose process dies then was killed by it."""
OUT_OF_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
BROKEN = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "device-side assert", "CUBLAS_", "CUDNN_", "cuDNN")


class UnusableError(RuntimeError):
    """A CUDA failure after which every later call in this process fails too."""


def failure(error: BaseException) -> Status | None:
    """ "out of memory", the one CUDA failure that a process survives; None for the others, which it does not; or "failed"."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(mark in text for mark in OUT_OF_MEMORY):
        return "out of memory"
    return None if "AcceleratorError" in text or any(mark in text for mark in BROKEN) else "failed"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much to spend on a case.

    rounds: timed ones, after one that is dropped; 0: accuracy alone. seconds: when no other round starts, once there are
    three. peak: measure memory too. gate: withhold "ok" from what breaks the bounds of accuracy. compilers: also what
    torch.compile compiles, which costs half a minute a case. judged_rows: see `Judge`.
    """

    rounds: int
    seconds: float = 60.0
    peak: bool = True
    gate: bool = True
    compilers: bool = True
    judged_rows: int | None = None


@dataclass
class _Runner:
    provider: Provider
    cell: Cell
    keep: Callable[[Cell], None]
    step: Step | None = None
    seconds: list[float] = field(default_factory=list)

    def save(self, note: str) -> None:
        """As a cell whose measurement has not ended."""
        self.keep(replace(self.cell, status="stopped", seconds=Rounds.of(self.seconds), note=note))

    def note(self, text: str) -> None:
        self.cell.note = "; ".join(filter(None, [self.cell.note, text]))


def measure(
    part: str,
    case: Case,
    providers: Sequence[Provider],
    effort: Effort,
    wanted: Collection[str] | None = None,
    keep: Callable[[Cell], None] = lambda cell: None,
) -> Iterator[Cell]:
    """A finished cell per provider whose name is ``wanted`` (None: every one), in order; the others only run beside them.

    What a provider raises becomes its cell's status; the others go on. keep: called with what is known of a wanted cell,
    as "stopped", before its first step, after it and after every round. Raises UnusableError where a CUDA failure leaves
    nothing to go on with; the cell that met it has been kept as "failed".
    """
    if effort.compilers and any(provider.compiles for provider in providers):
        torch.compiler.reset()  # earlier cases' code would count against this one's limit of recompilations
    problem = make_problem(case)
    judge = Judge(problem, effort.judged_rows)
    names = {provider.name for provider in providers} if wanted is None else wanted
    runners = [
        _Runner(p, Cell(part=part, provider=p.name, case=case), keep if p.name in names else lambda cell: None)
        for p in providers
    ]
    for runner in runners:
        if not _refused(runner, effort):
            runner.save(FIRST_STEP)
            _attempt(runner, problem, partial(_first_step, runner, problem, judge, effort))
    if effort.rounds:
        start = processor_times()
        _time_rounds(runners, problem, effort)
        _compare(runners, case)
        wall, busy, own = (now - then for now, then in zip(processor_times(), start, strict=True))
        others = max(busy - own, 0.0) / (wall * (os.cpu_count() or 1))
        for runner in runners:
            if runner.seconds and others > QUIET:
                runner.note(f"other processes took {others:.0%} of the machine meanwhile")
    for runner in runners:
        if runner.provider.name in names:
            if effort.peak and case.device == "cpu" and runner.step is not None and runner.provider.computes_loss:
                try:
                    runner.cell.peak_mib = memory.peak_on_cpu(runner.provider, case)
                except Exception as error:  # a peer may fail in any way
                    runner.note(f"peak memory not measured: {error}")
            yield runner.cell


def _refused(runner: _Runner, effort: Effort) -> bool:
    """Whether it cannot be measured here; the cell says why."""
    provider, cell, case = runner.provider, runner.cell, runner.cell.case
    cell.note = provider.remark(case)
    needed = provider.full_buffers(case) * 4 * case.shape.tokens * case.shape.vocab
    found: tuple[Status, str] | None = None
    if (refusal := provider.supports(case)) is not None:
        found = "unsupported", refusal
    elif (absence := provider.available()) is not None:
        found = "not installed", absence
    elif provider.compiles and not effort.compilers:
        found = "left out", "takes half a minute to compile; measured where it is named"
    elif case.device == "cpu" and needed > CPU_MEMORY_SHARE * _memory_of_machine():
        found = "out of memory", f"not tried: full logits would take about {needed / 2**30:.0f} GiB"
    if found is not None:
        cell.status, cell.note = found
    return found is not None


def _first_step(runner: _Runner, problem: Problem, judge: Judge, effort: Effort) -> None:
    """Everything but time: compilation, accuracy, and peak memory on a GPU."""
    provider, cell = runner.provider, runner.cell
    step = provider.prepare(problem)
    loss = step()
    if provider.computes_loss:
        assert loss is not None
        cell.kl = judge.exact(provider.drops_padding).kl
        cell.errors = judge.errors(provider, loss)
        complaint = judge.complaint(provider, cell.errors)
        if complaint is not None and effort.gate:
            cell.status = "inaccurate"
            runner.note(complaint)
        del loss
        if effort.peak and problem.case.device != "cpu":
            problem.clear()
            cell.peak_mib = memory.peak_of(step, "cuda") or None  # a graph replays within memory that it holds already
    runner.step = step
    runner.save(cell.note)


def _time_rounds(runners: list[_Runner], problem: Problem, effort: Effort) -> None:
    """Seconds of every provider, paired by round."""

    def timed(runner: _Runner, counts: bool) -> None:
        assert runner.step is not None
        seconds = seconds_of(runner.step, problem.case.device)
        if counts:
            runner.seconds.append(seconds)
            runner.save(runner.cell.note)

    start, late = time.perf_counter(), None
    for i, runner in in_turns(runners, effort.rounds):
        if i == late:
            break
        if late is None and i >= 3 and time.perf_counter() - start > effort.seconds:
            late = i + 1  # the round that has begun is finished: ratios need all of it
        if runner.step is not None:
            _attempt(runner, problem, partial(timed, runner, i > 0))


def in_turns(contestants: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Every contestant once per round, each round starting with another one. Round 0 is to be thrown away."""
    for i in range(rounds + 1):
        shift = i % len(contestants)
        yield from ((i, one) for one in [*contestants[shift:], *contestants[:shift]])


def seconds_of(step: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _compare(runners: list[_Runner], case: Case) -> None:
    seconds = {runner.provider.name: runner.seconds for runner in runners}
    ours, floor = seconds.get(OURS[case.device]), seconds.get(FLOOR)
    for runner in runners:
        cell, found = runner.cell, runner.seconds
        if found:
            cell.seconds = Rounds.of(found)
            cell.tflops = operations(case) / statistics.median(found) / 1e12
            cell.ratios = Rounds.of([a / b for a, b in zip(found, ours, strict=True)]) if ours else None
            cell.floor_share = statistics.median(b / a for a, b in zip(found, floor, strict=True)) if floor else None


def _attempt(runner: _Runner, problem: Problem, what: Callable[[], None]) -> None:
    """An exception becomes the cell's status; its provider is taken out, and what it held is freed."""
    problem.clear()
    try:
        what()
        return
    except Exception as error:
        status, text = failure(error), f"{type(error).__name__}: {error}".splitlines()[0][:300]
        runner.cell.status = status or "failed"
        runner.note(text)
        runner.step, runner.seconds = None, []
        if status is None:
            runner.keep(runner.cell)
            raise UnusableError(text) from error
    finally:
        problem.clear()
    gc.collect()  # here, where the exception is gone, whose frames held the tensors that did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def processor_times() -> tuple[float, float, float]:
    """Seconds: of the clock, of all processors at work, of this process. The second is 0 where /proc does not tell."""
    try:
        ticks = sum(map(int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:4]))
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
    except (OSError, ValueError):
        return time.perf_counter(), 0.0, time.process_time()


def _memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
