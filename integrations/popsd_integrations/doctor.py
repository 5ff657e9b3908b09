"""``popsd doctor``: what is installed, which backend would compute, and whether it is right. For bug reports."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import popsd
from popsd.config import Impl
from popsd.engine.backends import resolve_impl
from popsd.engine.workspace import CPU_WORKSPACE_MIB, GPU_WORKSPACE_MIB
from popsd.testing import make_head, make_hidden, relative_l2, true_purified

PEERS = ("liger-kernel", "orda-kernel")
VARIABLES = (
    "TRITON_INTERPRET",
    "POPSD_KERNELS_PORTABLE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
MAX_ERROR = 2e-5
"""Relative L2 of loss and gradient in float32 against float64, as the tests demand."""
MIB = 2**20


class Line(NamedTuple):
    """A line of the report. problem: popsd would not work, or not as intended. It makes the exit status 1."""

    name: str
    value: str
    problem: bool = False


def run() -> int:
    """Print the report. Returns 1 where a line is a problem, otherwise 0."""
    lines = examine()
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:<{width}}  {'PROBLEM: ' if line.problem else ''}{line.value}")
    problems = sum(line.problem for line in lines)
    print(f"\n{problems} problem(s)." if problems else "\nNo problems.")
    return int(problems > 0)


def examine() -> list[Line]:
    device_lines = [line for device in devices() for line in _device(device)]
    return [*_platform(), *packages(), *_triton(), *device_lines]


def devices() -> list[torch.device]:
    """The CPU, and every accelerator that torch sees."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found + ([torch.device("mps")] if torch.backends.mps.is_available() else [])


def _platform() -> list[Line]:
    versions = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    built = next((f"{name} {version}" for name, version in versions.items() if version), "CPU only")
    return [
        Line("popsd", f"{popsd.__version__}, {os.path.dirname(popsd.__file__)}"),
        Line("python", f"{platform.python_version()}, {sys.executable}"),
        Line("platform", f"{platform.platform()}, {os.cpu_count()} cores"),
        Line("torch build", f"{built}, {torch.get_num_threads()} threads"),
        *(Line(name, os.environ[name]) for name in VARIABLES if name in os.environ),
    ]


_OF_DEVELOPERS = ("test", "docs", "dev")
"""Extras that nobody needs to use popsd."""


def packages() -> list[Line]:
    """The installed versions of what popsd and its extras for users require, then of the peers it is compared with."""
    try:
        wanted = metadata.requires("popsd") or []
    except metadata.PackageNotFoundError:
        return [Line("packages", "popsd is not installed but run from its sources: no versions to check")]
    lines: dict[str, Line] = {}
    absent: dict[str, list[str]] = {}
    for text in wanted:
        requirement, _, marker = text.partition(";")
        name = re.split(r"[^\w.-]", requirement.strip())[0]
        extra, version = re.search(r"extra == ['\"](\w+)", marker), _version(name)
        if extra and extra[1] in _OF_DEVELOPERS:
            continue
        if version is not None:
            fits = within(version, requirement)
            lines[name] = Line(name, version if fits else f"{version}; popsd needs {requirement.strip()}", not fits)
        elif extra:
            absent.setdefault(extra[1], []).append(name)
        else:
            lines[name] = Line(name, f"missing: pip install '{requirement.strip()}'", True)
    for extra_name, names in absent.items():
        text = f"missing {', '.join(names)}: pip install 'popsd[{extra_name}]'"
        lines[f"extra {extra_name}"] = Line(f"extra [{extra_name}]", text)
    for peer in PEERS:
        lines[peer] = Line(peer, _version(peer) or f"missing: pip install {peer} to measure beside it")
    return list(lines.values())


