"""Self-validating options. `beta` is always the JSD coefficient, as in TRL; `pmi_beta` is the paper's β."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Impl(StrEnum):
    """Who computes the row sweeps. AUTO is Triton on a GPU it drives and torch elsewhere; the others never fall back."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


class Strategy(StrEnum):
    """How logits come and go. CHUNKED stores those of a chunk of tokens and sweeps them twice: the fastest so far.

    The others are Triton only and never fall back. SINGLE_READ sweeps once, a row held in registers across programs; off
    until a GPU has shown it live and faster. STREAMING never writes a logit to memory and recomputes instead: two to
    three times the work, for tiny memory and huge vocabularies.
    """

    CHUNKED = "chunked"
    SINGLE_READ = "single_read"
    STREAMING = "streaming"


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Generalised Jensen-Shannon divergence between student p and target q, m = (1−beta)·p + beta·q (arXiv 2306.13649).

    beta: in [0, 1]. 0 is forward KL(q‖p), 1 is reverse KL(p‖q), between them beta·KL(q‖m) + (1−beta)·KL(p‖m).
    temperature: > 0; divides every stream's logits. No temperature² factor is applied.
    token_clip: > 0 or None; caps the token's loss. A capped token has zero gradient.
    entry_clip: > 0 or None; caps each vocabulary entry's contribution (OPSD's stabiliser, arXiv 2601.18734). A capped entry
        has zero derivative, and the loss may be negative.
    vocab_size: >= 1 or None; the number of leading vocabulary rows in use. Padding rows beyond it leave every softmax,
        mean and norm.
    check_finite: look for NaN and inf in the inputs before any work. None: only on CPU and uncompiled, where looking is free.
    """

    beta: float = 0.5
    temperature: float = 1.0
    token_clip: float | None = None
    entry_clip: float | None = None
    vocab_size: int | None = None
    check_finite: bool | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"beta: expected a number in [0, 1]; got {self.beta}. 0 is forward KL, 0.5 the symmetric JSD, 1 reverse KL."
            )
        _require_positive("temperature", self.temperature)
        for name in ("token_clip", "entry_clip", "vocab_size"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PurifiedConfig(DivergenceConfig):
    """The purified (PMI) target of arXiv 2607.02234 on top of the divergence: softmax(log π_0 + Δ̃/pmi_beta).

    pmi_beta: > 0; Eq. 16. pmi_clip: > 0 or None; c of Δ̃ = c·tanh(Δ̄/c), Eq. 15; None leaves the tanh out.
    center: subtract the vocabulary mean of Δ_it, Eq. 14. Switching it off needs one more matrix product: without centring
        the log-normalisers of teacher and reference no longer cancel.
    exact_difference: carry teacher − reference as a high and a low part (one more matrix product on 16-bit inputs).
        By default it is taken in float32 and rounded once to the head's dtype. Float32 inputs are always exact.
    """

    pmi_beta: float = 1.0
    pmi_clip: float | None = 10.0
    center: bool = True
    exact_difference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("pmi_beta", self.pmi_beta)
        if self.pmi_clip is not None:
            _require_positive("pmi_clip", self.pmi_clip)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number; got {value}.")
