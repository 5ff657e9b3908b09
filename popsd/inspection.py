"""Looking at the method without a loss: the target's logits, the decomposition alone, a head's logits and Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from popsd.config import DivergenceConfig, Impl, Method, PurifiedConfig, TargetConfig
from popsd.engine import validation
from popsd.engine.backends import resolve_impl
from popsd.engine.chunks.decomposition import decompose_hidden
from popsd.engine.chunks.target import target_logits
from popsd.engine.precision import eager, exact_matmuls
from popsd.engine.problem import flat_streams, operand_dtype, problem_of
from popsd.engine.sources import project
from popsd.engine.tokens import checks
from popsd.engine.torch_backend.targets import tempered_logits
from popsd.engine.vocabulary import shards
from popsd.engine.vocabulary.reduce import WHOLE
from popsd.functional import linear_purified_jsd
from popsd.head import Head, centred_gram
from popsd.outputs import Decomposition, HiddenStates
from popsd_kernels.rows import LogitTransform, RowOptions


@torch.no_grad()
def purified_target_logits(
    base_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    config: PurifiedConfig | TargetConfig | None = None,
    impl: Impl | str = Impl.AUTO,
) -> torch.Tensor:
    """Logits of the purified target, Eq. 13-17, or of a registered one, dense: [..., V] raw logits → [..., V'] float32.

    V' is the vocabulary in use. Tempered, and not normalised. For inspection and sampling: the losses never form it over all
    tokens.
    """
    # a target needs no student: any stream of the right shape will do
    streams = HiddenStates(base_logits, base_logits, teacher_logits, reference_logits)
    config = validation.target_config(config)
    named = validation.named_streams(streams, validation.LOGITS)
    del named[validation.LOGITS[0]]
    shape = validation.check_streams(named)
    vocab_size = validation.check_vocabulary(named, None, config)
    validation.check_finite(named, None, config, heads=None, vocab_size=vocab_size)
    impl = validation.checked_impl(impl, base_logits.device)
    problem = problem_of(streams, None, config, impl=impl)
    validation.check_pmi_clip(problem, resolve_impl(impl, base_logits.device))
    return target_logits(problem).unflatten(0, shape)


@torch.no_grad()
def decompose(
    hidden: HiddenStates,
    student_head: Head,
    frozen_head: Head | None = None,
    *,
    config: PurifiedConfig | TargetConfig | None = None,
    method: Method | str = Method.LOGITS,
    gram: torch.Tensor | None = None,
    log_normalisers: Sequence[torch.Tensor] | None = None,
    impl: Impl | str = Impl.AUTO,
    workspace_mib: float | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Decomposition:
    """The decomposition of the teacher's signal alone, Eq. 4, per token: fields [N] or [B, T] float32, detached.

    ``hidden.base`` is not looked at and may be None. method: "logits" gives every field; "gram" the centred ones from hidden
    states and the head's Gram matrix in O(N·D²), where one head without soft cap serves all streams. gram: that matrix, see
    `gram_matrix`; None forms it in this call. log_normalisers: with "gram" the raw fields too; log Σ exp of the tempered logits
    of student, teacher and reference, [N] or [B, T] each. vocab_group: see `linear_purified_jsd`.

    Relative error per field in float32 against float64, V = 32k: "gram" 2e-7 at any distance, as long as the differences of
    the hidden states lie in no direction that the head nearly ignores. A squared norm is off by up to 1e-6·‖W_c‖²·‖difference‖²
    (spectral norm), so with D near V or above, or with rows that depend on one another, take "logits". "logits" 3e-6 or less,
    5e-5 in raw fields where the streams are 0.1 % apart (KL near 1e-6), since log-normalisers round at 1e-7. Where the heads
    differ or have a soft cap, 1e-5 and, there, 5e-4 in raw and weighted fields.
    Raises what `linear_purified_jsd` raises.
    """
    if hidden.base is None:
        hidden = hidden._replace(base=hidden.teacher)
    heads = (student_head, student_head if frozen_head is None else frozen_head)
    known = validation.checked_method(method, heads, argument="method")
    gram = validation.checked_gram(gram, known, student_head, argument="method")
    if known is Method.GRAM:
        config = validation.target_config(config)
        return _decompose_by_gram(hidden, student_head, config, gram, log_normalisers, vocab_group)
    if log_normalisers is not None:
        raise ValueError("log_normalisers: expected None with method='logits', which computes them. Leave them out.")
    output = linear_purified_jsd(
        hidden,
        student_head,
        frozen_head,
        config=config,
        decompose=True,
        impl=impl,
        workspace_mib=workspace_mib,
        vocab_group=vocab_group,
    )
    assert output.decomposition is not None
    return output.decomposition


@eager
@torch.no_grad()
def gram_matrix(
    head: Head, vocab_size: int | None = None, *, vocab_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The head's centred Gram matrix W_cᵀ·W_c, [D, D] float32, W_c the first ``vocab_size`` rows of its weight less their mean.

    ``gram=`` of `linear_purified_jsd` and `decompose` takes it, with the same head and ``config.vocab_size``. It costs V·D²
    multiplications, D/(4·N) of a loss's matmuls, so form it once where the head is frozen. It is the caller's to keep: whoever
    writes to the weight forms it anew. vocab_group: see `linear_purified_jsd`; each rank passes its rows and gets the matrix of
    all. Raises TypeError for no `Head`, ValueError for a size that it does not have.
    """
    validation.check_head("head", head)
    if shards.are_sharded((head, head), vocab_group):
        nothing = torch.zeros(1, head.weight.shape[1], device=head.weight.device)
        (head, _), config, over = shards.local_shards(
            (head, head), {"head": nothing}, DivergenceConfig(vocab_size=vocab_size), vocab_group, look=True
        )
        with exact_matmuls(head.weight.device):
            return centred_gram(head.weight, head.bias, config.vocab_size or 0, over)
    rows = head.weight.shape[0]
    if vocab_size is not None and (not isinstance(vocab_size, int) or not 1 <= vocab_size <= rows):
        raise ValueError(f"vocab_size: expected None or 1 to {rows}, the head's rows; got {vocab_size}.")
    with exact_matmuls(head.weight.device):
        return centred_gram(head.weight, head.bias, vocab_size or rows)


@eager
def _decompose_by_gram(
    hidden: HiddenStates,
    head: Head,
    config: PurifiedConfig | TargetConfig,
    gram: torch.Tensor | None,
    log_normalisers: Sequence[torch.Tensor] | None,
    vocab_group: dist.ProcessGroup | None,
) -> Decomposition:
    validation.check_hidden(hidden)
    streams = validation.named_streams(hidden, validation.HIDDEN)
    shape, over = validation.check_streams(streams), WHOLE
    if shards.are_sharded((head, head), vocab_group):
        (head, _), config, over = shards.local_shards(
            (head, head), streams, config, vocab_group, look=checks.may_look(hidden.student)
        )
    vocab_size = validation.check_vocabulary(streams, (head, head), config)
    validation.check_finite(streams, None, config, heads=(head, head), vocab_size=vocab_size)
    student, _, teacher, reference = flat_streams(hidden)
    assert reference is not None
    with exact_matmuls(student.device):
        parts = decompose_hidden(
            (student, teacher, reference),
            head,
            vocab_size=vocab_size,
            temperature=config.temperature,
            gram=gram,
            log_normalisers=checks.checked_log_normalisers(log_normalisers, shape, student.device),
            over=over,
        )
    return Decomposition(*(None if x is None else x.unflatten(0, shape) for x in parts))


@eager
@torch.no_grad()
def head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """[N, D] hidden states → [N, V] float32 logits in the model's own order: projection, bias, scale, soft cap.

    From matmuls with float32 output whatever the dtypes, for looking at a few tokens; the losses never form them over all.
    """
    validation.check_head("head", head)
    width = head.weight.shape[1]
    validation.check_streams({"hidden": hidden})
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(f"hidden: expected shape [N, {width}] to fit head.weight; got {list(hidden.shape)}.")
    weight = head.weight.to(operand_dtype(head.weight, hidden, None))
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    with exact_matmuls(hidden.device):
        project(hidden.to(weight.dtype), weight, logits)
    bias = None if head.bias is None else head.bias.float()
    return tempered_logits(logits, bias, LogitTransform(head.logit_scale, head.softcap), RowOptions(), out=logits)
