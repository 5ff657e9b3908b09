"""The public functions, and all of their validation: a bad argument is named before any work is done."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from popsd import checks
from popsd.autograd import Spec, Tensors, divergence
from popsd.checks import Streams
from popsd.config import DivergenceConfig, Impl, PurifiedConfig, Strategy
from popsd.streams import Problem
from popsd.tiling import resolve_impl, target_logits
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
    strategy: Strategy | str = Strategy.CHUNKED,
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
        strategy: "chunked", "single_read" or "streaming", see `popsd.Strategy`.

    Returns: a `LossOutput`.

    Raises:
        ValueError: shapes, devices, vocabularies or widths that do not match, a non-finite input (see
            ``DivergenceConfig.check_finite``), or ``impl="triton"`` without a usable device.
        TypeError: an argument of the wrong type or dtype.
    """
    heads = (student_head, student_head if frozen_head is None else frozen_head)
    request = _Request(weights, token_ids, reduction, impl, workspace_mib, decompose, strategy)
    return _divergence(checks.hidden_streams(hidden), heads, checks.checked_config(config, PurifiedConfig), request)


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
    strategy: Strategy | str = Strategy.CHUNKED,
) -> LossOutput:
    """Generalised JSD per token between two models' next-token distributions, from hidden states (arXiv 2306.13649).

    This is the loss of standard OPSD (arXiv 2601.18734) and GKD. student_hidden: [N, D] or [B, T, D]; target_hidden: the
    same positions, its width that of ``target_head``. The other arguments, results and errors are those of
    `linear_purified_jsd`; of a `PurifiedConfig` only the `DivergenceConfig` part counts.
    """
    heads = (student_head, student_head if target_head is None else target_head)
    streams = {"student_hidden": student_hidden, "target_hidden": target_hidden}
    request = _Request(weights, token_ids, reduction, impl, workspace_mib, strategy=strategy)
    return _divergence(streams, heads, checks.checked_config(config, DivergenceConfig), request)


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
    return _divergence(streams, None, checks.checked_config(config, PurifiedConfig), request)


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
    return _divergence(streams, None, checks.checked_config(config, DivergenceConfig), request)


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
    config = checks.checked_config(config, PurifiedConfig)
    shape = checks.check_streams(streams)
    checks.check_vocabulary(streams, None, config)
    checks.check_finite(streams, None, config, minus_infinity=True)
    student, base, teacher, reference = (_flat(x) for x in streams.values())
    impl = checks.checked_impl(impl, base.device)
    problem = Problem(student, base, teacher, reference, None, config, impl=impl)
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
    strategy: Strategy | str = Strategy.CHUNKED


def _divergence(
    streams: Streams, heads: tuple[Head, Head] | None, config: DivergenceConfig, request: _Request
) -> LossOutput:
    """Validate everything, then hand flat tensors to the operator and give its results their shape."""
    shape = checks.check_streams(streams)
    vocab_size = checks.check_vocabulary(streams, heads, config)
    total = checks.checked_reduction(request.reduction) == "sum"
    checks.check_workspace(request.workspace_mib)
    student, target, *rest = (_flat(x) for x in streams.values())
    impl = checks.checked_impl(request.impl, student.device)
    weights = checks.checked_weights(request.weights, shape, student.device)
    token_ids = checks.checked_token_ids(request.token_ids, shape, student.device, vocab_size)
    checks.check_finite(streams, weights, config, minus_infinity=heads is None)
    teacher, reference = rest or (None, None)
    composed = config if rest and isinstance(config, PurifiedConfig) else None
    driver = resolve_impl(impl, student.device)
    strategy = checks.checked_strategy(request.strategy, driver, heads, composed, request.decompose)
    own, frozen = heads or (None, None)
    separate = None if own is None or frozen is None or frozen is own else frozen
    tensors = Tensors(
        student,
        target,
        teacher,
        reference,
        None if own is None else own.weight,
        None if own is None else own.bias,
        None if separate is None else separate.weight,
        None if separate is None else separate.bias,
        weights,
        token_ids,
    )
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student, *tensors[4:6])]
    train_head = needs[1] or needs[2]
    early = own is not None and (total or not train_head)
    device = student.device.type
    purified = config if isinstance(config, PurifiedConfig) else PurifiedConfig()
    spec = Spec(
        beta=config.beta,
        temperature=config.temperature,
        token_clip=config.token_clip,
        entry_clip=config.entry_clip,
        vocab_size=config.vocab_size,
        pmi_beta=purified.pmi_beta,
        pmi_clip=purified.pmi_clip,
        center=purified.center,
        exact_difference=purified.exact_difference,
        student_scale=1.0 if own is None else own.logit_scale,
        student_softcap=None if own is None else own.softcap,
        frozen_scale=1.0 if frozen is None else frozen.logit_scale,
        frozen_softcap=None if frozen is None else frozen.softcap,
        decompose=request.decompose,
        total=total,
        with_dhidden=early and needs[0],
        with_dhead=early and train_head,
        impl=impl.value,
        strategy=strategy.value,
        workspace_mib=request.workspace_mib,
        autocast=str(torch.get_autocast_dtype(device)).split(".")[1] if torch.is_autocast_enabled(device) else None,
    )
    loss, detached = divergence(tensors, spec)
    rows = RowLoss(*(x.unflatten(0, shape) for x in detached[: len(RowLoss._fields)]))
    parts = [x.unflatten(0, shape) for x in detached[len(RowLoss._fields) :]]
    return LossOutput(
        loss=loss if total else loss.unflatten(0, shape),
        **(rows._asdict() | {"token_logprob": None if token_ids is None else rows.token_logprob}),
        decomposition=Decomposition(*parts) if request.decompose else None,
        weights=torch.ones_like(rows.divergence) if weights is None else weights.view(shape),
    )


def _flat(stream: torch.Tensor) -> torch.Tensor:
    """[..., D] → [N, D] with unit inner stride."""
    flat = stream.flatten(0, -2)
    return flat if flat.stride(-1) == 1 or 0 in flat.shape else flat.contiguous()
