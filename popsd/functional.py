"""The public functions, and all of their validation: a bad argument is named before any work is done."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from popsd import checks
from popsd.autograd import LinearDivergence, LogitDivergence
from popsd.checks import Streams
from popsd.config import DivergenceConfig, Impl, PurifiedConfig
from popsd.streams import Problem
from popsd.tiling import target_logits
from popsd.types import Decomposition, Head, HiddenStates, LossOutput
from popsd_kernels.options import RowLoss

Reduction = Literal["none", "sum"]


def linear_purified_jsd(
    hidden: HiddenStates,
    student_head: Head,
    frozen_head: Head | None = None,
    *,
    config: PurifiedConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    decompose: bool = False,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """Purified OPSD loss per token from last hidden states and the LM head, Eq. 12-18 of arXiv 2607.02234.

    No full-vocabulary tensor over all tokens is ever formed. With one shared frozen head it costs four matrix products:
    student, base and (teacher − reference) forward, and the student's hidden gradient.

    Args:
        hidden: four streams [N, D] or [B, T, D], float32, bfloat16 or float16. Only ``student`` receives gradient.
        student_head: maps the student's hidden states to logits; its weight and bias get gradients if they require them.
        frozen_head: head of base, teacher and reference; None: the student's, without gradient through those streams.
        config: see `PurifiedConfig`; None is the paper's setting with beta = 0.5.
        weights: [N] or [B, T] per-token weights; 0 masks the token out, whatever its hidden states hold.
        token_ids: [N] or [B, T] int64 sampled tokens, for ``token_logprob``; -1 where there is none.
        decompose: also return Eq. 4 per token; one more matrix product.
        reduction: "none" gives one loss per token, "sum" their sum, for which a trainable head needs no recomputation.
        impl: "auto", "triton" or "torch", see `Impl`.
        workspace_mib: memory for a chunk's logits and gradients; None: 64 on CPU, 2048 on a GPU.

    Returns: a `LossOutput`.

    Raises:
        ValueError: shapes, devices, vocabularies or widths that do not match, a non-finite input (see
            ``DivergenceConfig.check_finite``), or ``impl="triton"`` without a usable device.
        TypeError: an argument of the wrong type or dtype.
    """
    heads = (student_head, student_head if frozen_head is None else frozen_head)
    request = _Request(weights, token_ids, reduction, impl, workspace_mib, decompose)
    return _linear(checks.hidden_streams(hidden), heads, checks.checked_config(config, PurifiedConfig), request)


def linear_jsd(
    student_hidden: torch.Tensor,
    student_head: Head,
    target_hidden: torch.Tensor,
    target_head: Head | None = None,
    *,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """Generalised JSD per token between two models' next-token distributions, from hidden states (arXiv 2306.13649).

    This is the loss of standard OPSD (arXiv 2601.18734) and GKD. student_hidden: [N, D] or [B, T, D]; target_hidden: the
    same positions, its width that of ``target_head``. The other arguments, results and errors are those of
    `linear_purified_jsd`; of a `PurifiedConfig` only the `DivergenceConfig` part counts.
    """
    heads = (student_head, student_head if target_head is None else target_head)
    streams = {"student_hidden": student_hidden, "target_hidden": target_hidden}
    request = _Request(weights, token_ids, reduction, impl, workspace_mib)
    return _linear(streams, heads, checks.checked_config(config, DivergenceConfig), request)


def purified_jsd(
    student_logits: torch.Tensor,
    base_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    config: PurifiedConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    decompose: bool = False,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """`linear_purified_jsd` from raw logits [N, V] or [B, T, V] that exist already; entries of -inf are impossible tokens.

    16-bit logits carry 5-40 % gradient error where student and target nearly agree, whatever is done with them here.
    """
    streams = {
        "student_logits": student_logits,
        "base_logits": base_logits,
        "teacher_logits": teacher_logits,
        "reference_logits": reference_logits,
    }
    request = _Request(weights, token_ids, reduction, impl, workspace_mib, decompose)
    return _from_logits(streams, checks.checked_config(config, PurifiedConfig), request)


def jsd(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """`linear_jsd` from raw logits [N, V] or [B, T, V] that exist already; entries of -inf are impossible tokens."""
    streams = {"student_logits": student_logits, "target_logits": target_logits}
    request = _Request(weights, token_ids, reduction, impl, workspace_mib)
    return _from_logits(streams, checks.checked_config(config, DivergenceConfig), request)


@torch.no_grad()
def purified_target_logits(
    base_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    config: PurifiedConfig | None = None,
    impl: Impl | str = Impl.AUTO,
) -> torch.Tensor:
    """Logits of the purified target, Eq. 13-17, dense: [..., V] raw logits → [..., V'] float32, V' the vocabulary in use.

    Tempered, and not normalised. For inspection and sampling; the losses never form it over all tokens.
    """
    streams = {
        "student": base_logits,  # a target needs no student: any stream of the right shape will do
        "base_logits": base_logits,
        "teacher_logits": teacher_logits,
        "reference_logits": reference_logits,
    }
    request = _Request(None, None, "none", impl, None)
    shape, problem = _problem(streams, None, checks.checked_config(config, PurifiedConfig), request)
    return target_logits(problem).unflatten(0, shape)


@torch.no_grad()
def decompose(
    hidden: HiddenStates,
    student_head: Head,
    frozen_head: Head | None = None,
    *,
    config: PurifiedConfig | None = None,
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> Decomposition:
    """The decomposition of the teacher's signal alone, Eq. 4, per token: fields [N] or [B, T] float32, detached.

    ``hidden.base`` is not looked at and may be None.
    """
    if hidden.base is None:
        hidden = hidden._replace(base=hidden.teacher)
    output = linear_purified_jsd(
        hidden, student_head, frozen_head, config=config, decompose=True, impl=impl, workspace_mib=workspace_mib
    )
    assert output.decomposition is not None
    return output.decomposition


class _Request(NamedTuple):
    """The arguments that all losses share."""

    weights: torch.Tensor | None
    token_ids: torch.Tensor | None
    reduction: Reduction
    impl: Impl | str
    workspace_mib: float | None
    decompose: bool = False


def _linear(streams: Streams, heads: tuple[Head, Head], config: DivergenceConfig, request: _Request) -> LossOutput:
    shape, problem = _problem(streams, heads, config, request)
    arguments = (problem, request.reduction == "sum", torch.is_grad_enabled())
    outputs = LinearDivergence.apply(_flat(next(iter(streams.values()))), heads[0].weight, heads[0].bias, *arguments)
    return _output(outputs, problem, shape)


def _from_logits(streams: Streams, config: DivergenceConfig, request: _Request) -> LossOutput:
    shape, problem = _problem(streams, None, config, request)
    outputs = LogitDivergence.apply(_flat(next(iter(streams.values()))), problem, request.reduction == "sum")
    return _output(outputs, problem, shape)


def _problem(
    streams: Streams, heads: tuple[Head, Head] | None, config: DivergenceConfig, request: _Request
) -> tuple[torch.Size, Problem]:
    """Validate everything, then describe the work on flat tokens. Returns the tokens' shape beside it."""
    shape = checks.check_streams(streams)
    vocab_size = checks.check_vocabulary(streams, heads, config)
    device = next(iter(streams.values())).device
    checks.checked_reduction(request.reduction)
    checks.check_workspace(request.workspace_mib)
    impl = checks.checked_impl(request.impl, device)
    weights = checks.checked_weights(request.weights, shape, device)
    token_ids = checks.checked_token_ids(request.token_ids, shape, device, vocab_size)
    checks.check_finite(streams, weights, config, minus_infinity=heads is None)
    student, target, *rest = (_flat(x) for x in streams.values())
    teacher, reference = rest or (None, None)
    return shape, Problem(
        student,
        target,
        teacher,
        reference,
        heads,
        config,
        weights,
        token_ids,
        request.decompose,
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
        impl,
        request.workspace_mib,
    )


def _flat(stream: torch.Tensor) -> torch.Tensor:
    """[..., D] → [N, D] with unit inner stride."""
    flat = stream.flatten(0, -2)
    return flat if flat.stride(-1) == 1 or 0 in flat.shape else flat.contiguous()


def _output(outputs: tuple[torch.Tensor, ...], problem: Problem, shape: torch.Size) -> LossOutput:
    loss, *detached = outputs
    detached = [x.unflatten(0, shape) for x in detached]
    rows, rest = RowLoss(*detached[: len(RowLoss._fields)]), detached[len(RowLoss._fields) :]
    weights = torch.ones_like(rows.divergence) if problem.weights is None else problem.weights.view(shape)
    return LossOutput(
        loss=loss if loss.ndim == 0 else loss.unflatten(0, shape),
        **(rows._asdict() | {"token_logprob": None if problem.token_ids is None else rows.token_logprob}),
        decomposition=Decomposition(*rest) if problem.decompose else None,
        weights=weights,
    )
