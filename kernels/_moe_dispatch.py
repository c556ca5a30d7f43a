"""Dispatch: the N·K pairs (n, k) of a token and an expert, put in the order of the experts. Nothing waits for the device.

Pair p = n K + k goes to the bin of its expert, and to bin E if there is no such expert. Within a bin pairs keep their order, so
that the result depends on the experts alone, on no scheduling. A counting sort, by chunks of CHUNK pairs:

    rank[p], counts[chunk, e]      how many of p's bin precede it in its chunk, and how many there are         moe_rank_kernel
    before[chunk, e], totals[e]    how many of e are in earlier chunks, and in all                             moe_scan_kernel
    offsets[e], work               where each bin begins, and the list of tiles below                          moe_plan_kernel
    order[offsets[e] + before[chunk, e] + rank[p]] = p                                                         moe_scatter_kernel

A tile is up to BLOCK_M consecutive positions of one bin; no expert is padded in memory. How many there will be is known on the
device alone, but at most (P + min(E + 1, P) (BLOCK_M - 1)) / BLOCK_M, for a bin that is not empty wastes less than a tile: so long
is the list, and the programs without a tile (expert -1) end at once.

Bytes moved, for each pair: 8 experts (read twice), 8 rank, 4 order; the tables of E + 1 numbers a chunk are small beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 512
COMPARED = 16
"""Pairs that a chunk's pairs are compared with at a time: 512 x 16 comparisons, 32 a thread."""
SCANNED = 128
"""Chunks that are scanned at a time."""


class Dispatch(NamedTuple):
    order: Tensor
    """(P,) the pair at each position."""
    offsets: Tensor
    """(E + 2,) where each bin begins and the last one ends."""
    work: Tensor
    """(2, tiles): the expert of each tile, or -1, and its first position."""

    @property
    def tiles(self) -> int:
        return self.work.shape[1]


def tiles_at_most(P: int, E: int, BLOCK_M: int) -> int:
    return (P + min(E + 1, P) * (BLOCK_M - 1)) // BLOCK_M


@triton.jit
def _bin(experts_ptr, pair, P, E):
    expert = tl.load(experts_ptr + pair, mask=pair < P, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit
def moe_rank_kernel(experts_ptr, rank_ptr, counts_ptr, P, E, CHUNK: tl.constexpr, COMPARED: tl.constexpr):
    """One chunk. experts (P,) -> rank (P,), counts (chunks, E + 1), which come in as zeros."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    bin = _bin(experts_ptr, pair, P, E)
    rank = tl.zeros((CHUNK,), tl.int32)
    following = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, CHUNK, COMPARED):
        other = chunk * CHUNK + first + tl.arange(0, COMPARED)
        same = (bin[:, None] == _bin(experts_ptr, other, P, E)[None, :]) & (other < P)[None, :]
        rank += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), 1)
        following += tl.sum((same & (other[None, :] > pair[:, None])).to(tl.int32), 1)
    tl.store(rank_ptr + pair, rank, mask=pair < P)
    tl.store(counts_ptr + chunk.to(tl.int64) * (E + 1) + bin, rank + 1, mask=(pair < P) & (following == 0))


@triton.jit
def moe_scan_kernel(counts_ptr, before_ptr, totals_ptr, chunks, bins, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """BINS bins. counts (chunks, bins) -> before (chunks, bins), totals (bins,)"""
    bin = tl.program_id(0) * BINS + tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        place = chunk.to(tl.int64)[:, None] * bins + bin[None, :]
        inside = (chunk < chunks)[:, None] & (bin < bins)[None, :]
        count = tl.load(counts_ptr + place, mask=inside, other=0)
        tl.store(before_ptr + place, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + bin, total, mask=bin < bins)


@triton.jit
def moe_plan_kernel(totals_ptr, offsets_ptr, work_ptr, tiles, E, BLOCK_M: tl.constexpr, BINS: tl.constexpr, AT_ONCE: tl.constexpr):
    """One bin. totals (E + 1,) -> offsets (E + 2,), work (2, tiles)"""
    expert = tl.program_id(0)
    bin = tl.arange(0, BINS)
    total = tl.load(totals_ptr + bin, mask=bin <= E, other=0)
    offset = tl.sum(tl.where(bin < expert, total, 0), 0)
    first_tile = tl.sum(tl.where(bin < expert, tl.cdiv(total, BLOCK_M), 0), 0)
    count = tl.sum(tl.where(bin == expert, total, 0), 0)
    end_tile = first_tile + tl.cdiv(count, BLOCK_M)
    tl.store(offsets_ptr + expert, offset)
    for first in range(first_tile, end_tile, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        tl.store(work_ptr + tile, expert + tl.zeros_like(tile), mask=tile < end_tile)
        tl.store(work_ptr + tiles + tile, offset + (tile - first_tile) * BLOCK_M, mask=tile < end_tile)
    if expert == E:
        tl.store(offsets_ptr + E + 1, offset + count)
        for first in range(end_tile, tiles, AT_ONCE):
            tile = first + tl.arange(0, AT_ONCE)
            tl.store(work_ptr + tile, tl.full((AT_ONCE,), -1, tl.int32), mask=tile < tiles)


@triton.jit
def moe_scatter_kernel(experts_ptr, rank_ptr, before_ptr, offsets_ptr, order_ptr, P, E, CHUNK: tl.constexpr):
    """One chunk. -> order (P,)"""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = pair < P
    bin = _bin(experts_ptr, pair, P, E)
    position = tl.load(rank_ptr + pair, mask=inside, other=0)
    position += tl.load(before_ptr + chunk.to(tl.int64) * (E + 1) + bin, mask=inside, other=0)
    position += tl.load(offsets_ptr + bin, mask=inside, other=0)
    tl.store(order_ptr + position, pair, mask=inside)


def dispatch(experts: Tensor, E: int, BLOCK_M: int) -> Dispatch:
    """experts (N, K), at least one -> the order of their pairs, and its tiles of BLOCK_M."""
    experts = experts.contiguous()
    P = experts.numel()
    chunk = min(CHUNK, max(COMPARED, triton.next_power_of_2(P)))
    chunks, tiles = triton.cdiv(P, chunk), tiles_at_most(P, E, BLOCK_M)
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=experts.device)  # noqa: E731
    rank, order, offsets, totals, work = new(P), new(P), new(E + 2), new(E + 1), new(2, tiles)
    before, counts = new(chunks, E + 1), torch.zeros((chunks, E + 1), dtype=torch.int32, device=experts.device)
    moe_rank_kernel[(chunks,)](experts, rank, counts, P, E, chunk, COMPARED, num_warps=max(1, chunk // 64))
    CHUNKS, BINS = min(SCANNED, triton.next_power_of_2(chunks)), 16
    moe_scan_kernel[(triton.cdiv(E + 1, BINS),)](counts, before, totals, chunks, E + 1, CHUNKS, BINS, num_warps=4)
    moe_plan_kernel[(E + 1,)](totals, offsets, work, tiles, E, BLOCK_M, triton.next_power_of_2(E + 1), 128, num_warps=4)
    moe_scatter_kernel[(chunks,)](experts, rank, before, offsets, order, P, E, chunk, num_warps=max(1, chunk // 128))
    return Dispatch(order, offsets, work)
