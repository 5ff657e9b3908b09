"""The public functions, and all of their validation: a bad argument is named before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, PurifiedConfig, Strategy
from popsd.engine import validation
from popsd.engine.backends import resolve_impl
from popsd.engine.decomposition import decompose_hidden
from popsd.engine.loop import target_logits
from popsd.engine.operator import COMPOSED, Spec, Tensors, divergence
from popsd.engine.precision import exact_matmuls
from popsd.engine.problem import Problem
from popsd.engine.sources import operand, project
from popsd.engine.token_masks import token_weights, warn_if_nothing_is_kept
from popsd.engine.torch_backend.targets import tempered_logits
from popsd.engine.validation import Streams
from popsd.head import Head
from popsd.outputs import Decomposition, HiddenStates, LossOutput, Purification
from popsd_kernels.rows import LogitTransform, RowOptions

Reduction = Literal["none", "sum"]


def linear_purified_jsd(
    hidden: HiddenStates,
    student_head: Head,
    frozen_head: Head | None = None,
    *,
    config: PurifiedConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
    decompose: bool | Method | str = False,
    telemetry: bool = False,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
    strategy: Strategy | str = Strategy.CHUNKED,
) -> LossOutput:
    """Purified OPSD loss per token from last hidden states and the LM head, Eq. 12-18 of arXiv 2607.02234.

    No full-vocabulary tensor over all tokens is ever formed. With one shared frozen head it costs four matrix products:
    student, base and (teacher − reference) forward, and the student's hidden gradient. Float32 operands are multiplied in
    full float32, whatever ``torch.set_float32_matmul_precision`` or the TF32 switches say; under autocast on a GPU they
    are converted to its dtype first.

    Args:
        hidden: four streams [N, D] or [B, T, D], float32, bfloat16 or float16. Only ``student`` receives gradient.
        student_head: maps the student's hidden states to logits; its weight and bias get gradients if they require them.
        frozen_head: head of base, teacher and reference; None: the student's, without gradient through those streams.
        config: see `PurifiedConfig`; None is the paper's setting with beta = 0.5.
        weights: [N] or [B, T] per-token weights; 0 masks the token out, whatever its hidden states hold.
        token_ids: [N] or [B, T] int64 sampled tokens, for ``token_logprob``; -1 where there is none.
        masks: which tokens the loss keeps, see `MaskConfig`; batch-level rules see the tokens of this call. The weights act
            after the operator, so with a trainable head the gradient is recomputed in backward, as for "none".
        positions: [N] or [B, T] int64 place of each token in its completion, for ``skip_first``; columns of [B, T] if None.
        decompose: also return Eq. 4 per token; True or "logits": every field, one more matrix product; "gram": the centred
            fields alone, from hidden states, where one head without soft cap serves all streams, see `Method`.
        telemetry: also return what the target does to each token, see `Purification`; one more matrix product and a search
            for quantiles, about as much again as the loss itself on CPU.
        reduction: "none" gives one loss per token, "sum" their sum, for which a trainable head needs no recomputation.
        impl: "auto", "triton" or "torch", see `Impl`.
        workspace_mib: memory for a chunk's logits and gradients; None: 72 on CPU, 2048 on a GPU, a third more
            with ``decompose=True``.
        strategy: "chunked", "single_read" or "streaming", see `popsd.Strategy`.

    Returns: a `LossOutput`.

    Raises:
        ValueError: shapes, devices, vocabularies or widths that do not match, a non-finite input (see
            ``DivergenceConfig.check_finite``), a mask or a method that lacks what it reads, or ``impl="triton"`` without a
            usable device.
        TypeError: an argument of the wrong type or dtype.
    """
    heads = (student_head, student_head if frozen_head is None else frozen_head)
    request = _Request(
        weights, token_ids, reduction, impl, workspace_mib, masks, positions, decompose, telemetry, strategy
    )
    return _divergence(
        validation.hidden_streams(hidden), heads, validation.checked_config(config, PurifiedConfig), request
    )


def linear_jsd(
    student_hidden: torch.Tensor,
    student_head: Head,
    target_hidden: torch.Tensor,
    target_head: Head | None = None,
    *,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
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
    request = _Request(
        weights, token_ids, reduction, impl, workspace_mib, masks=masks, positions=positions, strategy=strategy
    )
    return _divergence(streams, heads, validation.checked_config(config, DivergenceConfig), request)


def purified_jsd(
    student_logits: torch.Tensor,
    base_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    config: PurifiedConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
    decompose: bool | Method | str = False,
    telemetry: bool = False,
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
    request = _Request(weights, token_ids, reduction, impl, workspace_mib, masks, positions, decompose, telemetry)
    return _divergence(streams, None, validation.checked_config(config, PurifiedConfig), request)


def jsd(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """`linear_jsd` from raw logits [N, V] or [B, T, V] that exist already; entries of -inf are impossible tokens."""
    streams = {"student_logits": student_logits, "target_logits": target_logits}
    request = _Request(weights, token_ids, reduction, impl, workspace_mib, masks, positions)
    return _divergence(streams, None, validation.checked_config(config, DivergenceConfig), request)


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
    config = validation.checked_config(config, PurifiedConfig)
    shape = validation.check_streams(streams)
    validation.check_vocabulary(streams, None, config)
    validation.check_finite(streams, None, config, minus_infinity=True)
    student, base, teacher, reference = (_flat(x) for x in streams.values())
    impl = validation.checked_impl(impl, base.device)
    problem = Problem(student, base, teacher, reference, None, config, impl=impl)
    return target_logits(problem).unflatten(0, shape)


@torch.no_grad()
def decompose(
    hidden: HiddenStates,
    student_head: Head,
    frozen_head: Head | None = None,
    *,
    config: PurifiedConfig | None = None,
    method: Method | str = Method.LOGITS,
    log_normalisers: Sequence[torch.Tensor] | None = None,
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> Decomposition:
    """The decomposition of the teacher's signal alone, Eq. 4, per token: fields [N] or [B, T] float32, detached.

    ``hidden.base`` is not looked at and may be None. method: "logits" gives every field; "gram" the centred ones from hidden
    states and the head's Gram matrix in O(N·D²), where one head without soft cap serves all streams. log_normalisers: with
    "gram" the raw fields too; log Σ exp of the tempered logits of student, teacher and reference, [N] or [B, T] each.

    Relative error per field in float32 against float64, V = 32k: "gram" 2e-7 at any distance; "logits" 3e-6 or less, 5e-5 in
    raw fields where the streams are 0.1 % apart (KL near 1e-6), since log-normalisers round at 1e-7. Where the heads differ or
    have a soft cap, 1e-5 and, there, 5e-4 in raw and weighted fields.
    Raises what `linear_purified_jsd` raises.
    """
    if hidden.base is None:
        hidden = hidden._replace(base=hidden.teacher)
    heads = (student_head, student_head if frozen_head is None else frozen_head)
    if validation.checked_method(method, heads, argument="method") is Method.GRAM:
        return _decompose_by_gram(hidden, heads, validation.checked_config(config, PurifiedConfig), log_normalisers)
    if log_normalisers is not None:
        raise ValueError("log_normalisers: expected None with method='logits', which computes them. Leave them out.")
    output = linear_purified_jsd(
        hidden, student_head, frozen_head, config=config, decompose=True, impl=impl, workspace_mib=workspace_mib
    )
    assert output.decomposition is not None
    return output.decomposition


@torch.compiler.disable  # a Gram matrix kept with its weight is no business of a graph
def _decompose_by_gram(
    hidden: HiddenStates,
    heads: tuple[Head, Head],
    config: PurifiedConfig,
    log_normalisers: Sequence[torch.Tensor] | None,
) -> Decomposition:
    streams = validation.hidden_streams(hidden)
    shape = validation.check_streams(streams)
    vocab_size = validation.check_vocabulary(streams, heads, config)
    validation.check_finite(streams, None, config)
    student, _, teacher, reference = (_flat(x) for x in streams.values())
    with exact_matmuls(student.device):
        parts = decompose_hidden(
            student,
            teacher,
            reference,
            heads[0],
            vocab_size=vocab_size,
            temperature=config.temperature,
            log_normalisers=validation.checked_log_normalisers(log_normalisers, shape, student.device),
        )
    return Decomposition(*(None if x is None else x.unflatten(0, shape) for x in parts))


@torch.compiler.disable  # the precision of matmuls is a switch of the process, which no graph may set
@torch.no_grad()
def head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """[N, D] hidden states → [N, V] float32 logits in the model's own order: projection, bias, scale, soft cap.

    From products with float32 output whatever the dtypes, for looking at a few tokens; the losses never form them over all.
    """
    width = head.weight.shape[1]
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(f"hidden: expected shape [N, {width}] to fit head.weight; got {list(hidden.shape)}.")
    weight = operand(head.weight, hidden, None)
    logits = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device)
    with exact_matmuls(hidden.device):
        project(hidden.to(weight.dtype), weight, logits)
    bias = None if head.bias is None else head.bias.float()
    return tempered_logits(logits, bias, LogitTransform(head.logit_scale, head.softcap), RowOptions(), out=logits)


class _Request(NamedTuple):
    """The arguments that all losses share."""

    weights: torch.Tensor | None
    token_ids: torch.Tensor | None
    reduction: Reduction
    impl: Impl | str
    workspace_mib: float | None
    masks: MaskConfig | None = None
    positions: torch.Tensor | None = None
    decompose: bool | Method | str = False
    telemetry: bool = False
    strategy: Strategy | str = Strategy.CHUNKED


def _divergence(
    streams: Streams, heads: tuple[Head, Head] | None, config: DivergenceConfig, request: _Request
) -> LossOutput:
    """Validate everything, then hand flat tensors to the operator and give its results their shape."""
    shape = validation.check_streams(streams)
    vocab_size = validation.check_vocabulary(streams, heads, config)
    total = validation.checked_reduction(request.reduction) == "sum"
    validation.check_workspace(request.workspace_mib)
    student, target, *rest = (_flat(x) for x in streams.values())
    impl = validation.checked_impl(request.impl, student.device)
    weights = validation.checked_weights(request.weights, shape, student.device)
    token_ids = validation.checked_token_ids(request.token_ids, shape, student.device, vocab_size)
    positions = validation.checked_positions(request.positions, shape, student.device)
    masks = validation.checked_masks(
        request.masks, purified=len(streams) == 4, token_ids=token_ids, positions=positions
    )
    validation.check_finite(streams, weights, config, minus_infinity=heads is None)
    teacher, reference = rest or (None, None)
    composed = config if rest and isinstance(config, PurifiedConfig) else None
    driver = resolve_impl(impl, student.device)
    method = validation.method_for_masks(validation.checked_method(request.decompose, heads), masks, heads)
    normalisers = request.telemetry or method is Method.LOGITS
    strategy = validation.checked_strategy(request.strategy, driver, heads, composed, normalisers)
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
    trained = (student, tensors.student_weight, tensors.student_bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in trained]
    train_head = needs[1] or needs[2]
    inside = total and masks is None  # token masks come after the operator, and with them the sum
    early = own is not None and (inside or not train_head)
    device = student.device.type
    purified = config if isinstance(config, PurifiedConfig) else PurifiedConfig()
    spec = Spec(
        beta=config.beta,
        temperature=config.temperature,
        token_clip=config.token_clip,
        entry_clip=config.entry_clip,
        vocab_size=config.vocab_size,
        **{name: getattr(purified, name) for name in COMPOSED},
        student_scale=1.0 if own is None else own.logit_scale,
        student_softcap=None if own is None else own.softcap,
        frozen_scale=1.0 if frozen is None else frozen.logit_scale,
        frozen_softcap=None if frozen is None else frozen.softcap,
        decompose=None if method is None else method.value,
        telemetry=request.telemetry,
        total=inside,
        with_dhidden=early and needs[0],
        with_dhead=early and train_head,
        impl=impl.value,
        strategy=strategy.value,
        workspace_mib=request.workspace_mib,
        autocast=str(torch.get_autocast_dtype(device)).split(".")[1] if torch.is_autocast_enabled(device) else None,
    )
    loss, fields = divergence(tensors, spec)
    decomposition = None if method is None else Decomposition(*(fields.get(name) for name in Decomposition._fields))
    used = torch.ones_like(fields["divergence"]) if weights is None else weights
    if masks is not None:
        kept = token_weights(
            masks,
            student_entropy=fields["student_entropy"],
            target_entropy=fields["target_entropy"],
            decomposition=decomposition,
            token_ids=token_ids,
            positions=positions,
            weights=weights,
        )
        if validation.may_look(kept):
            warn_if_nothing_is_kept(used * kept, used)
        loss, used = loss * kept, used * kept
        loss = loss.sum() if total else loss
    fields = {name: x.unflatten(0, shape) for name, x in fields.items()}
    return LossOutput(
        loss=loss if total else loss.unflatten(0, shape),
        divergence=fields["divergence"],
        student_kl=fields["student_kl"],
        target_kl=fields["target_kl"],
        student_entropy=fields["student_entropy"],
        target_entropy=fields["target_entropy"],
        clip_fraction=fields["clip_fraction"],
        token_clipped=fields["token_clipped"],
        argmax_agreement=fields["argmax_agreement"],
        token_logprob=None if token_ids is None else fields["token_logprob"],
        decomposition=None if method is None else Decomposition(*(fields.get(x) for x in Decomposition._fields)),
        weights=used.view(shape),
        purification=Purification(*(fields[x] for x in Purification._fields)) if request.telemetry else None,
    )


def _flat(stream: torch.Tensor) -> torch.Tensor:
    """[..., D] → [N, D] with unit inner stride."""
    flat = stream.flatten(0, -2)
    return flat if flat.stride(-1) == 1 or 0 in flat.shape else flat.contiguous()
