"""One loss from the arguments of a public function: validation, the operator, and its results in their shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, Strategy, TargetConfig
from popsd.engine import validation
from popsd.engine.backends import resolve_impl
from popsd.engine.chunks.buckets import target_buckets
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
from popsd.outputs import HiddenStates, LossOutput, SparseTarget

Reduction = Literal["none", "sum"]


def loss_of(
    streams: HiddenStates,
    names: Sequence[str],
    heads: tuple[Head, Head] | None,
    config: DivergenceConfig,
    *,
    vocab_group: dist.ProcessGroup | None = None,
    **arguments: Any,
) -> LossOutput:
    """`_loss`, which torch.compile leaves out of its graph where ranks share the vocabulary: no graph can let them agree."""
    if shards.are_sharded(heads, vocab_group):
        return eager(_loss)(streams, names, heads, config, vocab_group, of_shards=True, **arguments)
    return _loss(streams, names, heads, config, vocab_group, of_shards=False, **arguments)


def _loss(
    streams: HiddenStates,
    names: Sequence[str],
    heads: tuple[Head, Head] | None,
    config: DivergenceConfig,
    vocab_group: dist.ProcessGroup | None,
    *,
    of_shards: bool,
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
    shape, vocabulary = validation.check_streams(named), WHOLE
    if of_shards:
        assert heads is not None
        if sparse is not None:
            raise ValueError("head: expected plain tensors for a sparse target; got a DTensor. Pass its full_tensor().")
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
        vocabulary=vocabulary,
    )
    backend = resolve_impl(impl, device)
    validation.check_strategy(problem, backend)
    validation.check_pmi_clip(problem, backend)
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
