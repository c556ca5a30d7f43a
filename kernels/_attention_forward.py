"""The forward pass of attention: online softmax in base 2, one tile of queries of one head a program.

For every block of keys, with the logits z, in base 2 and relative to the largest so far, `top`:

    p = 2^(z - top),  total += sum p,  o += p v,    where a new top first rescales total and o by 2^(old top - top)

and lse = (top + log2 total) ln 2. z = slope s: s is q k or, with a softcap, tanh(inner q k); slope holds scale (or softcap)
and log2 e, and is positive, so that the largest z is slope times the largest s.
"""

import triton
import triton.language as tl

from fastprimer.kernels._attention import (
    LN_2,
    LOG2_E,
    load_tile,
    online_softmax,
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
def _attend(
    o, top, total, q, k_tiles, v_tiles, row, begin, end, stride_k_token, stride_v_token, S, T, left, right, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take in the keys begin..end; without MASKED every row sees all of them."""
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k = load_tile(k_tiles, 0, 0, first, T, stride_k_token, BLOCK_N, D, WIDTH, MASKED, TMA)
        s = scores(q, k)
        if SOFTCAP:
            s = tanh(s * inner)
        if MASKED:
            s = tl.where(visible(row[:, None], key[None, :], T - S, T, left, right, LEFT, RIGHT), s, float("-inf"))
        p, rescale, top, total = online_softmax(s, top, total, slope, MASKED)
        v = load_tile(v_tiles, 0, 0, first, T, stride_v_token, BLOCK_N, Dv, WIDTH_V, MASKED, TMA)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
    return o, top, total


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, o_ptr, lse_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head, stride_o_batch, stride_lse_batch, stride_lse_head,
    tiles, S, T, H, group, left, right, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. q, k, v by strides -> o (tokens, H, Dv) contiguous, lse by strides.

    WHOLE_M, WHOLE_N: all sequences are multiples of the tile, so that nothing has to be checked against their ends.
    """
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
    k_ptr += batch * stride_k_batch + first_k * stride_k_token + head // group * stride_k_head
    v_ptr += batch * stride_v_batch + first_k * stride_v_token + head // group * stride_v_head
    q_tiles = tiles_of(q_ptr, 1, S, stride_q_head, stride_q_token, BLOCK_M, D, TMA)
    k_tiles = tiles_of(k_ptr, 1, T, stride_k_head, stride_k_token, BLOCK_N, D, TMA)
    v_tiles = tiles_of(v_ptr, 1, T, stride_v_head, stride_v_token, BLOCK_N, Dv, TMA)
    q = load_tile(q_tiles, 0, 0, first, S, stride_q_token, BLOCK_M, D, WIDTH, not WHOLE_M, TMA)
    o = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
    if sinks_ptr is not None:  # One more logit, whose value is 0.
        top = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    begin, full_begin, full_end, end = visible_range(first, S, T, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    if LEFT:
        o, top, total = _attend(
            o, top, total, q, k_tiles, v_tiles, row, begin, full_begin, stride_k_token, stride_v_token, S, T, left, right, inner, slope,
            D, Dv, WIDTH, WIDTH_V, BLOCK_N, LEFT, RIGHT, SOFTCAP, True, TMA,
        )  # fmt: skip
    o, top, total = _attend(
        o, top, total, q, k_tiles, v_tiles, row, full_begin, full_end, stride_k_token, stride_v_token, S, T, left, right, inner, slope,
        D, Dv, WIDTH, WIDTH_V, BLOCK_N, LEFT, RIGHT, SOFTCAP, False, TMA,
    )  # fmt: skip
    if RIGHT or not WHOLE_N:
        o, top, total = _attend(
            o, top, total, q, k_tiles, v_tiles, row, full_end, end, stride_k_token, stride_v_token, S, T, left, right, inner, slope,
            D, Dv, WIDTH, WIDTH_V, BLOCK_N, LEFT, RIGHT, SOFTCAP, True, TMA,
        )  # fmt: skip

    total = tl.where(total == 0, 1.0, total)  # A row that sees nothing: o = 0, lse = top = -inf.
    o_ptr += batch * stride_o_batch + (first_q * H + head) * Dv
    store_tile(o_ptr, o / total[:, None], first, S, H * Dv, Dv, not WHOLE_M)
    lse_ptr += batch * stride_lse_batch + head * stride_lse_head + first_q + row
    tl.store(lse_ptr, (top + tl.log2(total)) * LN_2, mask=row < S)
