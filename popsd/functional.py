"""The public functions. A bad argument is named before any work is done."""

from __future__ import annotations

import torch
import torch.distributed as dist

from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine import validation
from popsd.engine.losses import Reduction, loss_of
from popsd.head import Head
from popsd.outputs import HiddenStates, LossOutput, SparseTarget


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
    vocab_group: dist.ProcessGroup | None = None,
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
        vocab_group: ranks that share the vocabulary, as under tensor parallelism: each passes the same hidden states and
            its rows [V_r, D] of each head, in the order of the ranks, and gets the whole loss, the whole gradient of the hidden
            states and its rows' own of the head. ``config.vocab_size`` and token ids count all rows. Heads of DTensors with
            Shard(0) bring their mesh's group. Only "chunked"; torch.compile leaves the call out of its graph. On CPU it is
            looked whether the ranks hold the same, on a GPU at the first call with these options and where
            ``config.check_finite`` is True. docs/vocabulary_parallel.md has the bytes that the ranks exchange.

    Returns: a `LossOutput`.

    Raises:
        ValueError: shapes, devices, vocabularies or widths that do not match, a non-finite input (see
            ``DivergenceConfig.check_finite``), a mask or a method that lacks what it reads, ``impl="triton"`` without a
            usable device, or ranks of a ``vocab_group`` that do not fit together.
        TypeError: an argument of the wrong type or dtype.
    """
    validation.check_hidden(hidden)
    return loss_of(
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
        vocab_group=vocab_group,
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
    vocab_group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """Generalised JSD per token between two models' next-token distributions, from hidden states (arXiv 2306.13649).

    This is the loss of standard OPSD (arXiv 2601.18734) and GKD. student_hidden: [N, D] or [B, T, D]; target_hidden: the
    same positions, its width that of ``target_head``. The other arguments, results and errors are those of
    `linear_purified_jsd`; of a `PurifiedConfig` only the `DivergenceConfig` part counts.
    """
    return loss_of(
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
        vocab_group=vocab_group,
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
    return loss_of(
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
    return loss_of(
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
    return loss_of(
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
