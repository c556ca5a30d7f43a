"""The two passes of cross-entropy over a tile of logits: fold them into a token's loss, and turn them into their gradient.

A piece is columns first .. first + columns of the vocabulary, all of them or some; bias and target count from column 0 of all of them.

What a lane of the fold has seen of its columns is m, the largest z, s = Σ exp(z − m), and the column of m; lanes are brought together
once, at the end of the piece. A NaN is above all numbers, where torch.argmax puts it, and stays. s of a lane that has seen nothing
but −infinity counts them, which is right if all of the row is −infinity, and otherwise is multiplied by exp(−infinity) = 0.
"""

import triton
import triton.language as tl

from fastprimer.kernels._attention import tanh
from fastprimer.ops.cross_entropy import BLOCK as KEPT_BLOCK
from fastprimer.ops.cross_entropy import STEPS as KEPT_STEPS
from fastprimer.ops.cross_entropy import TOP as KEPT_TOP

NOBODY = tl.constexpr(0x7FFFFFFF)
BLOCK, STEPS, TOP = tl.constexpr(KEPT_BLOCK), tl.constexpr(KEPT_STEPS), tl.constexpr(KEPT_TOP)
LOWEST, HIGHEST = tl.constexpr(-(2.0**15)), tl.constexpr(2.0**15 - 1)
"""What is kept in 16 bits: columns that share a shift, steps of a unit, the largest z less the shift; the least number, which stands for
−infinity, and the largest."""


@triton.jit
def capped(l, SOFTCAP: tl.constexpr):
    """z of logits with their bias; SOFTCAP 0: none."""
    if SOFTCAP > 0:
        if l.dtype == tl.float64:
            far = 1 - 2 / (tl.exp(tl.abs(l) * (2 / SOFTCAP)) + 1)
            return SOFTCAP * tl.where(l < 0, -far, far)
        else:
            return SOFTCAP * tanh(l * (1 / SOFTCAP))
    else:
        return l


@triton.jit
def _weight(m, top):
    """exp(m − top), also where both are the same infinity."""
    return tl.where(m == top, 1.0, tl.exp(m - top))


