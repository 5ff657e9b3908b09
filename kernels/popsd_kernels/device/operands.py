"""From `Rows` and `RowOptions` to the arguments of kernels: which stream becomes a logit how, in one place."""

from __future__ import annotations

import torch

from popsd_kernels.device.logits import Stream, logit_stream, projection_stream
from popsd_kernels.device.row_loss import Gradient
from popsd_kernels.device.targets import Composition, Difference, Pair
from popsd_kernels.rows import RowOptions, Rows


def student_operand(rows: Rows, options: RowOptions) -> Stream:
    """The student's raw projections."""
    return projection_stream(rows.student, rows.student_bias, options.student, options.inv_temperature)


def target_operand(rows: Rows, options: RowOptions) -> Stream:
    """The target's finished logits, its raw projections or, where it is composed, the base's."""
    if rows.target_is_finished:
        return logit_stream(rows.frozen)
    return frozen_operand(rows.frozen, rows, options)


def frozen_operand(tensor: torch.Tensor, rows: Rows, options: RowOptions) -> Stream:
    """Raw projections [C, V] of another stream than the student. A bias cancels in its difference to the student."""
    bias = None if options.minus_student else rows.frozen_bias
    return projection_stream(tensor, bias, options.target, options.inv_temperature)


def difference_operand(rows: Rows, options: RowOptions) -> Difference | None:
    """Teacher − reference; times its gain it is tempered."""
    if rows.difference is None:
        return None
    gain = float(options.delta_scale) * float(options.inv_temperature)
    return Difference(rows.difference, rows.difference.stride(0), gain)


def composing_operand(rows: Rows, options: RowOptions) -> Difference | Pair | None:
    """What the target is composed of beside the base: a difference or, by a device function, teacher and reference."""
    if rows.composed is None:
        return difference_operand(rows, options)
    assert rows.teacher is not None and rows.reference is not None
    return Pair(rows.teacher, rows.teacher.stride(0), rows.reference, rows.reference.stride(0))


def offset_operand(rows: Rows) -> torch.Tensor | None:
    """[C], subtracted from the difference; or [C, 3], the log-normalisers that a device function's arguments are less."""
    return rows.offset if rows.composed is None else rows.composed.normalisers


def composition(rows: Rows, options: RowOptions) -> Composition:
    """How the target is composed; all None where it is not. None is a switch at compile time, a float is not."""
    if rows.composed is not None:
        return Composition(None, None, rows.composed.function, tuple(map(float, rows.composed.numbers)))
    if rows.difference is None:
        return Composition(None, None, None, None)
    return Composition(float(options.pmi_beta), optional(options.pmi_clip), None, None)


def gradient_operand(gradient: torch.Tensor | None) -> Gradient | None:
    return None if gradient is None else Gradient(gradient, gradient.stride(0))


def optional(number: float | None) -> float | None:
    """As a Python float, whose value never compiles a kernel again."""
    return None if number is None else float(number)
