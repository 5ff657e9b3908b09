"""What the parts measure, each a function of a `Bench`."""

from __future__ import annotations

import csv
import statistics
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench import Bench

from popsd.engine import workspace
from popsd_benchmarks.accuracy import Judge
from popsd_benchmarks.measure import WHOLE_TILES, Effort, seconds_of
from popsd_benchmarks.plan import SHAPES
from popsd_benchmarks.problems import Problem, make_problem
from popsd_benchmarks.providers import FLOOR, OURS, PROVIDERS, Provider, Step
from popsd_benchmarks.providers.matmuls import project
from popsd_benchmarks.providers.ours import Popsd
from popsd_benchmarks.results import Case, Loss, Shape

JUDGED_ROWS = 256
EFFORT = Effort(rounds=9, seconds=6.0, compilers=False, judged_rows=JUDGED_ROWS)
DRY_EFFORT = replace(EFFORT, rounds=1)
VOCAB, USED, PITCH = 151936, 151669, 151680
TINY = {VOCAB: 512, USED: 503, PITCH: 512, 8192: 32, 4096: 48, 2560: 40, 2048: 32, 2496: 24, 1664: 24, 1536: 16}


def shape(bench: Bench, name: str, **changes: int) -> Shape:
    """A real one with all rows of its head in use, which every peer can do too; a dry run's is tiny."""
    found = replace(SHAPES[name], **{"used": None, **changes})
    sizes = {"tokens": 16, "vocab": 257, "width": found.width // 128}
    return replace(found, **sizes, used=found.used and 250) if bench.dry else found


def case(bench: Bench, loss: Loss, of: Shape, **changes: float) -> Case:
    return Case(loss=loss, shape=of, dtype="bfloat16", device=bench.device, **changes)  # type: ignore[arg-type]


def providers(bench: Bench, *names: str) -> list[Provider]:
    """The floor, ours and those."""
    return [PROVIDERS[name] for name in dict.fromkeys((FLOOR, OURS[bench.device], *names))]


def cells(bench: Bench, part: str, of: Case, *names: str, **effort: bool) -> None:
    bench.measure(part, of, providers(bench, *names), replace(DRY_EFFORT if bench.dry else EFFORT, **effort))


def probe(bench: Bench) -> None:
    """The card's ceilings, and matmuls in the shapes and alignments that the loss needs."""

    def size(number: int) -> int:
        return TINY[number] if bench.dry else number

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=bench.device).bfloat16()

    def measured(name: str, prepare: Callable[[], Step], figure: str, amount: float, **sizes: int) -> None:
        with bench.attempt("probe", name) as wanted:
            if wanted:
                function = prepare()
                seconds = statistics.median([seconds_of(function, bench.device) for _ in range(9)][2:])
                bench.record("probe", name, ms=1e3 * seconds, **{figure: amount / seconds}, **sizes)

    def copy() -> Step:
        source = torch.empty(1 << (14 if bench.dry else 30), device=bench.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def square() -> Step:
        a, b = normal(size(8192), size(8192)), normal(size(8192), size(8192))
        return lambda: a @ b

    measured("copy", copy, "gb_per_s", 2e-9 * 4 * (1 << (14 if bench.dry else 30)))
    measured("square", square, "tflops", 2e-12 * size(8192) ** 3)
    pitches = {"V 151936": (VOCAB, VOCAB), "V 151669": (USED, PITCH), "V 151680": (PITCH, PITCH)}
    for width in (2048, 2560, 4096):
        cases = [(name, 2048) for name in pitches] if width != 2560 else []
        cases += [("V 151936", rows) for rows in (1536, 1664, 2048, 2496)]
        weight = normal(size(VOCAB), size(width))
        for name, rows in dict.fromkeys(cases):
            (vocab, pitch), n, d = map(size, pitches[name]), size(rows), size(width)
            head, at, work = weight[:vocab], f"D {width} {name} rows {rows}", 2e-12 * n * vocab * d

            def projection(n: int = n, d: int = d, head: Any = head, pitch: int = pitch) -> Step:
                hidden, out = normal(n, d), torch.empty(n, pitch, device=bench.device)[:, : len(head)]
                return lambda: project(hidden, head, out)

            def gradient(n: int = n, head: Any = head, pitch: int = pitch) -> Step:
                out = normal(n, pitch)[:, : len(head)]
                return lambda: out @ head

            measured(f"project {at}", projection, "tflops", work, rows=n, inner=d, columns=vocab)
            measured(f"gradient {at}", gradient, "tflops", work, rows=n, inner=vocab, columns=d)


def headline(bench: Bench) -> None:
    """popsd beside the bare matmuls, TRL, Liger, orda-kernel and eager code."""
    peers = ("trl", "liger-triton", "orda", "popsd-graph", "eager-16bit-logits")
    for name in ("qwen3-1.7b", "qwen3-8b"):
        for loss in ("purified", "two"):
            cells(bench, "table", case(bench, loss, shape(bench, name)), *peers)
    small = shape(bench, "qwen3-1.7b", tokens=2048)
    for loss in ("purified", "two"):
        cells(bench, "table", case(bench, loss, replace(small, name="qwen3-1.7b-2048")), "eager")


def profile(bench: Bench) -> None:
    effort = replace(DRY_EFFORT if bench.dry else EFFORT, rounds=1 if bench.dry else 3, peak=False)
    bench.measure("profile", case(bench, "purified", shape(bench, "qwen3-1.7b")), providers(bench), effort)


@dataclass(frozen=True)
class Planned(Popsd):
    """popsd with rows of its own: per chunk of logits, per gradient buffer. Refuses to run where its plan is not asked."""

    rows: tuple[int, int] = (0, 0)

    def prepare(self, problem: Problem) -> Step:
        step = super().prepare(problem)

        def planned() -> torch.Tensor | None:
            with (
                unittest.mock.patch.object(workspace, "filling_rows", return_value=self.rows) as filling,
                unittest.mock.patch.object(workspace, "simple_rows", return_value=self.rows) as simple,
            ):
                result = step()
            if not (filling.called or simple.called):
                raise AssertionError("popsd.engine.workspace was not asked for its plan: the rows are not those named.")
            return result

        return planned


def planning(bench: Bench) -> None:
    """The same loss by workspace and by rows, at the widths that fill the multiprocessors differently.

    The default within 2 GiB and 132 multiprocessors is 512/2,048 at D = 2048, 832/1,664 at 2560, 512/1,024 at 4096.
    """
    ours = PROVIDERS[OURS[bench.device]]
    assert isinstance(ours, Popsd)
    variants: list[Provider] = [replace(ours, name=f"popsd {mib} MiB", workspace_mib=mib) for mib in (400, 1024, 2048)]
    for rows in ((512, 1024), (512, 2048), (832, 1664), (832, 2496), (1024, 2048)):
        scaled = (rows[0] // 128, rows[0] // 128) if bench.dry else rows  # a CPU's gradient takes the logits' place
        variants.append(Planned(f"popsd rows {rows[0]}/{rows[1]}", ours.impl, rows=scaled))
    effort = replace(DRY_EFFORT if bench.dry else EFFORT, rounds=1 if bench.dry else 5)
    for name in ("qwen3-1.7b", "qwen3-8b"):
        bench.measure("planning", case(bench, "purified", shape(bench, name)), [*providers(bench), *variants], effort)
    padded = shape(bench, "qwen3-1.7b", used=USED)
    bench.measure("planning", case(bench, "purified", padded), providers(bench), effort)


def step(bench: Bench) -> None:
    """A training step of a Qwen3-1.7B with LoRA in the TRL trainer, by part."""
    import train_step

    with bench.attempt("step", "purified") as wanted:
        if not wanted:
            return
        arguments = ["--rounds", "5", "--device", bench.device]
        if bench.dry:
            arguments = ["--rounds", "1", "--prompt", "4", "--completion", "4", "--micro-batch", "1", "--rank", "2"]

        def keep(result: dict[str, Any]) -> None:
            """What is known so far, as the record of a part that has not ended."""
            for name, found in result["variants"].items():
                if totals := [sum(parts.values()) for parts in found["rounds"]]:
                    figures = {"step_s": statistics.median(totals), "peak_gib": found["peak_gib"]}
                    bench.record("step", name, status="stopped", **figures)

        result = train_step.measure(train_step.parse_options(arguments), keep)
        for name, found in reversed(result["variants"].items()):  # the purified one last: it says that all is there
            figures = {f"{part}_s": seconds for part, seconds in found["median"].items()}
            figures |= {"step_s": found["step"], "loss_share": found["median"]["loss"] / found["step"]}
            figures |= {"over_opsd": result["ratios"]["step"]} if name == "purified" else {}
            bench.record("step", name, peak_gib=found["peak_gib"], **figures)


def forward_kl(bench: Bench) -> None:
    for loss in ("purified", "two"):
        cells(bench, "table", case(bench, loss, shape(bench, "qwen3-1.7b"), beta=0.0), "trl", "liger-triton")


def width_2560(bench: Bench) -> None:
    for loss in ("purified", "two"):
        cells(bench, "table", case(bench, loss, shape(bench, "qwen3-4b")), "trl", "liger-triton")


def accuracy(bench: Bench) -> None:
    """Errors of dH and the loss against float64, by the true KL and the deviation of the logits."""
    of = shape(bench, "qwen3-1.7b", tokens=WHOLE_TILES)
    names = (OURS[bench.device], "eager", "eager-16bit-logits")
    effort = replace(EFFORT, rounds=0, peak=False, gate=False)
    for deviation in (3.0, 10.0, 30.0):
        for kl in (1e-3, 1e-1, 1.0):
            spread = (2 * kl) ** 0.5 / deviation
            found = case(bench, "purified", of, deviation=deviation, spread=float(f"{spread:.2g}"))
            for _ in range(2):  # the divergence grows with the square of the spread
                true = max(Judge(make_problem(found), 64).exact(False).kl, 1e-9)
                spread = found.spread * min(max(kl / true, 0.01), 100.0) ** 0.5
                found = replace(found, spread=float(f"{spread:.2g}"))
            bench.measure("accuracy", found, [PROVIDERS[name] for name in names], effort)


def one_step(bench: Bench) -> None:
    """What runs under ncu: a step of several chunks, so that every kernel of the main path is launched."""
    of = case(bench, "purified", shape(bench, "qwen3-1.7b", tokens=2048))
    PROVIDERS[OURS[bench.device]].prepare(make_problem(of))()


NCU = ("ncu", "--clock-control", "none", "--csv", "--log-file", "WORK/ncu.csv", "--kernel-name", "regex:^row_",
       "--launch-count", "16", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum",
       "--print-units", "base")  # fmt: skip


def read_ncu(bench: Bench, work: Path) -> None:
    """A record per kernel: bytes moved and their rate, as a share of the copy's that the probe measured."""
    path = work / "ncu.csv"
    rows = (
        [text for text in path.read_text(encoding="utf-8").splitlines() if text.startswith('"')]
        if path.exists()
        else []
    )
    totals: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(rows):
        if row.get("Metric Name"):
            found = totals.setdefault(row["Kernel Name"].split("(")[0], {})
            value = float(row["Metric Value"].replace(",", ""))
            found[row["Metric Name"]] = found.get(row["Metric Name"], 0.0) + value
    copied = bench.results.found("probe", "copy").get("gb_per_s")
    for name, found in totals.items():
        rate = (found["dram__bytes_read.sum"] + found["dram__bytes_write.sum"]) / found["gpu__time_duration.sum"]
        share = {"share_of_copy": rate / copied} if copied else {}
        bench.record("dram", name, gb=sum(v for k, v in found.items() if "bytes" in k) / 1e9, gb_per_s=rate, **share)
    if not totals:
        bench.record("dram", "kernels", status="failed", note="ncu named no kernel: see log.txt")


def streaming(bench: Bench) -> None:
    for loss in ("purified", "two"):
        cells(bench, "table", case(bench, loss, shape(bench, "qwen3-1.7b")), "popsd-streaming")


def single_read(bench: Bench) -> None:
    for name in ("qwen3-1.7b", "qwen3-8b"):
        cells(bench, "table", case(bench, "purified", shape(bench, name)), "popsd-single-read")


def compiled(bench: Bench) -> None:
    small = replace(shape(bench, "qwen3-1.7b", tokens=2048), name="qwen3-1.7b-2048")
    names = () if bench.dry else ("eager-compiled", "liger-compiled")  # compiling takes half a minute
    for loss in ("two", "purified"):
        cells(bench, "table", case(bench, loss, small), *names, compilers=True)
