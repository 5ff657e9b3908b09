"""TRL, Liger and orda-kernel, all with two distributions only."""

from typing import Any

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import Compute


def trl(problem: Problem) -> Compute:
    """`ChunkedDivergenceFunction`, which recomputes the logits in backward: Triton on a GPU, its torch fallback elsewhere.

    Per-token output, same ``beta``.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, cap = problem.hidden, problem.head.weight, problem.head.softcap

    def compute() -> torch.Tensor:
        student, teacher = (hidden.student, weight, None), (hidden.teacher, weight.detach(), None)
        return ChunkedDivergenceFunction.apply(*student, *teacher, problem.config.beta, 1.0, 1.0, cap, 1.0, cap)[0]

    return compute


def liger_triton(problem: Problem) -> Compute:
    """`LigerFusedLinearJSD`: chunks of tokens, float32 logits, the gradient in forward. The mean over tokens, same ``beta``."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    hidden, weight = problem.hidden, problem.head.weight
    function = LigerFusedLinearJSD(jsd_beta=problem.config.beta)
    return lambda: function(hidden.student, weight, hidden.teacher, weight.detach(), None)


def orda(problem: Problem) -> Compute:
    """`distillation_loss` with its divergence alone, summed over tokens, of a tied teacher.

    Its ``kl_beta`` is the student's share of the mixture: 1 − beta. On a CPU it forms all logits.
    """
    from orda_kernel import KernelConfig, TiedTeacher, distillation_loss

    hidden, weight, beta = problem.hidden, problem.head.weight, problem.config.beta
    ends: dict[float, dict[str, Any]] = {0.0: {"kl_divergence": "forward"}, 1.0: {"kl_divergence": "reverse"}}
    options = ends.get(beta, {"kl_divergence": "skew_js", "kl_beta": 1.0 - beta})
    options |= {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0, "reduction": "sum"}
    options |= {"backend": "triton" if weight.is_cuda else "torch"}
    options |= {"config": KernelConfig(assume_valid_labels=True)}
    labels = torch.zeros(hidden.student.shape[0], dtype=torch.long, device=weight.device)

    def compute() -> torch.Tensor:
        return distillation_loss(hidden.student, weight, labels, TiedTeacher(hidden=hidden.teacher), **options).loss

    return compute


def liger_chunked(problem: Problem, compiled: bool = False) -> Compute:
    """`LigerFusedLinearJSDLoss` without its cross-entropy: chunks of 1024 tokens, by torch.func, compiled or not."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    hidden, weight = problem.hidden, problem.head.weight
    weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    function = LigerFusedLinearJSDLoss(**weights, beta=problem.config.beta, compiled=compiled)
    labels = torch.zeros(hidden.student.shape[0], dtype=torch.long, device=weight.device)
    return lambda: function(hidden.student, weight, hidden.teacher, weight.detach(), labels)
