"""The autograd functions. No mathematics: they decide when the gradient is formed and scale it by what comes from above."""

from __future__ import annotations

from typing import Any

import torch

from popsd.streams import GivenLogits, Problem, ProjectedStreams
from popsd.tiling import run_tiles
from popsd_kernels.options import RowLoss


class LinearDivergence(torch.autograd.Function):
    """Loss from hidden states and a head.

    With a frozen head the gradient of each token is formed in forward, whatever comes from above: backward only scales
    rows. With a trainable head dW sums over tokens, so their upstream weights must be known: ``total`` (a scalar loss) forms
    it in forward, a per-token loss recomputes in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        problem: Problem,
        total: bool,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, ...]:
        wanted = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        train_head = wanted[1] or wanted[2]
        ctx.early = total or not train_head
        source = ProjectedStreams(
            problem, problem.weights, with_dhidden=ctx.early and wanted[0], with_dhead=ctx.early and train_head
        )
        result = run_tiles(problem, source, problem.weights)
        ctx.problem, ctx.wanted = problem, wanted
        ctx.save_for_backward(student, weight, source.dhidden, source.dweight, source.dbias)
        return _outputs(ctx, problem, total, result.rows, result.decomposition)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        _, weight, dhidden, dweight, dbias = ctx.saved_tensors
        if ctx.early:
            dhidden = _scaled(dhidden, upstream if upstream.ndim == 0 else upstream[:, None])
            dweight, dbias = _scaled(dweight, upstream), _scaled(dbias, upstream)
        else:
            scale = upstream.float()
            if ctx.problem.weights is not None:
                scale = torch.where(ctx.problem.weights == 0, 0.0, ctx.problem.weights * scale)
            source = ProjectedStreams(ctx.problem, scale, with_dhidden=ctx.wanted[0], with_dhead=True)
            run_tiles(ctx.problem, source, scale)
            dhidden, dweight, dbias = source.dhidden, source.dweight, source.dbias
        head = ctx.problem.heads[0]
        gradients = (dhidden, _as(dweight, weight), _as(dbias, head.bias))
        return (*(x if want else None for x, want in zip(gradients, ctx.wanted, strict=True)), None, None, None)


class LogitDivergence(torch.autograd.Function):
    """Loss from given logits. The gradient is formed in backward, where it can be written once, already scaled."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, problem: Problem, total: bool) -> tuple[torch.Tensor, ...]:
        result = run_tiles(problem, GivenLogits(problem, with_gradient=False), problem.weights)
        ctx.problem = problem
        ctx.save_for_backward(student)
        return _outputs(ctx, problem, total, result.rows, result.decomposition)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        (student,) = ctx.saved_tensors
        scale = upstream.float().expand(student.shape[0])
        if ctx.problem.weights is not None:
            scale = torch.where(ctx.problem.weights == 0, 0.0, ctx.problem.weights * scale)
        source = GivenLogits(ctx.problem, with_gradient=True)
        run_tiles(ctx.problem, source, scale.contiguous())
        return source.dlogits, None, None


def _outputs(
    ctx: Any, problem: Problem, total: bool, rows: RowLoss, decomposition: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """(loss, *RowLoss, *Decomposition); masked tokens read 0 in all of them."""
    detached = [*rows, *(decomposition or ())]
    loss = rows.divergence
    if problem.weights is not None:
        masked = problem.weights == 0
        detached = [x.masked_fill(masked, 0.0) for x in detached]
        loss = detached[0] * problem.weights
    else:
        loss = loss.clone()
    ctx.mark_non_differentiable(*detached)
    ctx.set_materialize_grads(False)
    return (loss.sum() if total else loss, *detached)


def _as(gradient: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _scaled(tensor: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor | None:
    """tensor · factor computed in float32 and rounded once to the tensor's dtype."""
    return None if tensor is None else torch.mul(tensor, factor.float(), out=torch.empty_like(tensor))
