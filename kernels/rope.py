"""RoPE in Triton. The mathematics stands in fastprimer/ops/rope.py.

Queries and keys are (B, S, heads, D), read by their strides. A program takes TOKENS tokens of one sequence: it loads their
rows of cos and sin once, keeps them in registers, and rotates all heads of q and then of k, HEADS at a time.

Half-split pairs are two contiguous loads. Interleaved ones are loaded as they lie, 16 bytes a thread, and pulled apart in
registers: a thread holds both numbers of a pair, so no data is exchanged between threads.

Bytes moved, with b bytes a number: 2b (read, write) for each of the B·S·(H + Hk)·D numbers, forward and backward, and once a
token R/2 numbers of cos, R/2 of sin and its position.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprimer.kernels._launch import as_heads, as_rows, on_device, wide

HEADS_AT_ONCE = 8
"""Few, so that keys, which have few heads, leave few lanes idle."""
PAIRS_IN_TILE = 1024
WIDEST = 4096
"""Pairs of one head in a tile; more of them take several."""


class Tile(NamedTuple):
    TOKENS: int
    HEADS: int
    PAIRS: int
    REST: int
    num_warps: int


def tile(S: int, heads: int, D: int, R: int) -> Tile:
    """The tile for sequences of S tokens with at most this many heads: 8 pairs a thread, at most 16 warps."""
    pairs = min(WIDEST, triton.next_power_of_2(R // 2))
    rest = min(PAIRS_IN_TILE, triton.next_power_of_2(max(1, D - R)))
    heads = min(HEADS_AT_ONCE, triton.next_power_of_2(heads), max(1, PAIRS_IN_TILE // max(pairs, rest)))
    tokens = min(triton.next_power_of_2(S), max(1, PAIRS_IN_TILE // (heads * max(pairs, rest))))
    return Tile(tokens, heads, pairs, rest, min(16, max(1, tokens * heads * pairs // 256)))


@triton.jit
def _heads_at(
    x_ptr, rotated_ptr, batch, token, first_head, stride_x_batch, stride_x_token, stride_x_head, S, heads,
    D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """(TOKENS, HEADS, 1): where heads first_head.. start in x and in the contiguous rotated, and whether they exist."""
    token = token[:, None, None]
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
    head_ptr = x_ptr + batch * stride_x_batch + token * stride_x_token + head * stride_x_head
    return head_ptr, rotated_ptr + ((batch * S + token) * heads + head) * D, (token < S) & (head < heads)


@triton.jit
def _rotate(
    x_ptr, rotated_ptr, c, s, batch, token, first_pair, stride_x_batch, stride_x_token, stride_x_head, S, heads,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate pairs first_pair.. of every head; c, s (TOKENS, 1, PAIRS)."""
    for first_head in range(0, heads, HEADS):
        head_ptr, rotated_head_ptr, exists = _heads_at(
            x_ptr, rotated_ptr, batch, token, first_head, stride_x_batch, stride_x_token, stride_x_head, S, heads, D, HEADS
        )
        if INTERLEAVED:
            feature = 2 * first_pair + tl.arange(0, 2 * PAIRS)[None, None, :]
            x = tl.load(head_ptr + feature, mask=exists & (feature < R), other=0.0)
            a, b = tl.split(tl.reshape(x.to(c.dtype), (c.shape[0], HEADS, PAIRS, 2)))
            rotated = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (c.shape[0], HEADS, 2 * PAIRS))
            tl.store(rotated_head_ptr + feature, rotated.to(x.dtype), mask=exists & (feature < R))
        else:
            pair = first_pair + tl.arange(0, PAIRS)[None, None, :]
            inside = exists & (pair < R // 2)
            x_a = tl.load(head_ptr + pair, mask=inside, other=0.0)
            x_b = tl.load(head_ptr + R // 2 + pair, mask=inside, other=0.0)
            a, b = x_a.to(c.dtype), x_b.to(c.dtype)
            tl.store(rotated_head_ptr + pair, (a * c - b * s).to(x_a.dtype), mask=inside)
            tl.store(rotated_head_ptr + R // 2 + pair, (a * s + b * c).to(x_a.dtype), mask=inside)


@triton.jit
def _copy_rest(
    x_ptr, rotated_ptr, batch, token, stride_x_batch, stride_x_token, stride_x_head, S, heads,
    D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Features R..D-1 pass through."""
    for first_head in range(0, heads, HEADS):
        head_ptr, rotated_head_ptr, exists = _heads_at(
            x_ptr, rotated_ptr, batch, token, first_head, stride_x_batch, stride_x_token, stride_x_head, S, heads, D, HEADS
        )
        for first_feature in range(R, D, REST):
            feature = first_feature + tl.arange(0, REST)[None, None, :]
            x = tl.load(head_ptr + feature, mask=exists & (feature < D), other=0.0)
            tl.store(rotated_head_ptr + feature, x, mask=exists & (feature < D))


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_rotated_ptr, k_rotated_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_cos_row, stride_sin_row, stride_positions_batch, stride_positions_token, S, H, Hk, P,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one sequence. q (B, S, H, D), k (B, S, Hk, D), positions (B, S) by strides -> both rotated, contiguous.

    A position outside the P rows of cos and sin reads nothing: its token becomes NaN.
    """
    tiles = tl.cdiv(S, TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    position = token
    if positions_ptr is not None:
        position_ptr = positions_ptr + batch * stride_positions_batch + token * stride_positions_token
        position = tl.load(position_ptr, mask=token < S, other=0).to(tl.int64)
    position = position[:, None, None]

    for first_pair in range(0, R // 2, PAIRS):
        pair = first_pair + tl.arange(0, PAIRS)[None, None, :]
        inside = (position >= 0) & (position < P) & (pair < R // 2)
        c = tl.load(cos_ptr + position * stride_cos_row + pair, mask=inside, other=float("nan")).to(WIDE)
        s = tl.load(sin_ptr + position * stride_sin_row + pair, mask=inside, other=float("nan")).to(WIDE)
        if INVERSE:
            s = -s
        _rotate(
            q_ptr, q_rotated_ptr, c, s, batch, token, first_pair, stride_q_batch, stride_q_token, stride_q_head, S, H,
            D, R, INTERLEAVED, HEADS, PAIRS,
        )  # fmt: skip
        if k_ptr is not None:
            _rotate(
                k_ptr, k_rotated_ptr, c, s, batch, token, first_pair, stride_k_batch, stride_k_token, stride_k_head, S, Hk,
                D, R, INTERLEAVED, HEADS, PAIRS,
            )  # fmt: skip

    if R < D:
        _copy_rest(q_ptr, q_rotated_ptr, batch, token, stride_q_batch, stride_q_token, stride_q_head, S, H, D, R, HEADS, REST)
        if k_ptr is not None:
            _copy_rest(k_ptr, k_rotated_ptr, batch, token, stride_k_batch, stride_k_token, stride_k_head, S, Hk, D, R, HEADS, REST)


def rotate(
    q: Tensor, k: Optional[Tensor], cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Forward, or with inverse backward: one launch for q and k."""
    q_rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_rotated = None if k is None else torch.empty(k.shape, dtype=q.dtype, device=q.device)
    if q_rotated.numel() or (k is not None and k_rotated.numel()):
        q_heads, k_heads = as_heads(q), None if k is None else as_heads(k)
        B, S, H, D = q_heads.shape
        Hk = 0 if k is None else k_heads.shape[2]
        P, R = cos.shape[0], 2 * cos.shape[1]
        cos, sin = as_rows(cos), as_rows(sin)
        positions = positions if positions is None or positions.dim() == 2 else positions.unsqueeze(0)
        TOKENS, HEADS, PAIRS, REST, num_warps = tile(S, max(H, Hk), D, R)
        with on_device(q):
            rope_kernel[(B * triton.cdiv(S, TOKENS),)](
                q_heads, k_heads, cos, sin, positions, q_rotated, k_rotated,
                *q_heads.stride()[:3], *((0, 0, 0) if k is None else k_heads.stride()[:3]),
                cos.stride(0), sin.stride(0), *((0, 0) if positions is None else positions.stride()), S, H, Hk, P,
                D, R, interleaved, inverse, wide(q), TOKENS, HEADS, PAIRS, REST, num_warps=num_warps,
            )  # fmt: skip
    return q_rotated, q.new_empty(0) if k is None else k_rotated


def rope_forward(
    q: Tensor, k: Optional[Tensor], cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q (..., H, D), k (..., Hk, D) or None -> both rotated; (0,) in place of an absent k."""
    return rotate(q, k, cos, sin, positions, interleaved, False)


def rope_backward(
    dq: Tensor, dk: Optional[Tensor], cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The same rotation by the opposite angle."""
    return rotate(dq, dk, cos, sin, positions, interleaved, True)
