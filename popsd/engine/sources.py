"""Where a chunk's logits come from and where their gradient goes: projected from hidden states, or given as logits.

Projection stacks the streams so that one matmul with float32 output serves a chunk of C tokens,

    [student; base; teacher − reference] · Wᵀ  →  [3C, V]

for the logits of a difference are the difference of the logits, and their mean over the vocabulary is the projection onto the
mean row of W. G·W turns the student's logit gradient into d loss / d hidden. A decomposition adds the reference, [4C, V], whose
sum with the difference is the teacher. Where teacher and reference need logits of their own it is [4C, V] too, and [2C, V]
for two distributions and for a target that is linear in the hidden states, see `Problem`.
"""

from __future__ import annotations

from typing import Any

import torch

from popsd.engine.problem import Problem
from popsd.engine.torch_backend.supports import disjoint_heads, mark_disjoint
from popsd.engine.workspace import Work, vocabulary_columns
from popsd.head import mean_row
from popsd_kernels.rows import LOGIT_FLOOR, Rows


class ProjectedStreams:
    """Hidden states and heads. After `finish`: dhidden [N, D] in `Problem.dhidden_dtype`, dweight [V, D] and dbias [V] float32.

    row_scale: [N], what the sweeps multiply the logits' gradients by; or None.
    """

    def __init__(self, problem: Problem) -> None:
        tensors, options, vocab = problem.tensors, problem.options, problem.vocab_size
        own, frozen, student = tensors.student_weight, problem.frozen_weight, tensors.student
        assert own is not None and frozen is not None
        self.columns = columns = vocabulary_columns(vocab, min(own.shape[0], frozen.shape[0]), student.device)
        self.problem, self.vocab, self.options = problem, vocab, problem.row_options
        self.keep = None if tensors.weights is None else (tensors.weights != 0)[:, None]
        self.student_weight = own[: columns.projected].detach().to(problem.student_dtype)
        self.frozen_weight = self.student_weight
        if own is not frozen:
            self.frozen_weight = frozen[: columns.projected].detach().to(problem.frozen_dtype)
        self.student_bias, self.frozen_bias = (_bias(x, vocab) for x in (tensors.student_bias, problem.frozen_bias))
        self.mean_row = None
        if problem.is_purified and not problem.needs_separate_logits and not problem.is_target_linear:
            self.mean_row = mean_row(self.frozen_weight, problem.frozen_bias, vocab, problem.vocabulary)
        self.with_gradient = options.with_dhidden or options.with_dhead
        self.row_scale, self.peak = problem.gradient_weights, None
        if self.row_scale is not None and self.student_weight.dtype == torch.float16 and problem.tokens:
            # a gradient of 1e-6 has no room for a weight of 1/4096 as well, nor one of 1 for a loss scale of 65536
            self.peak = self.row_scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            self.row_scale = self.row_scale / self.peak
        self.dhidden = torch.empty_like(student, dtype=problem.dhidden_dtype) if options.with_dhidden else None
        self.dweight = self.dbias = None
        if options.with_dhead:
            self.dweight = torch.zeros_like(own, dtype=torch.float32)
            if tensors.student_bias is not None:
                self.dbias = torch.zeros_like(tensors.student_bias, dtype=torch.float32)

    @property
    def streams(self) -> int:
        problem = self.problem
        if not problem.is_purified or problem.is_target_linear:
            return 2
        return 4 if problem.needs_separate_logits or problem.needs_reference_logits else 3

    @property
    def work(self) -> Work:
        """A float32 gradient takes the place of logits read already."""
        separate = self.with_gradient and self.student_weight.dtype != torch.float32
        size, projected = self.student_weight.element_size(), self.columns.projected
        if self.problem.vocabulary.group is not None:
            projected = self.problem.planned_vocab_size
        return Work(
            projected,
            self.student_weight.shape[1],
            self.streams,
            size,
            logit_bytes=4 * self.streams * projected,
            gradient_bytes=size * projected if separate else 0,
            with_gradient=self.dhidden is not None,
            with_dweight=self.dweight is not None,
        )

    def allocate(self, rows: int, gradient_rows: int) -> None:
        pitch = row_pitch(self.columns.projected)
        device, float32 = self.problem.tensors.student.device, torch.float32
        logits = torch.empty(self.streams * rows, pitch, dtype=float32, device=device)
        self.logits = logits[:, : self.columns.projected]
        self.gradients = None
        if self.with_gradient and gradient_rows:
            dtype = self.student_weight.dtype
            self.gradients = torch.empty(gradient_rows, pitch, dtype=dtype, device=device)[:, : self.vocab]

    def operands(
        self, start: int, stop: int
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """What the matmuls read for tokens [start, stop): student [n, D], frozen streams [n, Df] each, what rounding the
        difference lost, and the centring [n] of the difference.
        """
        problem, tensors = self.problem, self.problem.tensors
        student = self._rows(tensors.student, start, stop).to(self.student_weight.dtype)
        teacher, low, offset = self._rows(tensors.teacher, start, stop), None, None
        if tensors.base is None or tensors.reference is None:
            frozen = [teacher]
        else:
            base, reference = (self._rows(x, start, stop) for x in (tensors.base, tensors.reference))
            if problem.is_target_linear:
                difference = teacher.float() - reference.float()
                frozen = [base.float().add(difference, alpha=1.0 / problem.options.pmi_beta)]
            elif self.mean_row is None:
                frozen = [base, teacher, reference]
            else:
                high, low = self._difference(teacher, reference)
                # the mean of the very rows that the matmul reads, or centring would be off by their rounding
                exact = high.float() if low is None else high.float() + low.float()
                offset = (exact @ self.mean_row).mul_(self.options.delta_scale * self.options.inv_temperature)
                frozen = [base, high, reference] if problem.needs_reference_logits else [base, high]
        if problem.is_base_minus_student:
            for k in (0, 2) if problem.needs_reference_logits else (0,):
                frozen[k] = frozen[k].float() - student
        return student, [x.to(self.frozen_weight.dtype) for x in frozen], low, offset

    def load(self, tokens: slice) -> Rows:
        n, problem = tokens.stop - tokens.start, self.problem
        student, frozen, low, offset = self.operands(tokens.start, tokens.stop)
        stacked = torch.cat(frozen)
        if self.frozen_weight is self.student_weight:
            project(torch.cat([student, stacked]), self.student_weight, self.logits[: self.streams * n])
        else:
            project(student, self.student_weight, self.logits[:n])
            project(stacked, self.frozen_weight, self.logits[n : self.streams * n])
        if low is not None:
            project(low, self.frozen_weight, self.logits[2 * n : 3 * n], accumulate=True)
        own, first, *others = (self.logits[k * n : (k + 1) * n, : self.vocab] for k in range(self.streams))
        chunk = _rows_of(problem, tokens, own, self.row_scale)._replace(
            student_bias=self.student_bias, frozen_bias=self.frozen_bias
        )
        if not others:
            return chunk._replace(target=first)
        if problem.needs_separate_logits:
            return chunk._replace(base=first, teacher=others[0], reference=others[1])
        reference = others[1] if problem.needs_reference_logits else None
        return chunk._replace(base=first, difference=others[0], offset=offset, reference=reference)

    def difference_of(self, rows: Rows) -> torch.Tensor:
        """Where the difference of ``rows`` goes that is still to be formed: the teacher's place."""
        assert rows.teacher is not None
        return rows.teacher

    def gradient(self, first: int, start: int, stop: int) -> torch.Tensor | None:
        if not self.with_gradient:
            return None
        if self.gradients is None:  # over the base or target: composed targets live in the difference by now
            return self.logits[stop - start : 2 * (stop - start), : self.vocab]
        return self.gradients[start - first : stop - first]

    def accumulate(self, first: int, last: int) -> None:
        """dH and dW of a filled gradient buffer: one matmul over the whole vocabulary, never partial sums in 16 bits."""
        gradient = self.gradient(first, first, last)
        if gradient is None:
            return
        if self.dhidden is not None:
            self.dhidden[first:last] = self._times_head(gradient)
        if self.dweight is not None:
            hidden = self._rows(self.problem.tensors.student, first, last).to(gradient.dtype)
            project(gradient.t(), hidden.t(), self.dweight[: self.vocab], accumulate=True)
        if self.dbias is not None:
            self.dbias[: self.vocab] += gradient.sum(dim=0, dtype=torch.float32)

    def finish(self) -> None:
        """After the last buffer."""
        if self.dhidden is not None:
            self.problem.vocabulary.add(self.dhidden)
        for x in (self.dhidden, self.dweight, self.dbias):
            if x is not None and self.peak is not None:
                x.mul_(self.peak)

    def mark_disjoint(self, losses: torch.Tensor) -> None:
        """Into results [9, N] and gradients: tokens that count, where the heads' biases forbid different entries."""
        tensors, options = self.problem.tensors, self.options
        counted = torch.ones_like(losses[0], dtype=torch.bool) if tensors.weights is None else tensors.weights != 0
        disjoint = disjoint_heads(self.student_bias, self.frozen_bias, options, self.problem.vocabulary) & counted
        mark_disjoint(losses, disjoint, options, self.dhidden)
        if options.beta == 1.0:  # of sums over tokens; those that a clip caps have added what they should
            lost = disjoint.any() & (options.token_clip is None and options.entry_clip is None)
            for x in (self.dweight, self.dbias):
                if x is not None:
                    x[: self.vocab].masked_fill_(lost, torch.nan)

    def _times_head(self, gradient: torch.Tensor) -> torch.Tensor:
        """gradient [n, V] · W, in float32 where the vocabulary is taken in two pieces or the result is kept in float32."""
        inner, weight = self.columns.inner, self.student_weight
        if inner == self.vocab and gradient.dtype in (torch.float32, self.problem.dhidden_dtype):
            return gradient @ weight[:inner]
        out = torch.empty(gradient.shape[0], weight.shape[1], dtype=torch.float32, device=gradient.device)
        project(gradient[:, :inner], weight[:inner].t(), out)
        if inner < self.vocab:
            project(gradient[:, inner:], weight[inner : self.vocab].t(), out, accumulate=True)
        return out

    def _rows(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a stream, masked ones as zeros: padding may hold NaN, and 0 · NaN would reach dW."""
        rows = tensor.detach()[start:stop]
        return rows if self.keep is None else torch.where(self.keep[start:stop], rows, 0.0)

    def _difference(self, teacher: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher − reference, taken in float32 and rounded once; on request with what the rounding lost."""
        difference, dtype = teacher.float() - reference.float(), self.frozen_weight.dtype
        high = difference.to(dtype)
        if dtype == torch.float32 or not self.problem.options.exact_difference:
            return high, None
        return high, (difference - high.float()).to(dtype)


class SparseStreams(ProjectedStreams):
    """The student's hidden states and head, beside a sparse target that needs no projection."""

    streams = 1

    @property
    def work(self) -> Work:
        """`Buckets` keeps the slope of a soft cap beside the logits."""
        work = super().work
        has_slope = self.problem.options.student_softcap is not None and self.with_gradient
        return work._replace(logit_bytes=work.logit_bytes * (2 if has_slope else 1))

    def load(self, tokens: slice) -> Rows:
        n, tensors = tokens.stop - tokens.start, self.problem.tensors
        student = self._rows(tensors.student, tokens.start, tokens.stop).to(self.student_weight.dtype)
        project(student, self.student_weight, self.logits[:n])
        return _rows_of(self.problem, tokens, self.logits[:n, : self.vocab], self.row_scale)._replace(
            student_bias=self.student_bias, target=self._rows(tensors.teacher, tokens.start, tokens.stop)
        )

    def gradient(self, first: int, start: int, stop: int) -> torch.Tensor | None:
        if not self.with_gradient or self.gradients is not None:
            return super().gradient(first, start, stop)
        return self.logits[: stop - start, : self.vocab]  # `Buckets` has no more use for them


class GivenLogits:
    """Logits [N, V] of any floating dtype. After the loop: dhidden [N, V], here the logits' own gradient, in their dtype."""

    dweight = dbias = None

    def __init__(self, problem: Problem) -> None:
        self.problem, self.vocab = problem, problem.vocab_size
        # padding columns of the vocabulary keep a zero gradient
        self.dhidden = torch.zeros_like(problem.tensors.student) if problem.options.with_dhidden else None

    @property
    def work(self) -> Work:
        return Work(self.vocab, logit_bytes=4 * self.vocab)

    def allocate(self, rows: int, gradient_rows: int) -> None:
        self.difference = None
        if self.problem.is_purified:
            device = self.problem.tensors.student.device
            self.difference = torch.empty(rows, self.vocab, dtype=torch.float32, device=device)

    def load(self, tokens: slice) -> Rows:
        student, base, teacher, reference = (
            None if x is None else x.detach()[tokens, : self.vocab] for x in self.problem.tensors[:4]
        )
        assert student is not None
        chunk = _rows_of(self.problem, tokens, student, self.problem.gradient_weights)
        if self.difference is None:
            return chunk._replace(target=teacher)
        return chunk._replace(base=base, teacher=teacher, reference=reference)

    def difference_of(self, rows: Rows) -> torch.Tensor:
        """A buffer for the difference of ``rows``, theirs until the next ones are swept."""
        assert self.difference is not None
        return self.difference[: rows.student.shape[0]]

    def gradient(self, first: int, start: int, stop: int) -> torch.Tensor | None:
        return None if self.dhidden is None else self.dhidden[start:stop, : self.vocab]

    def accumulate(self, first: int, last: int) -> None:
        return

    def finish(self) -> None:
        return


Source = ProjectedStreams | GivenLogits


def source_of(problem: Problem) -> Source:
    if problem.is_sparse:
        return SparseStreams(problem)
    return GivenLogits(problem) if problem.tensors.student_weight is None else ProjectedStreams(problem)


def _rows_of(problem: Problem, tokens: slice, student: torch.Tensor, row_scale: torch.Tensor | None) -> Rows:
    ids = problem.tensors.token_ids
    return Rows(
        student,
        token_ids=None if ids is None else problem.vocabulary.local(ids[tokens], problem.vocab_size),
        row_scale=None if row_scale is None else row_scale[tokens],
    )


def row_pitch(vocab: int) -> int:
    """Entries from one row of logits to the next.

    An odd one costs cuBLAS and vector loads their aligned paths; a multiple of 4 KiB sends all rows to the same cache sets
    (projection onto V = 32768 in chunks of 256 tokens, MKL on two cores: 0.31 s against 0.29 s with 16 entries more).
    """
    pitch = -(-vocab // 16) * 16
    return pitch + 16 if pitch % 1024 == 0 else pitch


def _bias(bias: torch.Tensor | None, vocab: int) -> torch.Tensor | None:
    return None if bias is None else bias.detach()[:vocab].float().clamp_min(LOGIT_FLOOR)


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out = hidden · weightᵀ, or out += it, in float32 whatever the operands."""
    wide: dict[str, Any] = {} if hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
    if accumulate:
        torch.addmm(out, hidden, weight.t(), out=out, **wide)
    else:
        torch.mm(hidden, weight.t(), out=out, **wide)
