"""A row over several programs in one launch, each with its slice in registers: one read, 14 bytes per entry.

Read s, b, d, write the gradient, where the two sweeps move 26 to 34 bytes. The programs of a row exchange partial sums
through memory and wait for one another twice. None can starve: the grid is no larger than what the GPU holds at once, and
the launch is cooperative, so that all of it is resident before any of it runs; a grid too large for that is refused by the
driver. A group of programs takes every groups-th row in a loop. At 80 registers 132 multiprocessors hold 396 programs, 5
groups of 75 at V = 151,936; under clips or a soft cap 264, 3 groups.

Off by default, not yet run on a GPU. Triton's interpreter runs programs one after the other and would wait for ever, so
there the kernel is launched once per PHASE.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels.launch import (
    INTERPRETED,
    Launch,
    LaunchConfig,
    Outputs,
    fast_instructions,
    result_rows,
    shipped_config,
)
from popsd_kernels.rows import RowLoss, RowOptions, Rows, RowStatistics
from popsd_kernels.sweeps.row_slices import (
    NORMALISERS,
    RESULTS,
    Exchange,
    SliceCall,
    Vectors,
    check_slices,
    partials_for,
    row_slice,
)

_NAME = "row_single_read"
REGISTERS = 65536
"""Of a multiprocessor, on every NVIDIA GPU since compute capability 5.0."""


def row_single_read(rows: Rows, options: RowOptions, *, gradient: torch.Tensor) -> tuple[RowStatistics, RowLoss]:
    """`row_statistics` and `row_loss_gradient` at once; a composed target's logits are not written.

    rows: as in `row_statistics`; each matrix is read once.
    gradient: [C, V]; it may be ``rows.base``, ``rows.target`` or ``rows.difference`` itself (same memory, dtype size and
        strides), no other memory of theirs and none of ``rows.student``.
    A NaN anywhere in a row makes that row's losses and gradient NaN and no other's; row_scale 0 gives a gradient of zeros.
    Raises ValueError, TypeError or RuntimeError before the launch, among others where the GPU does not hold all programs
    of one row at once. Can be captured in a CUDA graph after one call outside of it. Not yet run on a GPU.
    """
    check_slices(_NAME, rows, options, gradient)
    tokens, device = rows.student.shape[0], rows.student.device
    results = result_rows(RESULTS, tokens, device)
    if tokens:
        config, fast = shipped_config("single_read", device), fast_instructions(device)
        launch(SliceCall(rows, options, Outputs(results, gradient), partials_for(rows, config), config, fast), device)
    return RowStatistics(*results[: NORMALISERS.value]), RowLoss(*results[NORMALISERS.value :])


def launch(call: SliceCall, device: torch.device) -> None:
    """The whole of ``call`` in one launch, or in the interpreter in three."""
    counters = torch.zeros(call.tokens, 2, dtype=torch.int32, device=device)
    if INTERPRETED:
        for phase in (1, 2, 3):
            plan(call, counters, 1, phase=phase).run(device)
        return
    registers = register_bound(call.options, call.config) if torch.version.hip is None else None
    resident = resident_programs(call.config.num_warps, registers, device)
    groups = min(resident // call.slices, call.tokens)
    if groups == 0:
        raise RuntimeError(
            f"{_NAME}: rows.student has {call.vocabulary} columns, so a row needs {call.slices} programs at once; expected at "
            f"most the {resident} that {device} holds; use row_statistics and row_loss_gradient"
        )
    plan(call, counters, groups, registers).run(device)


def plan(call: SliceCall, counters: torch.Tensor, groups: int, registers: int | None = None, phase: int = 0) -> Launch:
    """A launch of ``groups`` times the programs of a row.

    counters: [C, 2] int32, zeros. registers: None, or how many the compiler may give a thread. phase: 0 to wait for one
    another; 1, 2, 3 in turn not to.
    """
    arguments = {**call.arguments(), "counters_ptr": counters, "rows": call.tokens, "PHASE": phase}
    if phase == 0:
        arguments["launch_cooperative_grid"] = True
    if registers is not None:
        arguments["maxnreg"] = registers
    return Launch(row_single_read_kernel, groups * call.slices, arguments, call.config)


def register_bound(options: RowOptions, config: LaunchConfig) -> int:
    """What a thread may take without a spill (``python -m popsd_kernels.aot``): for the 8 entries of the shipped sizes 80,
    128 under clips or a soft cap. Left alone the compiler takes up to 106, and fewer programs fit: rows in flight are what
    hides the waiting. 64 would hold 7 groups where 80 hold 5, but spills 4 instructions in forward KL (sm_100), 7 in JSD
    (sm_120), 22 in JSD at an odd V padded to 16 (sm_100).
    """
    soft_capped = options.student.softcap is not None or options.target.softcap is not None
    plain = not soft_capped and options.entry_clip is None and options.token_clip is None
    threads = 32 * config.num_warps
    return min((10 if plain else 16) * max(config.block // threads, 8), 255, REGISTERS // threads)


def resident_programs(num_warps: int, registers: int | None, device: torch.device) -> int:
    """How many programs of ``num_warps`` warps and that bound on registers the GPU certainly holds at once.

    The bound is the compiler's to keep, so nothing has to be asked of the compiled kernel; their shared memory, 4 KiB at
    most, limits nothing. Without a bound (AMD): one per multiprocessor, which fits wherever the kernel runs at all.
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"{_NAME}: rows.student must be on a CUDA or ROCm GPU, got {device}; row_split_sweeps needs no waiting programs"
        )
    properties, threads = torch.cuda.get_device_properties(device), 32 * num_warps
    held = 1
    if registers is not None:
        held = min(REGISTERS // (registers * threads), properties.max_threads_per_multi_processor // threads)
    return properties.multi_processor_count * held


@triton.jit(
    do_not_specialize=["out_row_stride", "rows"],
    do_not_specialize_on_alignment=["offset_ptr", "token_ids_ptr", "row_scale_ptr"],
)
def row_single_read_kernel(
    student,
    target,
    difference,
    offset_ptr,
    token_ids_ptr,
    row_scale_ptr,
    gradient,
    out_ptr,
    out_row_stride,
    partials_ptr,
    counters_ptr,
    rows,
    composition,
    clips,
    beta,
    V: tl.constexpr,
    SLICE: tl.constexpr,
    MODE: tl.constexpr,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """A program takes the same slice of every groups-th row: normalisers, wait, sums, wait, gradient."""
    slices: tl.constexpr = (V + SLICE - 1) // SLICE
    part = tl.program_id(0) % slices
    vectors = Vectors(offset_ptr, token_ids_ptr, row_scale_ptr)
    exchange = Exchange(out_ptr, out_row_stride, partials_ptr, counters_ptr)
    beta = tl.cast(beta, tl.float32)
    # disable_licm: what is hoisted out of the loop stays in registers across it (forward KL, sm_90: 4 spills at 64)
    for row in tl.range(tl.program_id(0) // slices, rows, tl.num_programs(0) // slices, disable_licm=True):
        row_slice(
            student, target, difference, vectors, gradient, exchange, composition, clips, beta,
            tl.cast(row, tl.int32), part,  # the interpreter counts in Python's integers
            V, SLICE, MODE, PHASE, FAST,
        )  # fmt: skip
