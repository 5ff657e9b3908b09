"""popsd, by implementation and strategy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import popsd
from popsd_benchmarks.cases import Case
from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import Provider, Step, missing


@dataclass(frozen=True, kw_only=True)
class Popsd(Provider):
    """workspace_mib: as in popsd's functions; None is their default. graph: replays the step from a CUDA graph.

    options: further arguments of the functions.
    """

    impl: str
    strategy: str = "chunked"
    workspace_mib: float | None = None
    graph: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    drops_padding: bool = True

    def available(self) -> str | None:
        return missing("triton") if self.impl == "triton" else None

    def supports(self, case: Case) -> str | None:
        if self.impl == "triton" and case.device == "cpu":
            return "Triton kernels need a GPU"
        if self.impl == "torch" and case.device == "cuda":
            return "made for a CPU's caches: a sweep's call for every row, seconds a step"
        if self.options and case.loss == "two":
            return "compares two distributions, which leaves nothing to diagnose"
        if self.strategy == "single_read" and case.loss == "purified" and case.shape.softcap is not None:
            return "needs teacher − reference as one projection, which a soft cap forbids"
        return None

    def prepare(self, problem: Problem) -> Step:
        hidden, head = problem.hidden, problem.head
        options: dict[str, Any] = {"impl": self.impl, "strategy": self.strategy, "workspace_mib": self.workspace_mib}
        options |= {"config": problem.config, "reduction": "sum"} | self.options
        if options.get("decompose") == "gram":
            # once, as whoever keeps a frozen head does
            options["gram"] = popsd.gram_matrix(head, problem.config.vocab_size)

        def step() -> torch.Tensor:
            if problem.case.loss == "purified":
                out = popsd.linear_purified_jsd(hidden, head, **options)
            else:
                out = popsd.linear_jsd(hidden.student, head, hidden.teacher, **options)
            out.loss.backward()
            return out.divergence

        return _captured(step, problem) if self.graph else step


def _captured(step: Callable[[], torch.Tensor], problem: Problem) -> Step:
    """The step in a CUDA graph. Its gradients are the graph's own tensors, put back into the leaves by every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and makes what is kept between calls
    torch.cuda.current_stream().wait_stream(stream)
    problem.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    leaves = (problem.hidden.student, problem.head.weight)
    gradients = [leaf.grad for leaf in leaves]

    def replay() -> torch.Tensor:
        graph.replay()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        return loss

    return replay


_WAYS: dict[str, dict[str, Any]] = {
    "decompose=True": {"decompose": True},
    "decompose='gram'": {"decompose": "gram"},
    "telemetry=True": {"telemetry": True},
    "masks by entropy": {"masks": popsd.MaskConfig(top_student_entropy=0.2)},
    "plausibility": {"config": popsd.PurifiedConfig(plausibility=0.1)},
}
DIAGNOSTICS = [Popsd(name, impl="auto", options=way, computes_loss=False) for name, way in _WAYS.items()]
"""What a step costs with each of them: popsd bench --providers popsd_benchmarks.providers.ours:DIAGNOSTICS"""
