"""Self-validating options. `beta` is always the JSD coefficient, as in TRL; `pmi_beta` is the paper's β."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Impl(StrEnum):
    """Who computes the row sweeps. AUTO is Triton on a GPU it drives and torch elsewhere; the others never fall back."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


class Method(StrEnum):
    """How Eq. 4 is measured. LOGITS: every field, from the logits of teacher and reference, one more matmul.

    GRAM: the centred fields alone, from hidden states and the head's `popsd.gram_matrix`, no logit; all three streams share a
    head without soft cap. There is no AUTO: the two do not return the same fields.
    """

    LOGITS = "logits"
    GRAM = "gram"


class Strategy(StrEnum):
    """How logits come and go. CHUNKED stores those of a chunk of tokens and sweeps them twice: the fastest so far.

    The others are Triton only and never fall back. SINGLE_READ sweeps once, a row held in registers across programs; off
    until a GPU has shown it live and faster. STREAMING never writes a logit to memory and recomputes instead: two to
    three times the work, for tiny memory and huge vocabularies.
    """

    CHUNKED = "chunked"
    SINGLE_READ = "single_read"
    STREAMING = "streaming"


BETA_RESOLUTION = 2.0**-24
"""How near to 0 or 1 a ``beta`` counts as 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Generalised Jensen-Shannon divergence between student p and target q, m = (1−beta)·p + beta·q (arXiv 2306.13649).

    beta: in [0, 1]. 0 is forward KL(q‖p), 1 is reverse KL(p‖q), between them beta·KL(q‖m) + (1−beta)·KL(p‖m). A value within
        2⁻²⁴ (6e-8) of 0 or 1 becomes 0 or 1: float32 cannot tell 1−beta from 1 there, and it comes from rounding, as in
        1 − 10·0.1. Mind the step: towards 0 the mixture's divergence goes to 0 like beta·KL(q‖p), towards 1 likewise.
        A KL of a token that only its first policy can sample (the other's logit is -inf) is inf. The gradient is then p − q at
        beta = 0 and NaN at beta = 1. A mixture, and ``entry_clip``, are always finite; ``token_clip`` caps it as any other.
    renyi_alpha: order α in (0, 1) or None; the forward Rényi divergence D_α(q‖p) = −log Σ q^α·p^(1−α) / (1 − α) in place of a
        JSD (SR-OPSD, arXiv 2608.09745, with α from .9 to .95). Its limit at 1 is forward KL: it needs beta = 0, and has no
        contributions of entries for ``entry_clip`` to cap. It is inf where no token is possible to both, and finite else.
    temperature: > 0; divides every stream's logits. No temperature² factor is applied.
    token_clip: > 0 or None; caps the token's loss. A capped token has zero gradient.
    entry_clip: > 0 or None; caps each vocabulary entry's contribution (OPSD's stabiliser, arXiv 2601.18734). A capped entry
        has zero derivative, and the loss may be negative. An entry of infinite contribution, which one policy cannot sample, is
        capped from a probability of about 1e-30 by the other on; below that it counts as 0, for float32 ends there.
    vocab_size: >= 1 or None; the number of leading vocabulary rows in use. Padding rows beyond it leave every softmax,
        mean and norm.
    check_finite: look for NaN and inf in the inputs before any work. None: only on CPU and uncompiled, where looking is free,
        and not in the heads' weights, which True reads once as well.

    Precision is no option: float32 operands are multiplied in full float32 whatever TF32 switches the process has set.
    """

    beta: float = 0.5
    temperature: float = 1.0
    token_clip: float | None = None
    entry_clip: float | None = None
    vocab_size: int | None = None
    check_finite: bool | None = None
    renyi_alpha: float | None = None

    def __post_init__(self) -> None:
        _require_number("beta", self.beta)
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"beta: expected a number in [0, 1]; got {self.beta}. 0 is forward KL, 0.5 the symmetric JSD, 1 reverse KL."
            )
        if abs(self.beta - round(self.beta)) <= BETA_RESOLUTION:
            object.__setattr__(self, "beta", float(round(self.beta)))
        if self.renyi_alpha is not None:
            _require_number("renyi_alpha", self.renyi_alpha)
            if not 0.0 < self.renyi_alpha < 1.0:
                raise ValueError(f"renyi_alpha: expected a number between 0 and 1, or None; got {self.renyi_alpha}.")
            for name, only in (("beta", 0.0), ("entry_clip", None)):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name}: expected {only} with renyi_alpha={self.renyi_alpha}, which is a forward divergence of whole "
                        f"distributions; got {getattr(self, name)}. Set {name}={only}."
                    )
        _require_positive("temperature", self.temperature)
        for name in ("token_clip", "entry_clip", "vocab_size"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if not isinstance(self.vocab_size, int | None):
            raise TypeError(f"vocab_size: expected a whole number of rows or None; got {self.vocab_size!r}.")
        if self.check_finite is not None:
            _require_flag("check_finite", self.check_finite)


@dataclass(frozen=True, kw_only=True)
class PurifiedConfig(DivergenceConfig):
    """The purified (PMI) target of arXiv 2607.02234 on top of the divergence: softmax(log π_0 + Δ̃/pmi_beta).

    pmi_beta: > 0; Eq. 16. pmi_clip: > 0 or None; c of Δ̃ = c·tanh(Δ̄/c), Eq. 15; None leaves the tanh out. The Triton
        kernels take up to 1000.
    center: subtract the vocabulary mean of Δ_it, Eq. 14. Switching it off needs one more matmul: without centring the
        log-normalisers of teacher and reference no longer cancel.
    exact_difference: carry teacher − reference as a high and a low part (one more matmul on 16-bit inputs).
        By default it is taken in float32 and rounded once to the head's dtype. Float32 inputs are always exact.

    Two masks on vocabulary entries, off by default. Where teacher and probe are both near zero, Δ_it is a ratio of two tails
    that c = 10 never clips: .0085 / .0005 gives +2.8 nats on a token that the base does use.
    plausibility: in (0, 1] or None; entries whose base probability is below this share of the largest one keep Δ̃ = 0.
    tail_floor, tail_cap: a probability in (0, 1] and nats > 0, or None both; |Δ̃| is at most tail_cap where teacher and
        reference are both below tail_floor. They need the log-normalisers: one more matmul.
    """

    pmi_beta: float = 1.0
    pmi_clip: float | None = 10.0
    center: bool = True
    exact_difference: bool = False
    plausibility: float | None = None
    tail_floor: float | None = None
    tail_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("center", "exact_difference"):
            _require_flag(name, getattr(self, name))
        _require_positive("pmi_beta", self.pmi_beta)
        if self.pmi_clip is not None:
            _require_positive("pmi_clip", self.pmi_clip)
        for name in ("plausibility", "tail_floor"):
            _require_between(name, getattr(self, name), 0.0, 1.0, open_below=True)
        if (self.tail_floor is None) != (self.tail_cap is None):
            raise ValueError(
                f"tail_cap: expected with tail_floor or not at all; got tail_floor={self.tail_floor} and "
                f"tail_cap={self.tail_cap}. The floor says which entries, the cap how far they may move."
            )
        if self.tail_cap is not None:
            _require_positive("tail_cap", self.tail_cap)
            if self.pmi_clip is not None and self.tail_cap >= self.pmi_clip:
                raise ValueError(
                    f"tail_cap: expected less than pmi_clip={self.pmi_clip}, which bounds every entry already; "
                    f"got {self.tail_cap}."
                )


@dataclass(frozen=True, kw_only=True)
class TargetConfig(DivergenceConfig):
    """A target of one's own on top of the divergence, see `popsd.register_target`; in place of a `PurifiedConfig`.

    target: the registered name. numbers: finite; the function's arguments after the three streams, but for defaults at the end.
    """

    target: str
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "numbers", tuple(float(number) for number in self.numbers))
        if not all(math.isfinite(number) for number in self.numbers):
            raise ValueError(f"numbers: expected finite numbers; got {self.numbers}.")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which completion tokens the loss keeps. Each rule gives a weight in [floor, 1] and the weights multiply; all are off.

    max_reference_fraction: > 0; keeps tokens with ‖Δ_ref‖/‖Δ_total‖ up to this: the share that exists without the question.
    min_cos_transferable: in [-1, 1]; keeps tokens whose cos(Δ_total, Δ_it) is at least this.
    signal: which family of `Decomposition` these two read: "raw" is the paper's, and with "weighted" costs a matmul;
        "centred" costs next to nothing where one head serves all streams and its `popsd.gram_matrix` is passed.
    min_student_entropy, min_target_entropy: nats >= 0; keeps tokens of at least this entropy.
    top_student_entropy, top_target_entropy: in (0, 1]; keeps this share of the call's tokens, those of highest entropy.
    skip_first: >= 0; leaves out the first tokens of each completion.
    protect_ids: leaves out the tokens sampled as one of these, so that no gradient at that place speaks for or against
        them: epistemic markers, say, see ``EpistemicMarkers.token_ids``.
    floor: in [0, 1); the weight of what a rule turns down. 0 drops it, more weighs it down.
    softness: >= 0; width of a logistic step at each threshold, in the units of what is compared; 0 is a hard step.
    """

    max_reference_fraction: float | None = None
    min_cos_transferable: float | None = None
    signal: Literal["raw", "centred", "weighted"] = "raw"
    min_student_entropy: float | None = None
    min_target_entropy: float | None = None
    top_student_entropy: float | None = None
    top_target_entropy: float | None = None
    skip_first: int = 0
    protect_ids: tuple[int, ...] = ()
    floor: float = 0.0
    softness: float = 0.0

    def __post_init__(self) -> None:
        infinity = float("inf")
        _require_between("max_reference_fraction", self.max_reference_fraction, 0.0, infinity, open_below=True)
        _require_between("min_cos_transferable", self.min_cos_transferable, -1.0, 1.0)
        if self.signal not in ("raw", "centred", "weighted"):
            raise ValueError(f"signal: expected 'raw', 'centred' or 'weighted'; got {self.signal!r}.")
        for name in ("min_student_entropy", "min_target_entropy", "softness"):
            _require_between(name, getattr(self, name), 0.0, infinity)
        for name in ("top_student_entropy", "top_target_entropy"):
            _require_between(name, getattr(self, name), 0.0, 1.0, open_below=True)
        if not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise ValueError(f"skip_first: expected a whole number of tokens, at least 0; got {self.skip_first!r}.")
        object.__setattr__(self, "protect_ids", tuple(self.protect_ids))
        if any(not isinstance(token, int) or token < 0 for token in self.protect_ids):
            raise ValueError(f"protect_ids: expected token ids of at least 0; got {self.protect_ids}.")
        _require_number("floor", self.floor)
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"floor: expected a weight in [0, 1); got {self.floor}. At 1 no rule would do anything.")

    @property
    def reads_decomposition(self) -> bool:
        return self.max_reference_fraction is not None or self.min_cos_transferable is not None


def _require_between(name: str, value: float | None, low: float, high: float, *, open_below: bool = False) -> None:
    if value is None:
        return
    _require_number(name, value)
    if not (low < value if open_below else low <= value) or not value <= high or value == float("inf"):
        bracket = "(" if open_below else "["
        closing = ")" if high == float("inf") else "]"
        raise ValueError(f"{name}: expected a number in {bracket}{low:g}, {high:g}{closing}, or None; got {value}.")


def _require_number(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number; got {value!r} of type {type(value).__name__}.")


def _require_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False; got {value!r}.")


def _require_positive(name: str, value: float) -> None:
    _require_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number; got {value}.")
