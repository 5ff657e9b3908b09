"""What the parts measure, each a function of a `Bench`."""

import csv
import statistics
import sys
import unittest.mock
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench import Bench

from popsd.engine import workspace
from popsd_benchmarks.accuracy import Judge
from popsd_benchmarks.cases import FLOOR, LOSSES, OURS, SHAPES, Case, Loss
from popsd_benchmarks.measure import WHOLE_TILES, Effort, seconds_of
from popsd_benchmarks.problems import Problem, make_problem
from popsd_benchmarks.providers import PROVIDERS, Provider, Step
from popsd_benchmarks.providers.baselines import project
from popsd_benchmarks.providers.ours import Popsd
from popsd_benchmarks.results import Results

EFFORT = Effort(rounds=9, seconds=6.0, compilers=False, judged_rows=256)
BOTH = ("qwen3-1.7b", "qwen3-8b")
VOCAB, USED, PITCH = 151936, 151669, 151680


def case(bench: Bench, loss: Loss, model: str, tokens: int = 8192, used: int | None = None, **changes: float) -> Case:
    """A real shape with all rows of its head in use, which every peer can do too; a dry run's is tiny."""
    of = replace(SHAPES[model], tokens=tokens, used=used, name=model if tokens == 8192 else f"{model}-{tokens}")
    if bench.dry:
        of = replace(of, tokens=16, vocab=257, width=of.width // 128, used=used and 250)
    return Case(loss=loss, shape=of, dtype="bfloat16", device=bench.device, **changes)  # type: ignore[arg-type]


def cells(
    bench: Bench,
    *,
    models: Sequence[str] = ("qwen3-1.7b",),
    peers: Sequence[Provider | str] = (),
    part: str = "table",
    losses: Sequence[Loss] = LOSSES,
    effort: Effort = EFFORT,
    **changes: Any,
) -> None:
    """The bare matmuls, popsd and these peers on a case for each model and loss."""
    names = dict.fromkeys((FLOOR, OURS[bench.device], *peers))
    providers = [PROVIDERS[name] if isinstance(name, str) else name for name in names]
    for model in models:
        for loss in losses:
            bench.measure(part, case(bench, loss, model, **changes), providers, effort)


def probe(bench: Bench) -> None:
    """The card's ceilings, and matmuls in the shapes and alignments that the loss needs."""

    def size(number: int) -> int:
        return number // 64 if bench.dry else number

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=bench.device).bfloat16()

    def measured(name: str, prepare: Callable[[], Step], figure: str, amount: float, **sizes: int) -> None:
        with bench.attempt("probe", name) as wanted:
            if wanted:
                function = prepare()
                seconds = statistics.median([seconds_of(function, bench.device) for _ in range(9)][2:])
                bench.record("probe", name, ms=1e3 * seconds, **{figure: amount / seconds}, **sizes)

    def copy() -> Step:
        source = torch.empty(size(1 << 30), device=bench.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def square() -> Step:
        a, b = normal(size(8192), size(8192)), normal(size(8192), size(8192))
        return lambda: a @ b

    measured("copy", copy, "gb_per_s", 2e-9 * 4 * size(1 << 30))
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
    cells(bench, models=BOTH, peers=("trl", "liger-triton", "orda", "popsd-graph", "eager-16bit-logits"))
    cells(bench, peers=("eager",), tokens=2048)


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
        variants.append(Planned(f"popsd rows {rows[0]}/{rows[1]}", impl=ours.impl, rows=scaled))
    alone: dict[str, Any] = {"part": "planning", "losses": ("purified",), "effort": replace(EFFORT, rounds=5)}
    cells(bench, models=BOTH, peers=variants, **alone)
    cells(bench, used=USED, **alone)


def step(bench: Bench) -> None:
    """A training step of a Qwen3-1.7B with LoRA in the TRL trainer, by part."""
    with bench.attempt("step", "purified") as wanted:
        if not wanted:
            return
        import train_step

        tiny = ["--rounds", "1", "--prompt", "4", "--micro-batch", "1", "--rank", "2"]
        options = train_step.parse_options(tiny if bench.dry else ["--rounds", "5", "--device", bench.device])
        train_step.measure(options, bench.record)


def accuracy(bench: Bench) -> None:
    """Errors of dH and the loss against float64, by the true KL and the deviation of the logits."""
    providers = [PROVIDERS[name] for name in (OURS[bench.device], "eager", "eager-16bit-logits")]
    usual = case(bench, "purified", "qwen3-1.7b", tokens=WHOLE_TILES)
    for deviation in (3.0, 10.0, 30.0):
        for kl in (1e-3, 1e-1, 1.0):
            spread = (2 * kl) ** 0.5 / deviation
            found = replace(usual, deviation=deviation, spread=float(f"{spread:.2g}"))
            for _ in range(2):  # the divergence grows with the square of the spread
                true = max(Judge(make_problem(found), 64).exact(False).kl, 1e-9)
                spread = found.spread * min(max(kl / true, 0.01), 100.0) ** 0.5
                found = replace(found, spread=float(f"{spread:.2g}"))
            bench.measure("accuracy", found, providers, replace(EFFORT, rounds=0))


ONE_STEP = ("benchmarks/gpu/measuring.py",)
NCU = """ncu --clock-control none --csv --log-file WORK/ncu.csv --kernel-name regex:^row_ --launch-count 16
--metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum --print-units base"""


def one_step(bench: Bench) -> None:
    """What runs under ncu: a step of several chunks, so that every kernel of the main path is launched."""
    PROVIDERS[OURS[bench.device]].prepare(make_problem(case(bench, "purified", "qwen3-1.7b", tokens=2048)))()


def read_ncu(bench: Bench, work: Path) -> None:
    """A record per kernel: bytes moved and their rate, as a share of the copy's that the probe measured."""
    path = work / "ncu.csv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    totals: dict[str, Any] = defaultdict(Counter)
    for row in csv.DictReader(text for text in lines if text.startswith('"')):
        if row.get("Metric Name"):
            totals[row["Kernel Name"].split("(")[0]][row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
    copied = bench.results.found("probe", "copy").get("gb_per_s")
    for name, found in totals.items():
        rate = (found["dram__bytes_read.sum"] + found["dram__bytes_write.sum"]) / found["gpu__time_duration.sum"]
        share = {"share_of_copy": rate / copied} if copied else {}
        bench.record("dram", name, gb=sum(v for k, v in found.items() if "bytes" in k) / 1e9, gb_per_s=rate, **share)
    if not totals:
        bench.record("dram", "kernels", status="failed", note="ncu named no kernel: see log.txt")


if __name__ == "__main__":
    one_step(Bench(Results({}), Path(), dry="--dry" in sys.argv))
