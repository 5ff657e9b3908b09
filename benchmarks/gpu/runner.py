"""A list of parts as a command: each in a process of its own with a time limit, everything known always in one file.

What a part measures it writes to the results file at once. One that crashes, hangs or runs out of memory costs itself
alone; one that leaves its process unusable is begun again without what broke it; a rerun takes up what is missing.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import UNUSABLE, Bench, Part, forked
from environment import ROOT
from predictions import comparison

from popsd_benchmarks.measure import FIRST_STEP
from popsd_benchmarks.results import FINISHED, Results, describe, load

ATTEMPTS = 3
LEAST_SECONDS = 5.0
LOG_BYTES = 4 << 20
DRY_SECONDS = 200.0
"""Limit of a part in a dry run: a busy CPU is no GPU."""
CASE_GIB = 8
"""Of device memory for a process of the correctness suite."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["measuring"])


def main(description: str, parts: Sequence[Part], arguments: Sequence[str] | None = None) -> int:
    """Exit status: how many parts are not done, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {part.name: part for part in parts}
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results; six files at most")
    add("--work", type=Path, help="folder that survives, where a rerun finds what is done (default: --out)")
    add("--parts", default=",".join(by_name), help="comma-separated, run in this order (%(default)s)")
    add("--seconds", type=float, help=f"for everything ({sum(part.seconds for part in parts):.0f})")
    add("--dry", action="store_true", help="every part on the CPU at a tiny size")
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    if unknown := [name for name in wanted if name not in by_name]:
        parser.error(f"--parts: expected some of {', '.join(by_name)}; got {', '.join(unknown)}.")
    if not options.dry and not torch.cuda.is_available():
        parser.error("expected a GPU that torch sees; got none. --dry runs every part on a CPU at a tiny size.")
    work = options.work or options.out
    for flag, folder in (("--out", options.out), ("--work", work)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"{flag}: expected a folder that can be written to; got {folder} ({error.strerror}).")
    try:
        session = Session(work, options.out, options.dry)
    except ValueError as error:  # what is there was measured elsewhere
        parser.error(f"--work: {error}")
    limits = {name: DRY_SECONDS if options.dry else by_name[name].seconds for name in wanted}
    end, left_over = time.monotonic() + (options.seconds or sum(limits.values())), 0
    for name, limit in limits.items():
        began = time.monotonic()
        ended = session.run(by_name[name], min(limit, end - began))
        left_over += ended != "done"
        print(f"== {name}: {ended}, {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(comparison(load(session.path))[:40]), flush=True)
    return left_over


class Session:
    """One run of a command: the results file in ``work``, a log beside it, both copied to ``out`` after every part."""

    def __init__(self, work: Path, out: Path, dry: bool) -> None:
        self.work, self.out, self.dry = work.resolve(), out.resolve(), dry
        if dry:  # at tiny sizes, threads wait for one another
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
        self.card = {} if dry else card()
        meta = describe("cpu" if dry else "cuda") | {"card": self.card, "dry": dry}
        self.path, results = begin(self.work, "dry" if dry else slug(meta["device"]), meta)
        results.save(self.path)
        self.log = self.work / "log.txt"

    def bench(self) -> Bench:
        return Bench(load(self.path), self.path, self.dry)

    def run(self, part: Part, seconds: float) -> str:
        """How it ended, in a few words."""
        if self.bench().results.found("parts", part.name).get("status") in FINISHED:
            return "done"
        tool = part.tool.split()[:1]
        if seconds < LEAST_SECONDS:
            ended = "left out: no time"
        elif tool and shutil.which(*tool) is None:
            ended = f"left out: no {tool[0]}"
        else:
            try:
                ended = self._run(part, time.monotonic() + seconds)
            finally:
                self.copy()  # also of an interrupted one
        results = self.bench().results
        unfinished = [cell.provider for cell in results.cells if cell.part == part.name and cell.status == "failed"]
        unfinished += [r["name"] for r in results.records if r["part"] == part.name and r["status"] not in FINISHED]
        if ended == "done" and unfinished:
            ended = f"done, but {len(unfinished)} failed: {', '.join(unfinished)}"[:300]
        results.record("parts", part.name, "ok" if ended == "done" else "failed", note=ended)
        results.save(self.path)
        self.copy()
        return ended

    def _run(self, part: Part, deadline: float) -> str:
        endings = [self.program(part, program, deadline) for program in part.programs]
        if self.cases_of(part).exists():
            read_cases(self.bench(), part.name, self.cases_of(part))
        if part.run is not None:
            endings.append(self.measure(part, deadline))
        if part.collect is not None:
            part.collect(self.bench(), self.work)
        return next((ended for ended in endings if ended != "done"), "done")

    def measure(self, part: Part, deadline: float) -> str:
        """The part's function, and where something broke its process again without that."""
        for attempt in range(ATTEMPTS):
            status = self.fork(part, attempt > 0, deadline)
            broken = self.blame(status) or status == UNUSABLE
            if isinstance(status, str) or status == 0:
                return status or "done"
            if not broken or deadline - time.monotonic() < LEAST_SECONDS:
                break
        return f"exit status {status}"

    def cases_of(self, part: Part) -> Path:
        return self.work / f"cases-{part.name}.jsonl"

    def command(self, part: Part, program: str) -> list[str]:
        results = shlex.quote(str(self.cases_of(part)))
        suite = f"-m pytest tests/test_correctness.py -q -p no:cacheprovider --results {results}"
        if self.dry:  # a few cases of the first selection; of the others only that there are such
            some = "-k 'test_torch and bf16 and kl'" if "WORKERS" in program else "--collect-only"
            program = program.replace("PYTEST", f"{suite} {some}") if "PYTEST" in program else f"{program} --dry"
        if self.dry:
            words = program.replace("WORKERS", "").replace("-n 1", "")
        else:
            number = max(1, min(8, os.cpu_count() or 1, int(self.card["gib"] - 4) // CASE_GIB))
            words = program.replace("WORKERS", f"-n {number} --max-worker-restart 200")
        tool = part.tool.replace("WORK", shlex.quote(str(self.work)))
        return [*shlex.split(tool), sys.executable, *shlex.split(words.replace("PYTEST", f"{suite} --device cuda"))]

    def program(self, part: Part, program: str, deadline: float) -> str:
        """How a program ended; one that is stopped takes its own processes with it."""
        command, environment = self.command(part, program), os.environ | dict(part.environment)
        with self.log.open("a", encoding="utf-8") as stream:
            print("$", *command, file=stream, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            status = wait(process.pid, process.wait, deadline)
        if status in (0, 1, 5, 9):  # 1 and 9: failed cases, which are records; 5: none is left of them
            return "done"
        return status if isinstance(status, str) else f"a program ended with status {status}"

    def fork(self, part: Part, skip_failed: bool, deadline: float) -> int | str:
        """The part in a fork of a server that has imported everything and never touched the GPU: five seconds saved."""
        bench = replace(self.bench(), skip_failed=skip_failed)
        process = FORKS.Process(target=forked, args=(part, bench, self.log))
        process.start()
        assert process.pid is not None

        def joined(timeout: float) -> int:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(part.name, timeout)
            return process.exitcode

        return wait(process.pid, joined, deadline)

    def blame(self, status: int | str) -> bool:
        """What was in its first step when the process died has failed, or was stopped; whether there is such a thing."""
        results, known = load(self.path), ("stopped", FIRST_STEP)
        now = {"status": "failed", "note": f"its process died (status {status})"}
        if isinstance(status, str):
            now = {"status": "stopped", "note": f"{status} in its first step"}
        cells = [vars(cell) for cell in results.cells]
        blamed = [row for row in [*cells, *results.records] if (row["status"], row.get("note")) == known]
        for row in blamed:
            row |= now
        results.save(self.path)
        return bool(blamed)

    def copy(self) -> None:
        """To ``out``, where that is another folder; of the log its end."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-LOG_BYTES:])
        for path in (self.path, self.log, *self.work.glob("cases-*.jsonl")):
            with suppress(shutil.SameFileError, FileNotFoundError):
                shutil.copyfile(path, self.out / path.name)


def read_cases(bench: Bench, part: str, path: Path) -> None:
    """The suite's lines as a record: how many passed, the worst, and what failed."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # cut off by a kill
            row = json.loads(text)
            rows[row["case"], row["impl"]] = row  # the last line counts
    if not rows:
        return
    failed = [row for row in rows.values() if not row["passed"]]
    worst = max(rows.values(), key=worst_share)
    bench.record(
        part, "cases", status="failed" if failed else "ok", passed=len(rows) - len(failed), failed=len(failed),
        worst=worst["case"], share_of_bound=worst_share(worst),
        failures={row["case"]: row.get("exception") or row["errors"] for row in failed[:50]},
    )  # fmt: skip


def worst_share(row: dict[str, Any]) -> float:
    """Of its bound, the largest error of a case; NaN counts as infinite."""
    return max((math.inf if math.isnan(x) else x for x in row["errors"].values()), default=0.0)


def wait(pid: int, joined: Callable[..., int], deadline: float) -> int | str:
    """The exit status of a process, or how long it ran until it was killed with its children."""
    began = time.monotonic()
    try:
        return joined(timeout=max(deadline - began, 0.1))
    except BaseException as error:
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that the GPU holds may outlast its end
            joined(timeout=10.0)
        if isinstance(error, subprocess.TimeoutExpired):
            return f"stopped after {time.monotonic() - began:.0f} s"
        raise


def begin(work: Path, name: str, meta: dict[str, Any]) -> tuple[Path, Results]:
    """The newest file of this card, continued, or a new one, called by the card and the day."""
    for path in sorted(work.glob(f"{name}-*.json"), reverse=True)[:1]:
        return path, load(path).continued(meta)
    return work / f"{name}-{meta['date'][:10]}.json", Results(meta)


def slug(device: str) -> str:
    known = re.search(r"\b[A-Z]{1,3}\d{1,4}[A-Z]{0,2}\b", device)
    return (known[0] if known else re.sub(r"\W+", "-", device)).lower()


def card() -> dict[str, Any]:
    """What the driver says of the card as it is found."""
    properties = torch.cuda.get_device_properties(0)
    found = {"capability": [properties.major, properties.minor], "gib": round(properties.total_memory / 2**30, 1)}
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
        values = subprocess.check_output(query, text=True, timeout=10).strip().split(", ")
        found |= dict(zip(fields.split(","), values, strict=False))
    return found
