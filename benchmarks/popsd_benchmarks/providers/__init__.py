"""Everything that is measured, by name. A new one: a function from a problem to its loss, a line here, a look in `cases`."""

from functools import partial
from typing import Any

from popsd_benchmarks.providers import peers
from popsd_benchmarks.providers.base import Provider, Step, own
from popsd_benchmarks.providers.baselines import Matmuls, eager
from popsd_benchmarks.providers.ours import Popsd

_LIGER: dict[str, Any] = {"four": False, "softcap": False, "mean": True}
_CHUNKED = _LIGER | {
    "module": "liger_kernel.chunked_loss.jsd_loss",
    "frozen_note": "forms dW whether the head is trained or not",
}
_FULL: dict[str, Any] = {"buffers": (8.0, 8.0)}
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Popsd("popsd-torch", impl="torch"),
        Popsd("popsd-triton", impl="triton"),
        Popsd("popsd-graph", impl="triton", graph=True),
        Popsd("popsd-single-read", impl="triton", strategy="single_read"),
        Popsd("popsd-streaming", impl="triton", strategy="streaming"),
        Matmuls("matmuls"),
        Provider("eager", eager, **_FULL),
        Provider("eager-16bit-logits", partial(eager, logits_in_float32=False), only_16_bit=True, **_FULL),
        Provider("eager-compiled", partial(eager, compiled=True), compiles=True, **_FULL),
        Provider("trl", peers.trl, "trl.kernels.chunked_divergence", four=False, cpu_note="torch fallback"),
        Provider("liger-triton", peers.liger_triton, "liger_kernel.transformers.fused_linear_jsd", on_cpu=False, **_LIGER),
        Provider("liger-chunked", peers.liger_chunked, **_CHUNKED),
        Provider("liger-compiled", partial(peers.liger_chunked, compiled=True), compiles=True, **_CHUNKED),
        Provider(
            "orda", peers.orda, "orda_kernel", four=False, softcap=False, buffers=(0.0, 15.0),
            cpu_note="forms all logits on a CPU",
        ),
    )
}  # fmt: skip

__all__ = ["PROVIDERS", "Provider", "Step", "own"]