def within(version: str, requirement: str) -> bool:
    """Whether the release is within a requirement such as ``trl>=1.12,<1.17``. Only >= and < are understood."""

    def release(text: str) -> list[int]:
        numbers = [int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split(".")]  # type: ignore[index]
        return numbers + [0] * (4 - len(numbers))

    bounds = re.findall(r"(>=|<)\s*([\d.]+)", requirement)
    return all(
        release(version) >= release(bound) if sign == ">=" else release(version) < release(bound)
        for sign, bound in bounds
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _triton() -> list[Line]:
    if find_spec("triton") is None:
        return [Line("kernels", "no Triton: the torch backend computes", torch.cuda.is_available())]
    try:
        launch = importlib.import_module("popsd_kernels.launch")
    except Exception as error:
        return [Line("kernels", f"cannot be imported: {type(error).__name__}: {error}", True)]
    if not launch.INTERPRETED:
        return [Line("kernels", "compiled by Triton; the interpreter is off")]
    slow = torch.cuda.is_available()
    advice = "; unset TRITON_INTERPRET, or every kernel runs in Python" if slow else ", for tests"
    return [Line("kernels", f"Triton's interpreter is on (TRITON_INTERPRET){advice}", slow)]


def _device(device: torch.device) -> list[Line]:
    impl = resolve_impl(Impl.AUTO, device)
    name = str(device)
    return [
        Line(name, _description(device)),
        Line(f"{name} impl=auto", f"{impl}: {_reason(device, impl)}"),
        workspace(name, *_memory(device), GPU_WORKSPACE_MIB if device.type != "cpu" else CPU_WORKSPACE_MIB),
        _check(device),
    ]


def _description(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.processor() or platform.machine()
    found = torch.cuda.get_device_properties(device)
    table = ""
    if find_spec("triton") is not None:
        table = f", launch table {importlib.import_module('popsd_kernels.launch').architecture(device)}"
    return f"{found.name}, {found.multi_processor_count} multiprocessors, capability {found.major}.{found.minor}{table}"


def _reason(device: torch.device, impl: Impl) -> str:
    if impl is Impl.TRITON:
        return "a GPU, and Triton is installed"
    return "a GPU, but no Triton: pip install triton" if device.type == "cuda" else f"Triton drives no {device.type}"


def _memory(device: torch.device) -> tuple[float, float]:
    """Available and total MiB, NaN where they are unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / MIB, total / MIB
    try:
        kib = dict(
            re.findall(r"(MemAvailable|MemTotal):\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        )
        return int(kib["MemAvailable"]) / 1024, int(kib["MemTotal"]) / 1024
    except (OSError, KeyError):
        return float("nan"), float("nan")


def workspace(name: str, free: float, total: float, default: float) -> Line:
    """Whether the default workspace fits into the memory that is free now. An unknown amount (NaN) is no problem."""
    text = f"default {default:.0f} MiB per call; {free:.0f} of {total:.0f} MiB available"
    if free < default:
        return Line(f"{name} workspace", f"{text}: pass workspace_mib={max(free / 2, 1):.0f} or less", True)
    return Line(f"{name} workspace", text)


def _check(device: torch.device) -> Line:
    """A small loss and its gradient by the backend that impl="auto" picks, compared with float64."""
    name = f"{device} check"
    try:
        hidden, head, config = make_hidden(33, 64, 0.3), make_head(1009, 64), popsd.PurifiedConfig()
        truth = true_purified(hidden, (head, head), config, torch.ones(33))
        moved = popsd.HiddenStates(*(x.to(device) for x in hidden if x is not None))
        student = moved.student.requires_grad_()
        loss = popsd.linear_purified_jsd(moved, popsd.Head(head.weight.to(device)), config=config).loss
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        worst = max(relative_l2(loss.cpu(), truth.loss), relative_l2(gradient.cpu(), truth.dhidden))
    except Exception as error:  # what a broken installation raises is what the report is for
        return Line(name, f"{type(error).__name__}: {error}", True)
    return Line(name, f"loss and gradient within {worst:.1e} of float64 (allowed {MAX_ERROR:.0e})", worst > MAX_ERROR)
