"""``python -m popsd_kernels.aot``: compiles the shipped kernels for GPUs that are not there, and reports what came out.

The launchers' own argument builders run on meta tensors under a stand-in driver: what is compiled is what is shipped.
Prints registers, spill instructions, shared memory, programs per multiprocessor, SASS instructions per vocabulary entry
of each inner loop, and whether matrix units are used (a row sweep uses none). Exits with 1 on any spill, on shared
memory above the device's limit, and on more than 1,024 threads. Needs Triton, neither a GPU nor its driver.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from popsd_kernels import launch
from popsd_kernels.aot.cases import AnyCase, all_cases, shipped_cases
from popsd_kernels.launch import LaunchConfig


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

    spills = metadata("vgpr_spill_count")
    # without private memory, scalar registers went to lanes of a vector register
    if metadata("private_segment_fixed_size"):
        spills += metadata("sgpr_spill_count")
    return metadata("vgpr_count"), spills, (), "v_mfma" in assembly


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
