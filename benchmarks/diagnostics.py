"""What the diagnostics cost beside the loss, and how exact the two ways to decompose are.

    python benchmarks/diagnostics.py                                                          # CPU, float32
    python benchmarks/diagnostics.py --device cuda --n 8192 --vocab 151936 --width 4096 --dtype bfloat16 --json out.json

Forward and backward with a frozen head, each in turns within one process, ratios to the plain loss round by round. Errors
are relative L2 per field against the float64 oracle, over several distances of student and teacher.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import popsd
from popsd import oracle
from popsd.testing import relative_l2
from popsd_benchmarks.measure import Effort, measure
from popsd_benchmarks.problems import Problem, make_problem
from popsd_benchmarks.provenance import describe
from popsd_benchmarks.providers import OURS, PROVIDERS
from popsd_benchmarks.providers.ours import Popsd
from popsd_benchmarks.results import Case, Results, Shape

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
    shape = Shape(name="decompose", tokens=options.n, vocab=options.vocab, width=options.width)
    case = Case(loss="purified", shape=shape, dtype=options.dtype, device=options.device)
    results = Results(describe(options.device))
    print(f"N={options.n} V={options.vocab} D={options.width} {options.dtype}, {results.meta}\n")
    problem = make_problem(case)
    for method in ("logits", "gram"):
        for spread in (0.001, 0.1, 1.0):
            found = errors(problem, spread, method)
            results.record("decompose", f"{method}, {spread:g}", **found)
            print(f"{method}, {spread:g}: worst field", *(f"{family} {x:.1e}" for family, x in found.items()), sep="  ")
    plain = PROVIDERS[OURS[options.device]]
    assert isinstance(plain, Popsd)
    ways = [Popsd(name, plain.impl, options=way) for name, way in WAYS.items()]
    effort = Effort(rounds=options.repeats, seconds=3600.0, peak=False, gate=False, judged_rows=8)
    print("\nof the plain loss, median of rounds (quartiles):")
    for cell in measure("diagnostics", case, [plain, *ways], effort):
        results.put(cell)
        ratio, most = cell.ratios, TARGETS.get(cell.provider)
        if ratio is None:
            print(f"  {cell.provider:18} {cell.status}: {cell.note}")
        elif cell.provider != plain.name:
            verdict = "" if most is None else f"  <= {most} {'met' if ratio.median <= most else 'MISSED'}"
            print(f"  {cell.provider:18} {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f}){verdict}")
    if options.json:
        results.save(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
