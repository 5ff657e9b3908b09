"""What the diagnostics cost beside the loss, and how exact the two ways to decompose are.

    python benchmarks/diagnostics.py                                    # N = 512, V = 32768, D = 512, float32
    python benchmarks/diagnostics.py --device cuda --json out.json      # N = 8192, V = 151936, D = 4096, bfloat16

Forward and backward with a frozen head, each in turns within one process, ratios to the plain loss round by round. Errors
are relative L2 per field against the float64 oracle, over several distances of student and teacher.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import popsd
from popsd import oracle
from popsd.testing import relative_l2
from popsd_benchmarks.cases import SHAPES, Case
from popsd_benchmarks.measure import Effort, measure
from popsd_benchmarks.problems import Problem, make_problem
from popsd_benchmarks.providers.ours import Popsd
from popsd_benchmarks.results import Results, describe

TARGETS = {"decompose=True": 1.3, "decompose='gram'": 1.05}
WAYS: dict[str, dict[str, Any]] = {
    "decompose=True": {"decompose": True},
    "decompose='gram'": {"decompose": "gram"},
    "telemetry=True": {"telemetry": True},
    "masks by entropy": {"masks": popsd.MaskConfig(top_student_entropy=0.2)},
    "plausibility": {"config": popsd.PurifiedConfig(plausibility=0.1)},
}


def errors(problem: Problem, spread: float, method: Any, rows: int = 32) -> dict[str, float]:
    """Largest relative error over the fields of a family, for streams that differ by such a share of their deviation."""
    assert problem.hidden.base is not None
    generator = torch.Generator(problem.head.weight.device).manual_seed(1)
    base = problem.hidden.base[:rows]
    noise = (torch.empty_like(base).normal_(generator=generator) for _ in range(3))
    student, teacher, reference = (base + spread * base.std() * x for x in noise)
    logits = (oracle.head_logits(x, problem.head) for x in (student, teacher, reference))
    truth, worst = oracle.decompose(*logits, problem.config), {}
    hidden = popsd.HiddenStates(student, None, teacher, reference)
    found = popsd.decompose(hidden, problem.head, config=problem.config, method=method)
    for name, value in found._asdict().items():
        if value is not None:
            family = name.split("_")[0] if name.startswith(("centred", "weighted")) else "raw"
            worst[family] = max(worst.get(family, 0.0), relative_l2(value, getattr(truth, name)))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write everything measured here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    shape, dtype, impl = ("cpu", "float32", "torch") if options.device == "cpu" else ("qwen3-8b", "bfloat16", "triton")
    case = Case(loss="purified", shape=SHAPES[shape], dtype=dtype, device=options.device)
    results = Results(describe(options.device))
    print(f"{case}, {results.meta}\n")
    problem = make_problem(case)
    for method in ("logits", "gram"):
        for spread in (0.001, 0.1, 1.0):
            found = errors(problem, spread, method)
            results.record("decompose", f"{method}, {spread:g}", **found)
            print(f"{method}, {spread:g}: worst field", *(f"{family} {x:.1e}" for family, x in found.items()), sep="  ")
    ways = [Popsd(f"popsd-{impl}", impl=impl)]
    ways += [Popsd(name, impl=impl, options=way, computes_loss=False) for name, way in WAYS.items()]  # masks change it
    print("\nof the plain loss, median of rounds (quartiles):")
    for cell in measure("diagnostics", case, ways, Effort(rounds=13, seconds=3600.0, peak=False)):
        results.put(cell)
        if (ratio := cell.ratios) is None:
            print(f"  {cell.provider:18} {cell.status}: {cell.note}")
        elif cell.provider in WAYS:
            most = TARGETS.get(cell.provider)
            verdict = "" if most is None else f"  <= {most} {'met' if ratio.median <= most else 'MISSED'}"
            print(f"  {cell.provider:18} {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f}){verdict}")
    if options.json:
        results.save(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
