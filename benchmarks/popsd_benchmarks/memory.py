"""Peak memory of one step above its inputs: the allocator's count on a GPU, a fresh process's resident set on a CPU.

python -m popsd_benchmarks.memory --provider popsd-torch --case '{"loss": "purified", ...}'   # MiB, as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from popsd_benchmarks.problems import make_problem
from popsd_benchmarks.providers import PROVIDERS, Provider
from popsd_benchmarks.providers.ours import Popsd
from popsd_benchmarks.results import Case, Shape

MIB = 2**20


def peak_on_gpu(step: Callable[[], Any]) -> float:
    """MiB allocated at most during a step that has run before, above what was allocated when it began."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def peak_on_cpu(provider: Provider, case: Case, workspace_mib: float | None = None) -> float:
    """`peak_here` in a fresh process. Raises RuntimeError with the last line of its complaint."""
    command = [sys.executable, "-m", "popsd_benchmarks.memory", "--provider", provider.name]
    command += ["--case", json.dumps(asdict(case)), "--threads", str(torch.get_num_threads())]
    if workspace_mib is not None:
        command += ["--workspace-mib", str(workspace_mib)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        reason = run.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"exit status {run.returncode}: {reason[-1]}")
    return float(json.loads(run.stdout.splitlines()[-1]))


def peak_here(provider: Provider, case: Case) -> float:
    """Growth of this process's resident set in MiB while one step runs (Linux). The process should have done nothing yet."""
    small = replace(case.shape, tokens=4, vocab=64, width=64, used=None)
    provider.prepare(make_problem(replace(case, shape=small)))()  # threads and library buffers are no part of the loss
    problem = make_problem(case)
    step = provider.prepare(problem)
    if provider.compiles:
        step()
        problem.clear()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark VmHWM back to the present size
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=list(PROVIDERS), required=True)
    parser.add_argument("--case", type=json.loads, required=True, help="the fields of a Case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workspace-mib", type=float, help="of popsd; its default if not given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    provider = PROVIDERS[options.provider]
    if options.workspace_mib is not None:
        assert isinstance(provider, Popsd)
        provider = replace(provider, workspace_mib=options.workspace_mib)
    print(peak_here(provider, Case(**{**options.case, "shape": Shape(**options.case["shape"])})))


if __name__ == "__main__":
    main()
