"""Compiles a case for a GPU that is not there, and reports what came out.

The launchers' own argument builders run on meta tensors under a stand-in driver: what is compiled is what is shipped.
Needs Triton, neither a GPU nor its driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from popsd_kernels.aot.cases import AnyCase


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
CODE = {
    "cuda": ("ttir", "ttgir", "llir", "ptx", "sass", "cubin"),
    "hip": ("ttir", "ttgir", "llir", "amdgcn", "hsaco"),
}
"""Kinds of code that a backend of Triton leaves, from Triton's own to the machine's."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. instructions: per vocabulary entry, of each inner loop."""

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


def compile_case(
    case: AnyCase, architecture: str, config: Any = None, fast: bool = True
) -> tuple[Report, dict[str, str | bytes]]:
    """Compiles one case for one architecture, with the shipped configuration unless told otherwise; the code by kind."""
    device = DEVICES[architecture]
    nvidia = device.target.backend == "cuda"
    planned = case.launch(config or case.config(architecture), fast and nvidia)
    select_target(architecture, planned.kernel)
    compiled = planned.compile()
    threads = planned.config.num_warps * device.target.warp_size
    code = {kind: compiled.asm[kind] for kind in CODE[device.target.backend] if kind != "sass"}
    if nvidia:
        usage, code["sass"] = _disassembled(code["cubin"])
        registers, spills, loops, matrix = _inspect_sass(usage, code["sass"], case.read_bytes)
    else:
        registers, spills, loops, matrix = _inspect_gcn(code["amdgcn"])
    return Report(registers, spills, compiled.metadata.shared, threads, loops, matrix), code


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


def programs_per_sm(report: Report, device: Device) -> int | None:
    """How many programs a multiprocessor of NVIDIA holds at once, by threads and registers."""
    if device.target.backend != "cuda":
        return None
    per_warp = (report.registers * 32 + 255) // 256 * 256
    return min(device.max_threads_per_sm // report.threads, 65536 // per_warp // (report.threads // 32))


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Its resource usage and its SASS."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _cuobjdump(path, "--dump-resource-usage"), _cuobjdump(path, "-sass")


def _inspect_sass(usage: str, sass: str, read_bytes: int) -> tuple[int, int, tuple[float, ...], bool]:
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

    spills = metadata("vgpr_spill_count")
    # without private memory, scalar registers went to lanes of a vector register
    if metadata("private_segment_fixed_size"):
        spills += metadata("sgpr_spill_count")
    return metadata("vgpr_count"), spills, (), "v_mfma" in assembly


def _cuobjdump(path: Path, option: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
