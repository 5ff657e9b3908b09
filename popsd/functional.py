"""The public functions, and all of their validation: a bad argument is named before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine import validation
from popsd.engine.backends import resolve_impl
from popsd.engine.chunks.buckets import target_buckets
from popsd.engine.chunks.registry import structured
from popsd.engine.operator import divergence, divergence_by_beta
from popsd.engine.problem import problem_of
from popsd.engine.results import columns_of, decomposition_of, loss_output
from popsd.engine.tokens import checks
from popsd.engine.tokens.masks import token_weights, warn_if_nothing_is_kept
from popsd.head import Head
from popsd.outputs import HiddenStates, LossOutput, SparseTarget

Reduction = Literal["none", "sum"]


def linear_purified_jsd(
    hidden: HiddenStates,
    student_head: Head,
    frozen_head: Head | None = None,
    *,
    config: PurifiedConfig | TargetConfig | None = None,
    weights: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
    decompose: bool | Method | str = False,
    gram: torch.Tensor | None = None,
    telemetry: bool = False,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
    strategy: Strategy | str = Strategy.CHUNKED,
) -> LossOutput:
    """Purified OPSD loss per token from last hidden states and the LM head, Eq. 12-18 of arXiv 2607.02234.

    No full-vocabulary tensor over all tokens is ever formed. With one shared frozen head it costs four matmuls:
    student, base and (teacher − reference) forward, and the student's hidden gradient. Float32 operands are multiplied in
    full float32, whatever ``torch.set_float32_matmul_precision`` or the TF32 switches say; under autocast on a GPU they
    are converted to its dtype first.

    The loss is differentiable once, in reverse mode: a second derivative, forward mode and the transforms of torch.func raise
    NotImplementedError. Checkpoints, hooks on saved tensors and torch.compile with fullgraph=True work.

    Args:
        hidden: four streams [N, D] or [B, T, D], float32, bfloat16 or float16. Only ``student`` receives gradient.
        student_head: maps the student's hidden states to logits; its weight and bias get gradients if they require them.
        frozen_head: head of base, teacher and reference; None: the student's, without gradient through those streams.
        config: see `PurifiedConfig`; None is the paper's setting with beta = 0.5. Or a `TargetConfig`: a registered target.
        weights: [N] or [B, T] per-token weights; 0 masks the token out, whatever its hidden states hold.
        beta: for each completion [B], or each token [N] or [B, T], what counts as ``config.beta``; at most 8 different
            numbers. Forward KL on right and reverse KL on wrong completions is OG-OPSD's (arXiv 2610.05070). Each number is
            a pass over its tokens, on a copy of their hidden states. Reading them waits for the GPU; torch.compile cannot.
        token_ids: [N] or [B, T] int64 sampled tokens, for ``token_logprob`` and ``target_logprob``; -1 where
            there is none.
        masks: which tokens the loss keeps, see `MaskConfig`; batch-level rules see the tokens of this call. The weights act
            after the operator, so with a trainable head the gradient is recomputed in backward, as for "none".
        positions: [N] or [B, T] int64 place of each token in its completion, for ``skip_first``; columns of [B, T] if None.
        decompose: also return Eq. 4 per token; True or "logits": every field, one more matmul; "gram": the centred
            fields alone, from hidden states, where one head without soft cap serves all streams, see `Method`.
        gram: the head's `gram_matrix`, for "gram" and for masks on the centred fields; None forms it in every call.
        telemetry: also return what the target does to each token, see `Purification`; one more matmul and a search
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
    validation.check_hidden(hidden)
    return _divergence(
        hidden,
        validation.HIDDEN,
        (student_head, student_head if frozen_head is None else frozen_head),
        validation.target_config(config),
        weights=weights,
        beta=beta,
        token_ids=token_ids,
        masks=masks,
        positions=positions,
        decompose=decompose,
        gram=gram,
        telemetry=telemetry,
        reduction=reduction,
        impl=impl,
        workspace_mib=workspace_mib,
        strategy=strategy,
    )


