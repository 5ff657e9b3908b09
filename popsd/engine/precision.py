"""The precision of this package's matmuls: decided here, whatever the caller has set for the rest of the process."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """For a function that enters `exact_matmuls`, whose switches no graph may set: torch.compile breaks its graph there.

    ``torch.compiler.disable`` as a decorator does the same, but loads the compiler when popsd is imported, a second or two.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def exact_matmuls(device: torch.device) -> Iterator[None]:
    """Matmuls in the dtype of their operands, without autocast, and float32 ones in full float32. For eager code only.

    TF32 keeps 11 bits of a float32 operand: hidden gradients would be off by 5.6e-4 to 1e-3 where 2e-5 is documented.
    ``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul.allow_tf32`` and the ``fp32_precision`` switches are
    those of the process: while a thread is inside, matmuls of other threads are in full float32 too. They are put
    back when the last thread leaves, on an exception as well; what somebody sets in the meantime counts at once and stays.
    """
    with torch.autocast(device.type, enabled=False):
        _enter()
        try:
            yield
        finally:
            _leave()


class _Switch(NamedTuple):
    read: Callable[[], str]
    write: Callable[[str], object]
    full: str
    inherited: Callable[[], str] | None = None
    """What the switch says while it is "none", if it can be."""


def _switches() -> tuple[_Switch, ...]:
    """Those that decide what a float32 matmul is: on NVIDIA and AMD GPUs, and on CPUs with 16-bit units."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return (_Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),)
    # The older two set these, but asking them raises RuntimeError where the newer ones were set by themselves.
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    families = ((cuda.matmul, cudnn), (mkldnn.matmul, mkldnn))
    return tuple(_fp32_precision(matmul, family) for matmul, family in families)


def _fp32_precision(matmul: Any, family: Any) -> _Switch:
    return _Switch(
        lambda: matmul.fp32_precision,
        lambda value: setattr(matmul, "fp32_precision", value),
        "ieee",
        lambda: family.fp32_precision,
    )


_SWITCHES = _switches()
_REDUCED = ("high", "medium", "tf32", "bf16")
_lock = threading.RLock()
"""Reentrant: a signal handler that computes a loss runs in the thread that may be holding it."""
_inside = 0
_found: dict[_Switch, str] = {}
"""What was reduced when somebody came in."""


def _enter() -> None:
    global _inside
    with _lock:
        _inside += 1
        for switch in _SWITCHES:  # 0.6 µs each (torch 2.13)
            value = switch.read()
            if value in _REDUCED:
                inherits = switch.inherited is not None and switch.inherited() == value
                _found[switch] = "none" if inherits else value
                switch.write(switch.full)


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            for switch, value in list(_found.items()):  # a handler that comes in between has restored and cleared them
                if switch.read() == switch.full:
                    switch.write(value)
            _found.clear()
