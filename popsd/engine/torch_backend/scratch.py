"""Buffers that the torch backend keeps between blocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

HELD = 3
"""Scratch buffers of `StudentRows`."""
DIFFERENCE = 3
"""Those of `logit_difference`, after them."""


class _Pool(threading.local):
    """A thread's memory: the block of the call that is running, and one for the next call."""

    running: torch.Tensor | None = None
    free: torch.Tensor | None = None


_pool = _Pool()


@contextlib.contextmanager
def own_buffers() -> Iterator[None]:
    """Buffers for one call. A call inside another, from a signal handler or a registered target's function, has its own: it may
    come between any two lines of this one, whose results would be wrong without a word.
    """
    outer, _pool.running = _pool.running, _pool.free
    _pool.free = None
    if _pool.running is None:  # one block, which huge pages can back; those never asked for never become resident
        with torch.inference_mode(False):  # whoever calls first: an inference tensor could never be written in training
            _pool.running = torch.empty(_BUFFERS, _POOLED_ELEMENTS, dtype=torch.float32)
    try:
        yield
    finally:
        _pool.free, _pool.running = _pool.running, outer


def scratch(like: torch.Tensor, count: int, *, held: int = HELD) -> list[torch.Tensor]:
    """``count`` float32 buffers of a shape, kept for a thread's calls: fresh pages for temporaries cost more than the
    arithmetic on them (one multiplication of 2^17 elements: 61 µs into fresh memory, 6 µs in place, glibc 2.36).

    held: how many to leave alone, by default those of `StudentRows`. Outside of `own_buffers` all are fresh.
    """
    buffers = _pool.running
    if buffers is None or like.numel() > _POOLED_ELEMENTS or like.device.type != "cpu":
        return [torch.empty_like(like, dtype=torch.float32) for _ in range(count)]
    return [x[: like.numel()].view(like.shape) for x in buffers[held : held + count]]


_BUFFERS, _POOLED_ELEMENTS = HELD + DIFFERENCE + 5, 2 << 17
