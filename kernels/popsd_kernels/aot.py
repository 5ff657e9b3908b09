"""``python -m popsd_kernels.aot``: compiles the shipped kernels for GPUs that are not there, and reports what came out.

The launchers' own argument builders run on meta tensors under a stand-in driver: what is compiled is what is shipped.
Prints registers, spill instructions, shared memory, programs per multiprocessor, SASS instructions per vocabulary entry
of each inner loop, and whether matrix units are used (a row sweep uses none). Exits with 1 on any spill, on shared
memory above the device's limit, and on more than 1,024 threads. Needs Triton, neither a GPU nor its driver.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget

from popsd_kernels import (
    decomposition,
    difference,
    few_rows,
    launch,
    loss_gradient,
    masks,
    row_slices,
    single_read,
    statistics,
    streaming_aot,
)
from popsd_kernels.launch import Launch, LaunchConfig
from popsd_kernels.options import LogitTransform, RowOptions, RowStatistics

VOCABULARY = 151936
ODD_VOCABULARY = 50257


@dataclass(frozen=True)
class Device:
    """shared_limit: bytes one program may use. registers: per multiprocessor (NVIDIA) or per SIMD lane (AMD)."""

    target: GPUTarget
    shared_limit: int
    max_threads_per_sm: int


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 166912, 2048),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 232448, 2048),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 232448, 2048),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 101376, 1536),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 65536, 2048),
}


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
            return decomposition.plan(
                student, target, own, delta, bias, bias, self.options, not self.composed,
                launch.result_rows(decomposition.MOMENTS, rows, meta), config, fast,
            )  # fmt: skip
        if self.kernel == "masks":
            tail = None if self.composed else target
            if self.phase == 0:
                floors = (-2.3, None if tail is None else -4.6)
                thresholds = launch.result_rows(3, rows, meta)
                return masks.plan_thresholds(
                    (student, tail, tail), bias, self.options, floors, thresholds, config, fast
                )
            return masks.plan_masks(
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
    """What the report asks of a case: here, and in streaming_aot.py. read_bytes 0: entries of its loops not counted."""

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
        Case("single_read", "JSD", 12, PLAIN),
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
        *streaming_aot.cases(),
    ]  # fmt: skip


def all_cases() -> Iterator[Case]:
    """Every dtype, vocabulary and transform with every kernel, and every combination of sweep 2's flags: 240 cases,
    minutes per architecture."""
    for dtype, v, transformed in itertools.product(launch.FLOATING, (VOCABULARY, ODD_VOCABULARY), (False, True)):
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


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    registers: int
    spills: int
    shared: int
    threads: int
    instructions: tuple[float, ...]
    matrix_units: bool


class _AbsentGPU:
    """Stands in for Triton's driver: names a target, owns no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: AnyCase, architecture: str, config: Any = None, fast: bool = True) -> Report:
    """Compiles one case for one architecture, with the shipped configuration unless told otherwise."""
    device = DEVICES[architecture]
    nvidia = device.target.backend == "cuda"
    planned = case.launch(config or case.config(architecture), fast and nvidia)
    select_target(architecture, planned.kernel)
    compiled = planned.compile()
    threads = planned.config.num_warps * device.target.warp_size
    if nvidia:
        registers, spills, loops, matrix = _inspect_cubin(compiled.asm["cubin"], case.read_bytes)
    else:
        registers, spills, loops, matrix = _inspect_gcn(compiled.asm["amdgcn"])
    return Report(registers, spills, compiled.metadata.shared, threads, loops, matrix)


def select_target(architecture: str, kernel: Any) -> None:
    """Makes Triton compile for ``architecture``; kernels already compiled for another one are forgotten."""
    triton.runtime.driver.set_active(_AbsentGPU(DEVICES[architecture].target))
    kernel.device_caches.clear()


def problems(report: Report, device: Device) -> list[str]:
    """Why this would not launch, or would run badly."""
    found = []
    if report.spills:
        found.append(f"{report.spills} spill instructions")
    if report.shared > device.shared_limit:
        found.append(f"{report.shared} B of shared memory, limit {device.shared_limit}")
    if report.threads > 1024:
        found.append(f"{report.threads} threads, limit 1024")
    if device.target.backend == "cuda" and report.registers * report.threads > 65536:
        found.append(f"{report.registers} registers x {report.threads} threads, limit 65536")
    return found


