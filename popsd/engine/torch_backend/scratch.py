"""Buffers that the torch backend keeps between blocks."""

from __future__ import annotations

import threading

import torch

HELD = 3
"""Scratch buffers of `StudentRows`."""
DIFFERENCE = 3
"""Those of `logit_difference`, after them."""


_pool = threading.local()


def scratch(like: torch.Tensor, count: int, *, held: int = HELD) -> list[torch.Tensor]:
    """``count`` float32 buffers of a shape, kept between calls of a thread: fresh pages for temporaries cost more than the
    arithmetic on them (one multiplication of 2^17 elements: 61 µs into fresh memory, 6 µs in place, glibc 2.36).

    held: how many to leave alone, by default those of `StudentRows`.
    """
    if like.numel() > _POOLED_ELEMENTS or like.device.type != "cpu":
        return [torch.empty_like(like, dtype=torch.float32) for _ in range(count)]
    buffers = getattr(_pool, "buffers", None)
    if buffers is None:  # one block, which huge pages can back; those never asked for never become resident
        with torch.inference_mode(False):  # whoever calls first: an inference tensor could never be written in training
            buffers = _pool.buffers = torch.empty(_BUFFERS, _POOLED_ELEMENTS, dtype=torch.float32)
    return [x[: like.numel()].view(like.shape) for x in buffers[held : held + count]]


_BUFFERS, _POOLED_ELEMENTS = HELD + DIFFERENCE + 5, 2 << 17
