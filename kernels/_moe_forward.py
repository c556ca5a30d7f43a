"""The first product of an expert, with the gather of its tokens before and SwiGLU after it."""

import triton
import triton.language as tl

from fastprimer.kernels._moe import grouped_place, multiply, rows_of
from fastprimer.kernels.swiglu import _sigma


@triton.jit
def moe_hidden_kernel(
    x_ptr, gate_up_ptr, order_ptr, offsets_ptr, work_ptr, hidden_ptr, u_ptr,
    stride_x_row, stride_matrix_expert, stride_row, stride_column, tiles, E, C, F,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile, BLOCK_N columns of each half. x (N, C), gate_up (E, 2F, C) by strides -> hidden (P, 2F) by pair, u (P, F) by position.

    u is made from hidden as it is stored, rounded to x's type, for that is what backward will see.
    """
    tile, block = grouped_place(tl.program_id(0), tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(work_ptr + tile)
    if expert < 0:
        return
    position, pair, exists = rows_of(order_ptr, offsets_ptr, work_ptr, tile, tiles, expert, BLOCK_M)
    # Both halves in one product: the wider it is, the less of the rows' tile is read for a multiplication.
    both = tl.arange(0, 2 * BLOCK_N)[None, :]
    f = block * BLOCK_N + both % BLOCK_N
    ab = multiply(
        x_ptr + (pair // K * stride_x_row)[:, None], gate_up_ptr + expert.to(tl.int64) * stride_matrix_expert,
        both // BLOCK_N * F + f, f < F, tl.where(expert < E, C, 0), stride_column, stride_row, BLOCK_M, BLOCK_K, WHOLE_K, WHOLE_N, WIDE,
    )  # fmt: skip
    a, b = tl.split(tl.permute(tl.reshape(ab, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))

    f = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = exists[:, None] & (f < F)
    a, b = a.to(hidden_ptr.dtype.element_ty), b.to(hidden_ptr.dtype.element_ty)
    place = hidden_ptr + (pair * 2 * F)[:, None] + f
    tl.store(place, a, mask=inside)
    tl.store(place + F, b, mask=inside)
    a, b = a.to(WIDE), b.to(WIDE)
    sigma, _ = _sigma(a, 1.0, 0)
    tl.store(u_ptr + (position * F)[:, None] + f, (a * sigma * b).to(u_ptr.dtype.element_ty), mask=inside)
