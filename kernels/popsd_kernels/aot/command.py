"""Compile the kernels for GPUs without having one, and report what the compiler made of them.

For each case, that is each combination of flags that ships: registers and spill instructions of a thread, shared memory in
bytes, programs that a multiprocessor holds, SASS instructions per vocabulary entry of each inner loop, and whether matrix units
are used. Exits with 1 where something would not launch or would run badly: a spill, too much shared memory, too many threads.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from popsd_kernels import launch
from popsd_kernels.aot.cases import AnyCase, all_cases, shipped_cases
from popsd_kernels.aot.report import CODE, DEVICES, Report, compile_case, problems, programs_per_sm
from popsd_kernels.launch import LaunchConfig

_EXAMPLE = """\
example: python -m popsd_kernels.aot --kernel statistics loss_gradient --arch sm_90 --emit ptx,sass --output_dir code"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m popsd_kernels.aot", description=__doc__, epilog=_EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kernels, kinds = list(dict.fromkeys(case.kernel for case in shipped_cases())), sorted(set().union(*CODE.values()))
    add = made.add_argument
    add("--kernel", "--kernels", nargs="+", type=_kernel, choices=kernels, metavar="KERNEL",
        help=f"some of {', '.join(kernels)}; row_ before and _kernel behind may stand (all)")  # fmt: skip
    add("--arch", nargs="+", choices=list(DEVICES), metavar="ARCH",
        help=f"some of {', '.join(DEVICES)} (all, or those that have what --emit asks for)")  # fmt: skip
    add("--all", action="store_true", help="240 combinations of flags instead of one case for each flag: minutes")
    add("--config", type=_config, metavar="BLOCK,VEC,WARPS",
        help="sizes of the row kernels: entries per loop step, neighbours per accumulator, warps (as shipped)")  # fmt: skip
    add("--portable", action="store_true", help="without the approximate instructions of NVIDIA GPUs")
    add("--emit", type=_kinds, default=(), metavar="KIND[,KIND]",
        help=f"write code to --output_dir: {', '.join(kinds)}")  # fmt: skip
    add("--output_dir", "--output-dir", type=Path,
        help="folder of that code, ARCH/KERNEL-FLAGS.KIND (aot)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document instead of lines")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a case would not launch or would run badly."""
    read = parser()
    options = read.parse_args(arguments)
    chosen = [
        case
        for case in (all_cases() if options.all else shipped_cases())
        if case.kernel in (options.kernel or [case.kernel])
    ]
    having = [name for name, device in DEVICES.items() if set(options.emit) <= set(CODE[device.target.backend])]
    if lacking := [name for name in options.arch or () if name not in having]:
        kinds = CODE[DEVICES[lacking[0]].target.backend]
        read.error(
            f"argument --emit: expected some of {', '.join(kinds)} for {lacking[0]}; got {', '.join(options.emit)}"
        )
    if options.output_dir and not options.emit:
        read.error("argument --output_dir: expected --emit beside it, which says what is written there; got none")
    if not having:
        read.error(f"argument --emit: expected kinds of one maker's GPUs; got {', '.join(options.emit)}")
    if not chosen:
        read.error(f"argument --all: has no case of {', '.join(options.kernel)}; leave it out")
    tiled = [case.kernel for case in chosen if case.kernel.startswith("stream_")]
    if options.config and tiled:
        read.error(
            f"argument --config: expected row kernels, which --kernel names; got {tiled[0]}, whose tiles have other sizes"
        )
    if launch.INTERPRETED:
        read.error("TRITON_INTERPRET is set: kernels cannot be compiled in this process; unset it")
    if not options.json:
        print(f"Triton {triton.__version__}; registers and loops per thread; not yet run on a GPU")
    rows = []
    for architecture in options.arch or having:
        for case in chosen:
            report, code = compile_case(case, architecture, options.config, fast=not options.portable)
            row = _row(case, architecture, report)
            row["files"] = [_written(code[kind], kind, row, options.output_dir or Path("aot")) for kind in options.emit]
            rows.append(row)
            if not options.json:
                print(_line(row), *(f"  FAIL: {problem}" for problem in row["problems"]), flush=True)
    failures = sum(bool(row["problems"]) for row in rows)
    if options.json:
        print(json.dumps({"triton": triton.__version__, "failures": failures, "cases": rows}, indent=1))
    else:
        print(f"{failures} failures")
    return int(failures > 0)


def _row(case: AnyCase, architecture: str, report: Report) -> dict[str, Any]:
    device = DEVICES[architecture]
    of_case = {"architecture": architecture, "kernel": case.kernel, "flags": case.flags}
    return (
        of_case
        | asdict(report)
        | {"programs_per_sm": programs_per_sm(report, device), "problems": problems(report, device)}
    )


def _line(row: dict[str, Any]) -> str:
    loops = " + ".join(map(str, row["instructions"])) or "-"
    return (
        f"{row['architecture']:7} {row['kernel']:14} {row['flags']:52} regs {row['registers']:3}  spills {row['spills']}  "
        f"shared {row['shared']:5}  programs/SM {row['programs_per_sm'] or '-':2}  instructions/entry {loops:12}  "
        f"matrix units {'yes' if row['matrix_units'] else 'no'}"
    )


def _written(code: str | bytes, kind: str, row: dict[str, Any], folder: Path) -> str:
    flags = re.sub(r"\W+", "-", row["flags"]).strip("-")
    path = folder / row["architecture"] / f"{row['kernel']}-{flags}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code if isinstance(code, bytes) else code.encode())
    return str(path)


def _kernel(name: str) -> str:
    """As the cases call it; the functions are called row_<name> and row_<name>_kernel."""
    return name.removeprefix("row_").removesuffix("_kernel")


def _kinds(text: str) -> tuple[str, ...]:
    known, given = set().union(*CODE.values()), tuple(text.split(","))
    if unknown := [kind for kind in given if kind not in known]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(sorted(known))}; got {', '.join(unknown)!r}")
    return given


def _config(text: str) -> LaunchConfig:
    try:
        block, vec, warps = map(int, text.split(","))
        config = LaunchConfig(block, vec, warps)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected three numbers such as 2048,4,8; got {text!r} ({error})") from error
    if warps < 1 or warps & (warps - 1):
        raise argparse.ArgumentTypeError(f"expected a power of two for WARPS; got {warps}")
    return config


if __name__ == "__main__":
    sys.exit(main())
