"""Decoding in Triton: launches. The mathematics stands in fastprimer/ops/decoding.py.

One launch writes the new keys and values into the caches, one attends to them: B · Hk · tiles · splits programs (_decoding.py).
A tile holds the queries of all heads that share a key/value head, so that these keys are read once; where B · Hk · tiles are too
few for the GPU the keys are split, and a third launch combines the splits. Their number follows from what the host knows:
the capacity of the cache, the window, B, Hk and the multiprocessors; the lengths stay on the device.

Bytes moved, with b bytes a number: the new keys and values 2b (read, written); q and o b; for each sequence b (D + Dv) for every
key/value head and key that one of its queries sees, once a tile; lse 4 a row; with splits q once for each, 8 (Dv + 1) a row and
split that saw a key; the page of every block (of every key, where pages are no multiple of BLOCK_N). FLOPs: 2 (D + Dv) a query and key.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

from fastprimer.kernels._decoding import append_kernel, attention_combine_kernel, attention_with_kv_cache_kernel
from fastprimer.kernels._launch import architecture, as_heads, on_device, processors
from fastprimer.kernels.attention import scores, width

KEYS_OF_A_SPLIT = 256
"""Fewer do not pay for combining."""


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


MOST_ROWS = {"sm": 64, "gfx": 16, "float32": 16}
BLOCKS = {
    "sm": {64: (64, 4, 3), 128: (64, 4, 2), 256: (32, 4, 2)},
    "gfx": {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    "float32": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 8, 1)},
}
"""By target and width: BLOCK_N, num_warps and num_stages that spill no registers where the compile gate looks; those of "sm" are
measured on an H100 (benchmarks/NOTES.md), of "gfx" no GPU has been asked. They fit into the 99 KiB of shared memory of the smaller GPUs."""


def tile(rows: int, D: int, Dv: int, dtype: torch.dtype, target: str) -> Tile:
    """For this many queries that share a key/value head."""
    family = "float32" if dtype == torch.float32 else "gfx" if target.startswith("gfx") else "sm"
    BLOCK_M = min(MOST_ROWS[family], max(16, triton.next_power_of_2(rows)))
    BLOCK_N, num_warps, num_stages = BLOCKS[family][max(64, width(D), width(Dv))]
    return Tile(BLOCK_M, BLOCK_N, 8 if BLOCK_M == 64 else num_warps, num_stages)


def number_of_splits(programs: int, keys: int, device: torch.device) -> int:
    """Two programs a multiprocessor, as far as there are keys for them."""
    return max(1, min(2 * processors(device) // programs, keys // KEYS_OF_A_SPLIT))


def attention_with_kv_cache_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    block_table: Optional[Tensor],
    sinks: Optional[Tensor],
    scale: float,
    left: Optional[int],
    right: Optional[int],
    softcap: Optional[float],
) -> tuple[Tensor, Tensor]:
    """q (B, S, H, D) -> o (B, S, H, Dv), lse (B, H, S); writes k and v into the caches at cache_seqlens."""
    B, S, H, _ = q.shape
    o = torch.empty((B, S, H, v_cache.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    if o.numel():
        cache_seqlens = cache_seqlens.contiguous()
        if block_table is not None and block_table.stride(1) != 1:
            block_table = block_table.contiguous()
        with on_device(q):
            if k is not None:
                _append(as_heads(k), as_heads(v), k_cache, v_cache, cache_seqlens, block_table)
            new = 0 if k is None else S
            sinks = sinks if sinks is None else sinks.contiguous()
            _attend(as_heads(q), k_cache, v_cache, cache_seqlens, new, block_table, sinks, scale, left, right, softcap, o, lse)
    return o, lse


def _pages(k_cache: Tensor, block_table: Optional[Tensor]) -> tuple[int, int, int]:
    """The stride of the block table, tokens a page and tokens a sequence at most: none without pages."""
    if block_table is None:
        return 0, 1, k_cache.shape[1]
    return block_table.stride(0), k_cache.shape[1], k_cache.shape[1] * block_table.shape[1] if len(k_cache) else 0


def _append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Optional[Tensor]) -> None:
    B, S, Hk, D = k.shape
    Dv = v.shape[3]
    stride_table_batch, PAGE, capacity = _pages(k_cache, block_table)
    if capacity == 0:
        return
    HEADS = min(triton.next_power_of_2(Hk), max(1, 1024 // width(max(D, Dv))))
    append_kernel[(B * S,)](
        k, v, k_cache, v_cache, cache_seqlens, block_table,
        *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], stride_table_batch,
        len(k_cache), S, Hk, capacity,
        D, Dv, width(D), width(Dv), PAGE, HEADS, num_warps=4,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    new: int,
    block_table: Optional[Tensor],
    sinks: Optional[Tensor],
    scale: float,
    left: Optional[int],
    right: Optional[int],
    softcap: Optional[float],
    o: Tensor,
    lse: Tensor,
) -> None:
    B, S, H, D = q.shape
    Hk, Dv = v_cache.shape[2:]
    stride_table_batch, PAGE, capacity = _pages(k_cache, block_table)
    BLOCK_M, BLOCK_N, num_warps, num_stages = tile(S * (H // Hk), D, Dv, q.dtype, architecture(q.device))
    tiles = triton.cdiv(S * (H // Hk), BLOCK_M)
    splits = number_of_splits(B * Hk * tiles, capacity if left is None else min(capacity, left + S), q.device)
    SPLIT = splits > 1
    o_part = torch.empty((splits, *o.shape), dtype=torch.float32, device=o.device) if SPLIT else o
    lse_part = torch.empty((splits, *lse.shape), dtype=torch.float32, device=o.device) if SPLIT else lse
    farthest = S + capacity
    attention_with_kv_cache_kernel[(splits * tiles * Hk * B,)](
        q, k_cache, v_cache, cache_seqlens, block_table, sinks, o_part, lse_part,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], stride_table_batch, len(k_cache),
        splits, tiles, new, B, S, H, Hk, capacity, min(left or 0, farthest), min(right or 0, farthest), *scores(scale, softcap),
        D, Dv, width(D), width(Dv), PAGE, H // Hk, BLOCK_M, BLOCK_N,
        left is not None, right is not None, softcap is not None, SPLIT, S == 1, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if SPLIT:
        attention_combine_kernel[(B * S * H,)](
            o_part, lse_part, o, lse, splits, B, S, H, Dv, width(Dv), triton.next_power_of_2(splits), 8, num_warps=4
        )
