"""Who computes the sweeps: the Triton kernels or torch, behind one protocol.

Both backends take `Rows` and `RowOptions`, as the launchers of ``popsd_kernels`` do, and return what those return.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Protocol

import torch

from popsd.config import Impl, Strategy
from popsd.engine.torch_backend import entry_masks, moments, sweeps, targets
from popsd.engine.torch_backend.supports import FLOORED
from popsd.engine.vocabulary import merge
from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd_kernels.rows import EntryMasks, RowLoss, RowOptions, Rows, RowStatistics

SWEEP_ELEMENTS = 2 << 17
"""Elements per stream that a sweep in torch sees at once: 1 MiB of float32, so that its seven temporaries stay in a shared
cache and the calls from Python (some 60 per block) cost less than 5 % of the matmuls."""


class Backend(Protocol):
    """An implementation of the sweeps, for one run over the chunks of a loss. Shapes: see `Rows`."""

    def block_rows(self, rows: int, vocabulary: int) -> int:
        """How many rows of a chunk of ``rows`` it wants to see per call."""

    def statistics(self, rows: Rows, options: RowOptions, *, target_out: torch.Tensor | None = None) -> RowStatistics:
        """Normalisers, four [C], and a composed target's logits into ``target_out`` [C, V] float32."""

    def sweeps(
        self, rows: Rows, options: RowOptions, *, gradient: torch.Tensor | None = None
    ) -> tuple[RowLoss, torch.Tensor]:
        """Nine results [C], the target's log-probability of the sampled tokens [C], NaN where there is none, and, into
        ``gradient`` [C, V], the student's. A composed target may take its difference's place."""

    def logit_difference(self, rows: Rows, options: RowOptions, *, center: bool, out: torch.Tensor) -> torch.Tensor:
        """Teacher's logits less the reference's into ``out`` [C, V] float32; returns their offset [C]."""

    def moments(self, rows: Rows, options: RowOptions, *, masked: bool) -> torch.Tensor:
        """Moments [13, C] of the decomposition."""

    def entry_thresholds(self, rows: Rows, masks: EntryMasks, options: RowOptions) -> torch.Tensor:
        """Logits [3, C] below which the masks apply."""

    def mask_entries(self, rows: Rows, thresholds: torch.Tensor, masks: EntryMasks, options: RowOptions) -> None:
        """Edits ``rows.difference`` [C, V] in place."""


