"""What one loss is asked to compute, and every decision that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch

from popsd.config import DivergenceConfig, Impl, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd.head import Head, is_shared
from popsd.outputs import HiddenStates
from popsd_kernels.rows import LogitTransform, RowOptions

NO_CLIP = 1e7
"""A ``pmi_clip`` beyond which the sweeps leave the tanh out: c·tanh(x/c) is x to float32's last bit for |x| up to 4e3 there,
and near 1e38 the factors of the tanh overflow."""


class Tensors(NamedTuple):
    """Tensor arguments of the operator, flat over N tokens. The streams are hidden states [N, D] or, without
    ``student_weight``, logits [N, V].

    base, reference: None with two distributions, where the teacher is the target.
    target_ids: [N, k] int64 or None; of a sparse target, whose log-probabilities [N, k] or [N, k + 1] are the teacher, see
    `popsd.engine.chunks.buckets`.
    frozen_weight, frozen_bias: None where the student's head serves all streams.
    weights: [N] float32. token_ids: [N] int64. gram: [D, D] float32, see `popsd.gram_matrix`.
    """

    student: torch.Tensor
    base: torch.Tensor | None
    teacher: torch.Tensor
    reference: torch.Tensor | None
    student_weight: torch.Tensor | None
    student_bias: torch.Tensor | None
    frozen_weight: torch.Tensor | None
    frozen_bias: torch.Tensor | None
    weights: torch.Tensor | None
    token_ids: torch.Tensor | None
    gram: torch.Tensor | None
    target_ids: torch.Tensor | None


class Options(NamedTuple):
    """The operator's other arguments: the fields of `PurifiedConfig`, those of the two heads, and which results are wanted.

    With two distributions the fields that describe a purified target are not read.
    """

    beta: float
    renyi_alpha: float | None
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
    target: str | None
    """A registered target's name; then no field of `PurifiedConfig` is read."""
    numbers: tuple[float, ...]
    student_scale: float
    student_softcap: float | None
    frozen_scale: float
    frozen_softcap: float | None
    decompose: str | None
    purification: bool
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
    """The dtype's name inside a caller's autocast region."""
    vocab_group: str | None
    """The name of the ranks that share the vocabulary, see `Vocabulary`; then ``vocab_size`` is what this rank holds."""
    vocab_first: int
    vocab_total: int
    vocab_widest: int


OF_DIVERGENCE = tuple(field.name for field in fields(DivergenceConfig) if field.name in Options._fields)
OF_TARGET = tuple(
    field.name for field in fields(PurifiedConfig) if field.name not in DivergenceConfig.__dataclass_fields__
)
"""Options that come from a configuration. ``check_finite`` is read by validation alone."""


