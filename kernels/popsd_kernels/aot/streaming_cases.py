"""The streaming kernels' cases for the ahead-of-time report: one per compile-time flag, as shipped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from popsd_kernels.launch import Launch
from popsd_kernels.rows import Heads, LogitTransform, RowOptions, Rows, RowStatistics
from popsd_kernels.streaming import plan
from popsd_kernels.streaming.plan import Call, TileConfig
from popsd_kernels.streaming.sums import SUMS, Scaling, Strip
from popsd_kernels.streaming.tiles import Extent

TOKENS, WIDTH, VOCABULARY, ODD_VOCABULARY = 1024, 4096, 151936, 50257


@dataclass(frozen=True)
class StreamCase:
    """One combination of compile-time flags. table: key of the tables; ``with_strip`` makes "sums" write the gradient
    too. A worst case has every option at once: biases, an odd vocabulary, a frozen head apart."""

    table: str
    flags: str
    options: RowOptions
    dtype: torch.dtype = torch.bfloat16
    with_strip: bool = False
    worst: bool = False
    read_bytes = 0

    @property
    def kernel(self) -> str:
        return f"stream_{self.table}"

    def config(self, architecture: str) -> TileConfig:
        return plan.TABLES[architecture][self.table, self.dtype.itemsize]

    def launch(self, config: TileConfig, fast: bool) -> Launch:
        v = ODD_VOCABULARY if self.worst else VOCABULARY
        tiles, step = triton.cdiv(v, config.vocabulary), 16
        hidden, head, vector = (
            self._empty(TOKENS, WIDTH),
            self._empty(v, WIDTH),
            self._empty(TOKENS, dtype=torch.float32),
        )
        bias = self._empty(v) if self.worst else None
        rows = Rows(
            hidden, base=hidden, difference=hidden, offset=vector, student_bias=bias, frozen_bias=bias,
            token_ids=vector.long(),
        )  # fmt: skip
        call = Call(rows, Heads(head, head if self.worst else None), self.options, fast)
        extent = Extent(TOKENS, 0, tiles, step)
        partial = self._empty(triton.cdiv(tiles, step), SUMS, TOKENS, dtype=torch.float32)
        if self.table == "statistics":
            return call.statistics(config, extent, partial)
        gradient = self._empty(TOKENS, step * config.vocabulary)
        strip: Strip | None = Strip(gradient, gradient.stride(0))
        sums = plan.parts(partial) if self.table == "sums" else None
        scaling: Scaling | None = Scaling(vector, vector)
        if sums is not None and not self.with_strip:
            strip = scaling = None
        statistics = RowStatistics(*[vector] * len(RowStatistics._fields))
        return call.accumulate(config, extent, statistics, scaling, sums, strip)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")


def cases() -> list[StreamCase]:
    plain, capped = RowOptions(), LogitTransform(softcap=30.0)
    worst = replace(plain, student=capped, target=capped, entry_clip=0.05, token_clip=1.0)
    forward = replace(plain, beta=0.0)
    found: list[StreamCase] = []
    for dtype in (torch.bfloat16, torch.float32):
        found += [
            StreamCase("statistics", f"purified, {dtype}", plain, dtype),
            StreamCase("statistics", f"every option, {dtype}", worst, dtype, worst=True),
            StreamCase("sums", f"JSD, {dtype}", plain, dtype),
            StreamCase("sums", f"JSD, every option, {dtype}", worst, dtype, worst=True),
            StreamCase("sums", f"forward KL in one pass, {dtype}", forward, dtype, with_strip=True),
            StreamCase(
                "sums", f"forward KL in one pass, every option, {dtype}",
                replace(forward, student=capped, target=capped), dtype, with_strip=True, worst=True,
            ),
            StreamCase("strip", f"JSD, {dtype}", plain, dtype),
            StreamCase("strip", f"JSD, small beta, {dtype}", replace(plain, beta=0.01), dtype),
            StreamCase("strip", f"JSD, every option, {dtype}", worst, dtype, worst=True),
            StreamCase("strip", f"reverse KL, {dtype}", replace(plain, beta=1.0), dtype),
            StreamCase("sums", f"Rényi, {dtype}", replace(forward, renyi=0.95), dtype),
            StreamCase("strip", f"Rényi, {dtype}", replace(forward, renyi=0.95), dtype),
        ]  # fmt: skip
    return found