class TorchBackend:
    """Plain torch, a few rows at a time."""

    def __init__(self, over: Vocabulary = WHOLE) -> None:
        self.over = over
        self._left: tuple[torch.Tensor, sweeps.StudentRows] | None = None

    def block_rows(self, rows: int, vocabulary: int) -> int:
        return max(1, min(rows, SWEEP_ELEMENTS // vocabulary))

    def statistics(self, rows: Rows, options: RowOptions, *, target_out: torch.Tensor | None = None) -> RowStatistics:
        return sweeps.row_statistics(rows, options, target_out=target_out, over=self.over)

    def sweeps(
        self, rows: Rows, options: RowOptions, *, gradient: torch.Tensor | None = None
    ) -> tuple[RowLoss, torch.Tensor]:
        left, self._left = self._left, None
        student = left[1] if left is not None and left[0] is rows.student else None
        return sweeps.row_sweeps(rows, options, gradient=gradient, student=student, over=self.over)

    def logit_difference(self, rows: Rows, options: RowOptions, *, center: bool, out: torch.Tensor) -> torch.Tensor:
        return targets.logit_difference(rows, options, center=center, out=out, over=self.over)

    def moments(self, rows: Rows, options: RowOptions, *, masked: bool) -> torch.Tensor:
        """Leaves what it derived from the student for `sweeps` of the very same tensor: a third of the work of either."""
        student = sweeps.student_rows(rows, options, self.over)
        self._left = (rows.student, student)
        return moments.row_moments(rows, options, masked=masked, student=student, over=self.over)

    def entry_thresholds(self, rows: Rows, masks: EntryMasks, options: RowOptions) -> torch.Tensor:
        return entry_masks.entry_thresholds(rows, masks, options, self.over)

    def mask_entries(self, rows: Rows, thresholds: torch.Tensor, masks: EntryMasks, options: RowOptions) -> None:
        entry_masks.mask_entries(rows, thresholds, masks, options)


class TritonBackend:
    """The kernels, a whole chunk at a time. single_read: gradients come from the kernel that reads each row once."""

    def __init__(self, over: Vocabulary = WHOLE, *, single_read: bool = False) -> None:
        self.over, self.single_read = over, single_read

    def block_rows(self, rows: int, vocabulary: int) -> int:
        return rows

    def statistics(self, rows: Rows, options: RowOptions, *, target_out: torch.Tensor | None = None) -> RowStatistics:
        from popsd_kernels import row_statistics

        statistics = row_statistics(rows, options, target_out=target_out)
        return statistics if self.over.group is None else merge.whole_statistics(statistics, self.over)

    def sweeps(
        self, rows: Rows, options: RowOptions, *, gradient: torch.Tensor | None = None
    ) -> tuple[RowLoss, torch.Tensor]:
        """The target's log-probability comes from the sampled tokens' columns, which costs the sweeps nothing."""
        ids = rows.token_ids
        # the gradient may take their place
        columns = None if ids is None else rows.sampled(ids, minus_student=options.minus_student)
        statistics, losses = self._sweeps(rows, options, gradient)
        if ids is None or columns is None:
            return losses, torch.full_like(losses.divergence, float("nan"))
        of_target = sampled_logprob(columns, ids, rows.student.shape[1], statistics, options)
        own, of_target = self.over.of_tokens(ids, losses.token_logprob, of_target)
        return losses._replace(token_logprob=own), of_target

    def _sweeps(self, rows: Rows, options: RowOptions, gradient: torch.Tensor | None) -> tuple[RowStatistics, RowLoss]:
        """Few rows take several programs each, in launches that compose the target anew; and so do shards of rows."""
        import popsd_kernels
        from popsd_kernels import launch

        if self.single_read and gradient is not None:
            return popsd_kernels.row_single_read(rows, options, gradient=gradient)
        if self.over.group is not None:
            between = merge.between_launches(self.over, options, rows.student.shape[1])
            return popsd_kernels.row_split_sweeps(rows, options, gradient=gradient, between=between)
        place = rows.target_place
        moved = launch.sweep_bytes(options, place is not None, gradient is not None)
        tokens, device = rows.student.shape[0], rows.student.device
        if not options.minus_student and launch.too_few_rows(tokens, *moved, device):
            return popsd_kernels.row_split_sweeps(rows, options, gradient=gradient)
        statistics = popsd_kernels.row_statistics(rows, options, target_out=place)
        if place is not None:
            rows = rows.with_target(place)
        return statistics, popsd_kernels.row_loss_gradient(rows, statistics, options, gradient=gradient)

    def logit_difference(self, rows: Rows, options: RowOptions, *, center: bool, out: torch.Tensor) -> torch.Tensor:
        from popsd_kernels import logit_difference

        if self.over.group is None:
            return logit_difference(rows, options, center=center, out=out)
        bias = rows.frozen_bias if options.target.softcap is None else None
        impossible = None if bias is None else bias <= FLOORED
        offset = None
        if not center:
            assert rows.teacher is not None  # whose place the difference may take
            both = Rows(
                rows.teacher, target=rows.reference, student_bias=rows.frozen_bias, frozen_bias=rows.frozen_bias
            )
            of = self.statistics(both, replace(options, student=options.target))
            offset = (of.student_max - of.target_max) + (of.student_logsum - of.target_logsum)
        mean = logit_difference(rows, options, center=True, out=out)
        if offset is None:
            offset = merge.whole_offset(mean, impossible, rows.student.shape[1], self.over)
        if impossible is not None:  # there the kernel has put the shard's own
            torch.where(impossible, (offset / options.inv_temperature)[:, None], out, out=out)
        return offset

    def moments(self, rows: Rows, options: RowOptions, *, masked: bool) -> torch.Tensor:
        from popsd_kernels import row_moments, shard_moments

        if self.over.group is None:
            return row_moments(rows, options, masked=masked)
        return merge.whole_moments(shard_moments(rows, options, masked=masked), self.over)

    def entry_thresholds(self, rows: Rows, masks: EntryMasks, options: RowOptions) -> torch.Tensor:
        from popsd_kernels import entry_thresholds

        found = entry_thresholds(rows, masks, options)
        if self.over.group is not None and masks.plausibility is not None:
            found[0] = self.over.max(found[0])
        if self.over.group is not None and masks.tail_floor is not None:
            found[1:] = self.over.logsumexp(found[1:])
        return found

    def mask_entries(self, rows: Rows, thresholds: torch.Tensor, masks: EntryMasks, options: RowOptions) -> None:
        from popsd_kernels import mask_entries

        mask_entries(rows, thresholds, masks, options)


def sampled_logprob(
    columns: Rows, ids: torch.Tensor, vocabulary: int, statistics: RowStatistics, options: RowOptions
) -> torch.Tensor:
    """The target's log-probability [C] of the tokens ``ids``, NaN of one outside the vocabulary. By the kernels' own formula:
    of a row of one entry the target's maximum is its logit.

    columns: `Rows.sampled` of the rows. statistics: of the whole rows.
    """
    from popsd_kernels import row_statistics

    place = None if columns.target_place is None else torch.empty_like(columns.target_place, dtype=torch.float32)
    logit = row_statistics(columns, options, target_out=place).target_max
    chosen = (logit - statistics.target_max) - statistics.target_logsum
    return chosen.where((ids >= 0) & (ids < vocabulary), float("nan"))


def resolve_impl(impl: Impl, device: torch.device) -> Impl:
    """AUTO: Triton on NVIDIA and AMD GPUs where Triton is installed, torch elsewhere. The others are themselves."""
    if impl is not Impl.AUTO:
        return impl
    return Impl.TRITON if device.type == "cuda" and find_spec("triton") is not None else Impl.TORCH


def backend_for(
    impl: Impl, device: torch.device, strategy: Strategy = Strategy.CHUNKED, over: Vocabulary = WHOLE
) -> Backend:
    """A backend for one run on ``device``."""
    if resolve_impl(impl, device) is Impl.TORCH:
        return TorchBackend(over)
    return TritonBackend(over, single_read=strategy is Strategy.SINGLE_READ)
