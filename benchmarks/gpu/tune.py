"""What the launch tables should say: matrix products, sweeps and whole losses on the GPU at hand, one table each.

    PYTHONPATH=.:kernels:integrations python benchmarks/gpu/tune.py --out tune.json

Needs torch and Triton only; under five minutes on an H200. Writes after every line, so that a killed run keeps what it
measured. Times are medians of CUDA-event timings after a warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from check import versions

import popsd
from popsd import PurifiedConfig
from popsd.testing import make_head, make_hidden
from popsd.tiling import sweep_bytes
from popsd_kernels import (
    RowOptions,
    RowStatistics,
    decomposition,
    launch,
    loss_gradient,
    row_loss_gradient,
    row_split_sweeps,
    row_statistics,
    single_read,
    statistics,
)
from popsd_kernels.launch import CANDIDATES, Launch, LaunchConfig, fast_instructions, result_rows

DEVICE = torch.device("cuda")
SINGLE_READ = tuple(LaunchConfig(block, 4, warps) for block, warps in ((4096, 8), (8192, 8), (8192, 16), (16384, 16)))
Line = tuple[str, dict[str, Any]]


def milliseconds(function: Callable[[], object], repeat_ms: int = 200) -> float:
    return float(triton.testing.do_bench(function, warmup=50, rep=repeat_ms, return_mode="median"))


def products(vocab: int, width: int) -> Iterator[Line]:
    """KERNELS (a), (b): the projection with float32 output, and the product back, by rows."""
    weight = make_head(vocab, width, dtype=torch.bfloat16, device="cuda").weight
    for rows in (512, 768, 1024, 1536, 2048):
        hidden = torch.randn(3 * rows, width, device=DEVICE).bfloat16()
        logits = torch.empty(3 * rows, -(-vocab // 16) * 16, device=DEVICE)[:, :vocab]
        time = milliseconds(lambda h=hidden, z=logits: torch.mm(h, weight.t(), out_dtype=torch.float32, out=z))
        yield f"project 3x{rows}", {"ms": time, "tflops": 6 * rows * width * vocab / time / 1e9}
        gradient = torch.randn(rows, vocab, device=DEVICE).bfloat16()
        time = milliseconds(lambda g=gradient: g @ weight)
        yield f"project back {rows}", {"ms": time, "tflops": 2 * rows * width * vocab / time / 1e9}


def sweeps(vocab: int, rows: int = 1024) -> Iterator[Line]:
    """KERNELS (c), (d): every candidate size of every sweep, with the bandwidth of the bytes that it must move."""
    pitch = -(-vocab // 16) * 16
    student, base, delta = (torch.randn(rows, pitch, device=DEVICE)[:, :vocab] * scale for scale in (3.0, 3.0, 0.5))
    gradient = torch.empty(rows, pitch, dtype=torch.bfloat16, device=DEVICE)[:, :vocab]
    offset, fast = torch.zeros(rows, device=DEVICE), fast_instructions(DEVICE)
    normal, loss_out = result_rows(4, rows, DEVICE), result_rows(9, rows, DEVICE)
    both = result_rows(13, rows, DEVICE)
    for beta in (0.0, 0.5, 1.0):
        options = RowOptions(beta=beta)
        plans: dict[str, tuple[int, Callable[[LaunchConfig], Launch]]] = {
            "loss_gradient": (
                10 if beta == 0.0 else 18,
                lambda config, o=options: loss_gradient.plan(
                    student,
                    base,
                    RowStatistics(*normal),
                    None,
                    None,
                    o,
                    True,
                    None,
                    None,
                    gradient,
                    loss_out,
                    config,
                    fast,
                ),
            )
        }
        if beta == 0.5:
            plans["statistics"] = (
                16,
                lambda config, o=options: statistics.plan(
                    student, base, delta, offset, None, None, o, torch.empty_like(base), normal, config, fast
                ),
            )
            plans["moments"] = (
                12,
                lambda config, o=options: decomposition.plan(
                    student, base, None, delta, None, None, o, False, both, config, fast
                ),
            )
        for name, (bytes_per_entry, plan) in plans.items():
            for config in CANDIDATES:
                time = milliseconds(lambda p=plan, c=config: p(c).run(DEVICE), 100)
                rate = rows * vocab * bytes_per_entry / time / 1e6
                yield f"{name} beta {beta} {config}", {"ms": time, "gb_per_s": rate}
        for config in SINGLE_READ:

            def run(config: LaunchConfig = config, options: RowOptions = options) -> None:
                partials = single_read.partials_for(student, config)
                tensors = (student, base, delta, offset, None, None, gradient, both, partials)
                single_read.launch(single_read.SliceCall(*tensors, options, config, fast), DEVICE)

            time = milliseconds(run, 100)
            yield f"single_read beta {beta} {config}", {"ms": time, "gb_per_s": rows * vocab * 14 / time / 1e6}


def few_rows(vocab: int) -> Iterator[Line]:
    """Where several programs per row stop paying: both ways by rows, against the prediction of launch.too_few_rows."""
    for rows, beta in itertools.product((16, 64, 128, 180, 236, 264, 400, 528), (0.0, 0.5)):
        yield f"rows {rows} beta {beta}", _both_ways(rows, vocab, RowOptions(beta=beta))


def _both_ways(rows: int, vocab: int, options: RowOptions) -> dict[str, Any]:
    student, base, delta = (torch.randn(rows, vocab, device=DEVICE) * scale for scale in (3.0, 3.0, 0.5))
    gradient = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    composed, offset = torch.empty_like(base), torch.zeros(rows, device=DEVICE)

    def swept() -> None:
        found = row_statistics(student, base, delta, offset, options=options, target_out=composed)
        row_loss_gradient(student, composed, found, options=options, purified=True, gradient=gradient)

    def split() -> None:
        row_split_sweeps(student, base, delta, offset, options=options, gradient=gradient)

    chosen = launch.too_few_rows(rows, *sweep_bytes(options, composed=True, with_gradient=True), DEVICE)
    return {"swept_ms": milliseconds(swept, 100), "split_ms": milliseconds(split, 100), "chosen": int(chosen)}


def losses(vocab: int, width: int, tokens: int = 8192) -> Iterator[Line]:
    """The whole loss, forward and backward, by workspace, against its four bare products timed beside it."""
    head = make_head(vocab, width, dtype=torch.bfloat16, device="cuda")
    hidden = make_hidden(tokens, width, 0.3, dtype=torch.bfloat16, device="cuda")
    leaf = hidden.student.clone().requires_grad_()
    gradient = torch.randn(tokens, vocab, device=DEVICE).bfloat16()

    def bare() -> None:
        for x in hidden[:3]:
            for part in x.split(1024):
                torch.mm(part, head.weight.t())
        gradient @ head.weight

    for beta in (0.0, 0.5):
        config = PurifiedConfig(beta=beta)
        for mib in (400, 1024, 2048, 4096, 8192):

            def step(mib: int = mib, config: PurifiedConfig = config) -> None:
                leaf.grad = None
                streams = hidden._replace(student=leaf)
                popsd.linear_purified_jsd(
                    streams, head, config=config, reduction="sum", workspace_mib=mib
                ).loss.backward()

            floor = milliseconds(bare)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            time = milliseconds(step)
            result = {"ms": time, "bare_ms": floor, "ratio": time / floor, "peak_mib": peak}
            yield f"loss D {width} beta {beta} workspace {mib} MiB", result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines: dict[str, Any] = {}
    report = {"versions": versions("cuda"), "architecture": launch.architecture(DEVICE), "lines": lines}
    parts = (products(arguments.vocab, 2048), products(arguments.vocab, 4096), sweeps(arguments.vocab))
    for part in (*parts, few_rows(arguments.vocab), losses(arguments.vocab, 2048), losses(arguments.vocab, 4096)):
        try:
            for name, result in part:
                lines[name] = result
                print(name, {key: round(value, 3) for key, value in result.items()}, flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(report, indent=1))
        except RuntimeError as error:  # one part that cannot run must not cost the others
            print("FAILED", error)


if __name__ == "__main__":
    main()
