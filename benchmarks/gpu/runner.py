"""A list of parts as a command: each in a process of its own with a time limit, everything known always in one file.

What a part measures it writes to the results file at once. One that crashes, hangs or runs out of memory costs itself
alone; one that leaves its process unusable is begun again without what broke it; a rerun takes up what is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from bench import UNUSABLE, Bench, Part, child, forked
from environment import ROOT
from predictions import comparison

from popsd_benchmarks import provenance
from popsd_benchmarks.measure import FIRST_STEP
from popsd_benchmarks.results import FINISHED, Results, load

PEERS = {"trl": "trl", "liger_kernel": "liger-kernel", "orda_kernel": "orda-kernel"}
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
    add("--dry", action="store_true", help="every part on the CPU at a tiny size, tools by a stub")
    add("--child", help=argparse.SUPPRESS)
    add("--skip-failed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(by_name[options.child], Bench(load(options.out), options.out, options.dry, options.skip_failed))
    wanted = options.parts.split(",")
    if unknown := [name for name in wanted if name not in by_name]:
        parser.error(f"--parts: expected some of {', '.join(by_name)}; got {', '.join(unknown)}.")
    if not options.dry and not torch.cuda.is_available():
        parser.error("expected a GPU that torch sees; got none. --dry runs every part on a CPU at a tiny size.")
    work = options.work or options.out
    for flag, folder in (("--out", options.out), ("--work", work)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".probe").touch()
            (folder / ".probe").unlink()
        except OSError as error:
            parser.error(f"{flag}: expected a folder that can be written to; got {folder} ({error.strerror}).")
    limits = {part.name: DRY_SECONDS if options.dry else part.seconds for part in parts}
    session = Session(work, options.out, options.dry)
    for sentence in session.warnings():
        print(sentence, flush=True)
    end, left_over = time.monotonic() + (options.seconds or sum(limits.values())), 0
    for name in wanted:
        began = time.monotonic()
        ended = session.run(by_name[name], min(limits[name], end - began))
        left_over += ended != "done"
        print(f"== {name}: {ended}, {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(comparison(load(session.path))[:40]), flush=True)
    return left_over


class Session:
    """One run of a command: the results file in ``work``, a log beside it, both copied to ``out`` after every part."""

    def __init__(self, work: Path, out: Path, dry: bool) -> None:
        self.work, self.out, self.dry = work, out, dry
        if dry:  # at tiny sizes, threads wait for one another
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
        self.card = {} if dry else card()
        meta = provenance.describe("cpu" if dry else "cuda") | {"card": self.card, "dry": dry}
        self.path, results = begin(work, "dry" if dry else slug(meta["device"]), meta)
        results.save(self.path)
        self.log = work / "log.txt"

    def warnings(self) -> list[str]:
        """A sentence for everything that is not as it should be, and yet leaves something to run."""
        absent = [peer for name, peer in PEERS.items() if importlib.util.find_spec(name) is None]
        found = [f"{peer} is missing: its cells will say so. README.md here says how to carry it." for peer in absent]
        capability = self.card.get("capability", [9, 0])
        if capability != [9, 0]:
            found.append(f"The predictions are for compute capability 9.0; this card has {capability}: it has none.")
        return found

    def run(self, part: Part, seconds: float) -> str:
        """How it ended, in a few words."""
        if load(self.path).found("parts", part.name).get("status") in FINISHED:
            return "done"
        if (obstacle := self.obstacle(part, seconds)) is not None:
            ended = f"left out: {obstacle}"
        else:
            try:
                ended = self._run(part, time.monotonic() + seconds)
            finally:
                self.copy()
        results = load(self.path)
        unfinished = [cell.provider for cell in results.cells if cell.part == part.name and cell.status == "failed"]
        unfinished += [r["name"] for r in results.records if r["part"] == part.name and r["status"] not in FINISHED]
        if ended == "done" and unfinished:
            ended = f"done, but {len(unfinished)} failed: {', '.join(unfinished)}"[:300]
        results.record("parts", part.name, "ok" if ended == "done" else "failed", note=ended)
        results.save(self.path)
        self.copy()
        return ended

    def obstacle(self, part: Part, seconds: float) -> str | None:
        if seconds < LEAST_SECONDS:
            return "no time"
        if part.gib > (gib := self.card.get("gib", part.gib)):
            return f"needs {part.gib:.0f} GiB of device memory; the card has {gib:.0f}"
        if part.tool and not self.dry and shutil.which(part.tool[0]) is None:
            return f"no {part.tool[0]}"
        absent = [name for name in part.modules if importlib.util.find_spec(name) is None]
        return f"no {', '.join(absent)}" if absent else None

    def _run(self, part: Part, deadline: float) -> str:
        ended = "done"
        for selection in part.cases:
            status = self.program(part, self.suite_command(part, selection), deadline)
            if status not in (0, 1, 5, 9):  # 1 and 9: failed cases, which are records; 5: none is left of them
                ended = status if isinstance(status, str) else f"pytest ended with status {status}"
        if part.cases:
            self.collect_cases(part)
        if part.run is not None:
            measured = self.measure(part, deadline)
            ended = measured if ended == "done" else ended
        if part.collect is not None:
            part.collect(Bench(load(self.path), self.path, self.dry), self.work)
        return ended

    def measure(self, part: Part, deadline: float) -> str:
        """The part's own process, and where something broke it another one that leaves this out."""
        command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--child", part.name]
        command += ["--out", str(self.path.resolve()), *["--dry"] * self.dry]
        for attempt in range(ATTEMPTS):
            if part.tool:
                again = [*command, *["--skip-failed"] * (attempt > 0)]
                status = self.program(part, self.under_tool(part, again), deadline)
            else:
                status = self.fork(part, attempt > 0, deadline)
            broken = self.blame(status) or status == UNUSABLE
            if isinstance(status, str) or status == 0:
                return status or "done"
            if not broken or deadline - time.monotonic() < LEAST_SECONDS:
                break
        return f"exit status {status}"

    def suite_command(self, part: Part, selection: str) -> list[str]:
        """The correctness suite. WORKERS in a selection: as many processes as the memory holds, each replaced if it dies."""
        command = [sys.executable, "-m", "pytest", "tests/test_correctness.py", "-q", "-p", "no:cacheprovider"]
        command += ["--device", "cpu" if self.dry else "cuda", "--results", str(self.cases_of(part).resolve())]
        if self.dry or importlib.util.find_spec("xdist") is None:
            words = selection.replace("WORKERS", "").replace("-n 1", "")
        else:
            number = max(1, min(8, os.cpu_count() or 1, int(self.card["gib"] - 4) // CASE_GIB))
            words = selection.replace("WORKERS", f"-n {number} --max-worker-restart 200")
        if self.dry:  # a few cases of the first selection; of the others only that there are such
            words += " -k test_torch~and~bf16~and~kl" if "WORKERS" in selection else " --collect-only"
        return self.under_tool(part, command + [word.replace("~", " ") for word in words.split()])

    def cases_of(self, part: Part) -> Path:
        return self.work / f"cases-{part.name}.jsonl"

    def under_tool(self, part: Part, command: list[str]) -> list[str]:
        tool = [word.replace("WORK", str(self.work.resolve())) for word in part.tool]
        if tool and self.dry:
            tool = [sys.executable, str(Path(__file__).with_name("stub.py")), *tool]
        return [*tool, *command]

    def program(self, part: Part, command: list[str], deadline: float) -> int | str:
        """A program: its exit status, or how long it ran where it was stopped, its own processes with it."""
        environment = os.environ | dict(part.environment)
        with self.log.open("a", encoding="utf-8") as stream:
            print("$", *command, file=stream, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            return wait(process.pid, process.wait, deadline)

    def fork(self, part: Part, skip_failed: bool, deadline: float) -> int | str:
        """The part in a fork of a server that has imported everything and never touched the GPU: five seconds saved."""
        given = (part, self.path.resolve(), self.dry, skip_failed, self.log.resolve())
        process = FORKS.Process(target=forked, args=given)
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
        results = load(self.path)
        stopped = isinstance(status, str)
        note = f"{status} in its first step" if stopped else f"its process died (status {status})"
        cells = [cell for cell in results.cells if (cell.status, cell.note) == ("stopped", FIRST_STEP)]
        rows = [row for row in results.records if (row["status"], row.get("note")) == ("stopped", FIRST_STEP)]
        for cell in cells:
            cell.status, cell.note = "stopped" if stopped else "failed", note
        for row in rows:
            row |= {"status": "stopped" if stopped else "failed", "note": note}
        results.save(self.path)
        return bool(cells or rows)

    def collect_cases(self, part: Part) -> None:
        """The suite's lines as records: how many passed, the worst, and what failed."""
        if not self.cases_of(part).exists():
            return
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for text in self.cases_of(part).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # cut off by a kill
                row = json.loads(text)
                rows[row["case"], row["impl"]] = row  # the last line counts
        failed = [row for row in rows.values() if not row["passed"]]
        worst = max(rows.values(), key=worst_share)
        Bench(load(self.path), self.path, self.dry).record(
            part.name, "cases", status="failed" if failed else "ok", passed=len(rows) - len(failed), failed=len(failed),
            worst=worst["case"], share_of_bound=worst_share(worst),
            failures={row["case"]: row.get("exception") or row["errors"] for row in failed[:50]},
        )  # fmt: skip

    def copy(self) -> None:
        """To ``out``, where that is another folder; of the log its end."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-LOG_BYTES:])
        if self.work.resolve() != self.out.resolve():
            for path in (self.path, self.log, *self.work.glob("cases-*.jsonl")):
                if path.exists():
                    shutil.copyfile(path, self.out / path.name)


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
    """The newest file of this card that can be continued, or a new one, called by the card and the day."""
    for path in sorted(work.glob(f"{name}-*.json"), reverse=True):
        try:
            return path, provenance.continued(load(path), meta)
        except ValueError as error:
            print(f"Not continued: {error}", flush=True)
    names = (work / f"{name}-{meta['date'][:10]}{f'-{i}' if i > 1 else ''}.json" for i in count(1))
    return next(path for path in names if not path.exists()), Results(meta)


def slug(device: str) -> str:
    known = re.search(r"\b[A-Z]{1,3}\d{1,4}[A-Z]{0,2}\b", device)
    return (known[0] if known else re.sub(r"\W+", "-", device)).lower()


def card() -> dict[str, Any]:
    """What the driver says of the card as it is found."""
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "gib": round(properties.total_memory / 2**30, 1),
    }
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
    with suppress(OSError, subprocess.SubprocessError):
        values = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        found |= dict(zip(fields.split(","), values.strip().split(", "), strict=False))
    return found | {tool: shutil.which(tool) is not None for tool in ("ncu", "compute-sanitizer")}
