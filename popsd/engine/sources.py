"""Where a chunk's logits come from and where their gradient goes: projected from hidden states, or given as logits.

Projection stacks the streams so that one matrix product with float32 output serves a chunk of C tokens,

    [student; base; teacher − reference] · Wᵀ  →  [3C, V]        (METHOD identities 1 and 2)

and G·W turns the student's logit gradient into d loss / d hidden. A decomposition adds the reference, [4C, V], whose sum with
the difference is the teacher. Where the identities do not hold (soft cap, uncentred Δ, masks and telemetry that need the
normalisers first) teacher and reference are projected apart, [4C, V]. Two distributions: [2C, V].
Without a tanh the target's logits are linear in the hidden states, so base + (teacher − reference)/pmi_beta is one stream and
the purified target costs what two distributions cost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from popsd.config import Method, Strategy
from popsd.engine.problem import Problem, operand_dtype
from popsd.engine.workspace import Work, vocabulary_columns
from popsd.head import Head, mean_row
from popsd_kernels.rows import LOGIT_FLOOR


class Chunk(NamedTuple):
    """Raw projections of n tokens, each [n, V]. delta: a float32 buffer that holds, or is to receive, the difference.

    offset: [n] float32, the centring of ``delta``; None where teacher and reference come apart, or there is no delta.
    """

    student: torch.Tensor
    target: torch.Tensor
    delta: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> Chunk:
        return self._replace(**{name: x[start:stop] for name, x in self._asdict().items() if x is not None})


class HiddenRows(NamedTuple):
    """Operands of the products: student [n, D], frozen streams [n, Df] each, what rounding the difference lost, centring."""

    student: torch.Tensor
    frozen: list[torch.Tensor]
    low: torch.Tensor | None
    offset: torch.Tensor | None


class ProjectedStreams:
    """Hidden states and heads. After the loop: dhidden [N, D] in the student's dtype, dweight [V, D] and dbias [V] float32."""

    def __init__(self, problem: Problem, *, with_dhidden: bool, with_dhead: bool) -> None:
        assert problem.heads is not None
        student_head, frozen_head = problem.heads
        vocab, student = problem.vocab_size, problem.student
        rows = min(head.weight.shape[0] for head in problem.heads)
        self.columns = columns = vocabulary_columns(vocab, rows, student.device)
        self.problem, self.vocab, self.options = problem, vocab, problem.row_options
        self.keep = None if problem.weights is None else (problem.weights != 0)[:, None]
        self.student_weight = operand(student_head.weight[: columns.projected], student, problem.autocast_dtype)
        self.frozen_weight = self.student_weight
        if student_head.weight is not frozen_head.weight:
            rows_in_use = frozen_head.weight[: columns.projected]
            self.frozen_weight = operand(rows_in_use, problem.target, problem.autocast_dtype)
        self.student_bias, self.target_bias = _bias(student_head, vocab), _bias(frozen_head, vocab)
        self.with_reference = problem.decompose is Method.LOGITS and not problem.apart
        self.mixed = self._is_one_stream()
        difference = problem.purified is not None and not problem.apart and not self.mixed
        self.mean_row = mean_row(frozen_head, vocab) if difference else None
        self.with_gradient = with_dhidden or with_dhead
        self.dhidden = torch.empty_like(student) if with_dhidden else None
        self.dweight = self.dbias = None
        if with_dhead:
            self.dweight = torch.zeros_like(student_head.weight, dtype=torch.float32)
            if student_head.bias is not None:
                self.dbias = torch.zeros_like(student_head.bias, dtype=torch.float32)

    @property
    def streams(self) -> int:
        if self.problem.purified is None or self.mixed:
            return 2
        return 4 if self.problem.apart or self.with_reference else 3

    @property
    def work(self) -> Work:
        """A float32 gradient takes the place of logits read already."""
        separate = self.with_gradient and self.student_weight.dtype != torch.float32
        size, projected = self.student_weight.element_size(), self.columns.projected
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
        device = self.problem.student.device
        self.logits = torch.empty(self.streams * rows, pitch, device=device)[:, : self.columns.projected]
        self.gradients = None
        if self.with_gradient and gradient_rows:
            dtype = self.student_weight.dtype
            self.gradients = torch.empty(gradient_rows, pitch, dtype=dtype, device=device)[:, : self.vocab]

    def hidden_rows(self, start: int, stop: int) -> HiddenRows:
        """What the matrix products read for tokens [start, stop)."""
        problem = self.problem
        student = self._rows(problem.student, start, stop).to(self.student_weight.dtype)
        frozen, low, offset = [self._rows(problem.target, start, stop)], None, None
        if problem.teacher is not None and problem.reference is not None:
            pair = [self._rows(x, start, stop) for x in (problem.teacher, problem.reference)]
            if self.mixed:
                assert problem.purified is not None
                difference = pair[0].float() - pair[1].float()
                frozen = [frozen[0].float().add(difference, alpha=1.0 / problem.purified.pmi_beta)]
            elif self.mean_row is None:
                frozen += pair
            else:
                high, low = self._difference(*pair)
                # the mean of the very rows that the product reads, or centring would be off by their rounding
                exact = high.float() if low is None else high.float() + low.float()
                offset = (exact @ self.mean_row).mul_(self.options.delta_scale * self.options.inv_temperature)
                frozen += [high, pair[1]] if self.with_reference else [high]
        if self.options.relative:
            for k in (0, 2) if self.with_reference else (0,):
                frozen[k] = frozen[k].float() - student
        return HiddenRows(student, [x.to(self.frozen_weight.dtype) for x in frozen], low, offset)

    def load(self, start: int, stop: int) -> Chunk:
        n = stop - start
        student, frozen, low, offset = self.hidden_rows(start, stop)
        stacked = torch.cat(frozen)
        if self.frozen_weight is self.student_weight:
            project(torch.cat([student, stacked]), self.student_weight, self.logits[: self.streams * n])
        else:
            project(student, self.student_weight, self.logits[:n])
            project(stacked, self.frozen_weight, self.logits[n : self.streams * n])
        if low is not None:
            project(low, self.frozen_weight, self.logits[2 * n : 3 * n], accumulate=True)
        views = [self.logits[k * n : (k + 1) * n, : self.vocab] for k in range(self.streams)]
        if self.problem.apart:
            return Chunk(views[0], views[1], delta=views[2], teacher=views[2], reference=views[3])
        reference = views[3] if self.with_reference else None
        return Chunk(views[0], views[1], views[2] if self.streams > 2 else None, offset, reference=reference)

    def gradient(self, first: int, start: int, stop: int) -> torch.Tensor | None:
        if not self.with_gradient:
            return None
        if self.gradients is None:  # over the target stream: composed targets live in the difference by now
            return self.logits[stop - start : 2 * (stop - start), : self.vocab]
        return self.gradients[start - first : stop - first]

    def fold(self, first: int, last: int) -> None:
        """dH and dW of a filled gradient buffer: one product over the whole vocabulary, never partial sums in 16 bits."""
        gradient = self.gradient(first, first, last)
        if gradient is None:
            return
        if self.dhidden is not None:
            self.dhidden[first:last] = self._times_head(gradient)
        if self.dweight is not None:
            hidden = self._rows(self.problem.student, first, last).to(gradient.dtype)
            project(gradient.t(), hidden.t(), self.dweight[: self.vocab], accumulate=True)
        if self.dbias is not None:
            self.dbias[: self.vocab] += gradient.sum(dim=0, dtype=torch.float32)

    def _times_head(self, gradient: torch.Tensor) -> torch.Tensor:
        """gradient [n, V] · W, accumulated in float32 where the vocabulary is taken in two pieces."""
        inner, weight = self.columns.inner, self.student_weight
        if inner == self.vocab:
            return gradient @ weight[:inner]
        out = torch.empty(gradient.shape[0], weight.shape[1], dtype=torch.float32, device=gradient.device)
        project(gradient[:, :inner], weight[:inner].t(), out)
        project(gradient[:, inner:], weight[inner : self.vocab].t(), out, accumulate=True)
        return out

    def _rows(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a stream, masked ones as zeros: padding may hold NaN, and 0 · NaN would reach dW."""
        rows = tensor.detach()[start:stop]
        return rows if self.keep is None else torch.where(self.keep[start:stop], rows, 0.0)

    def _is_one_stream(self) -> bool:
        """Whether the purified target is linear in the hidden states. Only where products are float32: a mix rounded to 16
        bits is off by 2⁻⁹ of the base's own logits, a difference by 2⁻⁹ of the difference.
        """
        config = self.problem.purified
        return (
            config is not None
            and config.pmi_clip is None
            and not config.masks_entries
            and not self.problem.apart
            and not self.with_reference
            and self.problem.strategy is Strategy.CHUNKED
            and self.frozen_weight.dtype == torch.float32
        )

    def _difference(self, teacher: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher − reference, taken in float32 and rounded once; on request with what the rounding lost."""
        difference, dtype = teacher.float() - reference.float(), self.frozen_weight.dtype
        high = difference.to(dtype)
        config = self.problem.purified
        if dtype == torch.float32 or config is None or not config.exact_difference:
            return high, None
        return high, (difference - high.float()).to(dtype)


class GivenLogits:
    """Logits [N, V] of any floating dtype. After the loop: dhidden [N, V], here the logits' own gradient, in their dtype."""

    student_bias = target_bias = dweight = dbias = None

    def __init__(self, problem: Problem, *, with_gradient: bool) -> None:
        self.problem, self.vocab = problem, problem.vocab_size
        # padding columns of the vocabulary keep a zero gradient
        self.dhidden = torch.zeros_like(problem.student) if with_gradient else None

    @property
    def work(self) -> Work:
        return Work(self.vocab, logit_bytes=4 * self.vocab)

    def allocate(self, rows: int, gradient_rows: int) -> None:
        purified = self.problem.purified is not None
        self.delta = torch.empty(rows, self.vocab, device=self.problem.student.device) if purified else None

    def load(self, start: int, stop: int) -> Chunk:
        problem = self.problem
        student, target, teacher, reference = (
            None if x is None else x.detach()[start:stop, : self.vocab]
            for x in (problem.student, problem.target, problem.teacher, problem.reference)
        )
        assert student is not None and target is not None
        delta = None if self.delta is None else self.delta[: stop - start]
        return Chunk(student, target, delta, teacher=teacher, reference=reference)

    def gradient(self, first: int, start: int, stop: int) -> torch.Tensor | None:
        return None if self.dhidden is None else self.dhidden[start:stop, : self.vocab]

    def fold(self, first: int, last: int) -> None:
        return


def row_pitch(vocab: int) -> int:
    """Entries from one row of logits to the next.

    An odd one costs cuBLAS and vector loads their aligned paths; a multiple of 4 KiB sends all rows to the same cache sets
    (projection onto V = 32768 in chunks of 256 tokens, MKL on two cores: 0.31 s against 0.29 s with 16 entries more).
    """
    pitch = -(-vocab // 16) * 16
    return pitch + 16 if pitch % 1024 == 0 else pitch


def _bias(head: Head, vocab: int) -> torch.Tensor | None:
    return None if head.bias is None else head.bias.detach()[:vocab].float().clamp_min(LOGIT_FLOOR)


def operand(weight: torch.Tensor, hidden: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    """The head in the dtype of the matrix products."""
    return weight.detach().to(operand_dtype(weight, hidden, autocast))


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out = hidden · weightᵀ, or out += it, in float32 whatever the operands."""
    wide: dict[str, Any] = {} if hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
    if accumulate:
        torch.addmm(out, hidden, weight.t(), out=out, **wide)
    else:
        torch.mm(hidden, weight.t(), out=out, **wide)
