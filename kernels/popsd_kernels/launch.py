"""How a sweep is launched: block sizes by device, which instructions it uses, where its results go.

None of the shipped sizes has run on a GPU yet: they come from the compiler's report (``python -m popsd_kernels.aot``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from popsd_kernels.device import primitives
from popsd_kernels.rows import RowOptions

INTERPRETED = bool(primitives.INTERPRETED.value)
"""Whether this process runs kernels in Triton's interpreter: fixed by TRITON_INTERPRET when they were decorated."""

PORTABLE_VARIABLE = "POPSD_KERNELS_PORTABLE"


@dataclass(frozen=True)
class LaunchConfig:
    """block: vocabulary entries per loop step. vec: neighbours that share an accumulator, all in one thread."""

    block: int
    vec: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.block % self.vec or self.block & (self.block - 1) or self.vec & (self.vec - 1):
            raise ValueError(f"block and vec must be powers of two and vec divide block, got {self}")


# 2,048 entries over 8 warps are two 128-bit fp32 loads per thread and stream: 64 KiB in flight per SM at the 4 to 6
# programs that fit. 1,024 entries cost 2-3 more SASS instructions per entry (loop bookkeeping), 4,096 leave 2 programs
# (sm_90, Triton 3.7.1). gfx942 has 64-lane waves: 4 of them are the same 256 threads.
# The single read keeps its block, a slice of the row, in registers: 80 of them, 3 programs, 5 rows of 151,936 in flight
# on an H200; 4,096 over 16 warps take 77 and leave 1. With entry_clip sweep 2 has three more accumulators: 2,048
# entries leave 2 or 3 programs, 1,024 over 8 warps spill (2 instructions, sm_90), over 4 warps 5 to 8 programs fit.
# The moments have 22 accumulators to a lane: 1,024 entries over 4 warps are two lanes per thread and 48 KiB in flight at the
# 4 programs that fit; lanes of 8 cost 10 instructions per entry more in fp32, whose loads are of 4 entries (sm_90).
_DEFAULT = {
    name: LaunchConfig(2048, 4, 8) for name in ("statistics", "loss_gradient", "difference", "masks", "single_read")
}
_DEFAULT["loss_gradient_entry_clip"] = LaunchConfig(1024, 4, 4)
_DEFAULT["moments"] = LaunchConfig(1024, 4, 4)
_WAVE64 = {name: LaunchConfig(config.block, config.vec, 4) for name, config in _DEFAULT.items()}
TABLES: Mapping[str, Mapping[str, LaunchConfig]] = {
    "sm_80": _DEFAULT,
    "sm_90": _DEFAULT,
    "sm_100": _DEFAULT,
    "sm_120": _DEFAULT,
    "gfx942": _WAVE64,
}
"""Shipped configurations: architecture -> kernel -> sizes. An unlisted device takes the nearest older entry."""


class Outputs(NamedTuple):
    """What a sweep writes. results: [k, C] float32 from `result_rows`. matrix: [C, V], or None where none is wanted."""

    results: torch.Tensor
    matrix: torch.Tensor | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel call, complete but for the moment of its launch."""

    kernel: Any
    rows: int
    arguments: dict[str, Any]
    config: LaunchConfig

    def run(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.rows,)](**self.arguments, **self._compiler_options())

    def compile(self) -> Any:
        """Compiles for Triton's current target without launching; tensors may be on the meta device."""
        return self.kernel.warmup(**self.arguments, **self._compiler_options(), grid=(self.rows,))

    def _compiler_options(self) -> dict[str, Any]:
        # Fused multiply-adds are counted on; Triton 3.9 announces that 3.10 will leave them out by default.
        return {"num_warps": self.config.num_warps, "enable_fp_fusion": True}


def architecture(device: torch.device) -> str:
    """Key into TABLES."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return nearest_architecture(torch.cuda.get_device_capability(device))


def nearest_architecture(capability: tuple[int, int]) -> str:
    """The newest listed NVIDIA architecture not newer than ``capability``, or the oldest."""
    listed = sorted(int(name[3:]) for name in TABLES if name.startswith("sm_"))
    number = capability[0] * 10 + capability[1]
    return f"sm_{max((entry for entry in listed if entry <= number), default=listed[0])}"


def fast_instructions(device: torch.device) -> bool:
    """Approximate instructions on NVIDIA GPUs, portable ones elsewhere or under POPSD_KERNELS_PORTABLE=1."""
    return device.type == "cuda" and torch.version.hip is None and not INTERPRETED and not _flag(PORTABLE_VARIABLE)


def sweep_bytes(options: RowOptions, composed: bool, with_gradient: bool) -> tuple[int, int]:
    """Bytes per entry of float32 logits that both sweeps move, a program per row; and several programs per row."""
    unclipped = options.entry_clip is None and options.token_clip is None
    one_read = options.beta == 0.0 and options.renyi is None and not options.minus_student and unclipped
    swept = (16 if composed else 8) + 8 + (2 + 8 * (not one_read)) * with_gradient
    streams = 12 if composed else 8
    return swept, 2 * streams + (streams + 2) * with_gradient


def too_few_rows(rows: int, bytes_swept: int, bytes_split: int, device: torch.device) -> bool:
    """Whether a program per row leaves a GPU so idle that spreading each over several pays, though that moves more bytes.

    Two programs per multiprocessor, 23 KiB of loads in flight at least, are what its bandwidth needs; fewer rows take as long
    as 2 * multiprocessors would. Predicted, not measured. Never on a device that has no multiprocessors.
    """
    if device.type != "cuda":
        return False
    filling = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return rows * bytes_split < filling * bytes_swept


def shipped_config(kernel: str, device: torch.device) -> LaunchConfig:
    """Sizes of ``kernel``, a row of TABLES, on ``device``. Launchers call it through this module."""
    return TABLES[_cached_architecture(device)][kernel]


def result_rows(count: int, rows: int, device: torch.device) -> torch.Tensor:
    """[count, rows] float32 whose rows all start 64-byte aligned, so that pointers to them never change a kernel's
    specialisation with the number of tokens."""
    return torch.empty(count, (rows + 15) // 16 * 16, dtype=torch.float32, device=device)[:, :rows]


@cache
def _cached_architecture(device: torch.device) -> str:
    return architecture(device)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")
