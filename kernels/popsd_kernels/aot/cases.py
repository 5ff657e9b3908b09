"""What is compiled ahead of time: the main path, one case for every flag, and every combination."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from popsd_kernels import checks, launch
from popsd_kernels.aot import streaming_cases
from popsd_kernels.launch import Launch, LaunchConfig
from popsd_kernels.rows import LogitTransform, RowOptions, RowStatistics
from popsd_kernels.sweeps import (
    difference,
    entry_masks,
    few_rows,
    loss_gradient,
    moments,
    row_slices,
    single_read,
    statistics,
)

VOCABULARY = 151936
ODD_VOCABULARY = 50257


@dataclass(frozen=True)
class Case:
    """One combination of compile-time flags. read_bytes: bytes that a loop step reads per vocabulary entry."""

    kernel: str
    flags: str
    read_bytes: int
    options: RowOptions
    dtype: torch.dtype = torch.float32
    vocabulary: int = VOCABULARY
    composed: bool = True
    bias: bool = False
    gradient: torch.dtype | None = torch.bfloat16
    center: bool = True
    phase: int = 0

    def config(self, architecture: str) -> LaunchConfig:
        key = loss_gradient.table_key(self.options) if self.kernel == "loss_gradient" else self.kernel
        return launch.TABLES[architecture][key]

    def launch(self, config: LaunchConfig, fast: bool) -> Launch:
        rows, v = 1024, self.vocabulary

        def rectangle(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, v, dtype=dtype, device="meta")

        meta = torch.device("meta")
        student, target, vector = rectangle(self.dtype), rectangle(self.dtype), torch.empty(rows, device="meta")
        bias = torch.empty(v, dtype=torch.bfloat16, device="meta") if self.bias else None
        if self.kernel == "statistics":
            delta = rectangle(torch.float32) if self.composed else None
            return statistics.plan(
                student, target, delta, vector if self.composed else None, bias, bias, self.options, delta,
                launch.result_rows(4, rows, meta), config, fast,
            )  # fmt: skip
        if self.kernel == "loss_gradient":
            return loss_gradient.plan(
                student, rectangle(torch.float32) if self.composed else target, RowStatistics(*[vector] * 4),
                bias, bias, self.options, self.composed, vector.long(), vector,
                None if self.gradient is None else rectangle(self.gradient),
                launch.result_rows(9, rows, meta), config, fast,
            )  # fmt: skip
        if self.kernel == "single_read":
            delta, offset = (rectangle(torch.float32), vector) if self.composed else (None, None)
            call = row_slices.SliceCall(
                student, target, delta, offset, vector.long(), vector,
                None if self.gradient is None else rectangle(self.gradient), launch.result_rows(13, rows, meta),
                row_slices.partials_for(student, config), self.options, config, fast, bias, bias,
            )  # fmt: skip
            if self.phase:
                return few_rows.plan(call, self.phase)
            counters = torch.empty(rows, 2, dtype=torch.int32, device=meta)
            return single_read.plan(
                call, counters, 1, single_read.register_bound(self.options, config) if fast else None
            )
        if self.kernel == "moments":
            own, delta = (None, rectangle(torch.float32)) if self.composed else (target, None)
            return moments.plan(
                student, target, own, delta, bias, bias, self.options, not self.composed,
                launch.result_rows(moments.MOMENTS, rows, meta), config, fast,
            )  # fmt: skip
        if self.kernel == "masks":
            tail = None if self.composed else target
            if self.phase == 0:
                floors = (-2.3, None if tail is None else -4.6)
                thresholds = launch.result_rows(3, rows, meta)
                return entry_masks.plan_thresholds(
                    (student, tail, tail), bias, self.options, floors, thresholds, config, fast
                )
            return entry_masks.plan_masks(
                rectangle(torch.float32), vector, launch.result_rows(3, rows, meta), student, tail, bias, self.options,
                None if tail is None else 0.1, config, fast,
            )  # fmt: skip
        out = rectangle(torch.float32)
        return difference.plan(student, target, out, bias, self.options, self.center, vector, config, fast)


PLAIN = RowOptions()
CAPPED = LogitTransform(softcap=30.0)
SOFTCAP = replace(PLAIN, student=CAPPED, target=CAPPED)
CLIPPED = replace(PLAIN, entry_clip=0.05, token_clip=1.0)


class AnyCase(Protocol):
    """What the report asks of a case: here, and in streaming_cases.py. read_bytes 0: entries of its loops not counted."""

    @property
    def kernel(self) -> str: ...
    @property
    def flags(self) -> str: ...
    @property
    def read_bytes(self) -> int: ...
    def config(self, architecture: str) -> Any: ...
    def launch(self, config: Any, fast: bool) -> Launch: ...


def shipped_cases() -> list[AnyCase]:
    """The main path, and one case for every flag: what continuous integration compiles."""
    forward, reverse = replace(PLAIN, beta=0.0), replace(PLAIN, beta=1.0)
    small, large = replace(PLAIN, beta=0.01), replace(PLAIN, beta=0.99)
    return [
        Case("statistics", "purified", 12, PLAIN),
        Case("statistics", "two distributions, bf16", 4, PLAIN, torch.bfloat16, composed=False),
        Case("statistics", "purified, no clip, softcap, bias, odd V", 16, replace(SOFTCAP, pmi_clip=None),
             vocabulary=ODD_VOCABULARY, bias=True),
        Case("loss_gradient", "forward KL", 8, forward),
        Case("loss_gradient", "reverse KL", 8, reverse),
        Case("loss_gradient", "JSD", 8, PLAIN),
        Case("loss_gradient", "JSD, no gradient", 8, PLAIN, gradient=None),
        Case("loss_gradient", "JSD, both clips, softcap, bias, raw target, bf16", 8, replace(CLIPPED, student=CAPPED),
             torch.bfloat16, composed=False, bias=True),
        Case("loss_gradient", "forward KL, both clips", 8, replace(CLIPPED, beta=0.0)),
        Case("loss_gradient", "reverse KL, both clips, float32", 8, replace(CLIPPED, beta=1.0), gradient=torch.float32),
        Case("loss_gradient", "JSD, small beta", 8, small),
        Case("loss_gradient", "JSD, large beta", 8, large),
        Case("loss_gradient", "JSD, large beta, both clips, softcap, bias, two", 8,
             replace(CLIPPED, beta=0.99, student=CAPPED), torch.bfloat16, composed=False, bias=True),
        Case("single_read", "JSD", 12, PLAIN),
        Case("single_read", "JSD, large beta", 12, large),
        Case("single_read", "forward KL", 12, forward),
        Case("single_read", "reverse KL", 12, reverse),
        Case("single_read", "forward KL, both clips, softcap", 12, replace(SOFTCAP, beta=0.0, entry_clip=0.05, token_clip=1.0)),
        *(Case("single_read", f"split, JSD, launch {phase}", 12, PLAIN, phase=phase) for phase in (1, 2, 3)),
        *(Case("single_read", f"split, two, both clips, bias, launch {phase}", 12, replace(CLIPPED, student=CAPPED),
               torch.bfloat16, ODD_VOCABULARY, False, True, phase=phase) for phase in (1, 2, 3)),
        Case("single_read", "split, forward KL, no gradient, launch 3", 12, forward, gradient=None, phase=3),
        Case("statistics", "relative", 12, replace(PLAIN, relative=True)),
        Case("loss_gradient", "relative, forward KL, float32", 8, replace(forward, relative=True), gradient=torch.float32),
        Case("loss_gradient", "relative, JSD, two, float32", 8, replace(PLAIN, relative=True), composed=False,
             gradient=torch.float32),
        Case("moments", "teacher as a difference", 12, PLAIN),
        Case("moments", "relative", 12, replace(PLAIN, relative=True)),
        Case("moments", "teacher apart, softcap", 12, SOFTCAP, composed=False),
        Case("moments", "masked, softcap, bias, bf16, odd V", 6, SOFTCAP, torch.bfloat16, ODD_VOCABULARY, False, True),
        *(Case("masks", f"plausibility, launch {k + 1}", (4, 8)[k], PLAIN, phase=k) for k in (0, 1)),
        *(Case("masks", f"both, softcap, bias, bf16, odd V, launch {k + 1}", (2, 8)[k], SOFTCAP, torch.bfloat16,
               ODD_VOCABULARY, False, True, phase=k) for k in (0, 1)),
        Case("difference", "center, softcap", 8, SOFTCAP),
        Case("difference", "log-sum-exp", 8, PLAIN, center=False),
        *streaming_cases.cases(),
    ]  # fmt: skip


def all_cases() -> Iterator[Case]:
    """Every dtype, vocabulary and transform with every kernel, and every combination of sweep 2's flags: 240 cases,
    minutes per architecture."""
    for dtype, v, transformed in itertools.product(checks.FLOATING, (VOCABULARY, ODD_VOCABULARY), (False, True)):
        base = SOFTCAP if transformed else PLAIN
        size = torch.empty(0, dtype=dtype).element_size()
        label = f"{dtype}, V={v}{', softcap, bias' * transformed}".replace("torch.", "")
        for composed, clip in ((False, 10.0), (True, 10.0), (True, None)):
            name = f"{label}, {'purified' if composed else 'two distributions'}{', no clip' * (clip is None)}"
            read = 2 * size + 4 * composed + 4 * transformed
            yield Case("statistics", name, read, replace(base, pmi_clip=clip), dtype, v, composed, transformed)
        for beta in (0.0, 0.5, 1.0):
            read = size + 4 + 2 * transformed
            yield Case(
                "loss_gradient", f"{label}, beta={beta}", read, replace(base, beta=beta), dtype, v, bias=transformed
            )
        for center in (True, False):
            read = 2 * size + 2 * transformed
            yield Case("difference", f"{label}, center={center}", read, base, dtype, v, bias=transformed, center=center)
    for beta, composed, gradient, entry, token, transformed in itertools.product(
        (0.0, 0.5, 1.0), (True, False), (None, torch.bfloat16, torch.float32), (None, 0.05), (None, 1.0), (False, True)
    ):
        options = replace(SOFTCAP if transformed else PLAIN, beta=beta, entry_clip=entry, token_clip=token)
        name = (
            f"beta={beta}, composed={composed}, gradient={gradient}, clips={entry},{token}{', softcap' * transformed}"
        )
        yield Case("loss_gradient", name, 8, options, composed=composed, gradient=gradient)
