"""Validation of what comes with each token: flat tensors, or an error that names argument, expected, got and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from popsd.config import DivergenceConfig, MaskConfig
from popsd.engine.chunks.buckets import is_empty
from popsd.outputs import SparseTarget

MOST_BETAS = 8
"""Different coefficients in one call: their passes share no matmul."""


def checked_weights(weights: torch.Tensor | None, shape: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Flat float32 weights."""
    if weights is None:
        return None
    _check_token_tensor("weights", weights, shape, device)
    if weights.requires_grad:
        raise ValueError("weights: expected a tensor without gradient; got requires_grad=True. Detach it.")
    flat = weights.reshape(-1).float()
    if may_look(flat) and not torch.isfinite(flat).all():
        raise ValueError("weights: expected finite numbers; got NaN or inf. Mask tokens out with 0.")
    return flat


def checked_betas(
    beta: torch.Tensor | None, shape: Sequence[int], device: torch.device, config: DivergenceConfig
) -> tuple[list[float], torch.Tensor] | None:
    """The different coefficients, and which of them each token has, [N] int64. Waits for the device."""
    if beta is None:
        return None
    flat = spread_betas(beta, shape, device).reshape(-1)
    if torch.compiler.is_compiling():
        raise ValueError(
            "beta: expected None under torch.compile, whose graph cannot read it; got a tensor. Call uncompiled."
        )
    values, which = flat.double().unique(return_inverse=True)
    if len(values) > MOST_BETAS:
        raise ValueError(
            f"beta: expected at most {MOST_BETAS} different numbers, each of which is a pass of its own; got {len(values)}. "
            "Round them, or weigh the losses of two."
        )
    return [replace(config, beta=value).beta for value in values.tolist()], which


def spread_betas(beta: torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """A coefficient for each token, in the shape of the tokens, from one for each or for each completion."""
    if isinstance(beta, torch.Tensor) and len(shape) == 2 and beta.shape == shape[:1]:
        beta = beta[:, None].expand(*shape)
    _check_token_tensor("beta", beta, shape, device)
    if beta.requires_grad:
        raise ValueError("beta: expected a tensor without gradient; got requires_grad=True. Detach it.")
    return beta


def check_token_ids(token_ids: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    """One int64 id for each token. Looks at no entry."""
    _check_token_tensor("token_ids", token_ids, shape, device)
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids: expected int64; got {token_ids.dtype}. Convert it with .long().")


def checked_token_ids(
    token_ids: torch.Tensor | None, shape: Sequence[int], device: torch.device, vocab_size: int
) -> torch.Tensor | None:
    """Flat int64 token ids, -1 for none."""
    if token_ids is None:
        return None
    check_token_ids(token_ids, shape, device)
    flat = token_ids.reshape(-1)
    if may_look(flat) and flat.numel() and not -1 <= int(flat.min()) <= int(flat.max()) < vocab_size:
        raise ValueError(
            f"token_ids: expected entries in [0, {vocab_size}) or -1 for none; got {int(flat.min())} … {int(flat.max())}."
        )
    return flat


def checked_sparse_target(
    target: SparseTarget, shape: Sequence[int], device: torch.device, vocab_size: int, weights: torch.Tensor | None
) -> SparseTarget:
    """Ids and log-probabilities [..., k] of the same tokens. Where looking is free: known ids, and probabilities that add up
    to at most 1 in tokens that count. weights: flat."""
    if not isinstance(target, SparseTarget):
        raise TypeError(f"target: expected a popsd.SparseTarget; got {type(target).__name__}.")
    for name, x in target._asdict().items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"target.{name}: expected a torch.Tensor; got {type(x).__name__}.")
        if x.ndim != len(shape) + 1 or x.shape[:-1] != torch.Size(shape) or x.shape[-1] == 0:
            raise ValueError(
                f"target.{name}: expected shape {[*shape, 'k']} with k of at least 1, a row per token; got {list(x.shape)}."
            )
        if x.device != device:
            raise ValueError(f"target.{name}: expected device {device}; got {x.device}. Move it with .to().")
    ids, log_probs = target
    if ids.dtype != torch.int64:
        raise TypeError(f"target.ids: expected int64; got {ids.dtype}. Convert it with .long().")
    if not log_probs.is_floating_point():
        raise TypeError(f"target.log_probs: expected a floating dtype; got {log_probs.dtype}.")
    if ids.shape != log_probs.shape:
        raise ValueError(
            f"target.log_probs: expected the shape of target.ids, {list(ids.shape)}; got {list(log_probs.shape)}."
        )
    if may_look(ids) and ids.numel():
        _check_sparse_values(ids, log_probs, vocab_size, weights)
    return target


MOST_MASS = 1.01
"""What listed probabilities may add up to: bfloat16 rounds a log-probability of -4 by 0.8 %."""


def _check_sparse_values(
    ids: torch.Tensor, log_probs: torch.Tensor, vocab_size: int, weights: torch.Tensor | None
) -> None:
    if not -1 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"target.ids: expected entries in [0, {vocab_size}) or -1 for none; got {int(ids.min())} … {int(ids.max())}. "
            "The teacher and the student must share their tokenizer."
        )
    counted = torch.ones_like(ids[..., 0], dtype=torch.bool) if weights is None else (weights != 0).view(ids.shape[:-1])
    mass = log_probs.detach().double().masked_fill(is_empty(ids, log_probs), -torch.inf).exp().sum(-1)
    bad = counted & ~(mass <= MOST_MASS)  # NaN too
    if bad.any():
        raise ValueError(
            f"target.log_probs: expected logarithms of probabilities that add up to at most 1; got a sum of "
            f"{float(mass[bad][0]):.4g} in token {bad.nonzero()[0].tolist()}. Pass log-probabilities of the whole vocabulary, "
            "not logits."
        )


