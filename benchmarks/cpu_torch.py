"""The torch implementation on CPU, against its own matrix products and against eager full-logit PyTorch.

    python benchmarks/cpu_torch.py [--n 512 --vocab 32768 --width 512 --repeats 9 --json out.json]

Forward and backward in float32 with a frozen head. Accuracy against the float64 oracle comes first: no speed is printed
for a wrong answer. Times are taken in turns within one process and compared round by round, so that another load on the
machine hits all of them alike; only the ratios mean something. Peak extra memory is the growth of the resident set over
what the inputs hold, in a fresh process each (Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

import popsd
from popsd import oracle

CONFIG = popsd.PurifiedConfig(beta=0.5, pmi_beta=1.0, pmi_clip=10.0)
MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 1e-5, 2e-5
MIB = 2**20


class Streams(NamedTuple):
    hidden: Any  # a popsd.HiddenStates with all four streams
    head: popsd.Head


class Target(NamedTuple):
    """What is to be reached: a ratio of two measurements and its largest value."""

    name: str
    kind: str
    ours: str
    theirs: str
    most: float


TARGETS = (
    Target("purified / its four products", "seconds", "popsd", "products", 1.25),
    Target("purified / eager", "seconds", "popsd", "eager", 0.33),
    Target("two distributions / their three products", "seconds", "popsd two", "products two", 1.25),
    Target("purified / eager", "MiB", "popsd", "eager", 1 / 8),
    Target("purified at 8 N / at N, beyond dH", "MiB", "popsd at 8 N", "popsd", 1.1),
)


def make_streams(tokens: int, vocab: int, width: int, seed: int = 0) -> Streams:
    """Hidden states whose logits are peaked as a language model's: a Gaussian bulk of standard deviation 2, and per token
    four favourites 6 to 14 above it. Base, student, teacher and reference share them, shifted by 1 %, 10 % and 20 %.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator) / math.sqrt(width)
    base = 2 * torch.randn(tokens, width, generator=generator)
    favourites = torch.randint(vocab, (tokens, 4), generator=generator)
    boost = 6 + 8 * torch.rand(tokens, 4, 1, generator=generator)
    base += (boost * weight[favourites]).sum(1)  # rows have norm 1 and are nearly orthogonal

    def shifted(share: float) -> torch.Tensor:
        return base + share * base.std() * torch.randn(tokens, width, generator=generator)

    hidden = popsd.HiddenStates(shifted(0.01).requires_grad_(), base, shifted(0.1), shifted(0.2))
    return Streams(hidden, popsd.Head(weight))


def run_popsd(streams: Streams, workspace_mib: float | None = None) -> torch.Tensor:
    out = popsd.linear_purified_jsd(
        streams.hidden, streams.head, config=CONFIG, reduction="sum", impl="torch", workspace_mib=workspace_mib
    )
    out.loss.backward()
    return out.divergence


def run_popsd_two(streams: Streams, workspace_mib: float | None = None) -> torch.Tensor:
    student, target = streams.hidden.student, streams.hidden.teacher
    out = popsd.linear_jsd(
        student, streams.head, target, config=CONFIG, reduction="sum", impl="torch", workspace_mib=workspace_mib
    )
    out.loss.backward()
    return out.divergence


def run_eager(streams: Streams) -> torch.Tensor:
    """The loss of CONFIG as a research script writes it: four full logit tensors, autograd through the student's."""
    hidden, weight, clip = streams.hidden, streams.head.weight, 10.0
    log_p = F.log_softmax(hidden.student @ weight.T / CONFIG.temperature, dim=-1)
    with torch.no_grad():
        log_base, log_teacher, log_reference = (
            F.log_softmax(x @ weight.T / CONFIG.temperature, dim=-1)
            for x in (hidden.base, hidden.teacher, hidden.reference)
        )
        delta = log_teacher - log_reference
        delta = delta - delta.mean(dim=-1, keepdim=True)
        delta = clip * torch.tanh(delta / clip)
        log_q = F.log_softmax(log_base + delta / CONFIG.pmi_beta, dim=-1)
    log_m = torch.logaddexp(log_p + math.log(1 - CONFIG.beta), log_q + math.log(CONFIG.beta))
    kl_student = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    kl_target = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    loss = CONFIG.beta * kl_target + (1 - CONFIG.beta) * kl_student
    loss.sum().backward()
    return loss.detach()


def make_products(streams: Streams, forward: int) -> Callable[[], None]:
    """The matrix products alone, into buffers that exist already: ``forward`` of [N, D]·[D, V] and one [N, V]·[V, D]."""
    weight, inputs = streams.head.weight, [x.detach() for x in streams.hidden[:forward]]
    logits = torch.empty(inputs[0].shape[0], weight.shape[0])
    gradient = torch.empty_like(inputs[0])

    def run() -> None:
        for x in inputs:
            torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight, out=gradient)

    return run


def accuracy(streams: Streams, rows: int = 32) -> dict[str, dict[str, float]]:
    """Relative L2 errors of the per-token losses and of dH on the first rows, against the oracle."""
    few: Any = popsd.HiddenStates(*(x[:rows].detach() for x in streams.hidden))
    errors = {}
    losses: dict[str, Callable[[Streams], Any]] = {"popsd": run_popsd, "popsd two": run_popsd_two, "eager": run_eager}
    for name, run in losses.items():
        exact = few.student.double().requires_grad_()
        student, base, teacher, reference = (oracle.head_logits(x, streams.head) for x in (exact, *few[1:]))
        if name == "popsd two":
            truth = oracle.jsd(student, teacher, CONFIG)
        else:
            truth = oracle.purified_jsd(student, base, teacher, reference, CONFIG)
        truth.sum().backward()
        mine = few._replace(student=few.student.clone().requires_grad_())
        loss, truth = run(Streams(mine, streams.head)), truth.detach()
        errors[name] = {
            "loss": relative_error(loss, truth),
            "gradient": relative_error(mine.student.grad, exact.grad),
            "mean loss": float(truth.mean()),
        }
    return errors


