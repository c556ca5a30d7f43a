"""Decoding: new keys and values into the caches, queries to a part of the keys each program, and the parts combined.

A sequence's keys are divided among `splits` programs: splits is the same for all of them, each takes its share of the blocks
that this sequence's queries see. For a split w, with lse_w in base 2 and o_w its own average,

    lse = log2 sum_w 2^lse_w,    o = sum_w 2^(lse_w - lse) o_w                          attention_combine_kernel

always in the order of the splits. The sink belongs to the first of them.
"""

import triton
import triton.language as tl

from fastprimer.kernels._attention import LN_2, LOG2_E, online_softmax, tanh, visible


@triton.jit
def _slot(block_table_ptr, batch, first, token, exists, stride_table_batch, pages, PAGE: tl.constexpr, COUNT: tl.constexpr):
    """page, place within it: where the COUNT tokens from `first` on lie; a contiguous cache has one page a sequence. A page is one of the
    cache's whatever the table says: nobody has looked at it on a device."""
    if block_table_ptr is None:
        return batch, token.to(tl.int64)
    elif PAGE % COUNT == 0:  # first is a multiple of COUNT: they share a page
        page = tl.load(block_table_ptr + batch * stride_table_batch + first // PAGE)
        return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64), (token % PAGE).to(tl.int64)
    else:
        page = tl.load(block_table_ptr + batch * stride_table_batch + token // PAGE, mask=exists, other=0)
        return tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64), (token % PAGE).to(tl.int64)


