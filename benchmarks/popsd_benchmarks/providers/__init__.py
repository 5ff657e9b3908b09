"""Everything that is measured, by name. A new provider: one class with the interface of `base.Provider`, one line here."""

from __future__ import annotations

from collections.abc import Sequence

from popsd_benchmarks.providers.base import Provider, Step
from popsd_benchmarks.providers.eager import Eager
from popsd_benchmarks.providers.matmuls import Matmuls, RecomputingPort
from popsd_benchmarks.providers.ours import Popsd
from popsd_benchmarks.providers.peers import LigerChunked, LigerTriton, Orda, TrlChunked

FLOOR = "matmuls"
OURS = {"cpu": "popsd-torch", "cuda": "popsd-triton"}
"""Whose time every other is divided by."""

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Popsd("popsd-torch", "torch"),
        Popsd("popsd-triton", "triton"),
        Popsd("popsd-graph", "triton", graph=True),
        Popsd("popsd-single-read", "triton", "single_read"),
        Popsd("popsd-streaming", "triton", "streaming"),
        Matmuls(),
        Eager("eager"),
        Eager("eager-16bit-logits", logits_in_float32=False),
        Eager("eager-compiled", compiles=True),
        TrlChunked(),
        RecomputingPort(),
        LigerTriton(),
        LigerChunked("liger-chunked", compiles=False),
        LigerChunked("liger-compiled", compiles=True),
        Orda(),
    )
}

__all__ = ["FLOOR", "OURS", "PROVIDERS", "Provider", "Step", "find"]


def find(names: Sequence[str] | None) -> list[Provider]:
    """The providers of these names, all if None. Raises ValueError for an unknown one, naming those that exist."""
    unknown = [name for name in names or () if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"providers: expected some of {', '.join(PROVIDERS)}; got {', '.join(unknown)}.")
    return [provider for name, provider in PROVIDERS.items() if names is None or name in names]
