"""Routing in Triton: one kernel forward, one backward. The mathematics stands in fastprimer/ops/routing.py.

A program has ROWS tokens, all E logits of each in registers. The experts lie as GROUPS groups of SIZE places, powers of two, in the
order of their numbers, so that a tie goes to the lower place; without groups they are one group.

The largest of a row is found K times over, each time among what is left. What is compared are integers in the order of the floats
(`_ordered`), with NaN above all numbers, where torch.sort puts it, and below all of them LOWEST, which no float has: it marks
places without an expert and experts already taken. So the K chosen are always K different experts that exist.

Bytes moved, with b bytes a logit, for each token: forward b E + 12 K (weights, experts), backward 2 b E + 12 K where the softmax is
over all, b E less where it is over the chosen. Logits of the chosen are read a second time, from the cache. FLOPs: some 10 E, and
3 K E comparisons.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprimer.kernels._launch import on_device, wide
from fastprimer.ops.routing import SCORES, SIGMOID

NUMBERS_IN_TILE = 1024
LOG2_E, LN_2_HIGH, LN_2_LOW = tl.constexpr(1.4426950408889634), tl.constexpr(0.693145751953125), tl.constexpr(1.42860682030941723e-06)
"""ln 2 in two parts: the first has so few bits that its product with an exponent is exact in float32."""


class Tile(NamedTuple):
    ROWS: int
    GROUPS: int
    SIZE: int
    SLOTS: int
    num_warps: int


def tile(N: int, E: int, K: int, groups: int) -> Tile:
    """The tile for N tokens: 8 logits a thread, at least one token."""
    GROUPS, SIZE = triton.next_power_of_2(groups), triton.next_power_of_2(E // groups)
    rows = max(1, min(NUMBERS_IN_TILE // (GROUPS * SIZE), triton.next_power_of_2(N)))
    return Tile(rows, GROUPS, SIZE, triton.next_power_of_2(K), min(16, max(1, rows * GROUPS * SIZE // 256)))


@triton.jit
def _exp(x):
    """To two units in the last place, where a GPU's own, 2^(x log2 e), errs by |x| of them: near ties of scores hang on it."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -200, -200.0, tl.where(x > 200, 200.0, x))  # Beyond, the result is 0 or inf as well; a NaN stays one.
        n = tl.floor(x * LOG2_E)
        half = tl.floor(n * 0.5)  # A GPU's exp2 knows no subnormal numbers, a product does, and their order counts too.
        return tl.exp2((x - n * LN_2_HIGH - n * LN_2_LOW) * LOG2_E) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def _over(x, y):
    """x / y, correctly rounded, as the reference divides."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _sigmoid(x):
    return _over(tl.full(x.shape, 1.0, x.dtype), 1 + _exp(-x))


@triton.jit
def _log_sigmoid(x):
    return tl.where(x < 0, x, tl.where(x == x, 0.0, x)) - tl.log(1 + _exp(-tl.abs(x)))


@triton.jit
def _softmax(x, exists):
    """Of the x that exist, (ROWS, n) along the rows: the result, and the largest x and the sum that it was made with."""
    top = tl.max(tl.where(exists, x, float("-inf")), 1)[:, None]
    e = tl.where(exists, _exp(x - top), 0.0)
    total = tl.sum(e, 1)[:, None]
    return _over(e, total + tl.zeros_like(e)), top, total


@triton.jit
def _order_of_bits(bits):
    """The bits of a float, and integers in the order of the floats: each is the other's image."""
    if bits.dtype == tl.int64:
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ordered(x):
    """Integers in the order of the floats x; equal ones, 0 and -0 too, are equal, and NaN is above all."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        return tl.where(x == x, _order_of_bits(x.to(tl.int64, bitcast=True)), 0x7FFFFFFFFFFFFFFF)
    else:
        return tl.where(x == x, _order_of_bits(x.to(tl.int32, bitcast=True)), 0x7FFFFFFF)


@triton.jit
def _lowest(dtype: tl.constexpr):
    return tl.full((), -0x8000000000000000 if dtype == tl.int64 else -0x80000000, dtype)


@triton.jit
def _float_of(order):
    bits = _order_of_bits(order)
    return bits.to(tl.float64 if order.dtype == tl.int64 else tl.float32, bitcast=True)


@triton.jit
def _first_of_the_largest(order):
    """(ROWS, n) -> (ROWS, 1): the lowest place that has the row's largest."""
    place = tl.arange(0, order.shape[1])[None, :]
    return tl.min(tl.where(order == tl.max(order, 1)[:, None], place, order.shape[1]), 1)[:, None]


