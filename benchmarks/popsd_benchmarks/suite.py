"""The whole measurement, part by part, into one results file: resumable, a cell at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from popsd_benchmarks import plan, profiling, provenance
from popsd_benchmarks.measure import measure
from popsd_benchmarks.plan import PARTS
from popsd_benchmarks.providers import FLOOR, OURS, Provider
from popsd_benchmarks.providers import find as find_providers
from popsd_benchmarks.results import FINISHED, Cell, Results, load

__all__ = ["PARTS", "run", "run_items"]


def run(
    parts: Sequence[str] = ("table", "accuracy"),
    shapes: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    *,
    quick: bool = True,
    device: str = "cpu",
    out: Path | None = None,
    progress: Callable[[int, int, Cell], None] | None = None,
    time_budget: float | None = None,
) -> Results:
    """Measures every cell that ``out`` does not hold yet, or holds as failed, and returns all of them.

    Args:
        parts: of `PARTS`, in this order.
        shapes: names of `popsd_benchmarks.plan.SHAPES`; None: those that suit the device and ``quick``.
        providers: names of `popsd_benchmarks.providers.PROVIDERS`; None: all. The bare matmuls and popsd are always among
            them: shares and ratios are to theirs.
        quick: few rounds and small scaling curves; under two minutes on two cores.
        device: "cpu" or "cuda".
        out: the results file, written after every cell; one that exists is continued. None: nothing is written.
        progress: called after every cell with (cells done, cells planned, the cell).
        time_budget: seconds after which no other case is started; None: no limit.

    Raises ValueError for an unknown part, shape or provider, naming the valid ones, for ``out`` not a results file, and for
    one that was measured on another device or with other versions.
    """
    chosen_shapes = None if shapes is None else plan.find(shapes)
    chosen = find_providers(None if providers is None else [*providers, FLOOR, OURS.get(device, "")])
    if device not in OURS:
        raise ValueError(f"device: expected one of {', '.join(OURS)}; got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' on this machine; got 'cuda', which torch does not see.")
    work = [item for part in parts for item in plan.cases(part, chosen_shapes, quick=quick, device=device)]
    results = Results(provenance.describe(device))
    if out is not None and out.exists():
        results = provenance.continued(load(out), results.meta)
    if providers is not None:
        work = [replace(item, effort=replace(item.effort, compilers=True)) for item in work]
    run_items(work, chosen, results, out=out, progress=progress, time_budget=time_budget)
    return results


def run_items(
    work: Sequence[plan.Item],
    providers: Sequence[Provider],
    results: Results,
    *,
    out: Path | None = None,
    progress: Callable[[int, int, Cell], None] | None = None,
    time_budget: float | None = None,
    skip_failed: bool = False,
) -> None:
    """Measures what ``results`` lacks of these cases; ``out`` holds everything known at any time.

    skip_failed: leave failed cells as they are. Raises `popsd_benchmarks.measure.UnusableError`.
    """
    start, done = time.perf_counter(), 0
    missing = [[p.name for p in providers if _is_missing(results, item, p, skip_failed)] for item in work]

    def keep(cell: Cell) -> None:
        results.put(cell)
        if out is not None:
            results.save(out)

    for item, names in zip(work, missing, strict=True):
        if time_budget is not None and time.perf_counter() - start > time_budget:
            break
        if not names:
            continue
        # ratios are within a run: popsd and the floor run beside what is missing, though they may be known
        along = [p for p in providers if p.name in (*names, FLOOR, OURS[item.case.device])]
        new = profiling.profile if item.part == "profile" else measure
        for cell in new(item.part, item.case, along, item.effort, names, keep):
            keep(cell)
            done += 1
            if progress is not None:
                progress(done, sum(map(len, missing)), cell)


def _is_missing(results: Results, item: plan.Item, provider: Provider, skip_failed: bool) -> bool:
    """Whether the cell has to be measured: it is new, was stopped or failed, or can be measured by now."""
    key = Cell(part=item.part, provider=provider.name, case=item.case).key
    status = next((cell.status for cell in results.cells if cell.key == key), None)
    if status == "not installed":
        return provider.available() is None
    if status == "left out":
        return item.effort.compilers
    return status not in FINISHED and not (status == "failed" and skip_failed)
