"""Devices by name, to plan the memory of one that is not there."""

from __future__ import annotations

import re
from typing import NamedTuple

DEVICES = {
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "l40s": 48,
    "a100-40": 40,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "mi300x": 192,
}
"""Memory in GB as the makers give it."""


class Device(NamedTuple):
    """A GPU and its memory in GiB."""

    name: str
    gib: float


def device_named(name: str | None) -> Device | None:
    """The device of a name of `DEVICES` or an amount such as 24GiB. None: the first GPU here, or None where there is none.

    Raises ValueError for another name.

    >>> device_named("24GiB")
    Device(name='24GiB', gib=24.0)
    """
    if name is None:
        import torch

        if not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_properties(0)
        return Device(found.name, found.total_memory / 2**30)
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb)", name.lower())
    if amount is not None:
        return Device(name, float(amount[1]) * (1 if amount[2] == "gib" else 1e9 / 2**30))
    if name.lower() not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)} or an amount such as 24GiB; got {name!r}.")
    return Device(name, DEVICES[name.lower()] * 1e9 / 2**30)
