"""What one loss is asked to compute, and every decision that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from popsd.config import DivergenceConfig, Impl, Method, PurifiedConfig, Strategy
from popsd.head import Head
from popsd_kernels.rows import LogitTransform, RowOptions

NO_CLIP = 1e7
"""A ``pmi_clip`` beyond which the sweeps leave the tanh out: c·tanh(x/c) is x to float32's last bit for |x| up to 4e3 there,
and near 1e38 the factors of the tanh overflow."""


@dataclass(frozen=True)
class Problem:
    """Validated inputs of one loss over N tokens; the streams are hidden states [N, D] or, without heads, logits [N, V].

    target: the base stream, or the target itself where ``teacher`` is None. weights: [N] float32 or None.
    token_ids: [N] int64 or None. heads: student's and frozen one, the same object where it is shared, or None for logits.
    autocast_dtype: that of the caller's autocast region, if it is in one.
    """

    student: torch.Tensor
    target: torch.Tensor
    teacher: torch.Tensor | None
    reference: torch.Tensor | None
    heads: tuple[Head, Head] | None
    config: DivergenceConfig
    weights: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    decompose: Method | None = None
    telemetry: bool = False
    autocast_dtype: torch.dtype | None = None
    impl: Impl = Impl.AUTO
    strategy: Strategy = Strategy.CHUNKED
    workspace_mib: float | None = None

    @property
    def purified(self) -> PurifiedConfig | None:
        """The configuration of the composed target, None where the target is a distribution of its own."""
        return self.config if self.teacher is not None and isinstance(self.config, PurifiedConfig) else None

    @property
    def vocab_size(self) -> int:
        rows = self.student.shape[-1] if self.heads is None else self.heads[0].weight.shape[0]
        return self.config.vocab_size or rows

    @property
    def apart(self) -> bool:
        """Whether teacher and reference need their own logits, because the identities of METHOD.md do not hold."""
        return self.purified is not None and comes_apart(self.purified, self.heads and self.heads[1], self.telemetry)

    @property
    def relative(self) -> bool:
        """Whether the base (or target) is projected as its difference to the student, which one head makes possible.

        A product rounds at the size of its result: of logits, 1e-6, or of what student and target differ by, where a KL of
        1e-3 means 0.04. Float32 products only: rounded to 16 bits the difference would be off by 2⁻⁹ of itself, the logits
        are not. Masks on entries and telemetry want the base itself.
        """
        if self.heads is None or self.heads[0] is not self.heads[1] or self.heads[0].softcap is not None:
            return False
        if self.apart or (self.purified is not None and self.purified.masks_entries):
            return False
        dtype = operand_dtype(self.heads[0].weight, self.student, self.autocast_dtype)
        return self.strategy is Strategy.CHUNKED and dtype == torch.float32

    @cached_property
    def row_options(self) -> RowOptions:
        config, (student, frozen) = self.config, self.heads or (None, None)
        options = RowOptions(
            beta=config.beta,
            inv_temperature=1.0 / config.temperature,
            entry_clip=config.entry_clip,
            token_clip=config.token_clip,
            student=LogitTransform() if student is None else LogitTransform(student.logit_scale, student.softcap),
            target=LogitTransform() if frozen is None else LogitTransform(frozen.logit_scale, frozen.softcap),
            delta_scale=1.0 if self.apart or frozen is None else frozen.logit_scale,
            relative=self.relative,
        )
        if self.purified is None:
            return options
        clip = self.purified.pmi_clip
        return replace(
            options, pmi_beta=self.purified.pmi_beta, pmi_clip=None if clip is None or clip > NO_CLIP else clip
        )


def comes_apart(config: PurifiedConfig, frozen_head: Head | None, normalisers: bool) -> bool:
    """Whether Δ_it needs the logits of teacher and reference apart: given logits, a soft cap, or their normalisers."""
    if frozen_head is None or frozen_head.softcap is not None or normalisers or config.tail_floor is not None:
        return True
    # the softmax absorbs the normalisers of an uncentred Δ_it, but only as a constant of the whole row: a tanh bends it, and
    # an entry that a mask holds at Δ̃ = 0 does not take part in it
    return not config.center and (config.pmi_clip is not None or config.masks_entries)


def operand_dtype(weight: torch.Tensor, hidden: torch.Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """That of the matrix products: float32 on CPU, which has no 16-bit product with float32 output."""
    if weight.device.type != "cuda":
        return torch.float32
    return autocast or torch.promote_types(weight.dtype, hidden.dtype)