def relative_error(value: Any, truth: Any) -> float:
    return float((value - truth).norm() / truth.norm())


def time_rounds(runs: dict[str, Callable[[], Any]], student: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, once per round, each round starting with another one. The first round is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(repeats + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            student.grad = None
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def peak_extra_mib(run: Callable[[], Any]) -> float:
    """Growth of the resident set while ``run`` runs."""

    def resident(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark VmHWM back to the present size
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, float]:
    """In this process, which should have done nothing yet: peak extra memory of one run, and its output dH."""
    run: Callable[[Streams], Any] = run_eager
    if name != "eager":
        ours = run_popsd if name == "popsd" else run_popsd_two
        run = lambda streams: ours(streams, options.workspace_mib)  # noqa: E731
    run(make_streams(4, 64, 64))  # threads and library buffers are no part of the loss
    streams = make_streams(options.n, options.vocab, options.width)
    return {"peak_extra": peak_extra_mib(lambda: run(streams)), "dh": 4 * options.n * options.width / MIB}


def memory_of(name: str, options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, __file__, "--memory", name, "--n", tokens, "--vocab", options.vocab]
    command += ["--width", options.width, "--threads", options.threads]
    if options.workspace_mib is not None:
        command += ["--workspace-mib", options.workspace_mib]
    return json.loads(subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout)


def versions() -> dict[str, Any]:
    cpu = re.search(r"model name\s+: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "popsd": popsd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def judge(seconds: dict[str, list[float]], mib: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row per target: the median of the rounds' ratios, their range and the ratio of the fastest times; or of peaks."""
    rows = []
    for target in TARGETS:
        if target.kind == "seconds":
            ours, theirs = seconds[target.ours], seconds[target.theirs]
            ratios, fastest = [a / b for a, b in zip(ours, theirs, strict=True)], min(ours) / min(theirs)
        else:
            beyond = "dh" if "beyond dH" in target.name else ""
            peak, other = (
                mib[name]["peak_extra"] - mib[name].get(beyond, 0.0) for name in (target.ours, target.theirs)
            )
            ratios, fastest = [peak / other], peak / other
        ratio = statistics.median(ratios)
        row = {"ratio": ratio, "low": min(ratios), "high": max(ratios), "fastest": fastest, "met": ratio <= target.most}
        rows.append(target._asdict() | row)
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=512, help="tokens")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workspace-mib", type=float, help="popsd's workspace; its default if not given")
    parser.add_argument("--json", type=Path, help="also write everything measured here")
    parser.add_argument(
        "--memory", choices=["popsd", "popsd two", "eager"], help="only the peak memory of this one, as JSON"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(measure_memory(options.memory, options)))
        return 0
    streams = make_streams(options.n, options.vocab, options.width)
    results: dict[str, Any] = {
        "versions": versions(),
        "shape": {k: getattr(options, k) for k in ("n", "vocab", "width")},
    }
    print(f"N={options.n} V={options.vocab} D={options.width} float32, {results['versions']}")

    errors = results["accuracy"] = accuracy(streams)
    for name, error in errors.items():
        print(
            f"{name:12} loss error {error['loss']:.1e}, dH error {error['gradient']:.1e}, mean loss {error['mean loss']:.3f}"
        )
    if any(e["loss"] > MAX_LOSS_ERROR or e["gradient"] > MAX_GRADIENT_ERROR for n, e in errors.items() if "popsd" in n):
        print(
            f"Wrong: loss errors up to {MAX_LOSS_ERROR} and dH errors up to {MAX_GRADIENT_ERROR} are right. No speed."
        )
        return 1

    runs: dict[str, Callable[[], Any]] = {
        "popsd": lambda: run_popsd(streams, options.workspace_mib),
        "products": make_products(streams, forward=3),
        "eager": lambda: run_eager(streams),
        "popsd two": lambda: run_popsd_two(streams, options.workspace_mib),
        "products two": make_products(streams, forward=2),
    }
    seconds = results["seconds"] = time_rounds(runs, streams.hidden.student, options.repeats)
    mib = results["MiB"] = {name: memory_of(name, options, options.n) for name in ("popsd", "popsd two", "eager")}
    mib["popsd at 8 N"] = memory_of("popsd", options, 8 * options.n)
    rows = results["targets"] = judge(seconds, mib)

    print("\nmedian seconds: " + ", ".join(f"{name} {statistics.median(x):.3f}" for name, x in seconds.items()))
    print("peak extra MiB: " + ", ".join(f"{name} {x['peak_extra']:.0f}" for name, x in mib.items()) + "\n")
    print(f"{'':50} {'ratio':>7}  {'range':15} {'of fastest':10}  target")
    for row in rows:
        spread, fastest = f"{row['low']:.3f}-{row['high']:.3f}", f"{row['fastest']:.3f}"
        met = "met" if row["met"] else "MISSED"
        name = f"{row['kind']}: {row['name']}"
        print(f"{name:50} {row['ratio']:7.3f}  {spread:15} {fastest:10}  <= {row['most']:.3f} {met}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