def _inspect_cubin(cubin: bytes, read_bytes: int) -> tuple[int, int, tuple[float, ...], bool]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (_cuobjdump(path, option) for option in ("--dump-resource-usage", "-sass"))
    found = re.search(r"REG:(\d+)", usage)
    lines = [(int(a, 16), text) for a, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass, re.MULTILINE)]
    if found is None or not lines:
        raise RuntimeError(f"cuobjdump gave no register count or no SASS: {usage[:200]!r}")
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", text)) for _, text in lines)
    matrix = bool(re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA|QGMMA)\b", sass))
    return int(found[1]), spills, _loop_costs(lines, read_bytes), matrix


def _loop_costs(lines: list[tuple[int, str]], read_bytes: int) -> tuple[float, ...]:
    """Instructions per vocabulary entry of each loop that reads memory and computes: the compiler may have unrolled it,
    so entries are counted by the bytes that a pass through the loop loads."""
    costs: list[float] = []
    if not read_bytes:
        return ()
    for address, text in lines:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) >= address:
            continue
        body = [t for a, t in lines if int(branch[1], 16) <= a <= address]
        loaded = sum(_loaded_bytes(t) for t in body)
        if loaded and any("MUFU" in t for t in body):
            costs.append(round(len(body) * read_bytes / loaded, 1))
    return tuple(costs)


def _loaded_bytes(instruction: str) -> int:
    found = re.search(r"\bLDG\.E(\S*)", instruction)
    if found is None:
        return 0
    for suffix, size in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if suffix in found[1]:
            return size
    return 4


def _inspect_gcn(assembly: str) -> tuple[int, int, tuple[float, ...], bool]:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no .{name} in the compiled kernel's metadata")
        return int(found[1])

    return metadata("vgpr_count"), metadata("vgpr_spill_count") + metadata("sgpr_spill_count"), (), "v_mfma" in assembly


def _cuobjdump(path: Path, option: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m popsd_kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=sorted(DEVICES), default=sorted(DEVICES), metavar="ARCH")
    parser.add_argument("--all", action="store_true", help="240 flag combinations, not one per flag (minutes)")
    kernels = sorted({case.kernel for case in shipped_cases()})
    parser.add_argument("--kernel", choices=kernels, help="only this kernel")
    parser.add_argument("--config", metavar="BLOCK,VEC,WARPS", help="these sizes instead of the shipped ones")
    parser.add_argument("--portable", action="store_true", help="without the approximate NVIDIA instructions")
    arguments = parser.parse_args(argv)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels cannot be compiled in this process; unset it")
    config = LaunchConfig(*map(int, arguments.config.split(","))) if arguments.config else None
    failures = 0
    print(f"Triton {triton.__version__}; registers and loops per thread; not yet run on a GPU")
    for architecture in arguments.arch:
        device = DEVICES[architecture]
        for case in all_cases() if arguments.all else shipped_cases():
            if arguments.kernel not in (None, case.kernel):
                continue
            report = compile_case(case, architecture, config, fast=not arguments.portable)
            found = problems(report, device)
            failures += bool(found)
            print(_line(architecture, case, report, device), *(f"  FAIL: {problem}" for problem in found), flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


def _line(architecture: str, case: AnyCase, report: Report, device: Device) -> str:
    programs = "-"
    if device.target.backend == "cuda":
        per_warp = (report.registers * 32 + 255) // 256 * 256
        programs = str(min(device.max_threads_per_sm // report.threads, 65536 // per_warp // (report.threads // 32)))
    loops = " + ".join(str(cost) for cost in report.instructions) or "-"
    matrix = "yes" if report.matrix_units else "no"
    return (
        f"{architecture:7} {case.kernel:14} {case.flags:52} regs {report.registers:3}  spills {report.spills}  "
        f"shared {report.shared:5}  programs/SM {programs:2}  instructions/entry {loops:12}  matrix units {matrix}"
    )


if __name__ == "__main__":
    sys.exit(main())
