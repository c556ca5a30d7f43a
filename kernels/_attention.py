"""What the attention kernels share: a program's place, which keys a query sees, tiles of rows, and the softcap.

Rows of a tile are queries, or keys; what lies beyond the end of a sequence reads as 0, whatever is stored there.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place_of(program, tiles, heads):
    """tile, head, sequence: the tiles of one head follow each other, so that its keys and values stay in the cache."""
    return program % tiles, (program // tiles % heads).to(tl.int64), (program // tiles // heads).to(tl.int64)


@triton.jit
def sequence(cu_seqlens_ptr, batch, length):
    """Where a packed sequence starts and how many tokens it has; a dense one starts at 0 and has `length`."""
    if cu_seqlens_ptr is None:
        return 0, length
    else:
        start = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        return start, (tl.load(cu_seqlens_ptr + batch + 1) - start).to(tl.int32)


@triton.jit
def _at(ptr, first, row, stride_row, WIDTH: tl.constexpr):
    """Where the numbers lie: one 64-bit product for the tile, so that a loop keeps the places within it."""
    return ptr + tl.cast(first, tl.int64) * stride_row + (row.to(tl.int64)[:, None] * stride_row + tl.arange(0, WIDTH)[None, :])


@triton.jit
def tiles_of(ptr, heads, rows, stride_head, stride_row, ROWS: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """What load_tile reads tiles of ROWS rows from: the pointer, or with TMA a descriptor of these heads of one sequence."""
    if TMA:
        return tl.make_tensor_descriptor(ptr, [heads, tl.maximum(rows, 1), C], [stride_head, stride_row, 1], [1, ROWS, C])
    else:
        return ptr


@triton.jit
def load_tile(
    tiles, head, stride_head, first, rows, stride_row,
    ROWS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows first.. of C numbers of one head, 0 in the columns C..WIDTH; with CHECKED also in the rows beyond the last."""
    if TMA:  # which itself reads 0 beyond the last row
        return tiles.load([head, first, 0]).reshape(ROWS, WIDTH)
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        place = _at(tiles + tl.cast(head, tl.int64) * stride_head, first, row, stride_row, WIDTH)
        if CHECKED and C < WIDTH:
            return tl.load(place, mask=(first + row < rows)[:, None] & (column < C)[None, :], other=0.0)
        elif CHECKED:
            return tl.load(place, mask=(first + row < rows)[:, None], other=0.0)
        elif C < WIDTH:
            return tl.load(place, mask=(column < C)[None, :], other=0.0)
        else:
            return tl.load(place)


@triton.jit
def store_tile(ptr, tile, first, rows, stride_row, C: tl.constexpr, CHECKED: tl.constexpr):
    ROWS: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    place, number = _at(ptr, first, row, stride_row, WIDTH), tile.to(ptr.dtype.element_ty)
    if CHECKED or C < WIDTH:
        tl.store(place, number, mask=(first + row < rows)[:, None] & (column < C)[None, :])
    else:
        tl.store(place, number)


@triton.jit
def visible_range(
    first, rows, columns, before, after, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):
    """begin <= full_begin <= full_end: the blocks of COLUMNS columns that rows first.. of a tile see.

    Row i sees column j if i + columns - rows - before <= j <= i + columns - rows + after. No row sees anything outside
    begin..end, and every row sees all of full_begin..full_end. Rows are queries and columns keys, or, with before and after
    exchanged, rows are keys and columns the queries that see them.
    """
    shift = columns - rows
    last = tl.minimum(first + ROWS, rows) - 1
    begin, full_begin, full_end, end = 0, 0, columns, columns
    if BEFORE:
        begin = tl.maximum(first + shift - before, 0) // COLUMNS * COLUMNS
        full_begin = tl.cdiv(tl.maximum(last + shift - before, 0), COLUMNS) * COLUMNS
    if AFTER:
        end = tl.minimum(tl.maximum(last + shift + after + 1, 0), columns)
        full_end = tl.minimum(tl.maximum(first + shift + after + 1, 0), columns)
    full_begin = tl.minimum(full_begin, tl.cdiv(end, COLUMNS) * COLUMNS)
    full_end = tl.maximum(full_end // COLUMNS * COLUMNS, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def visible(row, key, shift, T, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which key each query sees, with shift = T - S; row and key broadcast against each other."""
    distance = key - row - shift
    sees = key < T
    if LEFT:
        sees = sees & (distance >= -left)
    if RIGHT:
        sees = sees & (distance <= right)
    return sees


@triton.jit
def tanh(x):
    """To three units in the last place: near 0 an odd polynomial (a Chebyshev fit), where 1 - 2 / (exp 2x + 1) would cancel."""
    a = tl.abs(x)
    u = a * a
    polynomial = 0.0023734867
    polynomial = polynomial * u - 0.0084125256
    polynomial = polynomial * u + 0.0217890974
    polynomial = polynomial * u - 0.0539616518
    polynomial = polynomial * u + 0.1333331332
    polynomial = polynomial * u - 0.3333333323
    far = 1 - 2 / (tl.exp2(a * (2 * LOG2_E)) + 1)
    t = tl.where(a < 0.6, a + a * u * polynomial, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def _halves(x):
    """Two (rows, WIDTH / 2) of x (rows, WIDTH): the even and the odd columns."""
    return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))


@triton.jit
def scores(q, k):
    """q kᵀ. In float32 a sum of 256 products one after another errs by more than a library's: it is made of two.

    Backward makes them again, and they must be forward's: p is 2 to the power of their difference from lse.
    """
    if q.dtype == tl.float32 and q.shape[1] > 128:
        q_even, q_odd = _halves(q)
        k_even, k_odd = _halves(k)
        even = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
        return even + tl.dot(q_odd, tl.trans(k_odd), input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def online_softmax(s, top, total, slope, MASKED: tl.constexpr):
    """p = 2^(slope s - top) with the new top, the factor for what was summed with the old one, top and total."""
    new_top = tl.maximum(top, tl.max(s, 1) * slope)
    shift = new_top
    if MASKED:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # A row that has seen nothing yet.
    rescale = tl.exp2(top - shift)
    p = tl.exp2(s * slope - shift[:, None])
    return p, rescale, new_top, total * rescale + tl.sum(p, 1)
