"""A row spread over several programs, a slice each: in one read, or in three launches where few tokens come in a call.

`row_split_sweeps`: normalisers, sums and gradient of the slices are a launch each and each reads the row anew, 38 bytes per
entry; nothing waits, and few tokens occupy a whole GPU (`launch.too_few_rows`).

`row_single_read`, off by default: one launch that keeps its slice in registers, 14 bytes per entry (read s, b, d; write the
gradient) where the two sweeps move 26 to 34. The programs of a row exchange partial sums through memory and wait for one
another twice, so they must be resident together: block ids are handed out by a ticket counter, so the row that was begun
first always has all its programs running. Whether that is live and faster is for a GPU to show; until then nothing calls
this. Triton's interpreter runs programs one after the other and would wait for ever, so there the kernel is launched once
per PHASE as well.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels.divergence import FORWARD, divergence_mode
from popsd_kernels.entries import entries_from, scalars_from
from popsd_kernels.launch import (
    FLOATING,
    INTERPRETED,
    Launch,
    LaunchConfig,
    check_device,
    check_matrix_shape,
    check_no_reinterpretation,
    check_not_relative,
    check_rows,
    check_vector,
    fast_instructions,
    result_rows,
    shipped_config,
)
from popsd_kernels.logits import floor_logit, load_logit, projection_stream
from popsd_kernels.loss_rows import Gradient, Sums, accumulate, finish_row, store_block, store_gradient, zero_sums
from popsd_kernels.options import RowLoss, RowOptions, RowStatistics
from popsd_kernels.primitives import LOG2E, LOGIT_FLOOR, NOTHING, fma, lse_finish
from popsd_kernels.target import Difference, load_target_logit, target_gain

PARTIALS = 12
"""Scalars that a program leaves for its siblings: 4 normalisers, 8 sums."""


def row_single_read(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor,
    delta_offset: torch.Tensor,
    *,
    options: RowOptions,
    token_ids: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    gradient: torch.Tensor,
) -> tuple[RowStatistics, RowLoss]:
    """`row_statistics` and `row_loss_gradient` at once, with the same tensors and results, without biases.

    student, target, delta: [C, V] raw projections, read once. gradient: [C, V]; on a GPU it may take delta's memory (all
    of a row has been read before any of its gradient is written), in the interpreter it may not.
    """
    check_matrix_shape("row_single_read", "student", student)
    check_device("row_single_read", "student", student)
    check_not_relative("row_single_read", options.relative)
    (rows, _), device = student.shape, student.device
    matrices = {"student": student, "target": target, "delta": delta, "gradient": gradient}
    check_rows("row_single_read", student.shape, device, matrices)
    check_vector("row_single_read", "delta_offset", delta_offset, rows, device, (torch.float32,))
    check_vector("row_single_read", "token_ids", token_ids, rows, device, (torch.int64,))
    check_vector("row_single_read", "row_scale", row_scale, rows, device, (torch.float32,))
    out = result_rows(len(RowStatistics._fields) + len(RowLoss._fields), rows, device)
    if rows:
        fast = fast_instructions(device)
        tensors = (student, target, delta, delta_offset, token_ids, row_scale, gradient, out)
        config = shipped_config("single_read", device)
        scratch = scratch_for(student, config)
        _check_residency(scratch[0].shape[2], device)
        for phase in (1, 2, 3) if INTERPRETED else (0,):
            plan(*tensors, scratch, options, config, fast, phase).run(device)
    return RowStatistics(*out[:4]), RowLoss(*out[4:])


def row_split_sweeps(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None = None,
    delta_offset: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
    options: RowOptions,
    token_ids: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
) -> RowLoss:
    """The results of `row_statistics` and `row_loss_gradient` for few tokens, with their arguments; nothing else is written.

    gradient: [C, V], or None for no gradient work; it may be ``target`` itself (same dtype and strides), whose slice has
    been read for the last time when the gradient's is written.
    """
    name = "row_split_sweeps"
    check_matrix_shape(name, "student", student)
    check_device(name, "student", student)
    check_not_relative(name, options.relative)
    (rows, vocabulary), device = student.shape, student.device
    check_rows(
        name, student.shape, device, {"student": student, "target": target, "delta": delta, "gradient": gradient}
    )
    check_vector(name, "student_bias", student_bias, vocabulary, device, FLOATING)
    check_vector(name, "target_bias", target_bias, vocabulary, device, FLOATING)
    check_vector(name, "delta_offset", delta_offset, rows, device, (torch.float32,))
    check_vector(name, "token_ids", token_ids, rows, device, (torch.int64,))
    check_vector(name, "row_scale", row_scale, rows, device, (torch.float32,))
    check_no_reinterpretation(name, "gradient", gradient, student=student, target=target, delta=delta)
    if (delta is None) != (delta_offset is None):
        raise ValueError(f"{name}: delta and delta_offset must be given together or not at all; got one of them")
    out = result_rows(len(RowStatistics._fields) + len(RowLoss._fields), rows, device)
    if rows:
        config = shipped_config("single_read", device)
        tensors = (student, target, delta, delta_offset, token_ids, row_scale, gradient, out)
        scratch = scratch_for(student, config)
        for phase in (1, 2, 3):
            plan(
                *tensors, scratch, options, config, fast_instructions(device), phase, student_bias, target_bias
            ).run(device)  # fmt: skip
    return RowLoss(*out[4:])


def _check_residency(slices: int, device: torch.device) -> None:
    """A row whose programs cannot all be resident would wait for ever; one program per multiprocessor always is."""
    if device.type == "cuda" and slices > torch.cuda.get_device_properties(device).multi_processor_count:
        raise RuntimeError(
            f"row_single_read: a row needs {slices} programs at once, more than the GPU has multiprocessors; use "
            "row_statistics and row_loss_gradient"
        )


def scratch_for(student: torch.Tensor, config: LaunchConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results [C, 12, slices], and zeroed counters: the ticket, then two per row."""
    rows, slices = student.shape[0], -(-student.shape[1] // config.block)
    partials = torch.empty(rows, PARTIALS, slices, dtype=torch.float32, device=student.device)
    return partials, torch.zeros(1 + 2 * rows, dtype=torch.int32, device=student.device)


def plan(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None,
    delta_offset: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    gradient: torch.Tensor | None,
    out: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    options: RowOptions,
    config: LaunchConfig,
    fast: bool,
    phase: int,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
) -> Launch:
    """A launch of either function, unchecked. phase: 0 to wait for one another; 1, 2, 3 in turn not to."""
    tau = float(options.inv_temperature)
    difference: Difference | None = None
    pmi: tuple[float | None, float | None] = (None, None)
    if delta is not None:
        difference = Difference(delta, delta.stride(0), float(options.delta_scale) * tau)
        pmi = (float(options.pmi_beta), None if options.pmi_clip is None else float(options.pmi_clip))
    rows, vocabulary = student.shape
    return Launch(
        row_single_read_kernel,
        rows * -(-vocabulary // config.block),
        {
            "student": projection_stream(student, student_bias, options.student, tau),
            "target": projection_stream(target, target_bias, options.target, tau),
            "difference": difference,
            "offset_ptr": delta_offset,
            "token_ids_ptr": token_ids,
            "row_scale_ptr": row_scale,
            "gradient": None if gradient is None else Gradient(gradient, gradient.stride(0)),
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "partials_ptr": scratch[0],
            "counters_ptr": scratch[1],
            "pmi": pmi,
            "clips": tuple(None if x is None else float(x) for x in (options.entry_clip, options.token_clip)),
            "beta": float(options.beta),
            "V": vocabulary,
            "SLICE": config.block,
            "MODE": divergence_mode(options.beta),
            "PHASE": phase,
            "FAST": fast,
        },
        config,
    )


@triton.jit(
    do_not_specialize=["out_row_stride"],
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
    pmi,
    clips,
    beta,
    V: tl.constexpr,
    SLICE: tl.constexpr,
    MODE: tl.constexpr,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per slice of a row: normalisers, wait, sums, wait, gradient."""
    slices: tl.constexpr = (V + SLICE - 1) // SLICE
    masked: tl.constexpr = V % SLICE != 0
    ticket = tl.program_id(0)
    if PHASE == 0:
        ticket = tl.atomic_add(counters_ptr, 1)
    row = ticket // slices
    part = ticket % slices
    columns = part * SLICE + tl.arange(0, SLICE)
    mine = partials_ptr + row.to(tl.int64) * (12 * slices) + part
    beta = tl.cast(beta, tl.float32)
    s = floor_logit(load_logit(student, row, columns, V, masked, FAST), columns, V, masked)
    offset = 0.0
    if difference is not None:
        offset = tl.load(offset_ptr + row)
    u = load_target_logit(target, difference, offset, pmi[0], pmi[1], row, columns, V, masked, FAST)
    if difference is None:  # a composed target is floored already
        u = floor_logit(u * target_gain(target, difference), columns, V, masked)
    if PHASE <= 1:
        _store_normaliser(mine, s, columns, V, slices)
        _store_normaliser(mine + 2 * slices, u, columns, V, slices)
        if PHASE == 0:
            _arrive_and_wait(counters_ptr + 1 + 2 * row, slices)
    if PHASE != 1:
        scalars = _merge_normalisers(mine - part, out_ptr + row, out_row_stride, V, slices)
        entries = entries_from(s, u, scalars, columns, V, masked, 1.0, MODE != FORWARD)
        if PHASE != 3:
            sums = accumulate(zero_sums(SLICE // 4), entries, beta, clips[0], 4, MODE, FAST)
            _store_sums(mine + 4 * slices, sums, slices)
            if PHASE == 0:
                _arrive_and_wait(counters_ptr + 2 + 2 * row, slices)
        if PHASE != 2:
            row_scale = 1.0
            if row_scale_ptr is not None:
                row_scale = tl.load(row_scale_ptr + row)
            sums = _load_sums(mine - part + 4 * slices, slices)
            slope_sum, row_scale = finish_row(
                sums, student, scalars, token_ids_ptr, out_ptr + 4 * out_row_stride, out_row_stride, row, row_scale,
                beta, clips[0], clips[1], V, MODE, FAST,
            )  # fmt: skip
            if gradient is not None:
                if row_scale == 0.0:
                    store_block(gradient, row, columns, tl.zeros([SLICE], tl.float32), V, masked)
                else:
                    store_gradient(
                        gradient, student, entries, slope_sum, row_scale, beta, clips[0], row, columns,
                        V, MODE, masked, FAST,
                    )  # fmt: skip


@triton.jit
def _arrive_and_wait(counter_ptr, COUNT: tl.constexpr):
    """Publishes what this program stored, then waits until all COUNT siblings have done so."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < COUNT:
        pass
    tl.debug_barrier()


@triton.jit
def _store_normaliser(pointer, x, columns, V: tl.constexpr, STRIDE: tl.constexpr):
    """A slice's (max, sum of exp(x - max)). Every slice has an entry inside the vocabulary."""
    x = tl.where(columns < V, x, float("-inf"))
    top = tl.maximum(tl.max(x, axis=0), NOTHING)
    tl.store(pointer, top)
    tl.store(pointer + STRIDE, tl.sum(tl.exp2(fma(x, LOG2E, -top * LOG2E)), axis=0))


@triton.jit
def _load_partials(pointer, INDEX: tl.constexpr, COUNT: tl.constexpr, OTHER: tl.constexpr):
    """One partial scalar of all slices, as a vector padded to a power of two; past the L1 cache, which may be stale."""
    lanes = tl.arange(0, triton.next_power_of_2(COUNT))
    return tl.load(pointer + INDEX * COUNT + lanes, mask=lanes < COUNT, other=OTHER, cache_modifier=".cg")


@triton.jit
def _merge_normalisers(pointer, out_ptr, out_row_stride, V: tl.constexpr, COUNT: tl.constexpr):
    """The row's RowScalars; every sibling stores the same four normalisers."""
    student_max, student_logsum = lse_finish(
        _load_partials(pointer, 0, COUNT, LOGIT_FLOOR), _load_partials(pointer, 1, COUNT, 0.0), V
    )
    target_max, target_logsum = lse_finish(
        _load_partials(pointer, 2, COUNT, LOGIT_FLOOR), _load_partials(pointer, 3, COUNT, 0.0), V
    )
    tl.store(out_ptr, student_max)
    tl.store(out_ptr + out_row_stride, student_logsum)
    tl.store(out_ptr + 2 * out_row_stride, target_max)
    tl.store(out_ptr + 3 * out_row_stride, target_logsum)
    return scalars_from(student_max, student_logsum, target_max, target_logsum)


@triton.jit
def _store_sums(pointer, sums, STRIDE: tl.constexpr):
    tl.store(pointer, tl.sum(sums.student_kl, axis=0))
    tl.store(pointer + STRIDE, tl.sum(sums.target_kl, axis=0))
    tl.store(pointer + 2 * STRIDE, tl.sum(sums.student_entropy, axis=0))
    tl.store(pointer + 3 * STRIDE, tl.sum(sums.target_entropy, axis=0))
    tl.store(pointer + 4 * STRIDE, tl.max(sums.top, axis=0))
    tl.store(pointer + 5 * STRIDE, tl.sum(sums.clipped_divergence, axis=0))
    tl.store(pointer + 6 * STRIDE, tl.sum(sums.capped, axis=0))
    tl.store(pointer + 7 * STRIDE, tl.sum(sums.slope, axis=0))


@triton.jit
def _load_sums(pointer, COUNT: tl.constexpr):
    return Sums(
        _load_partials(pointer, 0, COUNT, 0.0),
        _load_partials(pointer, 1, COUNT, 0.0),
        _load_partials(pointer, 2, COUNT, 0.0),
        _load_partials(pointer, 3, COUNT, 0.0),
        _load_partials(pointer, 4, COUNT, LOGIT_FLOOR),
        _load_partials(pointer, 5, COUNT, 0.0),
        _load_partials(pointer, 6, COUNT, 0.0),
        _load_partials(pointer, 7, COUNT, 0.0),
    )