def checked_masks(
    masks: MaskConfig | None, *, purified: bool, token_ids: torch.Tensor | None, positions: torch.Tensor | None
) -> MaskConfig | None:
    """Token masks whose every rule has what it reads."""
    if masks is None:
        return None
    if not isinstance(masks, MaskConfig):
        raise TypeError(f"masks: expected a popsd.MaskConfig or None; got {type(masks).__name__}.")
    if masks.reads_decomposition and not purified:
        raise ValueError(
            "masks: max_reference_fraction and min_cos_transferable need the streams of a purified loss; got two "
            "distributions. Use the entropy rules, or compute the weights with popsd.decompose and popsd.token_weights."
        )
    if masks.protect_ids and token_ids is None:
        raise ValueError("masks: protect_ids expected token_ids, the sampled tokens; got None. Pass token_ids.")
    if masks.skip_first and positions is None:
        raise ValueError(
            "masks: skip_first expected completions of shape [B, T], or positions; got flat tokens, which do not tell "
            "where a completion begins. Pass positions, the place of each token in its completion."
        )
    return masks


def checked_positions(
    positions: torch.Tensor | None, shape: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Flat int64 places in the completion; of [B, T] by default the column, of flat tokens unknown."""
    if positions is None:
        if len(shape) != 2:
            return None
        return torch.arange(shape[1], device=device).expand(shape[0], -1).reshape(-1)
    _check_token_tensor("positions", positions, shape, device)
    if positions.dtype != torch.int64:
        raise TypeError(f"positions: expected int64; got {positions.dtype}. Convert it with .long().")
    return positions.reshape(-1)


def checked_log_normalisers(
    normalisers: Sequence[torch.Tensor] | None, shape: Sequence[int], device: torch.device
) -> list[torch.Tensor] | None:
    """Flat float32 log-normalisers of student, teacher and reference."""
    if normalisers is None:
        return None
    if len(normalisers) != 3:
        raise ValueError(
            f"log_normalisers: expected three tensors, of student, teacher and reference; got {len(normalisers)}."
        )
    for x in normalisers:
        _check_token_tensor("log_normalisers", x, shape, device)
    return [x.detach().reshape(-1).float() for x in normalisers]


def checked_completion_mask(mask: torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """float32 [B, T] or [N] of a mask over tokens: of bools, of 0 and 1, or of weights.

    Where looking is free, and of other dtypes than bool everywhere, at the price of a synchronisation: labels with -100 for
    what does not count look like a mask, and would give each token its id as weight.
    """
    _check_token_tensor("mask", mask, shape, device)
    if mask.dtype == torch.bool or torch.compiler.is_compiling():
        return mask.float()
    whole = not mask.is_floating_point()
    fine = (mask == 0) | (mask == 1) if whole else torch.isfinite(mask) & (mask >= 0)
    if not fine.all():
        raise ValueError(
            f"mask: expected {'0 and 1' if whole else 'finite weights of at least 0'}; got {mask[~fine][0].item()} among "
            f"{mask.dtype}. Of labels with -100 for what does not count pass labels != -100."
        )
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor without gradient; got requires_grad=True. Detach it.")
    return mask.float()


def check_num_items(num_items: float | torch.Tensor | None) -> None:
    """A positive number; a tensor may be 0, where nothing counts in any process. One element, looked at where it is free."""
    if num_items is None:
        return
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1 or num_items.is_complex():
            raise ValueError(f"num_items: expected one number; got a tensor of shape {list(num_items.shape)}.")
        if may_look(num_items) and not 0 <= num_items.item() < float("inf"):
            raise ValueError(f"num_items: expected a count of at least 0; got {num_items.item()}.")
    elif not isinstance(num_items, int | float):
        raise TypeError(f"num_items: expected a number, a tensor or None; got {type(num_items).__name__}.")
    elif not 0 < num_items < float("inf"):
        raise ValueError(f"num_items: expected a positive count; got {num_items}.")


def may_look(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at for free: a GPU would have to be waited for, a compiler's trace has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_token_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape {list(shape)}; got {type(tensor).__name__}.")
    check_dense(name, tensor)
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, one entry per token; got {list(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}; got {tensor.device}. Move it with .to().")


def check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got {tensor.layout}. Convert it with .to_dense().")
