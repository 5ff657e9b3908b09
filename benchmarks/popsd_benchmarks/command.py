"""``popsd bench``: popsd beside its peers on this machine, as a table, JSON, CSV and plots."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from popsd_benchmarks.cases import LOOKS, OURS, PARTS, SHAPES
from popsd_benchmarks.report import plots, tables
from popsd_benchmarks.results import Cell, Results
from popsd_integrations.commandline.suggest import Parser

QUICK_PARTS = ("table", "accuracy")
QUICK_SECONDS = 90.0
PEERS = "pip install liger-kernel orda-kernel trl"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; returns the exit status. Raises ValueError on bad input."""
    options = parse_options(arguments)
    folder: Path = options.output_dir
    progress = Progress(folder / "results.json")
    progress.say("importing PyTorch")
    import torch

    from popsd_benchmarks.suite import run

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = options.parts or (PARTS if options.full else QUICK_PARTS)
    how = {"quick": not options.full, "device": device, "seconds": options.seconds}
    try:
        results = run(
            parts, options.shapes, options.providers, **how, out=progress.out, begin=progress.begin, progress=progress
        )
    except KeyboardInterrupt:
        print(f"{progress.done + progress.kept} cells are kept in {progress.out}.", file=sys.stderr)
        raise
    print(report(results))
    if any(cell.status == "not installed" for cell in results.cells):
        print(f"\nThe peers that are not installed: {PEERS}")
    tables.write_csv(results.cells, folder / "results.csv")
    drawn = []
    try:
        drawn = plots.draw(results, folder)
    except ImportError:
        print("No plots: matplotlib is missing (pip install 'popsd[bench]').")
    written = ", ".join(map(str, [progress.out, folder / "results.csv", *drawn]))
    print("\n".join(filter(None, ["", tables.disturbance(results.cells), progress.closing(), f"Written: {written}"])))
    return 0


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits at once on what cannot be: nothing that takes time is imported before."""
    parser = Parser(
        prog="popsd bench",
        description="Time, peak memory and gradient accuracy of popsd beside eager PyTorch, torch.compile, TRL, Liger and "
        f"orda-kernel, in turns within one process. The peers: {PEERS}.",
    )
    add = parser.add_argument
    add("--device", choices=list(OURS), help="where to measure (a GPU that torch sees, else the CPU)")
    add(
        "--seconds",
        type=float,
        help=f"about how long to measure: as many rounds as fit ({QUICK_SECONDS:.0f}, no limit with --full)",
    )
    add("--full", action="store_true", help="every part and the scaling curves: half an hour or more")
    providers, shapes, parts = (f"some of {', '.join(names)}" for names in (LOOKS, SHAPES, PARTS))
    add("--providers", "--provider", nargs="+", metavar="PROVIDER", type=_provider,
        help=f"{providers}; or module:Class of one's own, which is measured beside the others")  # fmt: skip
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=shapes)
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=parts)
    add("--output_dir", type=Path, default=Path("runs/bench"), help="where results go (%(default)s)")
    options = parser.parse_args(arguments)
    if options.seconds is None and not options.full:
        options.seconds = QUICK_SECONDS
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        parser.error(f"argument --seconds: expected more than 0; got {options.seconds:g}")
    return options


def _provider(name: str) -> str:
    module, _, attribute = name.partition(":")
    if name not in LOOKS and not (module and attribute):
        known = ", ".join(map(repr, LOOKS))
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {known}) or module:Class")
    return name


class Progress:
    """A line per finished cell on the error stream, which leaves the table alone on the other. out: the results' file."""

    def __init__(self, out: Path) -> None:
        self.done = self.planned = self.kept = 0
        self.out, self.start = out, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def say(self, text: str) -> None:
        print(f"[{self.seconds:.0f} s] {text}".rstrip(), file=sys.stderr, flush=True)

    def begin(self, known: Results, cases: int) -> None:
        """Where it is measured, before anything is. The folder of the results is made here, when all names are known."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.kept = len(known.cells)
        self.say(f"{tables.machine(known.meta)}; {cases} cases; results in {self.out}")

    def __call__(self, done: int, planned: int, cell: Cell) -> None:
        self.done, self.planned = done, planned
        figures = [f"{tables.significant(tables.milliseconds(cell))} ms"] if cell.seconds else []
        if not figures and "dhidden" in cell.errors:
            figures.append(f"dH error {cell.errors['dhidden']:.1e}")
        status = {"ok": "", "stopped": "is timed next"}.get(cell.status, cell.status)
        where = f"{cell.part}: {cell.case.loss}, {tables.setting(cell.case)}"
        self.say(
            f"{done}/{planned} {where}: {cell.provider} {' '.join([*figures, status, tables.disturbance([cell])])}"
        )

    def closing(self) -> str:
        if left := self.planned - self.done:
            return f"Stopped after {self.seconds:.0f} s with {left} cells to go: the same command resumes."
        if not self.done:
            another = "To measure again delete it, or name another --output_dir."
            return f"Nothing to do: {self.out} has all {self.kept} cells. {another}"
        return f"{self.done} cells in {self.seconds:.0f} s" + (
            f", {self.kept} kept from earlier." if self.kept else "."
        )


def report(results: Results) -> str:
    """Every part as text for the terminal."""
    blocks = []
    for table in tables.all_tables(results.cells):
        notes = [*(f"  * {note}" for note in table.notes), *(f"  - {absent}" for absent in table.absent)]
        blocks.append("\n".join([table.title, tables.as_text(table.rows), *notes]))
    meta = results.meta
    return "\n\n".join(["", *blocks, f"{tables.machine(meta)}; commit {meta['commit']}; {tables.versions(meta)}"])
