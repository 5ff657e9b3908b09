"""Everything about speed, memory and accuracy on the GPU at hand, in one command of at most ten minutes.

    PYTHONPATH=.:kernels:benchmarks python benchmarks/gpu/run.py --out results.json

Needs torch and Triton only; TRL, Liger and orda-kernel are measured where they can be imported. Writes after every cell and
continues a file that exists, so that a killed run keeps what it has and `--parts` can take the rest later. The most telling
cases come first: `--seconds` after the start no other one is begun.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from popsd_benchmarks import suite
from popsd_benchmarks.cells import Cell

PARTS = ("table", "profile", "accuracy", "tokens", "vocab", "width")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order (%(default)s)")
    parser.add_argument("--shapes", help="comma-separated; those of the table and of the curves if not given")
    parser.add_argument("--providers", help="comma-separated; all if not given")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds")
    parser.add_argument("--seconds", type=float, default=540, help="budget (%(default)s)")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    start = time.perf_counter()

    def show(done: int, planned: int, cell: Cell) -> None:
        print(f"{time.perf_counter() - start:4.0f} s {done}/{planned} {line(cell)}", flush=True)

    try:
        results = suite.run(
            options.parts.split(","),
            options.shapes and options.shapes.split(","),
            options.providers and options.providers.split(","),
            quick=options.quick,
            device=options.device,
            out=options.out,
            progress=show,
            time_budget=options.seconds,
        )
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    print()
    for cell in results.cells:
        if cell.part == "table" and (cell.seconds or cell.status in ("out of memory", "failed")):
            print(line(cell))
    return 0


def line(cell: Cell) -> str:
    """A cell on a line."""
    case, shape = cell.case, cell.case.shape
    head = "trained" if case.trainable_head else "frozen"
    text = (
        f"{cell.part} {case.loss} N {shape.tokens} V {shape.vocab} D {shape.width} {head} beta {case.beta} {case.dtype}"
    )
    if cell.part == "accuracy":
        text += f" spread {case.spread}"
    figures = [f"{cell.provider:18}"]
    if cell.status != "ok":
        figures.append(f"{cell.status} ({cell.note})")
    if cell.seconds:
        figures.append(f"{1e3 * statistics.median(cell.seconds):.2f} ms")
    if cell.ratios:
        figures.append(f"{statistics.median(cell.ratios):.2f} x popsd")
    if cell.floor_share is not None:
        figures.append(f"{cell.floor_share:.0%} of floor, {cell.tflops:.3g} TFLOP/s")
    if cell.peak_mib is not None:
        figures.append(f"{cell.peak_mib:.0f} MiB")
    figures += [f"{name} {error:.1e}" for name, error in cell.errors.items()]
    for row in cell.kernels[:5]:
        figures.append(f"\n      {row['share']:4.0%} {1e3 * row['seconds']:8.3f} ms {row['calls']:5} x {row['name']}")
        if "bandwidth_share" in row:
            figures.append(f"{row['gb_per_s']:.0f} GB/s, {row['bandwidth_share']:.0%} of a copy's")
    return f"{text}: " + " ".join(figures)


if __name__ == "__main__":
    sys.exit(main())
