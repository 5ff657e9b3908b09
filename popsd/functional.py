"""The public functions, and all of their validation: a bad argument is named before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine import validation
from popsd.engine.backends import resolve_impl
from popsd.engine.chunks.registry import check_entrywise, structured
from popsd.engine.operator import divergence, divergence_by_beta
from popsd.engine.precision import eager
from popsd.engine.problem import problem_of
from popsd.engine.results import columns_of, decomposition_of, loss_output
from popsd.engine.tokens import checks
from popsd.engine.tokens.masks import token_weights, warn_if_nothing_is_kept
from popsd.engine.vocabulary import shards
from popsd.engine.vocabulary.reduce import WHOLE
from popsd.head import Head
from popsd.outputs import HiddenStates, LossOutput

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
        vocab_group=vocab_group,
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
    vocab_group: dist.ProcessGroup | None = None,
    **arguments: Any,
) -> LossOutput:
    """`_loss`, which torch.compile leaves out of its graph where ranks share the vocabulary: no graph can let them agree."""
    of_shards = heads is not None and shards.are_sharded(heads, vocab_group)
    return (eager(_loss) if of_shards else _loss)(streams, names, heads, config, vocab_group, **arguments)


def _loss(
    streams: HiddenStates,
    names: Sequence[str],
    heads: tuple[Head, Head] | None,
    config: DivergenceConfig,
    vocab_group: dist.ProcessGroup | None,
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
) -> LossOutput:
    """Validate everything, then hand flat tensors to the operator and give its results their shape.

    streams: hidden states or, without heads, logits; base and reference None with two distributions. names: theirs in errors.
    """
    named, device = validation.named_streams(streams, names), streams.student.device
    shape, vocabulary = validation.check_streams(named), WHOLE
    if heads is not None and shards.are_sharded(heads, vocab_group):
        for label, head in zip(("student_head", "frozen_head"), heads, strict=True):
            validation.check_head(label, head)
        given = (decompose, telemetry, reduction, impl, workspace_mib, strategy, masks, torch.is_grad_enabled())
        tensors = (weights, beta, token_ids, positions, gram, *(head.bias for head in heads))
        needs = [x.requires_grad for x in (streams.student, heads[0].weight)]
        heads, config, vocabulary = shards.local_shards(
            heads, named, config, vocab_group, weights=weights,
            arguments=(config, *given, needs, [x is None for x in tensors]),
            look=checks.may_look(streams.student) or bool(config.check_finite),
        )  # fmt: skip
    held = validation.check_vocabulary(named, heads, config)
    vocab_size = vocabulary.entries(held)
    validation.check_transforms(named, heads)
    total = validation.checked_reduction(reduction) == "sum"
    validation.check_workspace(workspace_mib)
    validation.check_purification(telemetry, config)
    impl = validation.checked_impl(impl, device)
    weights = checks.checked_weights(weights, shape, device)
    token_ids = checks.checked_token_ids(token_ids, shape, device, vocab_size)
    positions = checks.checked_positions(positions, shape, device)
    masks = checks.checked_masks(masks, purified=streams.base is not None, token_ids=token_ids, positions=positions)
    validation.check_finite(named, weights, config, heads=heads, vocab_size=held)
    method = validation.method_for_masks(validation.checked_method(decompose, heads), masks, heads)
    if isinstance(config, TargetConfig) and heads is not None and method is None:
        streams, config = structured(streams, config)
    if vocabulary.group is not None:
        check_entrywise(config)
    problem = problem_of(
        streams,
        heads,
        config,
        weights=weights,
        token_ids=token_ids,
        gram=validation.checked_gram(gram, method, heads and heads[0]),
        decompose=method,
        purification=telemetry,
        total=total and masks is None,  # token masks come after the operator, and with them the sum
        impl=impl,
        strategy=validation.checked_strategy(strategy),
        workspace_mib=workspace_mib,
        vocabulary=vocabulary,
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
