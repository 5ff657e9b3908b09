"""The operator `popsd::divergence` and its autograd formula. No mathematics: it decides when a gradient is formed and
scales it by what comes from above. An operator, not a bare autograd.Function, so that torch.compile keeps the caller whole.

With a frozen head the gradient of each token is formed in forward, whatever comes from above: backward only scales rows.
With a trainable head dW sums over tokens, so their upstream weights must be known: a scalar loss forms it in forward, a
per-token loss recomputes in backward. Given logits get their gradient in backward, where it is written once, scaled.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch

from popsd.config import DivergenceConfig, Impl, Method, PurifiedConfig, Strategy
from popsd.engine.decomposition import FIELDS as DECOMPOSITION_FIELDS
from popsd.engine.loop import run_tiles
from popsd.engine.problem import Problem
from popsd.engine.sources import GivenLogits, ProjectedStreams
from popsd.head import Head
from popsd.outputs import Decomposition, Purification
from popsd_kernels.rows import RowLoss

COMPOSED = ("pmi_beta", "pmi_clip", "center", "exact_difference", "plausibility", "tail_floor", "tail_cap")
"""Fields of `PurifiedConfig` beyond those of `DivergenceConfig`, which `Spec` repeats."""


class Tensors(NamedTuple):
    """Tensor arguments, flat over N tokens; without ``student_weight`` the streams are logits.

    ``frozen_weight`` and ``frozen_bias`` are None where the student's head serves all streams.
    """

    student: torch.Tensor
    target: torch.Tensor
    teacher: torch.Tensor | None
    reference: torch.Tensor | None
    student_weight: torch.Tensor | None
    student_bias: torch.Tensor | None
    frozen_weight: torch.Tensor | None
    frozen_bias: torch.Tensor | None
    weights: torch.Tensor | None
    token_ids: torch.Tensor | None


class Spec(NamedTuple):
    """Everything else: options of `PurifiedConfig` and of the two heads, and which results are wanted."""

    beta: float
    temperature: float
    token_clip: float | None
    entry_clip: float | None
    vocab_size: int | None
    pmi_beta: float
    pmi_clip: float | None
    center: bool
    exact_difference: bool
    plausibility: float | None
    tail_floor: float | None
    tail_cap: float | None
    student_scale: float
    student_softcap: float | None
    frozen_scale: float
    frozen_softcap: float | None
    decompose: str | None
    telemetry: bool
    total: bool
    """One scalar loss instead of [N]."""
    with_dhidden: bool
    """Form d loss/d hidden (or d loss/d logits) now."""
    with_dhead: bool
    """Form dW and the bias gradient now."""
    impl: str
    strategy: str
    workspace_mib: float | None
    autocast: str | None


def divergence(tensors: Tensors, spec: Spec) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss [N] or scalar, differentiable in student and its head; and fields of RowLoss, Decomposition, Purification [N]."""
    loss, rows, *_ = torch.ops.popsd.divergence(*tensors, *spec)
    return loss, dict(zip(_row_names(spec), rows.unbind(0), strict=True))


def _row_names(spec: Spec) -> list[str]:
    names = list(RowLoss._fields)
    if spec.decompose is not None:
        known = DECOMPOSITION_FIELDS[spec.decompose]
        names += [name for name in Decomposition._fields if name in known]
    return names + list(Purification._fields if spec.telemetry else ())


def _problem(tensors: Tensors, spec: Spec) -> Problem:
    heads = None
    if tensors.student_weight is not None:
        own = Head(tensors.student_weight, tensors.student_bias, spec.student_scale, spec.student_softcap)
        other = own
        if tensors.frozen_weight is not None:
            other = Head(tensors.frozen_weight, tensors.frozen_bias, spec.frozen_scale, spec.frozen_softcap)
        heads = (own, other)
    composed = {name: getattr(spec, name) for name in COMPOSED}
    common = {name: getattr(spec, name) for name in ("beta", "temperature", "token_clip", "entry_clip", "vocab_size")}
    purified = tensors.teacher is not None
    return Problem(
        tensors.student,
        tensors.target,
        tensors.teacher,
        tensors.reference,
        heads,
        PurifiedConfig(**common, **composed) if purified else DivergenceConfig(**common),
        tensors.weights,
        tensors.token_ids,
        None if spec.decompose is None else Method(spec.decompose),
        spec.telemetry,
        None if spec.autocast is None else getattr(torch, spec.autocast),
        Impl(spec.impl),
        Strategy(spec.strategy),
        spec.workspace_mib,
    )


