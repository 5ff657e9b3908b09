"""What is compiled ahead of time: the main path, one case for every flag, and every combination."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from popsd_kernels import checks, launch
from popsd_kernels.aot import streaming_cases
from popsd_kernels.device.targets import arithmetic_mix_logit
from popsd_kernels.launch import Launch, LaunchConfig, Outputs
from popsd_kernels.rows import (
    SHARD_MOMENTS,
    Composed,
    EntryMasks,
    LogitTransform,
    RowLoss,
    RowOptions,
    Rows,
    RowStatistics,
)
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

TOKENS = 1024
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
    device_function: bool = False

    def config(self, architecture: str) -> LaunchConfig:
        key = loss_gradient.table_key(self.options) if self.kernel == "loss_gradient" else self.kernel
        return launch.TABLES[architecture][key]

    def launch(self, config: LaunchConfig, fast: bool) -> Launch:
        options = self.options

        def results(count: int) -> torch.Tensor:
            return launch.result_rows(count, TOKENS, torch.device("meta"))

        def outputs(count: int, matrix: torch.dtype | None) -> Outputs:
            return Outputs(results(count), None if matrix is None else self._matrix(matrix))

        rows, losses = self._rows(), len(RowLoss._fields)
        if self.kernel == "statistics":
            made = outputs(len(RowStatistics._fields), torch.float32 if self.composed else None)
            return statistics.plan(rows, options, made, config, fast)
        if self.kernel == "loss_gradient":
            if self.composed:
                rows = rows.with_target(self._matrix(torch.float32))
            normalisers = RowStatistics(*[torch.empty(TOKENS, device="meta")] * len(RowStatistics._fields))
            return loss_gradient.plan(rows, normalisers, options, outputs(losses, self.gradient), config, fast)
        if self.kernel == "single_read":
            made, partials = outputs(row_slices.RESULTS, self.gradient), row_slices.partials_for(rows, config)
            call = row_slices.SliceCall(rows, options, made, partials, config, fast)
            if self.phase:
                return few_rows.plan(call, self.phase)
            counters = torch.empty(TOKENS, 2, dtype=torch.int32, device="meta")
            registers = single_read.register_bound(options, config) if fast else None
            return single_read.plan(call, counters, 1, registers)
        frozen = self._matrix(self.dtype)
        if self.kernel == "moments":
            rows = rows._replace(reference=frozen, teacher=None if self.composed else frozen)
            return moments.plan(rows, options, not self.composed, outputs(SHARD_MOMENTS, None), config, fast)
        rows = rows._replace(base=frozen, teacher=frozen, reference=frozen)
        if self.kernel == "masks":
            masks = EntryMasks(0.1) if self.composed else EntryMasks(0.1, 0.01, 0.1)
            thresholds = results(len(entry_masks.Thresholds._fields))
            if self.phase == 0:
                return entry_masks.plan_thresholds(rows, masks, options, Outputs(thresholds), config, fast)
            rows = rows._replace(difference=self._matrix(torch.float32), offset=torch.empty(TOKENS, device="meta"))
            return entry_masks.plan_masks(rows, thresholds, masks, options, config, fast)
        return difference.plan(rows, options, self.center, outputs(1, torch.float32), config, fast)

    def _rows(self) -> Rows:
        vector = torch.empty(TOKENS, device="meta")
        bias = torch.empty(self.vocabulary, dtype=torch.bfloat16, device="meta") if self.bias else None
        rows = Rows(
            self._matrix(self.dtype), student_bias=bias, frozen_bias=bias, token_ids=vector.long(), row_scale=vector
        )  # fmt: skip
        frozen = self._matrix(self.dtype)
        if self.device_function:
            place = self._matrix(torch.float32)
            mix = Composed(arithmetic_mix_logit, (0.3,), torch.empty(TOKENS, 3, device="meta"), place)
            return rows._replace(base=frozen, teacher=place, reference=place, composed=mix)
        if self.composed:
            return rows._replace(base=frozen, difference=self._matrix(torch.float32), offset=vector)
        return rows._replace(target=frozen)

    def _matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(TOKENS, self.vocabulary, dtype=dtype, device="meta")


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
    renyi = replace(PLAIN, beta=0.0, renyi=0.95)
    return [
        Case("statistics", "purified", 12, PLAIN),
        Case("statistics", "two distributions, bf16", 4, PLAIN, torch.bfloat16, composed=False),
        Case("statistics", "purified, no clip, softcap, bias, odd V", 16, replace(SOFTCAP, pmi_clip=None),
             vocabulary=ODD_VOCABULARY, bias=True),
        Case("statistics", "device function", 12, PLAIN, device_function=True),
        Case("statistics", "device function, softcap, bias, bf16, odd V", 10, SOFTCAP, torch.bfloat16, ODD_VOCABULARY,
             bias=True, device_function=True),
        *(Case("single_read", f"split, device function, launch {phase}", 12, PLAIN, phase=phase, device_function=True)
          for phase in (1, 2, 3)),
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
        Case("loss_gradient", "Rényi", 8, renyi),
        *(Case("single_read", f"split, Rényi, launch {phase}", 12, renyi, phase=phase) for phase in (2, 3)),
        Case("single_read", "JSD", 12, PLAIN),
        Case("single_read", "JSD, large beta", 12, large),
        Case("single_read", "forward KL", 12, forward),
        Case("single_read", "reverse KL", 12, reverse),
        Case("single_read", "forward KL, both clips, softcap", 12, replace(SOFTCAP, beta=0.0, entry_clip=0.05, token_clip=1.0)),
        *(Case("single_read", f"split, JSD, launch {phase}", 12, PLAIN, phase=phase) for phase in (1, 2, 3)),
        *(Case("single_read", f"split, two, both clips, bias, launch {phase}", 12, replace(CLIPPED, student=CAPPED),
               torch.bfloat16, ODD_VOCABULARY, False, True, phase=phase) for phase in (1, 2, 3)),
        Case("single_read", "split, forward KL, no gradient, launch 3", 12, forward, gradient=None, phase=3),
        Case("statistics", "minus student", 12, replace(PLAIN, minus_student=True)),
        Case("loss_gradient", "minus student, forward KL, float32", 8, replace(forward, minus_student=True),
             gradient=torch.float32),
        Case("loss_gradient", "minus student, JSD, two, float32", 8, replace(PLAIN, minus_student=True), composed=False,
             gradient=torch.float32),
        Case("moments", "teacher as a difference", 12, PLAIN),
        Case("moments", "minus student", 12, replace(PLAIN, minus_student=True)),
        Case("moments", "teacher projected, softcap", 12, SOFTCAP, composed=False),
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
