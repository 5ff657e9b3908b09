"""The checks that every launcher makes before any launch: shapes, dtypes, devices, memory that is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from popsd_kernels.launch import INTERPRETED

MAX_VOCABULARY = 2**31 - 2**16
"""Column offsets are 32-bit; only row offsets are 64-bit."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(
    function: str, shape: Sequence[int], device: torch.device, tensors: Mapping[str, torch.Tensor | None]
) -> None:
    """Every given tensor: [C, V] of ``shape``, on ``device``, float32/bfloat16/float16, unit inner stride."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check(tensor, function, name, shape, device, FLOATING)
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{function}: {name} must have unit stride along the vocabulary, got strides {tuple(tensor.stride())}; "
                "pass a row-major tensor, for example tensor.contiguous()"
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


def check_matrix_shape(function: str, name: str, tensor: torch.Tensor) -> None:
    """The tensor that fixes C and V."""
    if tensor.dim() != 2 or not 0 < tensor.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"{function}: {name} must be [tokens, vocabulary] with 1 to {MAX_VOCABULARY} columns, got "
            f"{list(tensor.shape)}; flatten leading dimensions with .reshape(-1, vocabulary)"
        )


def check_device(function: str, name: str, tensor: torch.Tensor) -> None:
    """A device that Triton can launch on in this process."""
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            f"{function}: {name} is on the CPU, where Triton kernels cannot run; move it to a GPU, use impl='torch', "
            "or set TRITON_INTERPRET=1 before popsd_kernels is imported to run the interpreter"
        )
    if tensor.device.type not in ("cpu", "cuda", "xpu"):
        raise RuntimeError(f"{function}: {name} is on {tensor.device}, which Triton does not drive; use impl='torch'")


def check_not_relative(function: str, relative: bool) -> None:
    """Only the two sweeps take a target that is a difference to the student."""
    if relative:
        raise ValueError(
            f"{function}: options.relative must be False, got True; use row_statistics and row_loss_gradient, or pass the "
            "target's own projections"
        )


def check_no_reinterpretation(
    function: str, written: str, out: torch.Tensor | None, **read: torch.Tensor | None
) -> None:
    """``out`` may start where an input starts only as the same tensor layout: another element size would be overwritten
    by neighbours before it is read."""
    for name, tensor in read.items():
        if out is None or tensor is None or out.numel() == 0 or out.data_ptr() != tensor.data_ptr():
            continue
        if out.element_size() != tensor.element_size() or (out.shape[0] > 1 and out.stride(0) != tensor.stride(0)):
            raise ValueError(
                f"{function}: {written} shares memory with {name} but has another dtype size or row stride "
                f"({out.dtype}, {out.stride(0)} against {tensor.dtype}, {tensor.stride(0)}); use other memory"
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
        raise ValueError(f"{function}: {name} must be on {device} like the first argument, got {tensor.device}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{function}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{function}: {name} must be one of {expected}, got {tensor.dtype}; convert it with .to()")
