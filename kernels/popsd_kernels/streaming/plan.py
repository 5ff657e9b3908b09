"""The launches of the streaming path: tile sizes by device, how programs share the vocabulary, arguments of each kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import triton

from popsd_kernels import launch
from popsd_kernels.device.divergence import coefficient_of, mode_of
from popsd_kernels.device.operands import composition, difference_operand, optional, student_operand, target_operand
from popsd_kernels.launch import Launch, LaunchConfig
from popsd_kernels.rows import Heads, RowOptions, Rows, RowStatistics
from popsd_kernels.streaming.sums import Scaling, Strip, stream_accumulate_kernel, stream_finish_kernel
from popsd_kernels.streaming.tiles import LANES, Extent, Parts, Streams, stream_merge_kernel, stream_statistics_kernel


@dataclass(frozen=True)
class TileConfig:
    """A logit tile is ``tokens`` x ``vocabulary``, projected ``width`` hidden dimensions at a time."""

    tokens: int
    vocabulary: int
    width: int
    num_warps: int
    num_stages: int


_KERNELS = ("statistics", "sums", "strip")
# Chosen from the compiler's report (Triton 3.6.0 and 3.7.1): the largest tile, in multiplications per operand byte, without
# a spill in any flag combination. 64x256 does 110 FLOP per byte from L2, 128x128 96, 64x128 77, 64x64 48. Pass 1 with every
# option spills 5 at 64x256 on sm_90 (3.6.0). Pass 2 holds nine sums per token on top of the accumulators. float32 runs on
# the FMA units ("ieee"): tensor cores would round it to tf32. On sm_100 and sm_120 its strips take half the depth step: at
# 32, every option spills 8 to 10 with 64 tokens, 6 to 8 with 32. At 16, 64 tokens spill 2 to 12 except on sm_100.
_FLOAT32_WIDE = {(kernel, 4): TileConfig(64, 64, 32, 8, 2) for kernel in _KERNELS}
_FLOAT32 = {
    **_FLOAT32_WIDE,
    ("statistics", 4): TileConfig(32, 64, 32, 8, 2),
    ("strip", 4): TileConfig(32, 64, 32, 8, 2),
}
_AMPERE = {
    **_FLOAT32,
    ("statistics", 2): TileConfig(64, 128, 64, 8, 3),
    ("sums", 2): TileConfig(32, 128, 64, 8, 3),
    ("strip", 2): TileConfig(64, 128, 64, 8, 3),
}
_HOPPER = {
    **_FLOAT32,
    ("statistics", 2): TileConfig(128, 128, 32, 8, 3),
    ("sums", 2): TileConfig(64, 128, 64, 8, 3),
    ("strip", 2): TileConfig(64, 256, 32, 8, 3),
}
_BLACKWELL = {
    **_FLOAT32,
    ("strip", 4): TileConfig(64, 64, 16, 8, 2),
    **{(kernel, 2): TileConfig(64, 64, 64, 8, 3) for kernel in _KERNELS},
}
_BLACKWELL_CONSUMER = {**_AMPERE, ("strip", 4): TileConfig(32, 64, 16, 8, 2)}
_CDNA = {
    **_FLOAT32_WIDE,
    ("sums", 4): TileConfig(64, 64, 16, 8, 2),
    **{(kernel, 2): TileConfig(64, 128, 32, 8, 2) for kernel in _KERNELS},
}
TABLES: Mapping[str, Mapping[tuple[str, int], TileConfig]] = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _BLACKWELL_CONSUMER,
    "gfx942": _CDNA,
}
"""Architecture -> (kernel, bytes per operand entry) -> sizes; "sums" is any that accumulates pass 2."""

_ROW = LaunchConfig(LANES, 1, 4)


@dataclass(frozen=True)
class Call:
    """What the launches of one call share; builds each of them, unchecked. rows: hidden states, as in `stream_divergence`."""

    rows: Rows
    heads: Heads
    options: RowOptions
    fast: bool

    @property
    def tokens(self) -> int:
        return self.rows.student.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.heads.student.shape[0]

    @property
    def operand_bytes(self) -> int:
        """Of the wider dtype, where student and frozen streams have different ones."""
        return max(self.rows.student.element_size(), self.rows.frozen.element_size())

    @cached_property
    def streams(self) -> Streams:
        rows, options, (student, frozen) = self.rows, self.options, self.heads
        return Streams(
            student_operand(rows, options),
            target_operand(rows, options),
            difference_operand(rows, options),
            rows.offset,
            *composition(rows, options)[:2],
            student,
            student.stride(0),
            frozen,
            None if frozen is None else frozen.stride(0),
        )

    def statistics(self, config: TileConfig, extent: Extent, out: torch.Tensor) -> Launch:
        """Pass 1. out: [parts, 4, N] float32."""
        return self._tiles(stream_statistics_kernel, config, extent, {"streams": self.streams, "out": parts(out)})

    def merge(self, partial: torch.Tensor, out: torch.Tensor) -> Launch:
        """partial: pass 1's, out: [4, N] float32 from `result_rows`."""
        arguments = {
            "partial": parts(partial),
            "part_count": partial.shape[0],
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "V": self.vocabulary,
            "LANES": LANES,
        }
        return Launch(stream_merge_kernel, self.tokens, arguments, _ROW)

    def accumulate(
        self,
        config: TileConfig,
        extent: Extent,
        statistics: RowStatistics,
        scaling: Scaling | None,
        sums: Parts | None,
        strip: Strip | None,
    ) -> Launch:
        """Pass 2 (``sums``), pass 3 over the tiles of ``extent`` (``scaling`` and ``strip``), or both in one."""
        arguments = {
            "streams": self.streams,
            "statistics": tuple(statistics),
            "token_ids_ptr": None if sums is None else self.rows.token_ids,
            "scaling": scaling,
            "sums_out": sums,
            "strip": strip or Strip(*[None] * len(Strip._fields)),
            "beta": coefficient_of(self.options),
            "entry_clip": optional(self.options.entry_clip),
            "MODE": mode_of(self.options),
        }
        return self._tiles(stream_accumulate_kernel, config, extent, arguments)

    def finish(self, statistics: RowStatistics, partial: torch.Tensor, scaling: Scaling, out: torch.Tensor) -> Launch:
        """partial: pass 2's [parts, SUMS, N], out: [9, N] float32 from `result_rows`; writes ``scaling`` too."""
        arguments = {
            "statistics": tuple(statistics),
            "partial": parts(partial),
            "part_count": partial.shape[0],
            "token_ids_ptr": self.rows.token_ids,
            "row_scale_ptr": self.rows.row_scale,
            "scaling": scaling,
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "beta": coefficient_of(self.options),
            "entry_clip": optional(self.options.entry_clip),
            "token_clip": optional(self.options.token_clip),
            "V": self.vocabulary,
            "LANES": LANES,
            "MODE": mode_of(self.options),
            "FAST": self.fast,
        }
        return Launch(stream_finish_kernel, self.tokens, arguments, _ROW)

    def _tiles(self, kernel: Any, config: TileConfig, extent: Extent, arguments: dict[str, Any]) -> Launch:
        programs = triton.cdiv(self.tokens, config.tokens) * triton.cdiv(extent.last - extent.first, extent.span)
        shared = {
            **extent._asdict(),
            "V": self.vocabulary,
            "D": self.rows.student.shape[1],
            "FROZEN_D": self.rows.frozen.shape[1],
            "BLOCK_M": config.tokens,
            "BLOCK_V": config.vocabulary,
            "BLOCK_D": config.width,
            "num_stages": config.num_stages,
            "FAST": self.fast,
        }
        return Launch(kernel, programs, {**arguments, **shared}, LaunchConfig(config.vocabulary, 1, config.num_warps))


def parts(tensor: torch.Tensor) -> Parts:
    return Parts(tensor, tensor.stride(0), tensor.stride(1))


def shipped_config(kernel: str, operand_bytes: int, device: torch.device) -> TileConfig:
    return TABLES[launch.architecture(device)][kernel, operand_bytes]


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors: each holds one program of these kernels."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def tile_span(token_tiles: int, vocabulary_tiles: int, processors: int, limit: int) -> int:
    """Vocabulary tiles per program: the most (fewest parts to merge) that is within 5 % of the shortest run.

    Programs run in waves of ``processors``, and a wave lasts as long as a program's tiles.
    """
    spans = [triton.cdiv(vocabulary_tiles, n) for n in range(1, min(vocabulary_tiles, processors, limit) + 1)]
    lasts = [triton.cdiv(token_tiles * triton.cdiv(vocabulary_tiles, span), processors) * span for span in spans]
    return next(span for span, last in zip(spans, lasts, strict=True) if last <= 1.05 * min(lasts))
