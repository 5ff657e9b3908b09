"""What the diagnostics cost beside the loss, and how exact the two ways to decompose are.

    python benchmarks/diagnostics.py                                                          # CPU, float32
    python benchmarks/diagnostics.py --device cuda --n 8192 --vocab 151936 --width 4096 --dtype bfloat16 --json out.json

Forward and backward with a frozen head, each in turns within one process, ratios to the plain loss round by round. Errors
are relative L2 per field against the float64 oracle, over several distances of student and teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import popsd
from popsd import oracle
from popsd.testing import relative_l2
from popsd_benchmarks.measure import in_turns, seconds_of
from popsd_benchmarks.problems import Problem, make_problem
from popsd_benchmarks.provenance import describe
from popsd_benchmarks.results import Case, Shape

TARGETS = {"decompose=True": 1.3, "decompose='gram'": 1.05}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decompose=True": {"decompose": True},
    "decompose='gram'": {"decompose": "gram"},
    "telemetry=True": {"telemetry": True},
    "masks by entropy": {"masks": popsd.MaskConfig(top_student_entropy=0.2)},
    "plausibility": {"config": popsd.PurifiedConfig(plausibility=0.1)},
}


def run(problem: Problem, **options: Any) -> None:
    problem.clear()
    options = {"config": problem.config} | options
    popsd.linear_purified_jsd(problem.hidden, problem.head, reduction="sum", **options).loss.backward()


def errors(problem: Problem, rows: int = 32) -> dict[str, dict[str, float]]:
    """Largest relative error over the fields of a family, by method and by the share that separates the streams."""
    assert problem.hidden.base is not None
    base, found = problem.hidden.base[:rows], {}
    for spread in (0.001, 0.1, 1.0):
        apart = [base + spread * base.std() * torch.randn_like(base) for _ in range(3)]
        hidden = popsd.HiddenStates(apart[0], None, apart[1], apart[2])
        truth = oracle.decompose(*(oracle.head_logits(x, problem.head) for x in apart), problem.config)
        for method in ("logits", "gram"):
            parts = popsd.decompose(hidden, problem.head, config=problem.config, method=method)
            worst: dict[str, float] = {}
            for name, value in parts._asdict().items():
                if value is not None:
                    family = name.split("_")[0] if name.startswith(("centred", "weighted")) else "raw"
                    worst[family] = max(worst.get(family, 0.0), relative_l2(value, getattr(truth, name)))
            found[f"{method}, {spread:g}"] = worst
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=512, help="tokens")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=13, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="on CPU")
    parser.add_argument("--json", type=Path, help="also write everything measured here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = Shape(name="decompose", tokens=options.n, vocab=options.vocab, width=options.width)
    case = Case(loss="purified", shape=shape, dtype=options.dtype, device=options.device)
    problem, meta = make_problem(case), describe(options.device)
    print(f"N={options.n} V={options.vocab} D={options.width} {options.dtype}, {meta}\n\nrelative error, worst field:")
    found = errors(problem)
    for apart, families in found.items():
        print(f"  {apart:14}" + "".join(f"  {family} {error:.1e}" for family, error in families.items()))
    runs = {name: lambda way=way: run(problem, **way) for name, way in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i, name in in_turns(list(runs), options.repeats):
        took = seconds_of(runs[name], options.device)
        if i:
            seconds[name].append(took)
    rows = {}
    print("\nof the plain loss, median of rounds (range):")
    for name in list(WAYS)[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        ratio, most = statistics.median(ratios), TARGETS.get(name)
        rows[name] = {"ratio": ratio, "low": min(ratios), "high": max(ratios)}
        verdict = "" if most is None else f"  <= {most} {'met' if ratio <= most else 'MISSED'}"
        print(f"  {name:18} {ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f}){verdict}")
    if options.json:
        content = {"meta": meta, "shape": [options.n, options.vocab, options.width], "dtype": options.dtype}
        options.json.write_text(json.dumps(content | {"errors": found, "ratios": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
