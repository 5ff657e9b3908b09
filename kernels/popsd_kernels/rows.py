"""What a row sweep reads, what it computes and what comes out, for the kernels and for other backends alike.

Nothing here imports Triton, so a machine without it can still describe a sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LOGIT_FLOOR = -1.0e30
"""Stand-in for a logit of -inf: its probability is exactly 0 in float32, and no inf - inf can arise."""


def _require_positive(owner: str, options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{owner}: {name} must be finite and above 0, got {value}; leave it out for the default")


@dataclass(frozen=True)
class LogitTransform:
    """How a raw projection becomes a logit, as the model has it: ``softcap * tanh(scale * (raw + bias) / softcap)``.

    The bias is a tensor and travels beside this; ``softcap=None`` leaves the tanh out.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _require_positive("LogitTransform", self, "softcap")


@dataclass(frozen=True)
class RowOptions:
    """One sweep's mathematics. Notation and equation numbers: arXiv 2607.02234.

    renyi: order α in (0, 1) of the divergence D_α(target‖student), in place of a JSD; then ``beta`` is not read and
        ``entry_clip`` is None.
    beta: generalised JSD coefficient; 0 is KL(target‖student), 1 is KL(student‖target) (arXiv 2306.13649).
    inv_temperature: multiplies every stream's transformed logits.
    pmi_beta: the paper's β of Eq. 16.
    pmi_clip: the paper's c of Eq. 15; ``None`` leaves the tanh out.
    entry_clip: upper bound on each vocabulary entry's contribution; a capped entry has zero derivative.
    token_clip: upper bound on the token's loss; a capped token has zero gradient.
    student, target: logit transforms of the student and of every other stream.
    delta_scale: multiplies the difference of raw teacher and reference projections, before the temperature.
    minus_student: the base (or target) stream, in `row_moments` the reference, holds its difference to the student, without
        bias or soft cap. The log-ratio is then rounded relative to itself, not to the logits. Differences are finite.
    """

    beta: float = 0.5
    inv_temperature: float = 1.0
    pmi_beta: float = 1.0
    pmi_clip: float | None = 10.0
    entry_clip: float | None = None
    token_clip: float | None = None
    student: LogitTransform = LogitTransform()
    target: LogitTransform = LogitTransform()
    delta_scale: float = 1.0
    minus_student: bool = False
    renyi: float | None = None

    def __post_init__(self) -> None:
        _require_positive("RowOptions", self, "inv_temperature", "pmi_beta", "pmi_clip", "entry_clip", "token_clip")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"RowOptions: beta must be between 0 and 1, got {self.beta}; 0 is KL(target‖student), 1 KL(student‖target)"
            )
        if self.renyi is not None and not 0.0 < self.renyi < 1.0:
            raise ValueError(f"RowOptions: renyi must lie between 0 and 1, got {self.renyi}; beta=0 is its limit at 1")


_NOT_OF_TOKENS = ("student_bias", "frozen_bias", "target_is_finished", "composed")
_FROZEN = ("base", "target", "teacher", "reference")
"""Matrices of the frozen head."""


class Composed(NamedTuple):
    """A target that a device function composes of base, teacher and reference, in place of Eq. 13-17.

    function: decorated with ``triton.jit``, function(base, teacher, reference, *numbers): from blocks of log-probabilities in
        float32, -1e30 or so where a token is impossible, to a block of the target's logits, of any normaliser. It works entry
        by entry.
    numbers: its other arguments. Their values never compile a kernel again.
    normalisers: [C, 3] float32, log-sum-exp of the tempered logits of base, teacher and reference.
    place: [C, V] float32, where the target's logits may go; it may be ``Rows.teacher`` itself.
    """

    function: Any
    numbers: tuple[float, ...]
    normalisers: torch.Tensor
    place: torch.Tensor


