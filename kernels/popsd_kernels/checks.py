"""What every launcher checks before any launch: shapes, dtypes, devices, what belongs together, memory that is shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from popsd_kernels.device.primitives import fma
from popsd_kernels.launch import INTERPRETED
from popsd_kernels.rows import RowOptions, Rows

MAX_VOCABULARY = 2**31 - 2**16
"""Column offsets are 32-bit; only row offsets are 64-bit."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32, INT64 = (torch.float32,), (torch.int64,)
MATRICES = ("student", "base", "difference", "target", "teacher", "reference")
"""Fields of `Rows` that are [C, V]."""


def check_rows(function: str, rows: Rows, options: RowOptions, needed: Sequence[str] = ()) -> None:
    """Every tensor in ``rows``, and that the fields ``needed`` are there."""
    check_options(function, options)
    if not isinstance(rows, Rows):
        raise TypeError(
            f"{function}: rows must be a popsd_kernels.Rows, got {type(rows).__name__}; pass Rows(student, target=target) with "
            "logits [tokens, vocabulary]"
        )
    student = rows.student
    if not isinstance(student, torch.Tensor):
        raise TypeError(
            f"{function}: rows.student must be a tensor, got {type(student).__name__}; pass [tokens, vocabulary]"
        )
    if student.dim() != 2 or not 0 < student.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"{function}: rows.student must be [tokens, vocabulary] with 1 to {MAX_VOCABULARY} columns, got "
            f"{list(student.shape)}; flatten leading dimensions with .reshape(-1, vocabulary)"
        )
    check_device(function, "rows.student", student)
    for name in MATRICES:
        check_matrix(function, f"rows.{name}", getattr(rows, name), student.shape, student.device)
    check_vectors(function, rows, student.shape[1])
    for name in needed:
        if getattr(rows, name) is None:
            raise ValueError(f"{function}: rows.{name} must be given, got None; this function reads it")


def check_vectors(function: str, rows: Rows, vocabulary: int) -> None:
    """The fields of ``rows`` that are [C] or [V]."""
    tokens, device = rows.student.shape[0], rows.student.device
    check_vector(function, "rows.student_bias", rows.student_bias, vocabulary, device, FLOATING)
    check_vector(function, "rows.frozen_bias", rows.frozen_bias, vocabulary, device, FLOATING)
    check_vector(function, "rows.offset", rows.offset, tokens, device, FLOAT32)
    check_vector(function, "rows.token_ids", rows.token_ids, tokens, device, INT64)
    check_vector(function, "rows.row_scale", rows.row_scale, tokens, device, FLOAT32)


def check_target(function: str, rows: Rows, *, composed: bool = True, finished: bool = False) -> None:
    """That there is one whole target. composed, finished: whether it may be yet to compose, and logits already."""
    if rows.composed is not None:
        _check_composed(function, rows, composed)
        return
    given = [name for name in ("base", "difference", "offset") if getattr(rows, name) is not None]
    if len(given) not in (0, 3):
        raise ValueError(
            f"{function}: rows.base, rows.difference and rows.offset must be given together, got {' and '.join(given)} alone; "
            "for two distributions give rows.target instead of all three"
        )
    if (rows.target is None) == (not given):
        raise ValueError(
            f"{function}: one target must be given, got {'two' if given else 'none'}; give either rows.target, or rows.base, "
            "rows.difference and rows.offset"
        )
    if given and not composed:
        raise ValueError(
            f"{function}: rows.target must be given, got rows.base with a difference; compose the target with "
            "row_statistics(rows, options, target_out=logits) and pass rows.with_target(logits)"
        )
    if rows.target_is_finished and not finished:
        raise ValueError(
            f"{function}: rows.target must be raw projections, got finished logits (rows.target_is_finished=True); their "
            "normalisers are those of the row_statistics call that wrote them"
        )


def _check_composed(function: str, rows: Rows, allowed: bool) -> None:
    """That a device function can compose the target, and has what it reads."""
    if not allowed:
        raise ValueError(
            f"{function}: rows.composed must be None, got a device function; compose the target with "
            "row_statistics(rows, options, target_out=logits) and pass rows.with_target(logits)"
        )
    streams = {
        name: getattr(rows, name) is not None for name in ("base", "teacher", "reference", "difference", "target")
    }
    if [name for name, given in streams.items() if given] != ["base", "teacher", "reference"]:
        raise ValueError(
            f"{function}: rows.composed needs rows.base, rows.teacher and rows.reference, and neither rows.difference nor "
            f"rows.target, got {' and '.join(name for name, given in streams.items() if given) or 'none of them'}"
        )
    assert rows.composed is not None
    normalisers, shape = rows.composed.normalisers, (rows.student.shape[0], 3)
    _check(normalisers, function, "rows.composed.normalisers", shape, rows.student.device, FLOAT32)
    if not normalisers.is_contiguous():
        raise ValueError(
            f"{function}: rows.composed.normalisers must be contiguous, got strides {normalisers.stride()}"
        )
    if not isinstance(rows.composed.function, type(fma)):
        raise TypeError(
            f"{function}: rows.composed.function must be decorated with triton.jit as this package's kernels are"
            f"{', with TRITON_INTERPRET=1' * INTERPRETED}, got {type(rows.composed.function).__name__}"
        )


