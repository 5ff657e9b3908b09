"""Results files to one Markdown page with plots, every figure beside the file, machine and commit it comes from.

What a person has to say about one, say why a target was missed, stands beside it under the same name in ``.md``.

python -m popsd_benchmarks.report benchmarks/results/*.json --output benchmarks/RESULTS.md
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from popsd_benchmarks.report import goals, plots, tables
from popsd_benchmarks.results import Results, load

Files = Sequence[tuple[Path, Results]]
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
PLOTS = "plots"
"""Folder beside the results files."""
PLOT_TITLES = {
    "accuracy": "Gradient accuracy",
    "scaling": "Time and memory as one size grows, the others fixed",
    "table": "Time and memory by shape",
}
UNMEASURED = {
    "cuda": "**Nothing on this page was measured on a GPU**: the Triton kernels of popsd, Liger and TRL have no speed, memory "
    "or accuracy figure here. `benchmarks/gpu/README.md` has the two commands that make them in ten minutes on one GPU.",
    "cpu": "**Nothing on this page was measured on a CPU.** `popsd bench --full` makes the figures.",
}
"""What a reader might take for granted."""
READING = """\
How to read the tables: times are medians and quartiles of forward and backward together, of rounds in which every provider
has its turn; a ratio is that of two medians of one run. The floor is the matmuls that the loss needs, alone. Peak memory is
above the inputs: of the allocator on a GPU, of the resident set of a fresh process on a CPU. Errors are relative (L2) against
float64 on the same inputs; `dH` is the gradient of the student's hidden states. A provider with an error beyond the bounds is
marked `inaccurate` beside its time. Inputs: logits with a bulk of standard deviation 2 and four favourites 6 to 14 above it
per token (`popsd_benchmarks/problems.py`)."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of popsd bench or benchmarks/gpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/RESULTS.md"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    files = read(options.results)
    for path, results in files:
        plots.draw(results, path.parent / PLOTS, f"{path.stem}-")
    options.output.write_text(page(files, options.output), encoding="utf-8")
    print(f"Written: {options.output}")
    return 0


def read(paths: Sequence[Path]) -> Files:
    """In the order of their names. Raises ValueError for one that is not a results file."""
    return [(path, load(path)) for path in sorted(paths)]


def page(files: Files, output: Path) -> str:
    """The Markdown, with links as seen from ``output``."""
    linked = {os.path.relpath(path, output.parent): results for path, results in files}
    sources = " ".join(os.path.join(output.parent.name, link) for link in linked)
    command = f"python -m popsd_benchmarks.report {sources} --output {os.path.join(output.parent.name, output.name)}"
    measured = {cell.case.device for _, file in files for cell in file.cells if cell.seconds or cell.errors}
    unmeasured = [text for device, text in UNMEASURED.items() if device not in measured]
    blocks = [
        "# Measured",
        f"Generated from the files below; do not edit. `make report`, that is `{command}`.",
        "\n".join(unmeasured or ["Measured on CPU and GPU; each section says on which."]),
        tables.as_markdown(_machines(linked), left=6),
        READING,
        "## Goals",
        "Largest values that count as met. One row per file that has the figure; ratios come from one run each.",
        tables.as_markdown(_goals(linked), left=2),
    ]
    for path, results in files:
        blocks += _section(results, path, output)
    return "\n\n".join(blocks) + "\n"


def _machines(linked: dict[str, Results]) -> tables.Rows:
    rows = [["file", "date", "device", "commit", "command", "versions"]]
    for link, meta in ((link, results.meta) for link, results in linked.items()):
        sessions = [meta, *meta.get("continued", [])]
        commits = ", ".join(dict.fromkeys(str(session["commit"]) for session in sessions))
        commands = ", ".join(dict.fromkeys(f"`{session['command']}`" for session in sessions))
        rows.append(
            [f"[{link}]({link})", meta["date"][:10], tables.machine(meta), commits, commands, tables.versions(meta)]
        )
    return rows


def _goals(linked: dict[str, Results]) -> tables.Rows:
    rows = [["on", "goal", "at most", "measured", "verdict", "file"]]
    for device, name in DEVICES.items():
        for verdicts in zip(*(goals.judge(device, results) for results in linked.values()), strict=True):
            goal = [name, verdicts[0].claim, f"{verdicts[0].most:.3g}"]
            measured = [(v, link) for v, link in zip(verdicts, linked, strict=True) if v.value is not None]
            rows += [[*goal, f"{v.value:.3g}", "met" if v.word == "met" else f"**{v.word}**", x] for v, x in measured]
            rows += [] if measured else [[*goal, "–", "not measured", ""]]
    return rows


def _section(results: Results, path: Path, output: Path) -> list[str]:
    link, folder = (os.path.relpath(x, output.parent) for x in (path, path.parent / PLOTS))
    blocks = [f"## {tables.machine(results.meta)}: {path.stem}", f"From `{link}`."]
    if (remarks := path.with_suffix(".md")).exists():
        blocks.append(remarks.read_text(encoding="utf-8").strip())
    drawn = list(plots.figures(results))
    for kind, title in PLOT_TITLES.items():
        if images := [f"![{name}]({folder}/{path.stem}-{name}.png)" for name in drawn if name.split("-")[0] == kind]:
            blocks += [f"### {title}", *images]
    blocks.append("### Tables")
    for table in tables.all_tables(results.cells):
        blocks += [f"**{table.title}**", tables.as_markdown(table.rows)]
        if notes := [*table.notes, *table.absent]:
            blocks.append("\n".join(f"- {note}" for note in notes))
    return blocks
