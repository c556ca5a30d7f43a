"""The backward pass of the experts: the gradient of hidden, and of an expert's matrices. u comes back from hidden."""

import triton
import triton.language as tl

from fastprimer.kernels._moe import grouped_place, multiply, rows_of
from fastprimer.kernels.swiglu import _sigma


@triton.jit
def _store_dhidden(
    d, weights_ptr, hidden_ptr, dhidden_ptr, wu_ptr, position, pair, exists, first, F, AT_ONCE: tl.constexpr, WIDE: tl.constexpr
):
    """From columns first.. of d, store those of dhidden and w u; what they add to dweights, (BLOCK_M,).

    AT_ONCE columns at a time: what all of them need at once does not fit into the registers.
    """
    HALF: tl.constexpr = d.shape[1] // 2
    if d.shape[1] > AT_ONCE:
        left, right = tl.split(tl.permute(tl.reshape(d, (d.shape[0], 2, HALF)), (0, 2, 1)))
        share = _store_dhidden(left, weights_ptr, hidden_ptr, dhidden_ptr, wu_ptr, position, pair, exists, first, F, AT_ONCE, WIDE)
        first += HALF
        return share + _store_dhidden(right, weights_ptr, hidden_ptr, dhidden_ptr, wu_ptr, position, pair, exists, first, F, AT_ONCE, WIDE)
    f = (first + tl.arange(0, d.shape[1]))[None, :]
    inside = exists[:, None] & (f < F)
    w = tl.load(weights_ptr + pair, mask=exists, other=0.0).to(WIDE)[:, None]
    place = hidden_ptr + (pair * 2 * F)[:, None] + f
    a = tl.load(place, mask=inside, other=0.0).to(WIDE)
    b = tl.load(place + F, mask=inside, other=0.0).to(WIDE)
    sigma, sigma_slope = _sigma(a, 1.0, 0)
    u = a * sigma * b
    tl.store(wu_ptr + (position * F)[:, None] + f, (w * u).to(wu_ptr.dtype.element_ty), mask=inside)
    du = w * d
    place = dhidden_ptr + (position * 2 * F)[:, None] + f
    tl.store(place, (du * (sigma + a * sigma_slope) * b).to(dhidden_ptr.dtype.element_ty), mask=inside)
    tl.store(place + F, (du * (a * sigma)).to(dhidden_ptr.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, d * u, 0.0), 1)


@triton.jit
def moe_dhidden_kernel(
    dy_ptr, down_ptr, weights_ptr, hidden_ptr, order_ptr, offsets_ptr, work_ptr, dhidden_ptr, wu_ptr, partial_ptr,
    stride_dy_row, stride_matrix_expert, stride_row, stride_column, tiles, E, C, F,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile. dy (N, C), down (E, C, F) by strides, weights (P,), hidden (P, 2F) by pair -> dhidden (P, 2F), wu (P, F) by position.

    And partial (P, blocks) by pair: what these columns add to dweights = d · u.
    """
    blocks = tl.cdiv(F, BLOCK_N)
    tile, block = grouped_place(tl.program_id(0), tiles, blocks, GROUP)
    expert = tl.load(work_ptr + tile)
    if expert < 0:
        return
    position, pair, exists = rows_of(order_ptr, offsets_ptr, work_ptr, tile, tiles, expert, BLOCK_M)
    f = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    d = multiply(
        dy_ptr + (pair // K * stride_dy_row)[:, None], down_ptr + expert.to(tl.int64) * stride_matrix_expert, f, f < F,
        tl.where(expert < E, C, 0), stride_row, stride_column, BLOCK_M, BLOCK_K, WHOLE_K, WHOLE_N, WIDE,
    )  # fmt: skip
    AT_ONCE: tl.constexpr = min(32, BLOCK_N // 2)
    share = _store_dhidden(d, weights_ptr, hidden_ptr, dhidden_ptr, wu_ptr, position, pair, exists, block * BLOCK_N, F, AT_ONCE, WIDE)
    tl.store(partial_ptr + pair * blocks + block, share, mask=exists)


@triton.jit
def _load_rows(
    ptr, order_ptr, first, end, column, columns, stride_row,
    K: tl.constexpr, GATHERED: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, columns) from the first position, of a tensor's rows by token (GATHERED) or by position; what does not exist is 0.

    WHOLE_K: all positions are before the end, WHOLE: all columns exist. What changes from one turn of a loop to the next is one
    address for all threads, where it can be.
    """
    k = tl.arange(0, BLOCK_K)
    exists = first + k < end
    if GATHERED:
        pair = tl.load(order_ptr + first + k) if WHOLE_K else tl.load(order_ptr + first + k, mask=exists, other=0)
        place = ptr + ((pair // K).to(tl.int64)[:, None] * stride_row + column)
    else:
        place = ptr + tl.cast(first, tl.int64) * stride_row + (k.to(tl.int64)[:, None] * stride_row + column)
    if WHOLE_K and WHOLE:
        return tl.load(place)
    elif WHOLE_K:
        return tl.load(place, mask=column < columns, other=0.0)
    elif WHOLE:
        return tl.load(place, mask=exists[:, None], other=0.0)
    else:
        return tl.load(place, mask=exists[:, None] & (column < columns), other=0.0)


@triton.jit
def _add_rows(
    total, left_ptr, right_ptr, order_ptr, first, end, m, n, rows, columns, stride_left_row, stride_right_row,
    K: tl.constexpr, LEFT_GATHERED: tl.constexpr, RIGHT_GATHERED: tl.constexpr,
    BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """total + left[position]ᵀ right[position] over BLOCK_K positions from `first`, those before the end."""
    left = _load_rows(left_ptr, order_ptr, first, end, m, rows, stride_left_row, K, LEFT_GATHERED, BLOCK_K, WHOLE_K, WHOLE_M)
    right = _load_rows(right_ptr, order_ptr, first, end, n, columns, stride_right_row, K, RIGHT_GATHERED, BLOCK_K, WHOLE_K, WHOLE_N)
    return tl.dot(tl.trans(left), right, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def moe_gradient_kernel(
    left_ptr, right_ptr, order_ptr, offsets_ptr, gradient_ptr, stride_left_row, stride_right_row, rows, columns,
    K: tl.constexpr, LEFT_GATHERED: tl.constexpr, RIGHT_GATHERED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient. left (·, rows), right (·, columns) -> gradient (E, rows, columns), contiguous.

    gradient[e] = the sum over e's positions of left[position]ᵀ right[position], in this order; 0 for an expert without any.
    """
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    expert = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    block_m, block_n = grouped_place(tl.program_id(0) % (row_blocks * column_blocks), row_blocks, column_blocks, GROUP)
    m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    rest = end - (end - begin) % BLOCK_K  # the last positions apart, so that the others need no masks
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for first in range(begin, rest, BLOCK_K):
        total = _add_rows(
            total, left_ptr, right_ptr, order_ptr, first, end, m, n, rows, columns, stride_left_row, stride_right_row,
            K, LEFT_GATHERED, RIGHT_GATHERED, BLOCK_K, True, WHOLE_M, WHOLE_N,
        )  # fmt: skip
    if rest < end:
        total = _add_rows(
            total, left_ptr, right_ptr, order_ptr, rest, end, m, n, rows, columns, stride_left_row, stride_right_row,
            K, LEFT_GATHERED, RIGHT_GATHERED, BLOCK_K, False, WHOLE_M, WHOLE_N,
        )  # fmt: skip

    m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    place = gradient_ptr + (expert * rows + m) * columns + n
    tl.store(place, total.to(gradient_ptr.dtype.element_ty), mask=(m < rows) & (n < columns))
