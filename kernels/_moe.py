"""What the kernels of the mixture of experts share: a program's place, products of an expert's rows, and the sum over K.

A tile is BLOCK_M positions of one bin (_moe_dispatch.py). Positions beyond the bin's end read row 0 of whatever is read, which is
there, and are not stored: a row of a product depends on no other row. In bin E, of experts that do not exist, a product is a sum of
no terms: such an expert is the network that gives 0.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_place(program, tiles, columns, GROUP: tl.constexpr):
    """A tile of rows and a tile of columns. GROUP tiles of rows take the same columns one after the other, and then the next columns:
    an expert's matrix is read once for GROUP · BLOCK_M rows, which themselves stay in the cache.
    """
    first = program // (GROUP * columns) * GROUP
    group = tl.minimum(tiles - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % group, within // group


@triton.jit
def rows_of(order_ptr, offsets_ptr, work_ptr, tile, tiles, expert, BLOCK_M: tl.constexpr):
    """position, pair, and which of them exist, (BLOCK_M,) of a tile of this expert."""
    position = tl.load(work_ptr + tiles + tile) + tl.arange(0, BLOCK_M)
    exists = position < tl.load(offsets_ptr + expert + 1)
    pair = tl.load(order_ptr + position, mask=exists, other=0)
    return tl.where(exists, position, 0).to(tl.int64), pair.to(tl.int64), exists


@triton.jit
def load_left(rows_ptr, first, size, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """(BLOCK_M, BLOCK_K) of rows that begin at rows_ptr (BLOCK_M, 1) and have `size` numbers."""
    k = tl.arange(0, BLOCK_K)[None, :]
    if WHOLE_K:
        return tl.load(rows_ptr + first + k)
    else:
        return tl.load(rows_ptr + first + k, mask=first + k < size, other=0.0)


@triton.jit
def load_right(
    ptr, first, column, inside, size, stride_k, stride_column, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr
):
    """(BLOCK_K, BLOCK_N) of a matrix of `size` rows, those of its columns that are inside: either of its strides may be the 1."""
    k = tl.arange(0, BLOCK_K)[:, None]
    place = ptr + tl.cast(first, tl.int64) * stride_k + (k.to(tl.int64) * stride_k + column.to(tl.int64) * stride_column)
    if WHOLE_K and WHOLE_N:
        return tl.load(place)
    elif WHOLE_K:
        return tl.load(place, mask=inside, other=0.0)
    elif WHOLE_N:
        return tl.load(place, mask=first + k < size, other=0.0)
    else:
        return tl.load(place, mask=(first + k < size) & inside, other=0.0)


@triton.jit
def multiply(
    rows_ptr, matrix_ptr, column, inside, size, stride_k, stride_column,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The rows times these columns (1, columns) of an expert's matrix, where they are inside: all are with WHOLE_N."""
    total = tl.zeros((BLOCK_M, column.shape[1]), WIDE)
    for first in range(0, size, BLOCK_K):
        left = load_left(rows_ptr, first, size, BLOCK_K, WHOLE_K)
        right = load_right(matrix_ptr, first, column, inside, size, stride_k, stride_column, BLOCK_K, WHOLE_K, WHOLE_N)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)  # Triton 3.6 expects float32 otherwise
    return total


@triton.jit
def moe_product_kernel(
    rows_ptr, matrix_ptr, weights_ptr, order_ptr, offsets_ptr, work_ptr, z_ptr,
    stride_matrix_expert, stride_k, stride_column, tiles, E, size, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile. rows (P, size) by position, matrix (E, size, columns) by strides, weights (P,) by pair -> z (P, columns) by pair.

    z = weight · (row matrix[expert]); without weights, just the product.
    """
    tile, block = grouped_place(tl.program_id(0), tiles, tl.cdiv(columns, BLOCK_N), GROUP)
    expert = tl.load(work_ptr + tile)
    if expert < 0:
        return
    position, pair, exists = rows_of(order_ptr, offsets_ptr, work_ptr, tile, tiles, expert, BLOCK_M)
    column = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    z = multiply(
        rows_ptr + (position * size)[:, None], matrix_ptr + expert.to(tl.int64) * stride_matrix_expert, column, column < columns,
        tl.where(expert < E, size, 0), stride_k, stride_column, BLOCK_M, BLOCK_K, WHOLE_K, WHOLE_N, WIDE,
    )  # fmt: skip
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pair, mask=exists & (expert < E), other=0.0).to(WIDE)
        z = z * weight[:, None]
    place = z_ptr + (pair * columns)[:, None] + column
    tl.store(place, z.to(z_ptr.dtype.element_ty), mask=exists[:, None] & (column < columns))


@triton.jit
def moe_combine_kernel(z_ptr, y_ptr, N, K, C, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS x COLUMNS of y. z (N, K, C) -> y (N, C), the sum over k = 0..K-1 in this order."""
    blocks = tl.cdiv(C, COLUMNS)
    row = ((tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < N) & (column < C)
    y = tl.zeros((ROWS, COLUMNS), WIDE)
    for k in range(0, K):
        y += tl.load(z_ptr + (row * K + k) * C + column, mask=inside, other=0.0).to(WIDE)
    tl.store(y_ptr + row * C + column, y.to(y_ptr.dtype.element_ty), mask=inside)
