"""The backward pass of attention. p comes back from s and lse, one product; nothing of size S x T is ever stored.

    delta_i = do_i · o_i - dlse_i, and this tile's share of dsink = -sum_i exp(sink - lse_i) delta_i     attention_delta_kernel
    dv_j = sum_i p_ij do_i,  dk_j = scale sum_i ds_ij q_i    one tile of keys a program                  attention_dk_dv_kernel
    dq_i = scale sum_j ds_ij k_j                             one tile of queries a program               attention_dq_kernel

with ds = p (dp - delta), and (1 - t²) times that with a softcap, where t = tanh(inner q k). Logits are in base 2, as in forward.
What a query does not see is replaced by 0 after it was computed, so that an infinite score of such a pair does not get into a sum.
"""

import triton
import triton.language as tl

from fastprimer.kernels._attention import (
    LOG2_E,
    load_tile,
    place_of,
    scores,
    sequence,
    store_tile,
    tanh,
    tiles_of,
    visible,
    visible_range,
)


@triton.jit
def attention_delta_kernel(
    do_ptr, dlse_ptr, o_ptr, lse_ptr, sinks_ptr, delta_ptr, partial_ptr,
    stride_do_batch, stride_do_token, stride_do_head, stride_o_batch, stride_o_token, stride_o_head,
    stride_lse_batch, stride_lse_head, tiles, N, H,
    Dv: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of N tokens (of a sequence, or of all packed ones) of one head; partial (sequences · tiles, H)."""
    tile, head, batch = place_of(tl.program_id(0), tiles, H)
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    do_ptr += batch * stride_do_batch + head * stride_do_head
    o_ptr += batch * stride_o_batch + head * stride_o_head
    do = load_tile(do_ptr, 0, 0, first, N, stride_do_token, BLOCK_M, Dv, WIDTH_V, True, False)
    o = load_tile(o_ptr, 0, 0, first, N, stride_o_token, BLOCK_M, Dv, WIDTH_V, True, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    place = batch * stride_lse_batch + head * stride_lse_head + row
    lse = tl.load(lse_ptr + place, mask=row < N, other=float("inf"))
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=row < N, other=0.0)
    tl.store(delta_ptr + place, delta, mask=row < N)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        share = tl.where(lse == float("-inf"), 0.0, tl.exp2((sink - lse) * LOG2_E) * delta)
        tl.store(partial_ptr + (batch * tiles + tile) * H + head, -tl.sum(share, 0))


@triton.jit
def _load_rows(ptr, row, rows, beyond, CHECKED: tl.constexpr):
    if CHECKED:
        return tl.load(ptr + row, mask=row < rows, other=beyond)
    else:
        return tl.load(ptr + row)


@triton.jit
def _p_and_ds(s, dp, lse, delta, inner, slope, SOFTCAP: tl.constexpr):
    """From the products q k and do v; lse and delta broadcast."""
    if SOFTCAP:
        s = tanh(s * inner)
    p = tl.exp2(s * slope - lse * LOG2_E)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1 - s * s)
    return p, ds


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q_tiles, do_tiles, lse_ptr, delta_ptr, key, begin, end,
    stride_q_token, stride_q_head, stride_do_token, stride_do_head, stride_lse_head, group, S, T, left, right, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take in the queries begin..end of every head of the group, in one loop: its loads are in flight from one head to the next.

    Without MASKED all of the queries see every key of the tile.
    """
    blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    for step in range(0, group * blocks):
        member, first = step // blocks, begin + step % blocks * BLOCK_M
        row = first + tl.arange(0, BLOCK_M)
        q = load_tile(q_tiles, member, stride_q_head, first, S, stride_q_token, BLOCK_M, D, WIDTH, MASKED, TMA)
        do = load_tile(do_tiles, member, stride_do_head, first, S, stride_do_token, BLOCK_M, Dv, WIDTH_V, MASKED, TMA)
        lse = _load_rows(lse_ptr + member.to(tl.int64) * stride_lse_head, row, S, float("inf"), MASKED)
        delta = _load_rows(delta_ptr + member.to(tl.int64) * stride_lse_head, row, S, 0.0, MASKED)
        s = scores(k, q)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        p, ds = _p_and_ds(s, dp, lse[None, :], delta[None, :], inner, slope, SOFTCAP)
        if MASKED:
            sees = visible(row[None, :], key[:, None], T - S, T, left, right, LEFT, RIGHT) & (row < S)[None, :]
            p, ds = tl.where(sees, p, 0.0), tl.where(sees, ds, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_dk_dv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, dk_ptr, dv_ptr,
    stride_do_batch, stride_do_token, stride_do_head, stride_q_batch, stride_q_token, stride_q_head,
    stride_k_batch, stride_k_token, stride_k_head, stride_v_batch, stride_v_token, stride_v_head,
    stride_dk_batch, stride_dv_batch, stride_lse_batch, stride_lse_head,
    tiles, S, T, Hk, group, left, right, scale, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key/value head, over the queries of all heads of its group -> dk, dv (tokens, Hk, D and Dv) contiguous."""
    tile, head, batch = place_of(tl.program_id(0), tiles, Hk)
    first_q, S = sequence(cu_seqlens_q_ptr, batch, S)
    first_k, T = sequence(cu_seqlens_k_ptr, batch, T)
    first = tile * BLOCK_N
    if cu_seqlens_q_ptr is not None:
        if first >= T:
            return

    key = first + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_k_batch + first_k * stride_k_token + head * stride_k_head
    v_ptr += batch * stride_v_batch + first_k * stride_v_token + head * stride_v_head
    k_tiles = tiles_of(k_ptr, 1, T, stride_k_head, stride_k_token, BLOCK_N, D, TMA)
    v_tiles = tiles_of(v_ptr, 1, T, stride_v_head, stride_v_token, BLOCK_N, Dv, TMA)
    k = load_tile(k_tiles, 0, 0, first, T, stride_k_token, BLOCK_N, D, WIDTH, not WHOLE_N, TMA)
    v = load_tile(v_tiles, 0, 0, first, T, stride_v_token, BLOCK_N, Dv, WIDTH_V, not WHOLE_N, TMA)
    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH_V), tl.float32)
    begin, full_begin, full_end, end = visible_range(first, T, S, right, left, BLOCK_N, BLOCK_M, RIGHT, LEFT)
    q_ptr += batch * stride_q_batch + first_q * stride_q_token + head * group * stride_q_head
    do_ptr += batch * stride_do_batch + first_q * stride_do_token + head * group * stride_do_head
    q_tiles = tiles_of(q_ptr, group, S, stride_q_head, stride_q_token, BLOCK_M, D, TMA)
    do_tiles = tiles_of(do_ptr, group, S, stride_do_head, stride_do_token, BLOCK_M, Dv, TMA)
    place = batch * stride_lse_batch + head * group * stride_lse_head + first_q
    lse_ptr += place
    delta_ptr += place
    if RIGHT:
        dk, dv = _add_dk_dv(
            dk, dv, k, v, q_tiles, do_tiles, lse_ptr, delta_ptr, key, begin, full_begin,
            stride_q_token, stride_q_head, stride_do_token, stride_do_head, stride_lse_head, group, S, T, left, right, inner, slope,
            D, Dv, WIDTH, WIDTH_V, BLOCK_M, LEFT, RIGHT, SOFTCAP, True, TMA,
        )  # fmt: skip
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_tiles, do_tiles, lse_ptr, delta_ptr, key, full_begin, full_end,
        stride_q_token, stride_q_head, stride_do_token, stride_do_head, stride_lse_head, group, S, T, left, right, inner, slope,
        D, Dv, WIDTH, WIDTH_V, BLOCK_M, LEFT, RIGHT, SOFTCAP, False, TMA,
    )  # fmt: skip
    if LEFT or not WHOLE_M:
        dk, dv = _add_dk_dv(
            dk, dv, k, v, q_tiles, do_tiles, lse_ptr, delta_ptr, key, full_end, end,
            stride_q_token, stride_q_head, stride_do_token, stride_do_head, stride_lse_head, group, S, T, left, right, inner, slope,
            D, Dv, WIDTH, WIDTH_V, BLOCK_M, LEFT, RIGHT, SOFTCAP, True, TMA,
        )  # fmt: skip

    dk_ptr += batch * stride_dk_batch + (first_k * Hk + head) * D
    dv_ptr += batch * stride_dv_batch + (first_k * Hk + head) * Dv
    store_tile(dk_ptr, dk * scale, first, T, Hk * D, D, not WHOLE_N)
    store_tile(dv_ptr, dv, first, T, Hk * Dv, Dv, not WHOLE_N)


@triton.jit
def _add_dq(
    dq, q, do, lse, delta, k_tiles, v_tiles, row, begin, end, stride_k_token, stride_v_token,
    S, T, left, right, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take in the keys begin..end; without MASKED every row sees all of them."""
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k = load_tile(k_tiles, 0, 0, first, T, stride_k_token, BLOCK_N, D, WIDTH, MASKED, TMA)
        v = load_tile(v_tiles, 0, 0, first, T, stride_v_token, BLOCK_N, Dv, WIDTH_V, MASKED, TMA)
        s = scores(q, k)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        _, ds = _p_and_ds(s, dp, lse[:, None], delta[:, None], inner, slope, SOFTCAP)
        if MASKED:
            ds = tl.where(visible(row[:, None], key[None, :], T - S, T, left, right, LEFT, RIGHT), ds, 0.0)
            k = tl.where(k == k, k, 0.0)  # 0 · nan is nan; where this key is seen, ds is NaN already
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def attention_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, dq_ptr,
    stride_do_batch, stride_do_token, stride_do_head, stride_q_batch, stride_q_token, stride_q_head,
    stride_k_batch, stride_k_token, stride_k_head, stride_v_batch, stride_v_token, stride_v_head,
    stride_dq_batch, stride_lse_batch, stride_lse_head,
    tiles, S, T, H, group, left, right, scale, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head -> dq (tokens, H, D) contiguous."""
    tile, head, batch = place_of(tl.program_id(0), tiles, H)
    first_q, S = sequence(cu_seqlens_q_ptr, batch, S)
    first_k, T = sequence(cu_seqlens_k_ptr, batch, T)
    if RIGHT:
        tile = tiles - 1 - tile  # The last queries see the most keys: they start first.
    first = tile * BLOCK_M
    if cu_seqlens_q_ptr is not None:
        if first >= S:
            return

    row = first + tl.arange(0, BLOCK_M)
    q_ptr += batch * stride_q_batch + first_q * stride_q_token + head * stride_q_head
    do_ptr += batch * stride_do_batch + first_q * stride_do_token + head * stride_do_head
    k_ptr += batch * stride_k_batch + first_k * stride_k_token + head // group * stride_k_head
    v_ptr += batch * stride_v_batch + first_k * stride_v_token + head // group * stride_v_head
    place = batch * stride_lse_batch + head * stride_lse_head + first_q
    q_tiles = tiles_of(q_ptr, 1, S, stride_q_head, stride_q_token, BLOCK_M, D, TMA)
    do_tiles = tiles_of(do_ptr, 1, S, stride_do_head, stride_do_token, BLOCK_M, Dv, TMA)
    k_tiles = tiles_of(k_ptr, 1, T, stride_k_head, stride_k_token, BLOCK_N, D, TMA)
    v_tiles = tiles_of(v_ptr, 1, T, stride_v_head, stride_v_token, BLOCK_N, Dv, TMA)
    q = load_tile(q_tiles, 0, 0, first, S, stride_q_token, BLOCK_M, D, WIDTH, not WHOLE_M, TMA)
    do = load_tile(do_tiles, 0, 0, first, S, stride_do_token, BLOCK_M, Dv, WIDTH_V, not WHOLE_M, TMA)
    lse = _load_rows(lse_ptr + place, row, S, float("inf"), not WHOLE_M)
    delta = _load_rows(delta_ptr + place, row, S, 0.0, not WHOLE_M)
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    begin, full_begin, full_end, end = visible_range(first, S, T, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    if LEFT:
        dq = _add_dq(
            dq, q, do, lse, delta, k_tiles, v_tiles, row, begin, full_begin, stride_k_token, stride_v_token,
            S, T, left, right, inner, slope,
            D, Dv, WIDTH, WIDTH_V, BLOCK_N, LEFT, RIGHT, SOFTCAP, True, TMA,
        )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse, delta, k_tiles, v_tiles, row, full_begin, full_end, stride_k_token, stride_v_token,
        S, T, left, right, inner, slope,
        D, Dv, WIDTH, WIDTH_V, BLOCK_N, LEFT, RIGHT, SOFTCAP, False, TMA,
    )  # fmt: skip
    if RIGHT or not WHOLE_N:
        dq = _add_dq(
            dq, q, do, lse, delta, k_tiles, v_tiles, row, full_end, end, stride_k_token, stride_v_token,
            S, T, left, right, inner, slope,
            D, Dv, WIDTH, WIDTH_V, BLOCK_N, LEFT, RIGHT, SOFTCAP, True, TMA,
        )  # fmt: skip

    dq_ptr += batch * stride_dq_batch + (first_q * H + head) * D
    store_tile(dq_ptr, dq * scale, first, S, H * D, D, not WHOLE_M)