@dataclass(frozen=True)
class Problem:
    """Validated arguments of one loss, and the questions that decide how it is computed."""

    tensors: Tensors
    options: Options

    @property
    def tokens(self) -> int:
        return self.tensors.student.shape[0]

    @property
    def vocab_size(self) -> int:
        tensors = self.tensors
        rows = tensors.student.shape[-1] if tensors.student_weight is None else tensors.student_weight.shape[0]
        return self.options.vocab_size or rows

    @property
    def vocabulary(self) -> Vocabulary:
        """Which ranks hold the other entries. ``vocab_size`` is how many this one holds."""
        options = self.options
        return Vocabulary(options.vocab_group, options.vocab_first, options.vocab_total, options.vocab_widest)

    @property
    def planned_vocab_size(self) -> int:
        """By which work is cut into pieces."""
        return self.vocab_size if self.options.vocab_group is None else self.options.vocab_widest

    @property
    def is_purified(self) -> bool:
        """Whether the target is composed of base, teacher and reference; otherwise it is the teacher."""
        return self.tensors.base is not None

    @property
    def is_sparse(self) -> bool:
        """Whether the target is known at a few entries of the vocabulary, and the sweeps see these and the others as one."""
        return self.tensors.target_ids is not None

    @property
    def masks_entries(self) -> bool:
        """Whether some vocabulary entries of the target keep less than their Δ̃."""
        return self.is_purified and (self.options.plausibility is not None or self.options.tail_floor is not None)

    @property
    def needs_separate_logits(self) -> bool:
        """Whether Δ_it takes the logits of teacher and reference and not just the projection of their difference: with given
        logits, with a soft cap, and where something reads them or their log-normalisers.
        """
        options = self.options
        if not self.is_purified:
            return False
        if self.tensors.student_weight is None or options.frozen_softcap is not None:
            return True
        if options.purification or options.tail_floor is not None or options.target is not None:
            return True
        # The softmax absorbs the normalisers of an uncentred Δ_it, but only as a constant of the whole row. A tanh bends it,
        # and an entry that a mask holds at Δ̃ = 0 has no part in it.
        return not options.center and (options.pmi_clip is not None or self.masks_entries)

    @property
    def needs_reference_logits(self) -> bool:
        """Whether the reference is projected beside teacher − reference, whose sum is the teacher: for a decomposition."""
        return self.options.decompose == Method.LOGITS.value and not self.needs_separate_logits

    @property
    def is_target_linear(self) -> bool:
        """Whether the purified target's hidden state base + (teacher − reference)/pmi_beta is projected in place of its parts.

        That takes a target without tanh. Only where operands are float32: a mix rounded to 16 bits is off by 2⁻⁹ of the base's
        own logits, a difference by 2⁻⁹ of the difference.
        """
        return (
            self.is_purified
            and self.options.pmi_clip is None
            and not self.masks_entries
            and not self.needs_separate_logits
            and not self.needs_reference_logits
            and self.options.strategy == Strategy.CHUNKED.value
            and self.frozen_dtype == torch.float32
        )

    @property
    def is_base_minus_student(self) -> bool:
        """Whether base (or target, and the reference of a decomposition) are projected as their differences to the student,
        which one head makes possible.

        A matmul rounds at the size of its result: of logits, 1e-6, or of what student and target differ by, where a KL of
        1e-3 means 0.04. Float32 operands only: rounded to 16 bits the difference would be off by 2⁻⁹ of itself, the logits
        are not. Masks on entries and `Purification` want the base itself. The kernels that take a row in slices, as shards
        are, take logits.
        """
        tensors, options = self.tensors, self.options
        if options.vocab_group is not None:
            return False
        if tensors.student_weight is None or tensors.frozen_weight is not None or options.student_softcap is not None:
            return False
        if self.is_sparse or self.needs_separate_logits or self.masks_entries:
            return False
        return options.strategy == Strategy.CHUNKED.value and self.student_dtype == torch.float32

    @property
    def is_gradient_weighted(self) -> bool:
        """Whether ``weights`` are in the gradients as they are formed: in sums over tokens, and in those of given logits.

        Of a frozen head's hidden states they are not. They come with the upstream gradient: a weight of 1/1024 put in here
        and a loss scale of 65536 put in there would leave float16 nothing between them.
        """
        return self.options.with_dhead or self.tensors.student_weight is None

    @property
    def _is_one_sided(self) -> bool:
        """Whether a token that is impossible to one of the two alone makes the loss infinite."""
        return self.options.beta in (0.0, 1.0) and self.options.renyi_alpha is None

    @property
    def is_disjoint_by_rows(self) -> bool:
        """Whether some tokens' KL may be infinite: of given logits, and of a sparse or a registered target. To a mixture it
        never is."""
        is_given = self.tensors.student_weight is None or self.is_sparse
        return self._is_one_sided and (is_given or self.options.target is not None)

    @property
    def is_disjoint_by_heads(self) -> bool:
        """Whether every token's KL may be infinite: two heads whose biases of -inf differ."""
        options, tensors = self.options, self.tensors
        biased = tensors.student_bias is not None or tensors.frozen_bias is not None
        return self._is_one_sided and options.target is None and biased and tensors.frozen_weight is not None

    @property
    def gradient_weights(self) -> torch.Tensor | None:
        """[N], by what the logits' gradients are multiplied as they are formed."""
        return self.tensors.weights if self.is_gradient_weighted else None

    @property
    def dhidden_dtype(self) -> torch.dtype:
        """In which d loss / d hidden waits for the upstream gradient. float16 has no digits left below 6e-5, where a gradient
        is before a loss scale of 65536 reaches it. What shards of a vocabulary add to it may cancel: it is rounded once, when
        it is whole."""
        dtype = self.tensors.student.dtype
        if self.options.vocab_group is not None:
            return torch.float32
        return torch.float32 if dtype == torch.float16 and self.tensors.student_weight is not None else dtype

    @property
    def frozen_weight(self) -> torch.Tensor | None:
        """The head's weight of base, teacher and reference."""
        return self.tensors.student_weight if self.tensors.frozen_weight is None else self.tensors.frozen_weight

    @property
    def frozen_bias(self) -> torch.Tensor | None:
        return self.tensors.student_bias if self.tensors.frozen_weight is None else self.tensors.frozen_bias

    @property
    def student_dtype(self) -> torch.dtype:
        """Of the operands of the student's projection."""
        assert self.tensors.student_weight is not None
        return operand_dtype(self.tensors.student_weight, self.tensors.student, self.autocast_dtype)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of the operands of the frozen streams' projection."""
        tensors, weight = self.tensors, self.frozen_weight
        assert weight is not None
        if weight is tensors.student_weight:
            return self.student_dtype
        return operand_dtype(weight, tensors.teacher if tensors.base is None else tensors.base, self.autocast_dtype)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.options.autocast is None else getattr(torch, self.options.autocast)

    @cached_property
    def row_options(self) -> RowOptions:
        """The same for the sweeps. Those of a sparse target see logits as `buckets` makes them, tempered already."""
        options = self.options
        if self.is_sparse:
            entry_clip, token_clip = options.entry_clip, options.token_clip
            return RowOptions(
                beta=options.beta, renyi=options.renyi_alpha, entry_clip=entry_clip, token_clip=token_clip
            )
        result = RowOptions(
            beta=options.beta,
            renyi=options.renyi_alpha,
            inv_temperature=1.0 / options.temperature,
            entry_clip=options.entry_clip,
            token_clip=options.token_clip,
            student=LogitTransform(options.student_scale, options.student_softcap),
            target=LogitTransform(options.frozen_scale, options.frozen_softcap),
            delta_scale=1.0 if self.needs_separate_logits else options.frozen_scale,
            minus_student=self.is_base_minus_student,
        )
        if not self.is_purified or options.target is not None:
            return result
        clip = options.pmi_clip
        return replace(result, pmi_beta=options.pmi_beta, pmi_clip=None if clip is None or clip > NO_CLIP else clip)


