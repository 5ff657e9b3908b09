"""Peak memory of one step above its inputs: the allocator's count on a GPU, a fresh process's resident set on a CPU."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from popsd_benchmarks.cases import Case
from popsd_benchmarks.problems import make_problem
from popsd_benchmarks.providers import Provider

MIB = 2**20


def reset_peak(device: str) -> float:
    """Begins to watch for a peak; MiB at present. On a CPU it is that of this process's resident set (Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM, the high-water mark, is the present size
    return _resident("VmRSS")


def peak(device: str) -> float:
    """MiB at most since then."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB
    return _resident("VmHWM")


def peak_of(step: Callable[[], object], device: str) -> float:
    """MiB at most during a step, above what there was when it began."""
    before = reset_peak(device)
    step()
    return peak(device) - before


def peak_on_cpu(provider: Provider, case: Case) -> float:
    """`peak_of` a step in a fresh process. Raises what it raised there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, provider, case, torch.get_num_threads()).result()


def _peak_here(provider: Provider, case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    small = replace(case.shape, tokens=4, vocab=64, width=64, used=None)
    provider.prepare(make_problem(replace(case, shape=small)))()  # threads and library buffers are no part of the loss
    problem = make_problem(case)
    step = provider.prepare(problem)
    if provider.compiles:
        step()
        problem.clear()
    return peak_of(step, "cpu")


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024
