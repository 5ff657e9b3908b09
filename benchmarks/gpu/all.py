"""Everything that needs a GPU, in one command and a given time: is it right, what should the tables say, how fast is it.

    python benchmarks/gpu/all.py --out results                                   # 9 minutes
    python benchmarks/gpu/all.py --out results --parts table,step --minutes 5    # goes on

Each part is a script of its own with its share of the time; one that fails, or is stopped at its end, leaves in the folder
what it has measured, and the next one begins. Needs torch and Triton; the training step transformers and peft too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [ROOT, ROOT / "kernels", ROOT / "integrations", ROOT / "benchmarks"]


class Part(NamedTuple):
    """share: of the whole time, at most. command: its first word is a program, the rest its arguments."""

    name: str
    share: float
    command: list[str]


def parts(out: Path, seconds: float) -> list[Part]:
    """In the order in which they matter: what is wrong need not be fast."""

    def script(name: str, path: str, flag: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "benchmarks" / path), flag, str(out / f"{name}.json"), *arguments]

    small = ["--processes", "1", "--tokens", "4", "--vocab", "1031", "--width", "64", "--only", "torch.bfloat16"]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    real = ["--device", "cuda", "--n", "8192", "--vocab", "151936", "--width", "4096", "--dtype", "bfloat16"]
    return [
        Part("check", 0.35, script("check", "gpu/check.py", "--out")),
        Part("memcheck", 0.1, [*memcheck, *script("memcheck", "gpu/check.py", "--out", *small)]),
        Part("tune", 0.2, script("tune", "gpu/tune.py", "--out")),
        Part("table", 0.3, script("table", "gpu/run.py", "--out", "--seconds", str(round(0.27 * seconds)))),
        Part("diagnostics", 0.1, script("diagnostics", "diagnostics.py", "--json", *real, "--repeats", "7")),
        Part("step", 0.15, script("step", "train_step.py", "--json", "--device", "cuda", "--rounds", "5")),
    ]


def run(part: Part, log: Path, seconds: float) -> str:
    """Runs it for at most so long, output at the end of ``log``; how it ended, in a few words."""
    if shutil.which(part.command[0]) is None:
        return f"left out: no {part.command[0]}"
    paths = os.pathsep.join(map(str, [*IMPORTED, os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as stream:
        process = subprocess.Popen(
            part.command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"exit status {code}"


def main(arguments: list[str] | None = None) -> int:
    names = [part.name for part in parts(Path(), 0.0)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (%(default)s)")
    parser.add_argument("--parts", default=",".join(names), help="comma-separated, run in this order (%(default)s)")
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--parts: expected some of {names}; got {sorted(unknown)}.")
    if not torch.cuda.is_available():
        parser.error("expected a GPU that torch sees; got none. Each script runs by itself, some of them on CPU.")
    options.out.mkdir(parents=True, exist_ok=True)
    seconds, start = 60.0 * options.minutes, time.monotonic()
    every = {part.name: part for part in parts(options.out, seconds)}
    total, failed, log = sum(every[name].share for name in wanted), 0, options.out / "log.txt"
    for name in wanted:
        began, before = time.monotonic(), log.stat().st_size if log.exists() else 0
        share = min(every[name].share / min(total, 1.0) * seconds, start + seconds - began)
        ended = run(every[name], log, share) if share > 0 else "left out: no time"
        failed += ended != "done"
        print(f"== {name}: {ended}, {time.monotonic() - began:.0f} s", flush=True)
        if log.exists():
            print("\n".join(log.read_bytes()[before:].decode(errors="replace").splitlines()[-12:]), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
