"""popsd, by implementation and strategy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

import popsd
from popsd_benchmarks.cells import Case
from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import Defaults, Step


@dataclass(frozen=True)
class Popsd(Defaults):
    """workspace_mib: as in popsd's functions; None is their default."""

    name: str
    impl: str
    strategy: str = "chunked"
    workspace_mib: float | None = None
    drops_padding = True

    def available(self) -> str | None:
        return "triton is not installed" if self.impl == "triton" and find_spec("triton") is None else None

    def supports(self, case: Case) -> str | None:
        if self.impl == "triton" and case.device == "cpu":
            return "Triton kernels need a GPU"
        if self.strategy == "single_read" and case.loss == "purified" and case.shape.softcap is not None:
            return "needs teacher − reference as one projection, which a soft cap forbids"
        return None

    def prepare(self, problem: Problem) -> Step:
        hidden, head = problem.hidden, problem.head

        def step() -> torch.Tensor:
            common: dict[str, Any] = {"impl": self.impl, "strategy": self.strategy, "workspace_mib": self.workspace_mib}
            if problem.case.loss == "purified":
                out = popsd.linear_purified_jsd(hidden, head, config=problem.config, reduction="sum", **common)
            else:
                out = popsd.linear_jsd(
                    hidden.student, head, hidden.teacher, config=problem.config, reduction="sum", **common
                )
            out.loss.backward()
            return out.divergence

        return step
