"""One case, several providers: each in turn, round by round in one process, so that other load hits all of them alike."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from popsd_benchmarks import memory
from popsd_benchmarks.accuracy import Judge
from popsd_benchmarks.cases import Case
from popsd_benchmarks.others import Others
from popsd_benchmarks.problems import Problem, make_problem
from popsd_benchmarks.providers import Provider, Step
from popsd_benchmarks.results import Cell, Rounds, Status

T = TypeVar("T")
LARGEST = 12
"""Rows kept; the rest is summed up in one."""

BYTES_PER_ENTRY = {
    "row_statistics_kernel": {"purified": 16, "two": 8},
    "row_loss_gradient_kernel": {"purified": 18, "two": 18},
    "row_single_read_kernel": {"purified": 14, "two": 10},
}
"""What popsd's sweeps must move per token and vocabulary row at beta strictly between 0 and 1: float32 logits read (twice by
the loss and gradient sweep), the composed target written, the 16-bit gradient written. See kernels/README.md."""
JUDGED_ROWS = 64
WHOLE_TILES = 512
"""Tokens with which kernels take the path of large problems: with fewer a row is split among several programs."""
CPU_MEMORY_SHARE = 0.7
"""Of the machine's memory, above which full logits are not tried on a CPU."""
FIRST_STEP = "ended in its first step"
"""Note of a cell that is being tried: whose process dies then was killed by it."""
OUT_OF_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
BROKEN = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "device-side assert", "CUBLAS_", "CUDNN_", "cuDNN")