def linear_jsd(
    student_hidden: torch.Tensor,
    student_head: Head,
    target_hidden: torch.Tensor,
    target_head: Head | None = None,
    *,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
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
    return _divergence(
        HiddenStates(student_hidden, None, target_hidden, None),
        ("student_hidden", "", "target_hidden", ""),
        (student_head, student_head if target_head is None else target_head),
        validation.two_distributions_config(config),
        weights=weights,
        beta=beta,
        token_ids=token_ids,
        masks=masks,
        positions=positions,
        reduction=reduction,
        impl=impl,
        workspace_mib=workspace_mib,
        strategy=strategy,
    )


def linear_sparse_jsd(
    hidden: torch.Tensor,
    head: Head,
    target: SparseTarget,
    *,
    add_tail: bool = True,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """Generalised JSD per token to a teacher of whom only the likeliest k entries are known, from hidden states.

    Student and teacher are compared over k + 1 buckets: the k entries, and all others together as the tail. That is a lower
    bound of the divergence over the vocabulary, and equal to it at k = V. The student's tail is a sum of its own, known to
    float32's relative accuracy however small it is. The teacher's is 1 less the sum of what is listed, taken in float64 and
    at least 1e-7. No [N, V] tensor is ever formed.

    Args:
        hidden: the student's last hidden states [N, D] or [B, T, D], float32, bfloat16 or float16.
        head: its language-model head; weight and bias get gradients if they require them.
        target: see `SparseTarget`. No gradient reaches it.
        add_tail: False leaves the tail out, and renormalises both over the k entries. Then nothing holds the student's
            probability on them together. Either is TRL's server distillation with its option of that name.
        config: see `DivergenceConfig`; None is beta = 0.5. ``temperature`` divides the student's logits alone: ask the server
            for log-probabilities at that temperature. ``entry_clip`` caps buckets.
        impl: "torch", or "auto", which is torch here on every device: no kernel has been written for it.
        weights, beta, token_ids, masks, positions, reduction, workspace_mib: see `linear_purified_jsd`.

    Returns: a `LossOutput`. Entropies, KLs, ``clip_fraction`` and ``argmax_agreement`` are those of the buckets.
    ``token_logprob`` is the student's over its whole vocabulary, with a tail or without; ``target_logprob`` is NaN of a token
    that the target does not list.

    Raises:
        ValueError: as `linear_purified_jsd`; and ids outside the vocabulary or probabilities that add up to more than 1, where
            looking is free; or ``impl="triton"``.
        TypeError: an argument of the wrong type or dtype.

    >>> import torch
    >>> import popsd
    >>> hidden, head = torch.randn(2, 8, requires_grad=True), popsd.Head(torch.randn(100, 8))
    >>> target = popsd.SparseTarget(torch.tensor([[7, 3], [5, -1]]), torch.tensor([[-0.5, -1.5], [-0.1, -torch.inf]]))
    >>> popsd.linear_sparse_jsd(hidden, head, target, reduction="sum").loss.backward()
    >>> hidden.grad.shape
    torch.Size([2, 8])
    """
    if not isinstance(add_tail, bool):
        raise TypeError(f"add_tail: expected True or False; got {add_tail!r}.")
    if validation.checked_impl(impl, hidden.device) is Impl.TRITON:
        raise ValueError(
            "impl: expected 'auto' or 'torch' for a sparse target, which no Triton kernel computes; got 'triton'."
        )
    return _divergence(
        HiddenStates(hidden, None, None, None),  # type: ignore[arg-type]
        ("hidden", "", "", ""),
        (head, head),
        validation.two_distributions_config(config),
        weights=weights,
        beta=beta,
        token_ids=token_ids,
        masks=masks,
        positions=positions,
        reduction=reduction,
        impl=Impl.TORCH,
        workspace_mib=workspace_mib,
        sparse=(target, add_tail),
    )


def purified_jsd(
    student_logits: torch.Tensor,
    base_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    config: PurifiedConfig | TargetConfig | None = None,
    weights: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
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
    return _divergence(
        HiddenStates(student_logits, base_logits, teacher_logits, reference_logits),
        validation.LOGITS,
        None,
        validation.target_config(config),
        weights=weights,
        beta=beta,
        token_ids=token_ids,
        masks=masks,
        positions=positions,
        decompose=decompose,
        telemetry=telemetry,
        reduction=reduction,
        impl=impl,
        workspace_mib=workspace_mib,
    )


def jsd(
    student_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    config: DivergenceConfig | None = None,
    weights: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    masks: MaskConfig | None = None,
    positions: torch.Tensor | None = None,
    reduction: Reduction = "none",
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
) -> LossOutput:
    """`linear_jsd` from raw logits [N, V] or [B, T, V] that exist already; entries of -inf are impossible tokens."""
    return _divergence(
        HiddenStates(student_logits, None, target_logits, None),
        ("student_logits", "", "target_logits", ""),
        None,
        validation.two_distributions_config(config),
        weights=weights,
        beta=beta,
        token_ids=token_ids,
        masks=masks,
        positions=positions,
        reduction=reduction,
        impl=impl,
        workspace_mib=workspace_mib,
    )


def _divergence(
    streams: HiddenStates,
    names: Sequence[str],
    heads: tuple[Head, Head] | None,
    config: DivergenceConfig,
    *,
    weights: torch.Tensor | None,
    beta: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    masks: MaskConfig | None,
    positions: torch.Tensor | None,
    reduction: Reduction,
    impl: Impl | str,
    workspace_mib: float | None,
    decompose: bool | Method | str = False,
    gram: torch.Tensor | None = None,
    telemetry: bool = False,
    strategy: Strategy | str = Strategy.CHUNKED,
    sparse: tuple[SparseTarget, bool] | None = None,
) -> LossOutput:
    """Validate everything, then hand flat tensors to the operator and give its results their shape.

    streams: hidden states or, without heads, logits; base and reference None with two distributions. names: theirs in errors.
    sparse: a target and whether it has a tail, in place of all streams but the student.
    """
    named, device = validation.named_streams(streams, names), streams.student.device
    shape = validation.check_streams(named)
    vocab_size = validation.check_vocabulary(named, heads, config)
    validation.check_transforms(named, heads)
    total = validation.checked_reduction(reduction) == "sum"
    validation.check_workspace(workspace_mib)
    validation.check_purification(telemetry, config)
    impl = validation.checked_impl(impl, device)
    weights = checks.checked_weights(weights, shape, device)
    token_ids = checks.checked_token_ids(token_ids, shape, device, vocab_size)
    positions = checks.checked_positions(positions, shape, device)
    masks = checks.checked_masks(masks, purified=streams.base is not None, token_ids=token_ids, positions=positions)
    validation.check_finite(named, weights, config, heads=heads, vocab_size=vocab_size)
    method = validation.method_for_masks(validation.checked_method(decompose, heads), masks, heads)
    if isinstance(config, TargetConfig) and heads is not None and method is None:
        streams, config = structured(streams, config)
    target_ids = None
    if sparse is not None:
        target = checks.checked_sparse_target(sparse[0], shape, device, vocab_size, weights)
        target_ids, buckets = target_buckets(*target, vocab_size, add_tail=sparse[1])
        streams, target_ids = streams._replace(teacher=buckets), target_ids.flatten(0, -2)
    problem = problem_of(
        streams,
        heads,
        config,
        weights=weights,
        token_ids=token_ids,
        gram=validation.checked_gram(gram, method, heads and heads[0]),
        target_ids=target_ids,
        decompose=method,
        purification=telemetry,
        total=total and masks is None,  # token masks come after the operator, and with them the sum
        impl=impl,
        strategy=validation.checked_strategy(strategy),
        workspace_mib=workspace_mib,
    )
    validation.check_strategy(problem, resolve_impl(impl, device))
    betas = checks.checked_betas(beta, shape, device, config)
    loss, rows = divergence(problem) if betas is None else divergence_by_beta(problem, *betas)
    used = torch.ones_like(rows[0]) if weights is None else weights
    if masks is not None:
        columns = columns_of(rows, problem)
        kept = token_weights(
            masks,
            student_entropy=columns["student_entropy"],
            target_entropy=columns["target_entropy"],
            decomposition=decomposition_of(columns, problem),
            token_ids=token_ids,
            positions=positions,
            weights=weights,
        )
        if checks.may_look(kept):
            warn_if_nothing_is_kept(used * kept, used)
        loss, used = loss * kept, used * kept
        loss = loss.sum() if total else loss
    return loss_output(loss, rows, problem, shape, used)
