"""Which cases each part measures, and the run over them into one results file: resumable, a cell at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from popsd_benchmarks.cases import CPU_SHAPE, FLOOR, LOSSES, OURS, PARTS, SHAPES, Case, Shape
from popsd_benchmarks.measure import JUDGED_ROWS, WHOLE_TILES, Effort, add_kernels, measure
from popsd_benchmarks.providers import PROVIDERS, Provider, own
from popsd_benchmarks.results import FINISHED, Cell, Results, describe, load

Progress = Callable[[int, int, Cell], None]
GPU_TABLE = ("qwen3-1.7b", "qwen3-8b", "gemma-2-2b", "llama-3-8b", "qwen3-4b")
SPREADS = (0.003, 0.008, 0.02, 0.05, 0.12, 0.3, 0.7, 1.6)
"""KL(target ‖ student) from about 1e-4 to 3 nats."""
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"tokens": (256, 1024, 4096, 16384), "vocab": (8192, 32768, 131072, 262144), "width": (128, 512, 2048)},
    "cuda": {
        "tokens": (256, 1024, 4096, 16384, 65536),
        "vocab": (32768, 65536, 131072, 262144),
        "width": (1024, 2048, 4096, 8192),
    },
}
"""Of the scaling curves."""
MOST_ROUNDS = 99
UNTIMED = 0.05
"""What a case that is not timed takes of the seconds of one that is, about."""


class Item(NamedTuple):
    part: str
    case: Case
    effort: Effort

    def shared(self, seconds: float) -> "Item":
        """With as many rounds as fit into its share of the seconds; untimed as it is."""
        rounds = MOST_ROUNDS if self.effort.rounds else 0
        return self._replace(effort=replace(self.effort, rounds=rounds, seconds=seconds))


def run(
    parts: Sequence[str],
    shapes: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    *,
    quick: bool = True,
    device: str = "cpu",
    out: Path | None = None,
    begin: Callable[[Results, int], None] | None = None,
    **how: Any,
) -> Results:
    """Measures what ``out`` does not hold yet, or holds as failed, and returns all of it; ``how``: as in `run_items`.

    parts, shapes, providers: names in `PARTS`, `SHAPES` and `PROVIDERS`, or module:name of a provider of one's own, see
    `popsd_benchmarks.providers.own`; None: the shapes that suit the device, and all providers. popsd and the bare matmuls are
    always among them: ratios are to theirs. quick: few rounds, small curves. begin: called before anything is measured, with
    what is known and how many cases there are.

    Raises ValueError for an unknown name, for ``out`` not a results file, and for one of another device or other versions.
    """
    given = None if providers is None else [name for name in providers if ":" not in name]
    own_ones = [provider for name in providers or () if ":" in name for provider in own(name)]
    valid = {"parts": (parts, PARTS), "shapes": (shapes, SHAPES), "providers": (given, PROVIDERS)}
    for argument, (names, known) in (valid | {"device": ([device], OURS)}).items():
        if unknown := [name for name in names or () if name not in known]:
            raise ValueError(f"{argument}: expected {', '.join(known)}; got {', '.join(unknown)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' on this machine; got 'cuda', which torch does not see.")
    chosen = [SHAPES[name] for name in shapes or ()]
    work = [item for part in parts for item in cases(part, chosen, quick=quick, device=device)]
    if given:
        work = [item._replace(effort=replace(item.effort, compilers=True)) for item in work]
        given += [FLOOR, OURS[device]]
    beside = [*(provider for name, provider in PROVIDERS.items() if not given or name in given), *own_ones]
    results = Results(describe(device))
    if out is not None and out.exists():
        results = load(out).continued(results.meta)
    if begin is not None:
        begin(results, len(work))
    run_items(work, beside, results, out=out, **how)
    return results


def run_items(
    work: Sequence[Item],
    providers: Sequence[Provider],
    results: Results,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    seconds: float | None = None,
    skip_failed: bool = False,
    whole: bool = True,
) -> None:
    """Measures what ``results`` lacks of these cases.

    out: written after every cell, and after every round of one. progress: called after every cell, and before the first ones'
    rounds, with (cells done, cells planned, the cell). seconds: shared out as rounds among the cases that are timed; when
    they are over no other case is started. skip_failed: failed cells stay as they are. whole: a case that lacks a time is
    measured again with all who have one, since times are compared; False: what is missing alone, where a part of a run on a GPU
    has seconds only. Raises `popsd_benchmarks.measure.UnusableError`.
    """
    start, done = time.perf_counter(), 0
    plan = [(item, _to_measure(results, item, providers, skip_failed, whole)) for item in work]
    plan = [(item, beside) for item, beside in plan if beside]
    planned = sum(len(beside) for _, beside in plan)

    def keep(cell: Cell) -> None:
        results.put(cell)
        if out is not None:
            results.save(out)
        if progress is not None and not done and cell.status == "stopped" and cell.errors and not cell.seconds:
            progress(done, planned, cell)

    for number, (item, beside) in enumerate(plan):
        if seconds is not None:
            left = seconds - (time.perf_counter() - start)
            if left < 0:
                break
            shares = sum(1.0 if item.effort.rounds else UNTIMED for item, _ in plan[number:])
            item = item.shared(left / shares)
        names = {provider.name: provider for provider in beside}
        if (
            item.effort.rounds and whole
        ):  # one of another run, that cannot be measured again, would be compared with this one's
            here = (item.part, item.case)
            results.cells = [
                c for c in results.cells if c.provider in names or not c.seconds or here != (c.part, c.case)
            ]
        for cell in measure(item.part, item.case, beside, item.effort, keep):
            if item.part == "profile" and cell.seconds:
                add_kernels(cell, names[cell.provider])
            keep(cell)
            done += 1
            if progress is not None:
                progress(done, planned, cell)


def _to_measure(
    results: Results, item: Item, providers: Sequence[Provider], skip_failed: bool, whole: bool
) -> list[Provider]:
    """Nobody where all is known."""
    missing = [provider for provider in providers if _is_missing(results, item, provider, skip_failed)]
    if not (missing and item.effort.rounds and whole):
        return missing
    known = {cell.provider: cell for cell in results.cells if (cell.part, cell.case) == (item.part, item.case)}
    timed = [name for name, cell in known.items() if cell.seconds]
    return [
        p for p in {p.name: p for p in (*providers, *PROVIDERS.values())}.values() if p in missing or p.name in timed
    ]


def _is_missing(results: Results, item: Item, provider: Provider, skip_failed: bool) -> bool:
    """Whether the cell has to be measured: it is new, was stopped or failed, or can be measured by now."""
    key = Cell(part=item.part, provider=provider.name, case=item.case).key
    status = next((cell.status for cell in results.cells if cell.key == key), None)
    if status == "not installed":
        return provider.available() is None
    if status == "left out":
        return item.effort.compilers
    return status not in FINISHED and not (status == "failed" and skip_failed)


def cases(part: str, shapes: Sequence[Shape], *, quick: bool, device: str) -> Iterator[Item]:
    """Of a part, the most telling first; of the device's usual shapes where none is given."""
    cpu, few = device == "cpu", quick or None
    usual = CPU_SHAPE if cpu else SHAPES["qwen3-1.7b"]
    usual = replace(usual, tokens=256, vocab=16384, width=256) if cpu and quick else usual
    case = Case(loss="purified", shape=usual, dtype="float32" if cpu else "bfloat16", device=device)
    if part == "table":
        effort = Effort(rounds=3 if quick else 9, seconds=10 if quick else 60, compilers=not quick)
        effort = effort if cpu else replace(effort, judged_rows=JUDGED_ROWS)
        heads, dtypes = (False, True)[:few], ("float32", "bfloat16")[:few] if cpu else ("bfloat16",)
        chosen = shapes or ([usual] if cpu else [SHAPES[name] for name in GPU_TABLE[: few and 2]])
        variants = [replace(case, shape=x, dtype=y, trainable_head=z) for x in chosen for y in dtypes for z in heads]
    elif part == "accuracy":
        effort = Effort(rounds=0, compilers=not quick and cpu, judged_rows=JUDGED_ROWS)
        most, spreads = JUDGED_ROWS if cpu else WHOLE_TILES, SPREADS[:: 3 if quick else 1]
        chosen = [replace(shape, tokens=min(shape.tokens, most)) for shape in shapes or [usual]]
        dtypes = ("bfloat16", "float32")
        variants = [replace(case, shape=x, dtype=y, spread=z) for x in chosen for y in dtypes for z in spreads]
    elif part == "profile":
        effort = Effort(rounds=1 if quick else 3, peak=False, compilers=not quick)
        variants = [replace(case, shape=shape) for shape in shapes or [CPU_SHAPE if cpu else usual]]
    else:  # one size grows, the others stay; compiled providers would compile anew for every size
        effort = Effort(rounds=3, seconds=5 if quick else 20, compilers=False, judged_rows=JUDGED_ROWS)
        chosen = shapes or [replace(CPU_SHAPE, tokens=256, vocab=8192, width=256) if cpu else usual]
        chosen = [replace(shape, used=None) for shape in chosen] if part == "vocab" else chosen
        sizes: list[dict[str, Any]] = [{part: size} for size in SIZES[device][part][: few and 3]]
        variants = [replace(case, shape=replace(shape, **size)) for shape in chosen for size in sizes]
    yield from (Item(part, replace(variant, loss=loss), effort) for variant in variants for loss in LOSSES)
