"""What consumes a strip of the gradient: out += A . B in float32, with or without the tiles that ``skip_below`` drops."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels.launch import Launch, LaunchConfig
from popsd_kernels.streaming_tiles import UPCAST

WIDTH_BLOCK = 64


def add_product(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, flags: torch.Tensor | None, blocks: tuple[int, int]
) -> None:
    """out [I, D] float32 += a [I, K] . b [K, D], accumulated in float32 whatever the operands' common dtype.

    flags: None, or [I tiles, K tiles] int32, contiguous: tiles of ``a`` (``blocks``) to leave out where it is 0.
    """
    if flags is not None:
        plan_skipping_product(out, a, b, flags, blocks).run(out.device)
    elif out.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(out, a, b, out=out, out_dtype=torch.float32)
    else:  # only GPUs have 16-bit products with a float32 result
        torch.addmm(out, a.float(), b.float(), out=out)


def plan_skipping_product(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, flags: torch.Tensor, blocks: tuple[int, int]
) -> Launch:
    """The launch of a product with flags, unchecked."""
    programs = triton.cdiv(a.shape[0], blocks[0]) * triton.cdiv(b.shape[1], WIDTH_BLOCK)
    arguments = {
        "out_ptr": out,
        "out_row_stride": out.stride(0),
        "a_ptr": a,
        "a_strides": tuple(a.stride()),
        "b_ptr": b,
        "b_row_stride": b.stride(0),
        "flags_ptr": flags,
        "flags_row_stride": flags.stride(0),
        "rows": a.shape[0],
        "inner": a.shape[1],
        "D": b.shape[1],
        "BLOCK_I": blocks[0],
        "BLOCK_K": blocks[1],
        "BLOCK_D": WIDTH_BLOCK,
        "num_stages": 1,
    }
    return Launch(skipping_product_kernel, programs, arguments, LaunchConfig(WIDTH_BLOCK, 1, 8))


@triton.jit(do_not_specialize=["flags_row_stride", "rows", "inner"])
def skipping_product_kernel(
    out_ptr,
    out_row_stride,
    a_ptr,
    a_strides,
    b_ptr,
    b_row_stride,
    flags_ptr,
    flags_row_stride,
    rows,
    inner,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per tile of ``out``, which it alone reads and writes; it walks over K in order."""
    i_tiles = tl.cdiv(rows, BLOCK_I)
    i_tile, d_tile = tl.program_id(0) % i_tiles, tl.program_id(0) // i_tiles
    i = i_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    near_i = tl.minimum(tl.arange(0, BLOCK_I), rows - 1 - i_tile * BLOCK_I)
    a_ptr += tl.cast(i_tile * BLOCK_I, tl.int64) * a_strides[0]
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for k_tile in range(tl.cdiv(inner, BLOCK_K)):
        if tl.load(flags_ptr + i_tile * flags_row_stride + k_tile) != 0:
            first = tl.cast(k_tile * BLOCK_K, tl.int64)
            left = inner - k_tile * BLOCK_K
            near_k = tl.minimum(tl.arange(0, BLOCK_K), left - 1)
            a = tl.load(
                a_ptr + first * a_strides[1] + (near_i[:, None] * a_strides[0] + near_k[None, :] * a_strides[1]),
                mask=tl.arange(0, BLOCK_K)[None, :] < left,
                other=0.0,
            )
            b = tl.load(b_ptr + first * b_row_stride + (near_k[:, None] * b_row_stride + tl.minimum(d, D - 1)[None, :]))
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
    pointers = out_ptr + i.to(tl.int64)[:, None] * out_row_stride + d[None, :]
    inside = (i[:, None] < rows) & (d[None, :] < D)
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + total, mask=inside)
