"""``popsd bench``: popsd beside its peers on this machine, as a table, JSON, CSV and plots."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popsd_benchmarks.problems import SHAPES
from popsd_benchmarks.providers import PROVIDERS
from popsd_benchmarks.report import plots, tables
from popsd_benchmarks.results import Cell, Results, load
from popsd_benchmarks.suite import PARTS, run

QUICK_PARTS = ("table", "accuracy")
QUICK_SECONDS = 90.0
"""After which a quick run starts no other case: it promises two minutes."""
PEERS = "pip install liger-kernel orda-kernel trl"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; returns the exit status. Raises ValueError on bad input."""
    parser = argparse.ArgumentParser(
        prog="popsd bench",
        description="Time, peak memory and gradient accuracy of popsd beside eager PyTorch, torch.compile, TRL, Liger and "
        f"orda-kernel, each round by round in one process. The peers: {PEERS}.",
    )
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU (default: the CPU)")
    everything = "every part, more rounds, the scaling curves: half an hour or more"
    parser.add_argument("--full", action="store_true", help=everything)
    for name, valid in (("providers", PROVIDERS), ("shapes", SHAPES), ("parts", PARTS)):
        shown = f"some of {', '.join(valid)}"
        parser.add_argument(f"--{name}", nargs="+", choices=list(valid), metavar=name[:-1].upper(), help=shown)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where results go (%(default)s)")
    options = parser.parse_args(arguments)
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "results.json"
    kept = len(load(out).cells) if out.exists() else 0
    progress = Progress()
    effort: dict[str, Any] = {"quick": not options.full, "time_budget": None if options.full else QUICK_SECONDS}
    effort |= {"device": "cuda" if options.gpu else "cpu", "out": out, "progress": progress}
    try:
        parts = options.parts or (PARTS if options.full else QUICK_PARTS)
        results = run(parts, options.shapes, options.providers, **effort)
    except KeyboardInterrupt:
        print(f"{progress.done + kept} cells are kept in {out}.", file=sys.stderr)
        raise
    print(report(results))
    if any(cell.status == "not installed" for cell in results.cells):
        print(f"\nThe peers that are not installed: {PEERS}")
    if (left := progress.planned - progress.done) > 0:
        closing = f"Stopped after {QUICK_SECONDS:.0f} s with {left} cells to go: the same command resumes."
    elif not progress.done:
        closing = (
            f"Nothing to do: {out} has all {kept} cells. To measure again delete it, or name another --output-dir."
        )
    else:
        earlier = f", {kept} kept from earlier" if kept else ""
        closing = f"{progress.done} cells in {progress.seconds:.0f} s{earlier}."
    tables.write_csv(results.cells, folder / "results.csv")
    drawn = []
    try:
        drawn = plots.draw(results, folder)
    except ImportError:
        print("No plots: matplotlib is missing (pip install 'popsd[bench]').")
    print(f"\n{closing}\nWritten: {', '.join(map(str, [out, folder / 'results.csv', *drawn]))}")
    return 0


class Progress:
    """One line per finished cell on the error stream, which leaves the table alone on the other."""

    def __init__(self) -> None:
        self.done = self.planned = 0
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def __call__(self, done: int, planned: int, cell: Cell) -> None:
        self.done, self.planned = done, planned
        figure = f"{tables.significant(tables.milliseconds(cell))} ms" if cell.seconds else ""
        if not figure and "dhidden" in cell.errors:
            figure = f"dH error {cell.errors['dhidden']:.1e}"
        status = "" if cell.status == "ok" else cell.status
        where = f"{cell.part}: {cell.case.loss}, {tables.setting(cell.case)}"
        line = f"[{done}/{planned}, {self.seconds:.0f} s] {where}: {cell.provider} {figure} {status}"
        print(line.rstrip(), file=sys.stderr, flush=True)


def report(results: Results) -> str:
    """Every part as text for the terminal."""
    blocks = []
    for table in tables.all_tables(results.cells):
        notes = [*(f"  * {note}" for note in table.notes), *(f"  - {absent}" for absent in table.absent)]
        blocks.append("\n".join([table.title, tables.as_text(table.rows), *notes]))
    meta = results.meta
    return "\n\n".join(["", *blocks, f"{meta['device']}; commit {meta['commit']}; {tables.versions(meta)}"])
