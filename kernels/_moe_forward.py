"""The first product of an expert, with the gather of its tokens before and SwiGLU after it."""

import triton
import triton.language as tl

from fastprimer.kernels._moe import load_left, load_right, place_of, rows_of
from fastprimer.kernels.swiglu import _sigma


@triton.jit
def moe_hidden_kernel(
    x_ptr, gate_up_ptr, order_ptr, offsets_ptr, work_ptr, hidden_ptr, u_ptr,
    stride_x_row, stride_matrix_expert, stride_row, stride_column, tiles, E, K, C, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile, BLOCK_N columns of each half. x (N, C), gate_up (E, 2F, C) by strides -> hidden (P, 2F) by pair, u (P, F) by position.

    u is made from hidden as it is stored, rounded to x's type, for that is what backward will see.
    """
    tile, block = place_of(tl.program_id(0), tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(work_ptr + tile)
    if expert < 0:
        return
    position, pair, exists = rows_of(order_ptr, offsets_ptr, work_ptr, tile, tiles, expert, BLOCK_M)
    f = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    x_rows = x_ptr + (pair // K * stride_x_row)[:, None]
    gate_ptr = gate_up_ptr + expert.to(tl.int64) * stride_matrix_expert
    up_ptr = gate_ptr + tl.cast(F, tl.int64) * stride_row
    a = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    b = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for first in range(0, tl.where(expert < E, C, 0), BLOCK_K):
        x = load_left(x_rows, first, C, BLOCK_K, WHOLE_K)
        gate = load_right(gate_ptr, first, f, C, F, stride_column, stride_row, BLOCK_K, WHOLE_K)
        up = load_right(up_ptr, first, f, C, F, stride_column, stride_row, BLOCK_K, WHOLE_K)
        a = tl.dot(x, gate, a, input_precision="ieee")
        b = tl.dot(x, up, b, input_precision="ieee")

    inside = exists[:, None] & (f < F)
    a, b = a.to(hidden_ptr.dtype.element_ty), b.to(hidden_ptr.dtype.element_ty)
    place = hidden_ptr + (pair * 2 * F)[:, None] + f
    tl.store(place, a, mask=inside)
    tl.store(place + F, b, mask=inside)
    a, b = a.to(WIDE), b.to(WIDE)
    sigma, _ = _sigma(a, 1.0, 0)
    tl.store(u_ptr + (position * F)[:, None] + f, (a * sigma * b).to(u_ptr.dtype.element_ty), mask=inside)
