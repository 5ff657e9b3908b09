"""A language-model head, and what is derived from one: its mean row and its Gram matrix."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

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
    return _remembered(_mean_rows, head, vocab_size, _mean_row)


def centred_gram(head: Head, vocab_size: int) -> torch.Tensor:
    """G = W_cᵀ·W_c of the same rows less their mean, [D, D] float32: Σ_v ((x·W_v) − x·w̄)² = xᵀGx. Kept like `mean_row`.

    It costs V·D² multiplications once per weight: D/(4·N) of one call's four products.
    """
    return _remembered(_grams, head, vocab_size, _centred_gram)


def _mean_row(head: Head, vocab_size: int) -> torch.Tensor:
    rows = head.weight.detach()[:vocab_size]
    if head.bias is None:
        return rows.mean(dim=0, dtype=torch.float32)
    kept = torch.isfinite(head.bias.detach()[:vocab_size])
    return torch.where(kept[:, None], rows, 0.0).sum(dim=0, dtype=torch.float32) / kept.sum()


def _centred_gram(head: Head, vocab_size: int) -> torch.Tensor:
    mean, width = mean_row(head, vocab_size), head.weight.shape[1]
    gram = torch.zeros(width, width, device=mean.device)
    for start in range(0, vocab_size, _GRAM_ROWS):  # centred before it is squared: a common row would cost its digits
        stop = min(start + _GRAM_ROWS, vocab_size)
        rows = head.weight.detach()[start:stop].float() - mean
        if head.bias is not None:
            rows = torch.where(torch.isfinite(head.bias.detach()[start:stop])[:, None], rows, 0.0)
        gram.addmm_(rows.t(), rows)
    return gram


def _remembered(
    cache: WeakIdKeyDictionary, head: Head, vocab_size: int, compute: Callable[[Head, int], torch.Tensor]
) -> torch.Tensor:
    weight, bias = head.weight, head.bias
    key = (vocab_size, *(None if x is None or x.is_inference() else x._version for x in (weight, bias)))
    known = cache.get(weight)
    if known is None or known[0] != key or known[1]() is not bias:
        value = compute(head, vocab_size)
        known = cache[weight] = (key, _no_bias if bias is None else weakref.ref(bias), value)
    return known[2]


def _no_bias() -> None:
    return None


_mean_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()
_grams: WeakIdKeyDictionary = WeakIdKeyDictionary()
_GRAM_ROWS = 8192
"""Rows of the head in float32 at a time: 128 MiB at D = 4096."""


def _require_matrix(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape [V, D]; got {type(tensor).__name__}.")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name}: expected a non-empty [V, D] matrix; got shape {list(tensor.shape)}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating dtype; got {tensor.dtype}. A quantised head must be dequantised first."
        )