@triton.jit
def _load_z(
    z_ptr, shift_ptr, bias_ptr, first, column, columns, stride_column, valid,
    RAW: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z in these columns of a piece's row, and the mask; RAW: from logits without bias. Not valid: 0, and nothing is read.

    shift_ptr, or None: the row's shifts, of z in 16 bits.
    """
    inside = (column < columns) & valid if MASKED else (column >= 0) & valid
    z = tl.load(z_ptr + column.to(tl.int64) * stride_column, mask=inside, other=0).to(WIDE)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + (first + column) // BLOCK, mask=inside, other=0.0)
        z = tl.where(z == LOWEST, float("-inf"), z * (1 / STEPS)) + shift
    if RAW:
        if bias_ptr is not None:
            z += tl.load(bias_ptr + first + column, mask=inside, other=0.0).to(WIDE)
        z = capped(z, SOFTCAP)
    return z, inside


@triton.jit
def _fold(
    m, s, total, place, logits_ptr, bias_ptr, first, column, columns, stride_column,
    KEEP: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """m, s, total and place of every lane after these columns."""
    z, inside = _load_z(logits_ptr, None, bias_ptr, first, column, columns, stride_column, True, True, MASKED, SOFTCAP, WIDE)
    if KEEP and (SOFTCAP > 0 or bias_ptr is not None):
        tl.store(logits_ptr + column.to(tl.int64) * stride_column, z, mask=inside)
    if SMOOTHED:
        total += tl.where(inside, z, 0.0)
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    more = (z > m) | ((z != z) & (m == m))
    e = tl.where(z == m, 1.0, tl.exp(-tl.abs(z - m)))
    s = tl.where(more, s * e + 1, s + e)
    return tl.where(more, z, m), s, total, tl.where(more, column, place)


@triton.jit
def _together(m, s, total, place, first):
    """m, s, total of all lanes, and the column of m."""
    has_nan = tl.max((m != m).to(tl.int32), 0) > 0
    top = tl.max(tl.where(m == m, m, float("-inf")), 0)
    argmax = first + tl.min(tl.where(tl.where(has_nan, m != m, m == top), place, NOBODY), 0).to(tl.int64)
    s_row = tl.sum(s * _weight(m, top), 0)
    return tl.where(has_nan, float("nan"), top), s_row, tl.sum(total, 0), argmax


@triton.jit
def _with_earlier_pieces(top, s_row, total_row, z_target, argmax, state_ptr, argmax_ptr, row, N):
    """The same of this piece and of all before it."""
    m_before, s_before = tl.load(state_ptr + row), tl.load(state_ptr + N + row)
    more = (top > m_before) | ((top != top) & (m_before == m_before))
    argmax = tl.where(more, argmax, tl.load(argmax_ptr + row))
    most = tl.where(more, top, m_before)
    s_row = s_row * _weight(top, most) + s_before * _weight(m_before, most)
    total_row += tl.load(state_ptr + 2 * N + row)
    z_target += tl.load(state_ptr + 3 * N + row)
    return most, s_row, total_row, z_target, argmax


@triton.jit
def _store_loss(
    top, s_row, total_row, z_target, target, loss_ptr, lse_ptr, correction_ptr, row, V, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr
):
    """loss, lse and κ of a row whose every column has been seen."""
    log_s = tl.log(s_row)
    lse = top + log_s
    part = lse - top
    rounding = (lse - part - top) + (part - log_s)  # lse − (top + log_s), exactly
    # A target that does not exist is a NaN that everybody sees: nobody waits for the device to raise an error.
    z_target = tl.where((target >= 0) & (target < V), z_target, float("nan"))
    loss = log_s + (1 - LABEL_SMOOTHING) * (top - z_target) + Z_LOSS * lse * lse
    if LABEL_SMOOTHING != 0:
        loss += LABEL_SMOOTHING * (top - total_row / V)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(correction_ptr + row, tl.where(tl.abs(lse) == float("inf"), 1.0, tl.exp(rounding)))


@triton.jit
def _ignore(
    logits_ptr, loss_ptr, lse_ptr, correction_ptr, argmax_ptr, row, columns, stride_column,
    LAST: tl.constexpr, KEEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the fold stores for an ignored row."""
    if KEEP:
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            nothing = tl.zeros((COLUMNS,), logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column.to(tl.int64) * stride_column, nothing, mask=column < columns)
    if LAST:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(correction_ptr + row, 0.0)
        tl.store(argmax_ptr + row, -1)


@triton.jit
def cross_entropy_fold_kernel(
    logits_ptr, bias_ptr, target_ptr, loss_ptr, lse_ptr, correction_ptr, argmax_ptr, state_ptr,
    stride_logits_row, stride_logits_column, N, first, columns, V, ignore_index,
    FIRST: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of a piece. logits (N, columns) by strides, bias (V,), target (N,) -> in the LAST piece loss, lse, κ, argmax (N,).

    What a row has of it between two pieces stands in state (4, N): m, s, the sum of z, z of the target; and in argmax. m of all of them
    stands there in the end.
    KEEP: logits become z, and 0 in ignored rows.

    Bytes moved, with b bytes a logit: b a column; with KEEP and a softcap or a bias twice that. A bias is read from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits_row
    target = tl.load(target_ptr + row).to(tl.int64)
    lane = tl.arange(0, COLUMNS)
    if target == ignore_index:
        _ignore(logits_ptr, loss_ptr, lse_ptr, correction_ptr, argmax_ptr, row, columns, stride_logits_column, LAST, KEEP, COLUMNS)
        return

    here = (target >= first) & (target < first + columns)
    z_target = tl.load(logits_ptr + (target - first) * stride_logits_column, mask=here, other=0.0).to(WIDE)
    if bias_ptr is not None:
        z_target += tl.load(bias_ptr + target, mask=here, other=0.0).to(WIDE)
    z_target = tl.where(here, capped(z_target, SOFTCAP), 0.0)
    if KEEP:
        tl.debug_barrier()  # Other threads may store z there at once.

    SMOOTHED: tl.constexpr = LABEL_SMOOTHING != 0
    m, s = tl.full((COLUMNS,), float("-inf"), WIDE), tl.zeros((COLUMNS,), WIDE)
    total, place = tl.zeros((COLUMNS,), WIDE), lane
    whole = columns // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        m, s, total, place = _fold(
            m, s, total, place, logits_ptr, bias_ptr, first, start + lane, columns, stride_logits_column,
            KEEP, False, SMOOTHED, SOFTCAP, WIDE,
        )  # fmt: skip
    for start in range(whole, columns, COLUMNS):  # at most once
        m, s, total, place = _fold(
            m, s, total, place, logits_ptr, bias_ptr, first, start + lane, columns, stride_logits_column,
            KEEP, True, SMOOTHED, SOFTCAP, WIDE,
        )  # fmt: skip

    top, s_row, total_row, argmax = _together(m, s, total, place, first)
    if not FIRST:
        top, s_row, total_row, z_target, argmax = _with_earlier_pieces(
            top, s_row, total_row, z_target, argmax, state_ptr, argmax_ptr, row, N
        )
    tl.store(argmax_ptr + row, argmax)
    if LAST:
        _store_loss(top, s_row, total_row, z_target, target, loss_ptr, lse_ptr, correction_ptr, row, V, LABEL_SMOOTHING, Z_LOSS)
    if not LAST or state_ptr is not None:
        tl.store(state_ptr + row, top)
    if not LAST:
        tl.store(state_ptr + N + row, s_row)
        tl.store(state_ptr + 2 * N + row, total_row)
        tl.store(state_ptr + 3 * N + row, z_target)


@triton.jit
def cross_entropy_keep_kernel(
    z_ptr, target_ptr, m_ptr, kept_ptr, shift_ptr, stride_z_row, stride_kept_row, stride_shift_row,
    first, columns, ignore_index, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of a piece after its fold. z (N, columns), target and m (N,) -> these columns of kept, in 16 bits, and their shifts.

    Bytes moved: 6 a column.
    """
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(target_ptr + row).to(tl.int64) != ignore_index
    shift = tl.where(valid, tl.load(m_ptr + row, mask=valid, other=0.0) - TOP, 0.0)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        steps = (tl.load(z_ptr + row * stride_z_row + column, mask=inside, other=0.0) - shift) * STEPS
        steps = tl.floor(tl.minimum(tl.maximum(steps, LOWEST), HIGHEST) + 0.5)
        place = first + column
        tl.store(kept_ptr + row * stride_kept_row + place, steps.to(tl.int16), mask=inside)
        tl.store(shift_ptr + row * stride_shift_row + place // BLOCK, tl.zeros_like(steps) + shift, mask=inside & (place % BLOCK == 0))


@triton.jit
def _gradient(
    z_ptr, shift_ptr, bias_ptr, target_ptr, dloss_ptr, dlse_ptr, lse_ptr, correction_ptr, scale_ptr, dlogits_ptr, partial_ptr,
    stride_z_row, stride_z_column, stride_shift_row, stride_dlogits_row, first_row, end_row, first, column, columns, V, ignore_index,
    RAW: tl.constexpr, MASKED: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dlogits of these rows and columns; partial (columns,): the sum over the rows."""
    total = tl.zeros(column.shape, WIDE)
    for row in range(first_row, end_row):
        row = tl.cast(row, tl.int64)
        target = tl.load(target_ptr + row).to(tl.int64)
        valid = target != ignore_index
        exists = (target >= 0) & (target < V)
        lse = tl.load(lse_ptr + row).to(WIDE)
        dloss = tl.where(exists, tl.load(dloss_ptr + row).to(WIDE), float("nan"))
        dtop = dloss * (1 + 2 * Z_LOSS * lse)
        if dlse_ptr is not None:
            dtop += tl.load(dlse_ptr + row).to(WIDE)
        dtop *= tl.load(correction_ptr + row).to(WIDE)
        shifts = None if shift_ptr is None else shift_ptr + row * stride_shift_row
        z, inside = _load_z(
            z_ptr + row * stride_z_row, shifts, bias_ptr, first, column, columns, stride_z_column, valid, RAW, MASKED, SOFTCAP, WIDE
        )
        dz = dtop * tl.exp(z - lse) - tl.where(first + column == target, dloss * (1 - LABEL_SMOOTHING), 0.0)
        if LABEL_SMOOTHING != 0:
            dz -= dloss * LABEL_SMOOTHING / V
        if SOFTCAP > 0:
            t = z / SOFTCAP  # not by the reciprocal, whose rounding would show where t is nearly 1
            dz *= 1 - t * t
        dl = tl.where(valid, dz, 0.0)  # whatever dloss is
        total += dl
        if scale_ptr is not None:
            dl *= tl.load(scale_ptr)
        place = dlogits_ptr + row * stride_dlogits_row + column
        if MASKED:
            tl.store(place, dl.to(dlogits_ptr.dtype.element_ty), mask=column < columns)
        else:
            tl.store(place, dl.to(dlogits_ptr.dtype.element_ty))
    if partial_ptr is not None:
        tl.store(partial_ptr + column, total, mask=column < columns)


@triton.jit
def cross_entropy_gradient_kernel(
    z_ptr, shift_ptr, bias_ptr, target_ptr, dloss_ptr, dlse_ptr, lse_ptr, correction_ptr, scale_ptr, dlogits_ptr, partial_ptr,
    stride_z_row, stride_z_column, stride_shift_row, stride_dlogits_row, N, first, columns, V, ignore_index,
    RAW: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a piece in ROWS rows. z (N, columns) by strides, RAW: logits without bias; shift (N, blocks of all columns), of z in
    16 bits; bias (V,), dloss, dlse, target, lse, κ (N,)

    -> dlogits (N, columns) with a row stride, times scale where there is one; partial (programs, columns), dbias of these rows.

    Bytes moved, with b bytes a number of z and d of dlogits: b + d a column, 4 / ROWS more with partial. Ignored rows are not read.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    first_row = chunk * ROWS
    end_row = tl.minimum(first_row + ROWS, N)
    if partial_ptr is not None:
        partial_ptr += chunk.to(tl.int64) * columns
    if (block + 1) * COLUMNS <= columns:  # so that most accesses are of 16 bytes, however many columns there are
        _gradient(
            z_ptr, shift_ptr, bias_ptr, target_ptr, dloss_ptr, dlse_ptr, lse_ptr, correction_ptr, scale_ptr, dlogits_ptr, partial_ptr,
            stride_z_row, stride_z_column, stride_shift_row, stride_dlogits_row,
            first_row, end_row, first, column, columns, V, ignore_index,
            RAW, False, LABEL_SMOOTHING, Z_LOSS, SOFTCAP, WIDE,
        )  # fmt: skip
    else:
        _gradient(
            z_ptr, shift_ptr, bias_ptr, target_ptr, dloss_ptr, dlse_ptr, lse_ptr, correction_ptr, scale_ptr, dlogits_ptr, partial_ptr,
            stride_z_row, stride_z_column, stride_shift_row, stride_dlogits_row,
            first_row, end_row, first, column, columns, V, ignore_index,
            RAW, True, LABEL_SMOOTHING, Z_LOSS, SOFTCAP, WIDE,
        )  # fmt: skip