@triton.jit
def _in_best_groups(order, groups, top_groups, BEST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """(ROWS, GROUPS · SIZE): 1 where the place is in one of the top_groups best groups, else 0."""
    lowest = _lowest(order.dtype)
    order = tl.reshape(order, (ROWS, GROUPS, SIZE))
    largest = tl.max(order, 2)
    worth = _float_of(largest)
    if BEST == 2:
        place = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(order == largest[:, :, None], place, SIZE), 2)
        worth += _float_of(tl.max(tl.where(place == first[:, :, None], lowest, order), 2))
    group = tl.arange(0, GROUPS)[None, :]
    left = tl.where(group < groups, _ordered(worth), lowest)
    for _ in range(top_groups):
        left = tl.where(group == _first_of_the_largest(left), lowest, left)
    kept = ((left == lowest) & (group < groups)).to(tl.int32)
    return tl.reshape(tl.broadcast_to(kept[:, :, None], (ROWS, GROUPS, SIZE)), (ROWS, GROUPS * SIZE))


@triton.jit
def route_forward_kernel(
    logits_ptr, bias_ptr, weights_ptr, experts_ptr, stride_logits_row, stride_logits_expert, N, K, groups, size, top_groups,
    SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr, BEST: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. logits (N, groups · size) by strides, bias (groups · size,) -> weights, experts (N, K) contiguous.

    BEST: of how many a group's worth is the sum; 0 if the choice is not limited to groups.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    place = tl.arange(0, GROUPS * SIZE)[None, :]
    expert = place // SIZE * size + place % SIZE
    exists = (place // SIZE < groups) & (place % SIZE < size)
    logits_ptr += row * stride_logits_row
    l = tl.load(logits_ptr + expert.to(tl.int64) * stride_logits_expert, mask=(row < N) & exists, other=0.0).to(WIDE)
    choice = l
    if SCORE == "softmax":
        choice, top, total = _softmax(l, exists)
    elif SCORE == "sigmoid":
        choice = _sigmoid(l)
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=exists, other=0.0).to(WIDE)
    order = _ordered(choice)
    lowest = _lowest(order.dtype)
    order = tl.where(exists, order, lowest)
    if BEST:
        kept = _in_best_groups(order, groups, top_groups, BEST, ROWS, GROUPS, SIZE)
        order = tl.where(exists & (kept == 0), _ordered(tl.full(choice.shape, float("-inf"), WIDE)), order)

    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    for k in range(K):
        best = _first_of_the_largest(order)
        chosen = tl.where(slot == k, best // SIZE * size + best % SIZE, chosen)
        order = tl.where(place == best, lowest, order)

    inside = (row < N) & (slot < K)
    l = tl.load(logits_ptr + chosen.to(tl.int64) * stride_logits_expert, mask=inside, other=0.0).to(WIDE)
    if SCORE == "softmax" and not RENORMALIZE:
        r = _over(_exp(l - top), total + tl.zeros_like(l))
    elif SCORE == "sigmoid" and not RENORMALIZE:
        r = _sigmoid(l)
    elif SCORE == "sigmoid":
        r, _, _ = _softmax(_log_sigmoid(l), slot < K)
    else:
        r, _, _ = _softmax(l, slot < K)
    tl.store(weights_ptr + row * K + slot, r * SCALE, mask=inside)
    tl.store(experts_ptr + row * K + slot, chosen.to(tl.int64), mask=inside)


@triton.jit
def route_backward_kernel(
    dweights_ptr, logits_ptr, experts_ptr, dlogits_ptr,
    stride_dweights_row, stride_dweights_slot, stride_logits_row, stride_logits_expert, N, K, E,
    SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. dweights (N, K), logits (N, E) by strides, experts (N, K) -> dlogits (N, E) contiguous. Experts outside 0..E-1: none."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    expert, slot = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    logits_ptr += row * stride_logits_row
    inside = (row < N) & (slot < K)
    chosen = tl.load(experts_ptr + row * K + slot, mask=inside, other=0)
    inside &= (chosen >= 0) & (chosen < E)
    dr = tl.load(dweights_ptr + row * stride_dweights_row + slot * stride_dweights_slot, mask=inside, other=0.0).to(WIDE) * SCALE
    l = tl.load(logits_ptr + chosen * stride_logits_expert, mask=inside, other=0.0).to(WIDE)
    if SCORE == "softmax" and not RENORMALIZE:
        l_all = tl.load(logits_ptr + expert.to(tl.int64) * stride_logits_expert, mask=(row < N) & (expert < E), other=0.0).to(WIDE)
        s_all, top, total = _softmax(l_all, expert < E)
        s = _over(_exp(l - top), total + tl.zeros_like(l))
        dl = -s_all * tl.sum(tl.where(inside, s * dr, 0.0), 1)[:, None]
        dchosen = s * dr  # on top of that
    else:
        dl = tl.zeros((ROWS, WIDTH), WIDE)
        if SCORE == "sigmoid" and not RENORMALIZE:
            dchosen = dr * _sigmoid(l) * _sigmoid(-l)
        else:
            if SCORE == "sigmoid":
                r, _, _ = _softmax(_log_sigmoid(l), inside)
            else:
                r, _, _ = _softmax(l, inside)
            dchosen = r * (dr - tl.sum(tl.where(inside, r * dr, 0.0), 1)[:, None])
            if SCORE == "sigmoid":
                dchosen *= _sigmoid(-l)
    for k in range(K):
        this = (slot == k) & inside
        place = tl.max(tl.where(this, chosen, -1), 1)[:, None]
        dl += tl.where(expert == place, tl.sum(tl.where(this, dchosen, 0.0), 1)[:, None], 0.0)
    tl.store(dlogits_ptr + row * E + expert, dl.to(dlogits_ptr.dtype.element_ty), mask=(row < N) & (expert < E))


def route_forward(
    logits: Tensor,
    k: int,
    score: int,
    renormalize: bool,
    bias: Optional[Tensor],
    groups: Optional[int],
    top_groups: Optional[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """logits (N, E) -> weights (N, K) float32 (float64 for float64), experts (N, K) int64, best first."""
    N, E = logits.shape
    weights = torch.empty((N, k), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    experts = torch.empty((N, k), dtype=torch.int64, device=logits.device)
    if N:
        limited = groups is not None and top_groups is not None
        groups, top_groups = (groups, top_groups) if limited else (1, 1)
        best = min(2 if score == SIGMOID else 1, E // groups) if limited else 0
        ROWS, GROUPS, SIZE, SLOTS, num_warps = tile(N, E, k, groups)
        with on_device(logits):
            route_forward_kernel[(triton.cdiv(N, ROWS),)](
                logits, None if bias is None else bias.contiguous(), weights, experts, *logits.stride(),
                N, k, groups, E // groups, top_groups, SCORES[score], renormalize, scale, best, wide(logits),
                ROWS, GROUPS, SIZE, SLOTS, num_warps=num_warps,
            )  # fmt: skip
    return weights, experts


def route_backward(dweights: Tensor, logits: Tensor, experts: Tensor, score: int, renormalize: bool, scale: float) -> Tensor:
    """dweights (N, K), logits (N, E), experts (N, K) -> dlogits (N, E)."""
    (N, E), K = logits.shape, experts.shape[1]
    dlogits = torch.empty((N, E), dtype=logits.dtype, device=logits.device)
    if N:
        ROWS, _, WIDTH, SLOTS, num_warps = tile(N, E, K, 1)
        with on_device(logits):
            route_backward_kernel[(triton.cdiv(N, ROWS),)](
                dweights, logits, experts.contiguous(), dlogits, *dweights.stride(), *logits.stride(), N, K, E,
                SCORES[score], renormalize, scale, wide(logits), ROWS, WIDTH, SLOTS, num_warps=num_warps,
            )  # fmt: skip
    return dlogits
