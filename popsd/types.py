"""The few values that travel through the library: heads, hidden states, results."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Head:
    """A language-model head: ``logits = softcap * tanh(logit_scale * (h @ weight.T + bias) / softcap)``.

    weight: [V, D] floating. bias: [V] or None; entries of -inf mask vocabulary rows out.
    logit_scale: multiplies the projection (a model that divides, such as Granite, passes the reciprocal).
    softcap: Gemma-2's final logit soft-capping, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _require_matrix("Head.weight", self.weight)
        rows = self.weight.shape[0]
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(
                f"Head.bias: expected shape [{rows}], one entry per row of weight; got {list(self.bias.shape)}. "
                "Pass the bias of the same lm_head, or None."
            )
        if self.bias is not None and self.bias.device != self.weight.device:
            raise ValueError(
                f"Head.bias: expected device {self.weight.device} like weight; got {self.bias.device}. Move it with .to()."
            )
        if not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"Head.logit_scale: expected a positive finite number; got {self.logit_scale}.")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"Head.softcap: expected a positive number or None; got {self.softcap}.")


def mean_row(head: Head, vocab_size: int) -> torch.Tensor:
    """Mean of a head's first ``vocab_size`` rows, [D] float32, leaving out rows masked by a bias of -inf.

    Centring (Eq. 14) needs the mean logit over the vocabulary, and the mean of a projection is the projection by the mean
    row (METHOD identity 2). Kept for as long as the weight lives, until it is written to again.
    """
    weight, bias = head.weight, head.bias
    key = (vocab_size, *(None if x is None or x.is_inference() else x._version for x in (weight, bias)))
    known = _mean_rows.get(weight)
    if known is None or known[0] != key or known[1]() is not bias:
        rows = weight.detach()[:vocab_size]
        if bias is None:
            row = rows.mean(dim=0, dtype=torch.float32)
        else:
            kept = torch.isfinite(bias.detach()[:vocab_size])
            row = torch.where(kept[:, None], rows, 0.0).sum(dim=0, dtype=torch.float32) / kept.sum()
        known = _mean_rows[weight] = (key, _no_bias if bias is None else weakref.ref(bias), row)
    return known[2]


def _no_bias() -> None:
    return None


_mean_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()


class HiddenStates(NamedTuple):
    """Last hidden states at the same completion positions, each [N, D] or [B, T, D]; the student may have its own D.

    student: trainable weights on the question. base: frozen weights on the question. teacher: frozen weights on question
    plus reference solution. reference: frozen weights on the reference solution alone. The last three never receive gradient.
    ``base`` and ``reference`` may be None where only the teacher is the target (standard OPSD).
    """

    student: torch.Tensor
    base: torch.Tensor | None
    teacher: torch.Tensor
    reference: torch.Tensor | None


class Decomposition(NamedTuple):
    """Eq. 4 per token over the full vocabulary, each [N] float32: Δ_total = Δ_ref + Δ_it.

    total_norm = ‖log π_T − log π_θ‖, reference_norm = ‖log π_ref − log π_θ‖, transferable_norm = ‖log π_T − log π_ref‖,
    the two cosines of Δ_total with the parts, and reference_fraction = reference_norm / total_norm. A ratio with a zero
    denominator is 0.
    """

    total_norm: torch.Tensor
    reference_norm: torch.Tensor
    transferable_norm: torch.Tensor
    cos_total_reference: torch.Tensor
    cos_total_transferable: torch.Tensor
    reference_fraction: torch.Tensor


class LossOutput(NamedTuple):
    """What every loss of popsd returns. Shapes are those of the tokens given ([N] or [B, T]), float32.

    loss: differentiable, weights applied; a scalar where ``reduction="sum"``. Everything else is detached:
    divergence: the same before weights. student_kl, target_kl: KL of student and of target to the mixture, in nats
    (with beta 0 or 1 the mixture is one of the two and its own KL is 0). student_entropy, target_entropy: nats.
    clip_fraction: share of vocabulary entries capped by ``entry_clip``. token_clipped: 1 where ``token_clip`` capped.
    argmax_agreement: 1 where student and target agree on the likeliest entry.
    token_logprob: log π_θ of ``token_ids``, None without them. decomposition: None unless asked for.
    weights: the weights actually used.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    student_kl: torch.Tensor
    target_kl: torch.Tensor
    student_entropy: torch.Tensor
    target_entropy: torch.Tensor
    clip_fraction: torch.Tensor
    token_clipped: torch.Tensor
    argmax_agreement: torch.Tensor
    token_logprob: torch.Tensor | None
    decomposition: Decomposition | None
    weights: torch.Tensor


def _require_matrix(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape [V, D]; got {type(tensor).__name__}.")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name}: expected a non-empty [V, D] matrix; got shape {list(tensor.shape)}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating dtype; got {tensor.dtype}. A quantised head must be dequantised first."
        )