def described(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


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

    rounds: timed ones, after one that is dropped; 0: accuracy alone, whatever it is. seconds: of the rounds together, after
    which no other one starts, once there are three. peak: measure memory too. compilers: also what torch.compile compiles,
    which costs half a minute a case. judged_rows: see `Judge`.
    """

    rounds: int
    seconds: float = 60.0
    peak: bool = True
    compilers: bool = True
    judged_rows: int | None = None


def measure(
    part: str,
    case: Case,
    providers: Sequence[Provider],
    effort: Effort,
    keep: Callable[[Cell], None] = lambda cell: None,
) -> Iterator[Cell]:
    """A finished cell per provider, in order. What a provider raises becomes its cell's status; the others go on.

    keep: called with what is known of a cell, as "stopped", before its first step, after it and after every round. Raises
    UnusableError where a CUDA failure leaves nothing to go on with; the cell that met it has been kept as "failed".
    """
    if effort.compilers and any(provider.compiles for provider in providers):
        torch.compiler.reset()  # earlier cases' code would count against this one's limit of recompilations
    problem = make_problem(case)
    judge = Judge(problem, effort.judged_rows)
    runners = [_Runner(p, Cell(part=part, provider=p.name, case=case), problem, effort, keep) for p in providers]
    for runner in runners:
        runner.cell.note = runner.provider.remark(case)
        if (refusal := _refusal(runner.provider, case, effort)) is not None:
            runner.cell.status, runner.cell.note = refusal
        else:
            runner.save(FIRST_STEP)
            runner.attempt(lambda runner=runner: runner.first_step(judge))  # type: ignore[misc]
            runner.peak_on_cpu()
    others, start, late = Others(case.device), time.perf_counter(), None
    for i, runner in in_turns(runners, effort.rounds) if effort.rounds else ():
        if i == late:
            break
        if late is None and i >= 3 and time.perf_counter() - start > effort.seconds:
            late = i + 1  # the round that has begun is finished: every provider has as many
        if runner.step is not None:
            runner.attempt(runner.warm_up if i == 0 else runner.round)
    share = others.share()
    for runner in runners:
        runner.cell.seconds = Rounds.of(runner.seconds)
        runner.cell.others = share if runner.seconds else None
        yield runner.cell


@dataclass
class _Runner:
    provider: Provider
    cell: Cell
    problem: Problem
    effort: Effort
    keep: Callable[[Cell], None]
    step: Step | None = None
    seconds: list[float] = field(default_factory=list)

    def save(self, note: str) -> None:
        """As a cell whose measurement has not ended."""
        self.keep(replace(self.cell, status="stopped", seconds=Rounds.of(self.seconds), note=note))

    def note(self, text: str) -> None:
        self.cell.note = "; ".join(filter(None, [self.cell.note, text]))

    def attempt(self, what: Callable[[], object]) -> None:
        """An exception becomes the cell's status; its provider is taken out, and what it held is freed."""
        self.problem.clear()
        try:
            what()
            return
        except Exception as error:
            status, text = failure(error), described(error)
            self.cell.status = status or "failed"
            self.note(text)
            self.step, self.seconds = None, []
            if status is None:
                self.keep(self.cell)
                raise UnusableError(text) from error
        finally:
            self.problem.clear()
        gc.collect()  # here, where the exception is gone, whose frames held the tensors that did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def first_step(self, judge: Judge) -> None:
        """Everything but time: compilation, accuracy, and peak memory on a GPU."""
        step = self.provider.prepare(self.problem)
        loss = step()
        if self.provider.computes_loss:
            assert loss is not None
            self.cell.kl = judge.exact(self.provider.drops_padding).kl
            self.cell.errors = judge.errors(self.provider, loss)
            if self.effort.rounds and (complaint := judge.complaint(self.provider, self.cell.errors)):
                self.cell.status = "inaccurate"
                self.note(complaint)
            del loss
            if self.effort.rounds and self.effort.peak and self.cell.case.device != "cpu":
                self.problem.clear()
                # None: a graph replays within memory that it holds already
                self.cell.peak_mib = memory.peak_of(step, "cuda") or None
        self.step = step
        self.save(self.cell.note)

    def peak_on_cpu(self) -> None:
        """In a process of its own; on a GPU the first step has measured it."""
        case, wanted = self.cell.case, self.effort.rounds and self.effort.peak
        if wanted and case.device == "cpu" and self.step and self.provider.computes_loss:
            try:
                self.cell.peak_mib = memory.peak_on_cpu(self.provider, case)
            except Exception as error:  # a peer may fail in any way
                self.note(f"peak memory not measured: {error}")

    def warm_up(self) -> float:
        assert self.step is not None
        return seconds_of(self.step, self.cell.case.device)

    def round(self) -> None:
        self.seconds.append(self.warm_up())
        self.save(self.cell.note)


def _refusal(provider: Provider, case: Case, effort: Effort) -> tuple[Status, str] | None:
    """Why it cannot be measured here, or None."""
    if (refusal := provider.supports(case)) is not None:
        return "unsupported", refusal
    if (absence := provider.available()) is not None:
        return "not installed", absence
    if provider.compiles and not effort.compilers:
        return "left out", "takes half a minute to compile; measured where it is named"
    needed = provider.buffers[case.loss == "two"] * 4 * case.shape.tokens * case.shape.vocab
    if case.device == "cpu" and needed > CPU_MEMORY_SHARE * _memory_of_machine():
        return "out of memory", f"not tried: full logits would take about {needed / 2**30:.0f} GiB"
    return None


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


def _memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def add_kernels(cell: Cell, provider: Provider) -> None:
    """The kernels of a timed cell and their share of a copy's bandwidth; a note where the machine forbids a profiler."""
    case, problem = cell.case, make_problem(cell.case)
    step, on_gpu = provider.prepare(problem), case.device == "cuda"
    seconds_of(step, case.device)
    problem.clear()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
            seconds_of(step, case.device)
        events = recorded.key_averages()
    except RuntimeError as error:
        cell.note = f"{cell.note}; not profiled: {error}".removeprefix("; ")[:300]
        return
    rows = []
    for event in events:
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if seconds and (event.device_type == DeviceType.CPU) != on_gpu:
            rows.append({"name": event.key[:120], "seconds": seconds, "calls": event.count})
    rows.sort(key=lambda row: -row["seconds"])
    total = sum(row["seconds"] for row in rows)
    if rest := rows[LARGEST:]:
        sums = {name: sum(row[name] for row in rest) for name in ("seconds", "calls")}
        rows[LARGEST:] = [{"name": f"{len(rest)} others", **sums}]
    counted = 0 < case.beta < 1 and case.dtype != "float32" and case.shape.softcap is None
    for row in rows:
        row["share"] = row["seconds"] / total
        if counted and (per_entry := BYTES_PER_ENTRY.get(row["name"])):
            row["bytes"] = per_entry[case.loss] * case.shape.tokens * (case.shape.used or case.shape.vocab)
            row["gb_per_s"] = row["bytes"] / row["seconds"] / 1e9
            row["bandwidth_share"] = row["gb_per_s"] / copy_bandwidth() if on_gpu else None
    cell.kernels = rows


@cache
def copy_bandwidth() -> float:
    """GB/s, read and write together, of a 4 GiB copy on the GPU."""
    source = torch.empty(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), "cuda") for _ in range(10)]
    return 2 * source.nbytes / statistics.median(seconds) / 1e9