@triton.jit
def _copy_heads(x_ptr, cache_ptr, stride_x_head, stride_cache_head, Hk, exists, C: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """All heads of one token."""
    column = tl.arange(0, WIDTH)[None, :]
    for first in range(0, Hk, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = exists & (head < Hk) & (column < C)
        tl.store(cache_ptr + head * stride_cache_head + column, tl.load(x_ptr + head * stride_x_head + column, mask=inside), mask=inside)


@triton.jit
def append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, cache_seqlens_ptr, block_table_ptr,
    stride_k_batch, stride_k_token, stride_k_head, stride_v_batch, stride_v_token, stride_v_head,
    stride_k_page, stride_k_slot, stride_k_cache_head, stride_v_page, stride_v_slot, stride_v_cache_head, stride_table_batch, pages,
    S, Hk, capacity,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One new token; what would lie before or beyond the sequence's room is dropped: nobody has looked at lengths on a device."""
    batch, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    token = tl.load(cache_seqlens_ptr + batch).to(tl.int64) + s
    exists = (token >= 0) & (token < capacity)
    token = tl.minimum(tl.maximum(token, 0), capacity - 1)
    page, slot = _slot(block_table_ptr, batch, token, token, exists, stride_table_batch, pages, PAGE, 1)
    k_ptr += batch * stride_k_batch + s * stride_k_token
    v_ptr += batch * stride_v_batch + s * stride_v_token
    k_cache_ptr += page * stride_k_page + slot * stride_k_slot
    v_cache_ptr += page * stride_v_page + slot * stride_v_slot
    _copy_heads(k_ptr, k_cache_ptr, stride_k_head, stride_k_cache_head, Hk, exists, D, WIDTH, HEADS)
    _copy_heads(v_ptr, v_cache_ptr, stride_v_head, stride_v_cache_head, Hk, exists, Dv, WIDTH_V, HEADS)


@triton.jit
def _load_keys(ptr, page, slot, exists, stride_page, stride_slot, C: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    place = ptr + (page * stride_page + slot * stride_slot)[:, None] + column[None, :]
    if C < WIDTH:
        return tl.load(place, mask=exists[:, None] & (column < C)[None, :], other=0.0)
    else:
        return tl.load(place, mask=exists[:, None], other=0.0)


@triton.jit
def _share(length, S, left, split, splits, BLOCK_N: tl.constexpr, LEFT: tl.constexpr):
    """first, begin, end: the first key that any query sees, and the blocks begin..end of this split."""
    first = 0
    if LEFT:
        first = tl.maximum(length - S - left, 0)
    begin = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * share
    return first, begin, tl.minimum(begin + share, length)


@triton.jit
def attention_with_kv_cache_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, cache_seqlens_ptr, block_table_ptr, sinks_ptr, o_ptr, lse_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_page, stride_k_slot, stride_k_head,
    stride_v_page, stride_v_slot, stride_v_head, stride_table_batch, pages,
    splits, tiles, new, B, S, H, Hk, capacity, left, right, inner, slope,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, ONE_QUERY: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of the S · GROUP queries that share one key/value head -> o (B, S, H, Dv), lse (B, H, S), contiguous; with SPLIT
    those of one split, o in float32 and lse in base 2.
    """
    program = tl.program_id(0)
    split, tile = program % splits, program // splits % tiles
    head, batch = (program // splits // tiles % Hk).to(tl.int64), (program // splits // tiles // Hk).to(tl.int64)
    length = tl.minimum(tl.load(cache_seqlens_ptr + batch).to(tl.int64) + new, capacity).to(tl.int32)
    first_key, begin, end = _share(length, S, left, split, splits, BLOCK_N, LEFT)

    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    s, query_head, is_query = (member // GROUP).to(tl.int64), head * GROUP + member % GROUP, member < S * GROUP
    column = tl.arange(0, WIDTH)
    q_place = q_ptr + batch * stride_q_batch + (s * stride_q_token + query_head * stride_q_head)[:, None] + column[None, :]
    q = tl.load(q_place, mask=is_query[:, None] & (column < D)[None, :], other=0.0)
    o = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # One more logit, whose value is 0.
        sink = tl.load(sinks_ptr + query_head, mask=is_query & (split == 0), other=float("-inf")).to(tl.float32)
        top = sink * LOG2_E
    total = tl.where(top == float("-inf"), 0.0, 1.0)

    k_cache_ptr += head * stride_k_head
    v_cache_ptr += head * stride_v_head
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        exists = (key >= first_key) & (key < end)
        page, slot = _slot(block_table_ptr, batch, first, key, exists, stride_table_batch, pages, PAGE, BLOCK_N)
        k = _load_keys(k_cache_ptr, page, slot, exists, stride_k_page, stride_k_slot, D, WIDTH)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            z = tanh(z * inner)
        sees = visible(s[:, None], key[None, :], length - S, end, left, right, LEFT, RIGHT) & (key >= first_key)[None, :]
        p, rescale, top, total = online_softmax(tl.where(sees, z, float("-inf")), top, total, slope, True)
        v = _load_keys(v_cache_ptr, page, slot, exists, stride_v_page, stride_v_slot, Dv, WIDTH_V)
        if not ONE_QUERY:  # 0 · nan is nan: a NaN value goes to those that see it through p, to all features of theirs.
            spoiled = sees & (tl.max((v != v).to(tl.int32), 1) > 0)[None, :]
            p, v = tl.where(spoiled, float("nan"), p), tl.where(v == v, v, 0.0)
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")

    is_stored, total = is_query, tl.where(total == 0, 1.0, total)  # A row that sees nothing: o = 0, lse = top = -inf.
    lse = top + tl.log2(total)
    if SPLIT:
        o_ptr += split.to(tl.int64) * B * S * H * Dv
        lse_ptr += split.to(tl.int64) * B * S * H
        is_stored = is_query & (lse != float("-inf"))
    else:
        lse = lse * LN_2
    column = tl.arange(0, WIDTH_V)
    o_place = o_ptr + (((batch * S + s) * H + query_head) * Dv)[:, None] + column[None, :]
    tl.store(o_place, (o / total[:, None]).to(o_ptr.dtype.element_ty), mask=is_stored[:, None] & (column < Dv)[None, :])
    tl.store(lse_ptr + (batch * H + query_head) * S + s, lse, mask=is_query)


@triton.jit
def attention_combine_kernel(
    o_partial_ptr, lse_partial_ptr, o_ptr, lse_ptr, splits, B, S, H,
    Dv: tl.constexpr, WIDTH_V: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One query of one head, over all splits; SPLITS: their number, rounded up to a power of two."""
    program = tl.program_id(0).to(tl.int64)
    head, s, batch = program % H, program // H % S, program // H // S
    split = tl.arange(0, SPLITS)
    lse_place = (batch * H + head) * S + s
    rows = tl.cast(B, tl.int64) * S * H
    lse = tl.load(lse_partial_ptr + split * rows + lse_place, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - shift), 0)
    column = tl.arange(0, WIDTH_V)
    o = tl.zeros((WIDTH_V,), tl.float32)
    for first in range(0, splits, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        weight = tl.exp2(tl.load(lse_partial_ptr + some * rows + lse_place, mask=some < splits, other=float("-inf")) - shift)
        place = o_partial_ptr + ((some * rows + program) * Dv)[:, None] + column[None, :]
        part = tl.load(place, mask=(weight != 0)[:, None] & (column < Dv)[None, :], other=0.0)
        o += tl.sum(part * weight[:, None], 0)
    o = o / tl.where(total == 0, 1.0, total)
    tl.store(o_ptr + program * Dv + column, o.to(o_ptr.dtype.element_ty), mask=column < Dv)
    tl.store(lse_ptr + lse_place, tl.where(total == 0, float("-inf"), top + tl.log2(total)) * LN_2)