def problem_of(
    streams: HiddenStates,
    heads: tuple[Head, Head] | None,
    config: DivergenceConfig,
    *,
    weights: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
    decompose: Method | None = None,
    purification: bool = False,
    total: bool = False,
    impl: Impl = Impl.AUTO,
    strategy: Strategy = Strategy.CHUNKED,
    workspace_mib: float | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Problem:
    """Validated arguments as the operator takes them.

    streams: [..., D], base and reference None with two distributions.
    heads: student's and frozen one; None for logits. vocabulary: which of its entries their rows are; then
        ``config.vocab_size`` is how many.
    """
    own, frozen = heads or (None, None)
    separate = None if own is None or frozen is None or is_shared(own, frozen) else frozen
    # the others never receive gradient: a loss of which they alone require one must not say that it requires one
    frozen_streams = (None if x is None else x.detach() for x in streams[1:])
    tensors = Tensors(
        *flat_streams(HiddenStates(streams.student, *frozen_streams)),  # type: ignore[arg-type]
        student_weight=None if own is None else own.weight,
        student_bias=None if own is None else own.bias,
        frozen_weight=None if separate is None else separate.weight.detach(),
        frozen_bias=None if separate is None or separate.bias is None else separate.bias.detach(),
        weights=weights,
        token_ids=token_ids,
        gram=gram,
        target_ids=target_ids,
    )
    trained = (tensors.student, tensors.student_weight, tensors.student_bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in trained]
    train_head = needs[1] or needs[2]
    early = own is not None and (total or not train_head)
    device = tensors.student.device.type
    purified = config if isinstance(config, PurifiedConfig) else PurifiedConfig()
    options = Options(
        **{name: getattr(config, name) for name in OF_DIVERGENCE},
        **{name: getattr(purified, name) for name in OF_TARGET},
        target=config.target if isinstance(config, TargetConfig) else None,
        numbers=config.numbers if isinstance(config, TargetConfig) else (),
        student_scale=1.0 if own is None else own.logit_scale,
        student_softcap=None if own is None else own.softcap,
        frozen_scale=1.0 if frozen is None else frozen.logit_scale,
        frozen_softcap=None if frozen is None else frozen.softcap,
        decompose=None if decompose is None else decompose.value,
        purification=purification,
        total=total,
        with_dhidden=early and needs[0],
        with_dhead=early and train_head,
        impl=impl.value,
        strategy=strategy.value,
        workspace_mib=workspace_mib,
        autocast=str(torch.get_autocast_dtype(device)).split(".")[1] if torch.is_autocast_enabled(device) else None,
        vocab_group=vocabulary.group,
        vocab_first=vocabulary.first,
        vocab_total=vocabulary.total,
        vocab_widest=vocabulary.widest,
    )
    return Problem(tensors, options)


def flat_streams(streams: HiddenStates) -> HiddenStates:
    """[..., D] → [N, D] with unit inner stride."""
    return HiddenStates(*(None if x is None else _flat(x) for x in streams))  # type: ignore[arg-type]


def _flat(stream: torch.Tensor) -> torch.Tensor:
    flat = stream.flatten(0, -2)
    return flat if flat.stride(-1) == 1 or 0 in flat.shape else flat.contiguous()


def operand_dtype(weight: torch.Tensor, hidden: torch.Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """Of a matmul's operands: float32 on CPU, which has no 16-bit matmul with float32 output."""
    if weight.device.type != "cuda":
        return torch.float32
    return autocast or torch.promote_types(weight.dtype, hidden.dtype)