def composing(rows: Rows) -> tuple[str, ...]:
    """Fields that a composed target's logits, or the gradient after them, may take the place of."""
    return ("base", "difference") if rows.composed is None else ("base", "teacher", "reference")


def check_options(function: str, options: RowOptions) -> None:
    if not isinstance(options, RowOptions):
        raise TypeError(
            f"{function}: options must be a popsd_kernels.RowOptions, got {type(options).__name__}; pass RowOptions(beta=0.5)"
        )


def check_not_minus_student(function: str, options: RowOptions) -> None:
    """For launchers that cannot take a stream that is a difference to the student."""
    check_options(function, options)
    if options.minus_student:
        raise ValueError(
            f"{function}: options.minus_student must be False, got True; pass the stream's own projections, or use "
            "row_statistics and row_loss_gradient, which take a difference to the student's"
        )


def check_output(
    function: str,
    name: str,
    out: torch.Tensor | None,
    rows: Rows,
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    replaceable: Sequence[str] = (),
    untouchable: Sequence[str] = (),
) -> None:
    """An optional [C, V] output. It may be one of the ``replaceable`` streams itself: same start, element size and row stride.

    With any other memory in common, or with memory of ``untouchable`` ones, entries would be overwritten before they are read.
    """
    check_matrix(function, name, out, rows.student.shape, rows.student.device, dtypes)
    if out is None:
        return
    for read in (*untouchable, *replaceable):
        tensor = getattr(rows, read)
        if tensor is None or not share_memory(out, tensor):
            continue
        if read in untouchable:
            raise ValueError(
                f"{function}: {name} must not share memory with rows.{read}, which is read after it is written; got a tensor "
                f"in the memory of rows.{read}; pass other memory{''.join(f', or rows.{x} itself' for x in replaceable)}"
            )
        if not _same_layout(out, tensor):
            raise ValueError(
                f"{function}: {name} must be rows.{read} itself or share no memory with it, got {out.dtype} with row stride "
                f"{out.stride(0)} in the memory of {tensor.dtype} with row stride {tensor.stride(0)}; pass other memory"
            )


def check_device(function: str, name: str, tensor: torch.Tensor) -> None:
    """A device that Triton can launch on in this process."""
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            f"{function}: {name} must be on a GPU, got the CPU, where Triton has an interpreter only; move it with .cuda() or "
            "set the environment variable TRITON_INTERPRET=1 before the first launcher is imported"
        )
    if tensor.device.type not in ("cpu", "cuda", "xpu"):
        raise RuntimeError(
            f"{function}: {name} must be on a GPU that Triton drives, got {tensor.device}; move it with .cuda()"
        )


def check_matrix(
    function: str,
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = FLOATING,
    max_stride: int | None = None,
) -> None:
    """An optional matrix with unit stride along its rows, which start less than ``max_stride`` entries apart."""
    if tensor is None:
        return
    _check(tensor, function, name, shape, device, dtypes)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{function}: {name} must have unit stride along its rows, got strides {tuple(tensor.stride())}; "
            "pass a row-major tensor, for example tensor.contiguous()"
        )
    if max_stride is not None and tensor.shape[0] > 1 and not 0 <= tensor.stride(0) < max_stride:
        raise ValueError(
            f"{function}: {name} must have rows less than {max_stride} entries apart, got strides {tuple(tensor.stride())}; "
            "pass tensor.contiguous()"
        )


def check_vector(
    function: str,
    name: str,
    tensor: torch.Tensor | None,
    length: int,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> None:
    """An optional contiguous [length] tensor."""
    if tensor is None:
        return
    _check(tensor, function, name, (length,), device, dtypes)
    if length > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{function}: {name} must be contiguous, got stride {tensor.stride(0)}; pass .contiguous()")


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether any byte belongs to both of two matrices of unit inner stride, which may be views of one buffer."""
    if 0 in (one.numel(), other.numel()) or one.device != other.device:
        return False
    sizes = [x.element_size() for x in (one, other)]
    pitches = [x.stride(0) * size for x, size in zip((one, other), sizes, strict=True)]
    widths = [x.shape[1] * size for x, size in zip((one, other), sizes, strict=True)]
    distance = other.data_ptr() - one.data_ptr()
    counts = (one.shape[0], other.shape[0])
    ends = [(count - 1) * pitch + width for count, pitch, width in zip(counts, pitches, widths, strict=True)]
    if distance >= ends[0] or -distance >= ends[1]:
        return False
    if 1 in counts or pitches[0] != pitches[1] or pitches[0] == 0:
        return True
    distance %= pitches[0]  # columns of one buffer
    return distance < widths[0] or distance + widths[1] > pitches[0]


def _same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.element_size() == other.element_size()
        and (one.shape[0] == 1 or one.stride(0) == other.stride(0))
    )


def _check(
    tensor: torch.Tensor,
    function: str,
    name: str,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{function}: {name} must be on {device} like the first argument, got {tensor.device}; move it with .to()"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{function}: {name} must have shape {list(shape)}, got {list(tensor.shape)}; slice or reshape it"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{function}: {name} must be {expected}, got {tensor.dtype}; convert it with .to()")
