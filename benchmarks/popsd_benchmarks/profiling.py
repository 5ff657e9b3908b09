"""Where a step's time goes: by kernel on a GPU, by operation on a CPU."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from popsd_benchmarks.measure import Effort, measure, seconds_of
from popsd_benchmarks.problems import make_problem
from popsd_benchmarks.providers import Provider
from popsd_benchmarks.results import Case, Cell

LARGEST = 12
"""Rows kept; the rest is summed up in one."""

BYTES_PER_ENTRY = {
    "row_statistics_kernel": {"purified": 16, "two": 8},
    "row_loss_gradient_kernel": {"purified": 18, "two": 18},
    "row_single_read_kernel": {"purified": 14, "two": 10},
}
"""What popsd's sweeps must move per token and vocabulary row at beta strictly between 0 and 1: float32 logits read (twice by
the loss and gradient sweep), the composed target written, the 16-bit gradient written. See kernels/README.md."""


def profile(
    part: str,
    case: Case,
    providers: Sequence[Provider],
    effort: Effort,
    wanted: Collection[str] | None = None,
    keep: Callable[[Cell], None] = lambda cell: None,
) -> Iterator[Cell]:
    """The cells of `measure`, with their kernels and those kernels' share of a copy's bandwidth."""
    by_name = {provider.name: provider for provider in providers}
    peak = copy_bandwidth() if case.device == "cuda" else None
    for cell in list(measure(part, case, providers, effort, wanted, keep)):
        if cell.seconds:
            try:
                cell.kernels = _kernels(by_name[cell.provider], case, peak)
            except RuntimeError as error:  # a profiler that the machine forbids must not cost the timing
                cell.note = f"{cell.note}; not profiled: {error}".removeprefix("; ")[:300]
        yield cell


def _kernels(provider: Provider, case: Case, peak: float | None) -> list[dict[str, Any]]:
    problem = make_problem(case)
    step = provider.prepare(problem)
    step()
    problem.clear()
    on_gpu = case.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in recorded.key_averages():
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
        per_entry = BYTES_PER_ENTRY.get(row["name"], {}).get(case.loss)
        if per_entry is not None and counted:
            row["bytes"] = per_entry * case.shape.tokens * (case.shape.used or case.shape.vocab)
            row["gb_per_s"] = row["bytes"] / row["seconds"] / 1e9
            if peak is not None:
                row["bandwidth_share"] = row["gb_per_s"] / peak
    del step, problem
    gc.collect()
    return rows


def copy_bandwidth() -> float:
    """GB/s, read and write together, of a 4 GiB copy on the GPU."""
    source = torch.empty(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), "cuda") for _ in range(10)]
    return 2 * source.nbytes / statistics.median(seconds) / 1e9
