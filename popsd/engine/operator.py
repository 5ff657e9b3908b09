"""The operator `popsd::divergence` and its autograd formula. No mathematics: it decides when a gradient is formed and
scales it by what comes from above. An operator, not a bare autograd.Function, so that torch.compile keeps the caller whole.

With a frozen head the gradient of each token is formed in forward, whatever comes from above: backward only scales rows.
With a trainable head dW sums over tokens, so their upstream weights must be known: a scalar loss forms it in forward, a
per-token loss recomputes in backward. Given logits get their gradient in backward, where it is written once, scaled.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch

from popsd.engine.loop import compute
from popsd.engine.problem import Options, Problem, Tensors
from popsd.engine.results import result_names
from popsd.engine.sources import source_of
from popsd_kernels.rows import RowLoss

TRAINED = ("student", "student_weight", "student_bias")
"""What may receive a gradient."""


def divergence(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [N] or scalar, differentiable in student and its head; and results [R, N] float32, a row for each `result_names`."""
    loss, rows, *_ = torch.ops.popsd.divergence(*problem.tensors, *problem.options)
    return loss, rows


def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    problem = _problem(arguments)
    source, weights = source_of(problem), problem.tensors.weights
    rows = compute(problem, source)
    if problem.tensors.token_ids is None:  # nobody reads it, and NaN would make two equal results unequal
        rows[RowLoss._fields.index("token_logprob")] = 0.0
    if weights is not None:
        rows.masked_fill_(weights == 0, 0.0)
    loss = rows[0].clone() if weights is None else rows[0] * weights
    if problem.options.total:
        loss = loss.sum()
    nothing = problem.tensors.student.new_empty(0)
    gradients = (source.dhidden, source.dweight, source.dbias)
    return (loss, rows, *(nothing.clone() if x is None else x for x in gradients))


def _fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    problem = _problem(arguments)
    tensors, options = problem.tensors, problem.options
    student, nothing = tensors.student, tensors.student.new_empty(0)
    loss = student.new_empty(() if options.total else (problem.tokens,), dtype=torch.float32)
    heads = [
        nothing.clone() if x is None or not options.with_dhead else torch.empty_like(x, dtype=torch.float32)
        for x in (tensors.student_weight, tensors.student_bias)
    ]
    dhidden = torch.empty_like(student) if options.with_dhidden else nothing.clone()
    rows = student.new_empty((len(result_names(options)), problem.tokens), dtype=torch.float32)
    return (loss, rows, dhidden, *heads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    problem = _problem(inputs)
    ctx.options = problem.options
    ctx.early = ctx.options.with_dhidden or ctx.options.with_dhead
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*problem.tensors, *output[2:])


def _backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    tensors, gradients = Tensors(*ctx.saved_tensors[: len(Tensors._fields)]), ctx.saved_tensors[len(Tensors._fields) :]
    slots = [Tensors._fields.index(name) for name in TRAINED]
    wanted = [ctx.needs_input_grad[slot] for slot in slots]
    if ctx.early:
        rows = upstream if upstream.ndim == 0 else upstream[:, None]
        gradients = [_scaled(x, factor) for x, factor in zip(gradients, (rows, upstream, upstream), strict=True)]
    else:
        scale = upstream.float().expand(tensors.student.shape[0]).contiguous()
        if tensors.weights is not None:
            scale = torch.where(tensors.weights == 0, 0.0, tensors.weights * scale)
        options = ctx.options._replace(with_dhidden=wanted[0], with_dhead=wanted[1] or wanted[2], total=True)
        options = options._replace(decompose=None, purification=False)
        gradients = torch.ops.popsd.divergence(*tensors._replace(weights=scale), *options)[2:]
    result: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    for slot, want, gradient in zip(slots, wanted, gradients, strict=True):
        owner = tensors[slot]
        result[slot] = gradient.to(owner.dtype) if want and owner is not None else None
    return tuple(result)


def _scaled(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """tensor · factor computed in float32 and rounded once to the tensor's dtype."""
    return torch.mul(tensor, factor.float(), out=torch.empty_like(tensor)) if tensor.numel() else tensor


def _problem(arguments: tuple[Any, ...]) -> Problem:
    count = len(Tensors._fields)
    return Problem(Tensors(*arguments[:count]), Options(*arguments[count:]))


def _schema() -> str:
    names = {torch.Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str"}
    types: dict[Any, str] = {**names, tuple[float, ...]: "float[]"}
    types |= {kind | None: f"{name}?" for kind, name in names.items()}
    arguments = [f"{types[hint]} {name}" for kind in (Tensors, Options) for name, hint in get_type_hints(kind).items()]
    return f"({', '.join(arguments)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


_operator = torch.library.custom_op("popsd::divergence", _forward, mutates_args=(), schema=_schema())
_operator.register_fake(_fake)
_operator.register_autograd(_backward, setup_context=_setup_context)
