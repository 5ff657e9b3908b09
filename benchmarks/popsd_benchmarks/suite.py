"""The whole measurement, part by part, into one results file: resumable, a cell at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from popsd_benchmarks.cells import Cell, Results

PARTS = ("table", "accuracy", "tokens", "vocab", "width", "profile")


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
    """Measures every cell that ``out`` does not hold yet, and returns all of them.

    Args:
        parts: of `PARTS`, in this order.
        shapes: names of `popsd_benchmarks.shapes.SHAPES`; None: those that suit the device and ``quick``.
        providers: names of `popsd_benchmarks.providers.PROVIDERS`; None: all. The bare products and popsd are always among
            them: shares and ratios are to theirs.
        quick: few rounds and small scaling curves; under two minutes on two cores.
        device: "cpu" or "cuda".
        out: the results file, written after every cell; one that exists is continued. None: nothing is written.
        progress: called after every cell with (cells done, cells planned, the cell).
        time_budget: seconds after which no other case is started; None: no limit.

    Raises ValueError for an unknown part, shape or provider, naming the valid ones, and for ``out`` not a results file.
    """
    raise NotImplementedError