class Rows(NamedTuple):
    """What the sweeps read of C tokens. Matrices are raw projections [C, V], float32, bfloat16 or float16, unit stride along V.

    The target is ``target``; or composed of ``base``, ``difference`` and ``offset`` as Eq. 13-17 have it; or of ``base``,
    ``teacher`` and ``reference`` as ``composed`` has it. The rest is None. `row_statistics` writes a composed
    target's logits, which are the target from then on: see `with_target`.

    student: the policy that is trained. base: the frozen policy that the target moves away from.
    difference: teacher - reference. offset: [C] float32, subtracted from inv_temperature * delta_scale * difference.
    target: the target's own projections; or, with ``target_is_finished``, its finished logits.
    teacher, reference: needed by ``composed``, `logit_difference`, `row_moments` and the tail mask only.
    student_bias, frozen_bias: [V] of any of the three dtypes, contiguous; of the student's head and of all other streams' head.
    token_ids: [C] int64, the sampled tokens; the log-probability of an id outside [0, V) is NaN.
    row_scale: [C] float32, a factor of the gradient only. Where it is 0 the gradient is exactly 0, whatever the row holds.
    """

    student: torch.Tensor
    base: torch.Tensor | None = None
    difference: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    target: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    student_bias: torch.Tensor | None = None
    frozen_bias: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    target_is_finished: bool = False
    composed: Composed | None = None

    @property
    def target_place(self) -> torch.Tensor | None:
        """Where a composed target's logits [C, V] may go; None where the target is there already."""
        return self.difference if self.composed is None else self.composed.place

    @property
    def frozen(self) -> torch.Tensor:
        """The stream that the target is, or is composed on."""
        stream = self.base if self.target is None else self.target
        assert stream is not None
        return stream

    def part(self, tokens: slice) -> Rows:
        """Some of the tokens, as views; before the target is ``composed``."""
        assert self.composed is None
        of_token = {
            name: x[tokens] for name, x in self._asdict().items() if x is not None and name not in _NOT_OF_TOKENS
        }
        return self._replace(**of_token)

    def sampled(self, ids: torch.Tensor, *, minus_student: bool = False) -> Rows:
        """The column [C, 1] of each row that belongs to its token of ``ids`` [C] int64, with the biases added in float32.

        It is a vocabulary of one entry, of which sweep 1 returns the logits themselves as maxima. minus_student: see
        `RowOptions`.
        """
        picked = ids.clamp(0, self.student.shape[1] - 1)
        matrices = {name: getattr(self, name) for name in ("student", "difference", *_FROZEN)}
        columns: dict[str, Any] = {
            name: None if x is None else x.gather(1, picked[:, None]) for name, x in matrices.items()
        }
        biases = dict.fromkeys(_FROZEN, None if minus_student or self.target_is_finished else self.frozen_bias)
        for name, bias in (biases | {"student": self.student_bias}).items():
            column = columns[name]
            if bias is not None and column is not None:
                columns[name] = column.float() + bias[picked].float()[:, None]
        place = self.student.new_empty(len(ids), 1, dtype=torch.float32)
        composed = self.composed and self.composed._replace(place=place)
        return self._replace(
            **columns, composed=composed, student_bias=None, frozen_bias=None, token_ids=None, row_scale=None
        )

    def with_target(self, logits: torch.Tensor) -> Rows:
        """The same tokens with the finished ``logits`` [C, V] of the composed target in place of what they came from."""
        return self._replace(
            base=None, difference=None, offset=None, composed=None, target=logits, target_is_finished=True
        )


class Heads(NamedTuple):
    """Weights [V, D] that project hidden states. frozen: [V, Df] of the other streams, None where it is ``student``."""

    student: torch.Tensor
    frozen: torch.Tensor | None = None


class Gradients(NamedTuple):
    """What to compute; None where not wanted. dhidden: [N, D], overwritten. dweight [V, D], dbias [V]: float32, added to."""

    dhidden: torch.Tensor | None = None
    dweight: torch.Tensor | None = None
    dbias: torch.Tensor | None = None

    @property
    def wanted(self) -> bool:
        return any(tensor is not None for tensor in self)


class EntryMasks(NamedTuple):
    """Vocabulary entries that the target must not move, or not far. None leaves a mask out.

    plausibility: entries whose base probability is below this share of the largest one keep Δ̄ = 0.
    tail_floor, tail_reach: |Δ̄| ≤ tail_reach where teacher and reference both give an entry less than tail_floor.
    """

    plausibility: float | None = None
    tail_floor: float | None = None
    tail_reach: float | None = None


class RowStatistics(NamedTuple):
    """Normalisers of a row, each [C] float32, natural log. Not added up: the sum would round at the size of a logit.

    log p(v) = (s(v) - student_max) - student_logsum, with logsum = log Σ exp(s - max); likewise the target.
    """

    student_max: torch.Tensor
    student_logsum: torch.Tensor
    target_max: torch.Tensor
    target_logsum: torch.Tensor


class RowLoss(NamedTuple):
    """Per-token results of the second sweep, each [C] float32, in nats.

    divergence: Eq. 18 after both clips. student_kl, target_kl: KL of student and of target to the mixture m
    (beta = 0 and ``renyi``: KL(target‖student) in ``target_kl``; beta = 1: KL(student‖target) in ``student_kl``; the other
    one is 0).
    clip_fraction: share of vocabulary entries capped by entry_clip. token_clipped: 1 where token_clip capped.
    argmax_agreement: 1 where student and target have their largest logit at a common entry.
    token_logprob: log p of the sampled token, NaN where no token ids were given.
    """

    divergence: torch.Tensor
    student_kl: torch.Tensor
    target_kl: torch.Tensor
    student_entropy: torch.Tensor
    target_entropy: torch.Tensor
    clip_fraction: torch.Tensor
    token_clipped: torch.Tensor
    argmax_agreement: torch.Tensor
    token_logprob: torch.Tensor


MOMENTS = 13
"""Sums per token that `row_moments` returns."""
SHARD_MOMENTS = 21
"""Those that `shard_moments` returns."""
