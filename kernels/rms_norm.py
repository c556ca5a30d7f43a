"""RMSNorm in Triton. The mathematics stands in fastprimer/ops/rms_norm.py.

Every tensor is seen as N rows of C numbers, contiguous within a row. A program works on a tile of ROWS x COLUMNS numbers:
several rows where C is small, one row where a tile can hold it. A wider row is split into blocks of COLUMNS: the first stays
in registers, the others are read twice, the second time mostly from the L2 cache (`SPLIT`).

A tensor that is absent is None, which Triton compiles away.

Bytes moved, with b bytes a number, N·C times: forward 2b (x, y), or 4b with residual (and residual, h); backward 3b (dy, h,
dx), or 4b with dh. rstd and the partial sums of dweight, float32 (programs, C), are small beside them.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprimer.kernels._launch import as_rows, on_device, processors


class Limits(NamedTuple):
    packed: int
    """Numbers in a tile of several rows."""
    widest: int
    """Numbers in a row that one tile still holds. Backward keeps dy, h_hat and dweight in registers, forward only h."""


FORWARD, BACKWARD = Limits(2048, 16384), Limits(4096, 8192)
BLOCK = 4096
"""Columns of a tile when the row is split: two blocks are live at a time."""


class Tile(NamedTuple):
    ROWS: int
    COLUMNS: int
    SPLIT: bool
    num_warps: int


def tile(C: int, limits: Limits) -> Tile:
    """The tile for rows of C numbers: 8 numbers a thread, at most 16 warps (what an AMD GPU can still launch)."""
    split = C > limits.widest
    columns = BLOCK if split else triton.next_power_of_2(C)
    rows = max(1, limits.packed // columns)
    return Tile(rows, columns, split, min(16, rows * columns // 256))


def backward_programs(N: int, C: int, device: torch.device) -> int:
    """1024 threads a multiprocessor. A function of shape and device alone: the order of summation, and so the bits, hang on it."""
    choice = tile(C, BACKWARD)
    return min(triton.cdiv(N, choice.ROWS), processors(device) * 32 // choice.num_warps)


@triton.jit
def _at(ptr, row, column, stride_row):
    return (ptr + row * stride_row)[:, None] + column[None, :]


@triton.jit
def _inside(row, column, N, C):
    if row.shape[0] == 1:  # A tile of one row is never beyond the last.
        return (column < C)[None, :]
    else:
        return (row < N)[:, None] & (column < C)[None, :]


@triton.jit
def _load_h(x_ptr, residual_ptr, row, column, stride_x_row, stride_residual_row, N, C):
    """h = x + residual as it is stored, rounded to x's type."""
    inside = _inside(row, column, N, C)
    h = tl.load(_at(x_ptr, row, column, stride_x_row), mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(_at(residual_ptr, row, column, stride_residual_row), mask=inside, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def _load_w(weight_ptr, column, C, weight_offset):
    """w = weight + weight_offset, for all rows of a tile; 1 without weight."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < C, other=0.0)
        return (weight.to(tl.float32) + weight_offset)[None, :]
    else:
        return 1.0


@triton.jit
def _store_y(h, rstd, weight_ptr, y_ptr, h_ptr, row, column, N, C, weight_offset):
    inside = _inside(row, column, N, C)
    y = h.to(tl.float32) * rstd[:, None] * _load_w(weight_ptr, column, C, weight_offset)
    tl.store(_at(y_ptr, row, column, C), y.to(h.dtype), mask=inside)
    if h_ptr is not None:
        tl.store(_at(h_ptr, row, column, C), h, mask=inside)


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, stride_x_row, stride_residual_row, N, C, eps, weight_offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of rows. x, residual (N, C) with row strides, weight (C,) -> y, h (N, C) contiguous, rstd (N,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    h = _load_h(x_ptr, residual_ptr, row, column, stride_x_row, stride_residual_row, N, C)
    squares = h.to(tl.float32) * h.to(tl.float32)
    if SPLIT:
        for start in range(COLUMNS, C, COLUMNS):
            block = _load_h(x_ptr, residual_ptr, row, start + column, stride_x_row, stride_residual_row, N, C).to(tl.float32)
            squares += block * block

    rstd = 1 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)  # tl.rsqrt takes a subnormal number for zero
    tl.store(rstd_ptr + row, rstd, mask=row < N)

    _store_y(h, rstd, weight_ptr, y_ptr, h_ptr, row, column, N, C, weight_offset)
    if SPLIT:
        for start in range(COLUMNS, C, COLUMNS):
            block = _load_h(x_ptr, residual_ptr, row, start + column, stride_x_row, stride_residual_row, N, C)
            _store_y(block, rstd, weight_ptr, y_ptr, h_ptr, row, start + column, N, C, weight_offset)


@triton.jit
def _load_dy_h_hat(dy_ptr, h_ptr, rstd, row, column, stride_dy_row, stride_h_row, N, C):
    inside = _inside(row, column, N, C)
    dy = tl.load(_at(dy_ptr, row, column, stride_dy_row), mask=inside, other=0.0).to(tl.float32)
    h = tl.load(_at(h_ptr, row, column, stride_h_row), mask=inside, other=0.0).to(tl.float32)
    return dy, h * rstd[:, None]


@triton.jit
def _store_dx(g, h_hat, rstd, mean, dh_ptr, dx_ptr, row, column, stride_dh_row, N, C):
    """dx = rstd (g - h_hat mean(g h_hat)) + dh"""
    inside = _inside(row, column, N, C)
    dx = rstd[:, None] * (g - h_hat * mean[:, None])
    if dh_ptr is not None:
        dx += tl.load(_at(dh_ptr, row, column, stride_dh_row), mask=inside, other=0.0).to(tl.float32)
    tl.store(_at(dx_ptr, row, column, C), dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, stride_dy_row, stride_dh_row, stride_h_row, N, C, weight_offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of rows, so that neighbours in time are neighbours in memory.

    dy, dh, h (N, C) with row strides, weight (C,), rstd (N,) -> dx (N, C) contiguous, partial (num_programs, C): this
    program's share of dweight. The first block's share is summed in registers, the others in `partial` itself, which then
    has to come in as zeros.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_row in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        row = first_row + tl.arange(0, ROWS).to(tl.int64)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        dy, h_hat = _load_dy_h_hat(dy_ptr, h_ptr, rstd, row, column, stride_dy_row, stride_h_row, N, C)
        g = dy * _load_w(weight_ptr, column, C, weight_offset)
        products = g * h_hat
        if SPLIT:
            for start in range(COLUMNS, C, COLUMNS):
                dy_block, h_hat_block = _load_dy_h_hat(dy_ptr, h_ptr, rstd, row, start + column, stride_dy_row, stride_h_row, N, C)
                products += dy_block * _load_w(weight_ptr, start + column, C, weight_offset) * h_hat_block

        mean = tl.sum(products, 1) / C

        _store_dx(g, h_hat, rstd, mean, dh_ptr, dx_ptr, row, column, stride_dh_row, N, C)
        dweight += dy * h_hat
        if SPLIT:
            tl.debug_barrier()  # What other threads added to `partial` for the row before must be visible.
            for start in range(COLUMNS, C, COLUMNS):
                dy_block, h_hat_block = _load_dy_h_hat(dy_ptr, h_ptr, rstd, row, start + column, stride_dy_row, stride_h_row, N, C)
                g_block = dy_block * _load_w(weight_ptr, start + column, C, weight_offset)
                _store_dx(g_block, h_hat_block, rstd, mean, dh_ptr, dx_ptr, row, start + column, stride_dh_row, N, C)
                if partial_ptr is not None:
                    share_ptr = partial_ptr + program * C + start + column
                    share = tl.load(share_ptr, mask=start + column < C, other=0.0)
                    tl.store(share_ptr, share + tl.sum(dy_block * h_hat_block, 0), mask=start + column < C)

    if partial_ptr is not None:
        tl.store(partial_ptr + program * C + column, tl.sum(dweight, 0), mask=column < C)


def rms_norm_forward(
    x: Tensor, weight: Optional[Tensor], eps: float, residual: Optional[Tensor], weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., C) -> y (..., C), h (..., C) or (0,) without residual (h is x then), rstd (...)."""
    C = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        x_rows = as_rows(x)
        residual_rows = None if residual is None else as_rows(residual)
        weight = None if weight is None else weight.contiguous()
        ROWS, COLUMNS, SPLIT, num_warps = tile(C, FORWARD)
        N = x_rows.shape[0]
        with on_device(x):
            rms_norm_forward_kernel[(triton.cdiv(N, ROWS),)](
                x_rows, residual_rows, weight, y, h, rstd, x_rows.stride(0), C if residual is None else residual_rows.stride(0),
                N, C, eps, weight_offset, ROWS, COLUMNS, SPLIT, num_warps=num_warps,
            )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, rstd


def rms_norm_backward(
    dy: Tensor, dh: Optional[Tensor], h: Tensor, weight: Optional[Tensor], rstd: Tensor, weight_offset: float, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dy, dh, h (..., C), rstd (...) -> dx (..., C), which is dresidual too, and dweight (C,), or (0,) where nobody needs it.

    torch sums the partials: an order that the shape alone decides; 4 C bytes of a program, little beside those of its rows.
    """
    C = h.shape[-1]
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    N = h.numel() // C
    ROWS, COLUMNS, SPLIT, num_warps = tile(C, BACKWARD)
    programs = backward_programs(N, C, h.device)
    partial = None
    if weight is not None and needs_dweight:
        partial = (torch.zeros if SPLIT else torch.empty)((programs, C), dtype=torch.float32, device=h.device)
    if programs:
        dy_rows, h_rows = as_rows(dy), as_rows(h)
        dh_rows = None if dh is None else as_rows(dh)
        with on_device(h):
            rms_norm_backward_kernel[(programs,)](
                dy_rows, dh_rows, h_rows, None if weight is None else weight.contiguous(), rstd.contiguous(), dx, partial,
                dy_rows.stride(0), C if dh is None else dh_rows.stride(0), h_rows.stride(0),
                N, C, weight_offset, ROWS, COLUMNS, SPLIT, num_warps=num_warps,
            )  # fmt: skip
    dtype = h.dtype if weight is None else weight.dtype
    return dx, h.new_empty(0, dtype=dtype) if partial is None else partial.sum(0).to(dtype)