def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    tensors, spec = _split(arguments)
    problem = _problem(tensors, spec)
    source: ProjectedStreams | GivenLogits
    if problem.heads is None:
        source = GivenLogits(problem, with_gradient=spec.with_dhidden)
    else:
        source = ProjectedStreams(problem, with_dhidden=spec.with_dhidden, with_dhead=spec.with_dhead)
    result = run_tiles(problem, source)
    losses = result.rows
    if problem.token_ids is None:  # NaN would make two equal results unequal
        losses = losses._replace(token_logprob=torch.zeros_like(losses.divergence))
    extra = (*(result.decomposition or ()), *(result.purification or ()))
    rows = torch.stack([*losses, *(x for x in extra if x is not None)])
    if problem.weights is not None:
        rows.masked_fill_(problem.weights == 0, 0.0)
    loss = rows[0].clone() if problem.weights is None else rows[0] * problem.weights
    if spec.total:
        loss = loss.sum()
    nothing = problem.student.new_empty(0)
    gradients = (source.dhidden, source.dweight, source.dbias)
    return (loss, rows, *(nothing.clone() if x is None else x for x in gradients))


def _fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    tensors, spec = _split(arguments)
    student, nothing = tensors.student, tensors.student.new_empty(0)
    tokens = student.shape[0]
    loss = student.new_empty(() if spec.total else (tokens,), dtype=torch.float32)
    heads = [
        nothing.clone() if x is None or not spec.with_dhead else torch.empty_like(x, dtype=torch.float32)
        for x in (tensors.student_weight, tensors.student_bias)
    ]
    dhidden = torch.empty_like(student) if spec.with_dhidden else nothing.clone()
    rows = student.new_empty((len(_row_names(spec)), tokens), dtype=torch.float32)
    return (loss, rows, dhidden, *heads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, ctx.spec = _split(inputs)
    ctx.early = ctx.spec.with_dhidden or ctx.spec.with_dhead
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    tensors, gradients = Tensors(*ctx.saved_tensors[: len(Tensors._fields)]), ctx.saved_tensors[len(Tensors._fields) :]
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
    if ctx.early:
        rows = upstream if upstream.ndim == 0 else upstream[:, None]
        gradients = [_scaled(x, factor) for x, factor in zip(gradients, (rows, upstream, upstream), strict=True)]
    else:
        scale = upstream.float().expand(tensors.student.shape[0]).contiguous()
        if tensors.weights is not None:
            scale = torch.where(tensors.weights == 0, 0.0, tensors.weights * scale)
        spec = ctx.spec._replace(with_dhidden=wanted[0], with_dhead=wanted[1] or wanted[2], total=True)
        spec = spec._replace(decompose=None, telemetry=False)
        gradients = torch.ops.popsd.divergence(*tensors._replace(weights=scale), *spec)[2:]
    owners = (tensors.student, tensors.student_weight, tensors.student_bias)
    result: list[torch.Tensor | None] = [None] * (len(Tensors._fields) + len(Spec._fields))
    for slot, want, gradient, owner in zip((0, 4, 5), wanted, gradients, owners, strict=True):
        result[slot] = gradient.to(owner.dtype) if want and owner is not None else None
    return tuple(result)


def _scaled(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """tensor · factor computed in float32 and rounded once to the tensor's dtype."""
    return torch.mul(tensor, factor.float(), out=torch.empty_like(tensor)) if tensor.numel() else tensor


def _split(arguments: tuple[Any, ...]) -> tuple[Tensors, Spec]:
    count = len(Tensors._fields)
    return Tensors(*arguments[:count]), Spec(*arguments[count:])


def _schema() -> str:
    names = {torch.Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str"}
    types = names | {kind | None: f"{name}?" for kind, name in names.items()}
    arguments = [f"{types[hint]} {name}" for kind in (Tensors, Spec) for name, hint in get_type_hints(kind).items()]
    return f"({', '.join(arguments)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


_operator = torch.library.custom_op("popsd::divergence", _forward, mutates_args=(), schema=_schema())
_operator.register_fake(_fake)
_operator.register_autograd(_backward, setup_context=_setup_context)
