"""The operator `popsd::divergence` and its autograd formula. No mathematics: it decides when a gradient is formed and
scales it by what comes from above. An operator, not a bare autograd.Function, so that torch.compile keeps the caller whole.

With a frozen head the gradient of each token is formed in forward, whatever comes from above: backward only scales rows, by
upstream and weight together, in float32 and with one rounding. With a trainable head dW sums over tokens, so their upstream
weights must be known: a scalar loss forms it in forward, a per-token loss recomputes in backward. Given logits get their
gradient in backward, where it is written once, scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch

from popsd.engine.loop import compute
from popsd.engine.problem import Options, Problem, Tensors
from popsd.engine.results import OF_SAMPLED, result_names
from popsd.engine.sources import source_of
from popsd.outputs import HiddenStates

OF_TOKENS = (*HiddenStates._fields, "weights", "token_ids", "target_ids")
"""Of `Tensors`, those with a row per token."""
TRAINED = ("student", "student_weight", "student_bias")
"""What may receive a gradient."""


def divergence(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [N] or scalar, differentiable in student and its head; and results [R, N] float32, a row for each `result_names`."""
    loss, rows, *_ = torch.ops.popsd.divergence(*problem.tensors, *problem.options)
    return loss, rows


def divergence_by_beta(
    problem: Problem, betas: Sequence[float], which: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`divergence` of tokens with a coefficient each, ``betas[which]``, which is [N] int64: a call for each of them."""
    losses, rows, places = [], [], []
    for number, beta in enumerate(betas):
        places.append((which == number).nonzero()[:, 0])
        own = {
            name: x[places[-1]] for name, x in problem.tensors._asdict().items() if x is not None and name in OF_TOKENS
        }
        part = Problem(problem.tensors._replace(**own), problem.options._replace(beta=beta))
        loss, results = divergence(part)
        losses.append(loss)
        rows.append(results)
    order = torch.cat(places).argsort()
    loss = torch.stack(losses).sum() if problem.options.total else torch.cat(losses)[order]
    return loss, torch.cat(rows, dim=1)[:, order]


def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    problem = _problem(arguments)
    source, weights = source_of(problem), problem.tensors.weights
    rows = compute(problem, source)
    if problem.tensors.token_ids is None:  # nobody reads it, and NaN would make two equal results unequal
        for name in OF_SAMPLED:
            rows[result_names(problem.options).index(name)] = 0.0
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
    dhidden = torch.empty_like(student, dtype=problem.dhidden_dtype) if options.with_dhidden else nothing.clone()
    rows = student.new_empty((len(result_names(options)), problem.tokens), dtype=torch.float32)
    return (loss, rows, dhidden, *heads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Saves the gradients that exist or else what they are formed from, never both; and the loss, which leads back here."""
    problem = _problem(inputs)
    tensors, ctx.options, ctx.tokens = problem.tensors, problem.options, problem.tokens
    ctx.early = ctx.options.with_dhidden or ctx.options.with_dhead
    ctx.is_gradient_weighted = problem.is_gradient_weighted
    ctx.dtypes = [None if x is None else x.dtype for x in (getattr(tensors, name) for name in TRAINED)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[0], *((tensors.weights, *output[2:]) if ctx.early else tensors))


def _backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    loss, *saved = ctx.saved_tensors  # read once: under checkpointing and offloading each reading unpacks all of them
    wanted = [ctx.needs_input_grad[Tensors._fields.index(name)] for name in TRAINED]
    with torch.no_grad():
        gradients = _scaled_gradients(ctx, saved, wanted, upstream)
    if torch.is_grad_enabled():
        gradients = _Once.apply(loss, upstream, *gradients)
    result: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    for name, gradient in zip(TRAINED, gradients, strict=True):
        result[Tensors._fields.index(name)] = gradient
    return tuple(result)


def _scaled_gradients(
    ctx: Any, saved: list[torch.Tensor], wanted: list[bool], upstream: torch.Tensor
) -> list[torch.Tensor | None]:
    """d (upstream · loss) / d the tensors of `TRAINED`, in their dtypes; None where unwanted."""
    weights = saved[0] if ctx.early else Tensors(*saved).weights
    per_token = upstream.float().expand(ctx.tokens)
    if weights is not None:  # 0 · NaN is NaN, and what comes from above to a masked token may be anything
        per_token = torch.where(weights == 0, 0.0, weights * per_token)
    if ctx.early:
        factor, is_weighted = upstream.float(), ctx.is_gradient_weighted
        gradients = saved[1:]
    else:
        options = ctx.options._replace(with_dhidden=wanted[0], with_dhead=wanted[1] or wanted[2], total=True)
        options = options._replace(decompose=None, purification=False)
        problem = Problem(Tensors(*saved)._replace(weights=per_token.contiguous()), options)
        factor, is_weighted = None, problem.is_gradient_weighted
        gradients = list(torch.ops.popsd.divergence(*problem.tensors, *options)[2:])
    factors = [factor if is_weighted else per_token[:, None], factor, factor]
    return [
        _scaled(gradient, factor, dtype) if want and dtype is not None else None
        for want, gradient, factor, dtype in zip(wanted, gradients, factors, ctx.dtypes, strict=True)
    ]


def _scaled(tensor: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """tensor · factor computed in float32 and rounded once to ``dtype``."""
    if factor is None or not tensor.numel():
        return tensor.to(dtype)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


class _Once(torch.autograd.Function):
    """Gradients as they are, which say so where somebody differentiates them again (``create_graph=True``).

    Without it they would have no history: a gradient penalty, say, would train on nothing without a word.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, upstream: torch.Tensor, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "popsd: expected a loss that is differentiated once; got a second derivative (a gradient that came from "
            "create_graph=True). Detach that gradient, or compute the penalty with popsd.oracle on a few tokens."
        )


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
