"""A language-model head, and what is derived from one: its mean row and its Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary


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
        _require_dense("Head.weight", self.weight, "[V, D]")
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise ValueError(f"Head.weight: expected a non-empty [V, D] matrix; got shape {list(self.weight.shape)}.")
        if self.bias is not None:
            self._check_bias(self.bias)
        for name in ("logit_scale", "softcap"):
            value = getattr(self, name)
            if value is None and name == "softcap":
                continue
            if not isinstance(value, int | float):
                raise TypeError(f"Head.{name}: expected a number; got {type(value).__name__}. Pass float(...) of it.")
            if not 0 < value < float("inf"):
                raise ValueError(f"Head.{name}: expected a positive finite number; got {value}.")

    def _check_bias(self, bias: torch.Tensor) -> None:
        rows = self.weight.shape[0]
        _require_dense("Head.bias", bias, f"[{rows}]")
        if bias.shape != (rows,):
            raise ValueError(
                f"Head.bias: expected shape [{rows}], one entry per row of weight; got {list(bias.shape)}. "
                "Pass the bias of the same lm_head, or None."
            )
        if bias.device != self.weight.device:
            raise ValueError(
                f"Head.bias: expected device {self.weight.device} like weight; got {bias.device}. Move it with .to()."
            )


def mean_row(
    weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int, over: Vocabulary = WHOLE
) -> torch.Tensor:
    """Mean of a head's first ``vocab_size`` rows [V, D], [D] float32, leaving out rows masked by a bias of -inf.

    Centring (Eq. 14) needs the mean logit over the vocabulary, and the mean of projections is the projection onto the mean row.
    It is formed in every call and never kept: no counter tells of a weight written through ``.data`` or by a fused optimiser.
    It reads V·D entries once, where a call's matmuls multiply 4·N times as many.
    """
    if bias is None:
        total = weight.detach()[:vocab_size].sum(dim=0, dtype=torch.float32)
        return over.sum(total) / over.entries(vocab_size)
    total = weight.new_zeros(weight.shape[1], dtype=torch.float32)
    kept = torch.isfinite(bias.detach()[:vocab_size])
    for start in range(0, vocab_size, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, vocab_size)
        rows = torch.where(kept[start:stop, None], weight.detach()[start:stop], 0.0)
        total += rows.sum(dim=0, dtype=torch.float32)
    return over.sum(total) / over.sum(kept.sum())


def centred_gram(
    weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int, over: Vocabulary = WHOLE
) -> torch.Tensor:
    """G = W_cᵀ·W_c of the same rows less their mean, [D, D] float32: Σ_v ((x·W_v) − x·w̄)² = xᵀGx.

    It costs V·D² multiplications, D/(4·N) of a call's four matmuls, so a caller whose head is frozen may keep it.
    """
    mean, width = mean_row(weight, bias, vocab_size, over), weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float32, device=weight.device)
    kept = None if bias is None else torch.isfinite(bias.detach()[:vocab_size])
    for start in range(0, vocab_size, BLOCK_ROWS):  # centred before it is squared: a common row would cost its digits
        stop = min(start + BLOCK_ROWS, vocab_size)
        rows = weight.detach()[start:stop].float() - mean
        if kept is not None:
            rows = torch.where(kept[start:stop, None], rows, 0.0)
        gram.addmm_(rows.t(), rows)
    return over.sum(gram)


BLOCK_ROWS = 8192
"""Rows of the head at a time: 128 MiB in float32 at D = 4096."""


def _require_dense(name: str, tensor: torch.Tensor, shape: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape {shape}; got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got {tensor.layout}. Convert it with .to_dense().")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating dtype; got {tensor.dtype}. A quantised head must be dequantised first."
        )


def is_shared(own: Head, frozen: Head) -> bool:
    """Whether both are the very same tensors and transforms, so that one projection serves all streams."""
    same = own.weight is frozen.weight and own.bias is frozen.bias
    return same and (own.logit_scale, own.softcap) == (frozen.logit_scale, frozen.softcap)
