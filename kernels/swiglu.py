"""SwiGLU and its relatives in Triton. The mathematics stands in fastprimer/ops/swiglu.py.

Every tensor is seen as N rows of F numbers, contiguous within a row: gate and up may be the two halves of one projection, read
where they lie. If no tensor has gaps between its rows, all of it is one long row. A program works on a tile of ROWS x COLUMNS
numbers: COLUMNS numbers of one row, or several rows where F is small.

The activation's four numbers are compile-time constants: without beta or limit their arithmetic is not there.

Bytes moved, with b bytes a number, N·F times: forward 3b (gate, up, y), backward 5b (dy, gate, up, dgate, dup).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprimer.kernels._launch import as_rows, on_device, wide

NUMBERS_IN_TILE = 1024


class Tile(NamedTuple):
    ROWS: int
    COLUMNS: int
    num_warps: int


def tile(N: int, F: int) -> Tile:
    """The tile for N rows of F numbers: 8 numbers a thread, which are 16 bytes of a half type."""
    columns = min(NUMBERS_IN_TILE, triton.next_power_of_2(F))
    rows = min(NUMBERS_IN_TILE // columns, triton.next_power_of_2(N))
    return Tile(rows, columns, max(1, rows * columns // 256))


@triton.jit
def _place(N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 1) rows and (1, COLUMNS) columns of this program's tile, and (ROWS, COLUMNS): which of them exist."""
    blocks = tl.cdiv(F, COLUMNS)
    row = ((tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < N) & (column < F)


@triton.jit
def _clamp(a, b, LIMIT: tl.constexpr):
    """a_L = min(a, L), b_L = max(-L, min(b, L)); a NaN stays one."""
    if LIMIT is not None:
        limit = tl.full((), LIMIT, a.dtype)
        a = tl.where(a > limit, limit, a)
        b = tl.where(b > limit, limit, tl.where(b < -limit, -limit, b))
    return a, b


@triton.jit
def _sigma(a, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """sigma(t) and sigma(t) sigma(-t) for t = a (alpha + beta a^2): with e = exp(-|t|) nothing overflows or cancels."""
    if BETA != 0:
        t = a * (ALPHA + BETA * a * a)
    else:
        t = a * ALPHA
    e = tl.exp(-tl.abs(t))
    r = 1 / (1 + e)
    return tl.where(t < 0, e * r, r), e * r * r


@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gate_row, stride_up_row, N, F,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile. gate, up (N, F) with row strides -> y (N, F) contiguous."""
    row, column, inside = _place(N, F, ROWS, COLUMNS)
    a = tl.load(gate_ptr + row * stride_gate_row + column, mask=inside, other=0.0).to(WIDE)
    b = tl.load(up_ptr + row * stride_up_row + column, mask=inside, other=0.0).to(WIDE)
    a, b = _clamp(a, b, LIMIT)
    sigma, _ = _sigma(a, ALPHA, BETA)
    tl.store(y_ptr + row * F + column, (a * sigma * (b + OFFSET)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_dy_row, stride_gate_row, stride_up_row, stride_gradient_row, N, F,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile. dy, gate, up (N, F) with row strides -> dgate, dup (N, F) with one row stride: they may be halves of one tensor."""
    row, column, inside = _place(N, F, ROWS, COLUMNS)
    dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=inside, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * stride_gate_row + column, mask=inside, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * stride_up_row + column, mask=inside, other=0.0).to(WIDE)
    dy_a, dy_b = dy, dy
    if LIMIT is not None:  # A clamp passes a gradient on only where it does not clamp.
        limit = tl.full((), LIMIT, WIDE)
        dy_a = tl.where(gate > limit, 0.0, dy)
        dy_b = tl.where(tl.abs(up) > limit, 0.0, dy)
    a, b = _clamp(gate, up, LIMIT)
    sigma, sigma_slope = _sigma(a, ALPHA, BETA)
    p = a * sigma_slope
    slope = sigma + ALPHA * p
    if BETA != 0:
        slope += 3 * BETA * p * a * a
    # slope is at most 1.13 and |a sigma| at most |a|: multiplied first, they keep the products from overflowing before the results do.
    dgate = dy_a * slope * (b + OFFSET)
    dup = dy_b * (a * sigma)
    place = row * stride_gradient_row + column
    tl.store(dgate_ptr + place, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + place, dup.to(dup_ptr.dtype.element_ty), mask=inside)


def rows(x: Tensor) -> Tensor:
    """x as (N, F) with contiguous rows; a scalar is one row of one number."""
    return as_rows(x if x.dim() else x.reshape(1))


def halves(gate: Tensor, up: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """gate and up as rows (N, F), be they two tensors or the halves of one."""
    return rows(gate).chunk(2, dim=1) if up is None else (rows(gate), rows(up))


def joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (N, F) as one row (1, N·F) each, if none has gaps between its rows."""
    return tuple(t.view(1, -1) for t in tensors) if all(t.is_contiguous() for t in tensors) else tensors


def swiglu_forward(gate: Tensor, up: Optional[Tensor], alpha: float, beta: float, limit: Optional[float], offset: float) -> Tensor:
    """gate, up (..., F), or gate (..., 2F) and no up -> y (..., F)."""
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    y = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        a, b, y_rows = joined(*halves(gate, up), rows(y))
        N, F = y_rows.shape
        ROWS, COLUMNS, num_warps = tile(N, F)
        with on_device(gate):
            swiglu_forward_kernel[(triton.cdiv(N, ROWS) * triton.cdiv(F, COLUMNS),)](
                a, b, y_rows, a.stride(0), b.stride(0), N, F,
                alpha, beta, limit, offset, wide(gate), ROWS, COLUMNS, num_warps=num_warps,
            )  # fmt: skip
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Optional[Tensor], alpha: float, beta: float, limit: Optional[float], offset: float
) -> tuple[Tensor, Tensor]:
    """dy (..., F) and forward's inputs -> dgate, dup (..., F), or dgate (..., 2F) and (0,) without up."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    if dgate.numel():
        dy_rows, a, b, dgate_rows, dup_rows = joined(rows(dy), *halves(gate, up), *halves(dgate, dup))
        N, F = dy_rows.shape
        ROWS, COLUMNS, num_warps = tile(N, F)
        with on_device(gate):
            swiglu_backward_kernel[(triton.cdiv(N, ROWS) * triton.cdiv(F, COLUMNS),)](
                dy_rows, a, b, dgate_rows, dup_rows, dy_rows.stride(0), a.stride(0), b.stride(0), dgate_rows.stride(0), N, F,
                alpha, beta, limit, offset, wide(gate), ROWS, COLUMNS, num_warps=num_warps,
            )  # fmt: skip
    return dgate, gate.new_empty(0) if dup is None else dup
