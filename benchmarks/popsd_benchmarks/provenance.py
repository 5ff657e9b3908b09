"""Where figures come from: versions, device, commit (POPSD_COMMIT, where the source has no repository), command, date, load."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import torch

import popsd
from popsd_benchmarks.results import Results

PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "orda-kernel", "numpy")


def describe(device: str) -> dict[str, Any]:
    """The ``meta`` of results measured now."""
    return {
        "versions": _versions(),
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "commit": os.environ.get("POPSD_COMMIT") or _commit(),
        "command": shlex.join(["python", *_arguments()]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


def continued(results: Results, now: dict[str, Any]) -> Results:
    """``results`` with this session noted. Raises ValueError where its cells would not compare with new ones."""
    for name in ("versions", "device", "threads"):
        if results.meta.get(name) != now[name]:
            raise ValueError(
                f"out: expected a results file measured with {name} {now[name]}; got one with {results.meta.get(name)}. "
                "Name another file, or delete this one."
            )
    session = {name: now[name] for name in ("commit", "command", "date", "load")}
    return Results(
        {**results.meta, "continued": [*results.meta.get("continued", []), session]}, results.cells, results.records
    )


def _versions() -> dict[str, str]:
    found = {"popsd": popsd.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    model = re.search(r"model name\s+: (.*)", path.read_text(encoding="utf-8")) if path.exists() else None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Of the source that runs, "+" where it has changes; None outside a repository."""
    git = ["git", "-C", str(Path(popsd.__file__).parent)]
    try:
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], stderr=DEVNULL)
        head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], stderr=DEVNULL, text=True)
        return head.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _arguments() -> list[str]:
    """As typed, less this machine's folders."""

    def shown(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name

    return list(map(shown, sys.orig_argv[1:]))
