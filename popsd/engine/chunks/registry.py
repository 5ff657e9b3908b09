"""Targets of one's own: a function from the logits of base, teacher and reference to those of the target, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from popsd.engine.chunks.decomposition import DIAGNOSTIC_ELEMENTS
from popsd.engine.problem import Problem
from popsd.engine.torch_backend.targets import tempered_logits
from popsd.engine.workspace import slices
from popsd_kernels.rows import Rows

_functions: dict[str, Callable[..., torch.Tensor]] = {}


def register_target(name: str, function: Callable[..., torch.Tensor]) -> None:
    """Offer ``function`` to every loss as ``config=popsd.TargetConfig(target=name, numbers=...)``, until the process ends.

    function(base, teacher, reference, *numbers): each [n, V] float32, tempered logits of n tokens over the vocabulary in use,
    not normalised, -1e30 or so where a token is impossible. It returns the target's logits, [n, V] float32, of any normaliser
    and with -inf for impossible tokens, and changes nothing in place. It sees a few tokens at a time, in any number, and only
    in forward: the target receives no gradient. Under torch.compile it stays outside the graph.

    It costs one more matmul than the purified target, three float32 matrices of those few tokens and what it makes itself.
    Raises TypeError for what is no string or no function, ValueError for a name that is taken.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a non-empty string; got {name!r}.")
    if not callable(function):
        raise TypeError(f"function: expected a function of base, teacher and reference; got {type(function).__name__}.")
    if name in _functions:
        raise ValueError(f"name: expected one that is not taken; got {name!r}. Choose another.")
    _functions[name] = function


def known_targets() -> list[str]:
    return sorted(_functions)


def registered_logits(problem: Problem, rows: Rows, out: torch.Tensor) -> torch.Tensor:
    """The registered target's finished logits [n, V], in ``out``, which may be the teacher's place."""
    options, name = problem.row_options, problem.options.target
    assert name is not None and rows.base is not None and rows.teacher is not None and rows.reference is not None
    step = max(1, DIAGNOSTIC_ELEMENTS // problem.vocab_size)
    for piece in slices(slice(0, out.shape[0]), step):
        raw = (x[piece] for x in (rows.base, rows.teacher, rows.reference))
        streams = [tempered_logits(x, rows.frozen_bias, options.target, options) for x in raw]
        out[piece] = _checked(name, _functions[name](*streams, *problem.options.numbers), streams[0])
    return out


def _checked(name: str, target: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(target, torch.Tensor):
        raise TypeError(
            f"target {name!r}: expected its function to return a torch.Tensor; got {type(target).__name__}."
        )
    if target.dtype != torch.float32:
        raise TypeError(f"target {name!r}: expected its function to return float32; got {target.dtype}. Convert it.")
    if target.shape != like.shape or target.device != like.device:
        raise ValueError(
            f"target {name!r}: expected its function to return shape {list(like.shape)} on {like.device}, that of each "
            f"argument; got {list(target.shape)} on {target.device}."
        )
    if target.device.type == "cpu" and not (target < torch.inf).all():  # on a GPU the host would have to wait
        raise ValueError(f"target {name!r}: expected its function to return logits; got NaN or +inf.")
    return target
