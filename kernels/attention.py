"""Attention in Triton: launches. The mathematics stands in fastprimer/ops/attention.py.

Forward is one kernel (_attention_forward.py), backward three (_attention_backward.py): delta, then dk and dv with the queries in
the inner loop, then dq with the keys in the inner loop. Each output element is summed by one program, in the order of the blocks.
Where the target and the layout allow, tiles come through tensor descriptors, made by each program for its own sequence: what lies
beyond its end is never read, packed or not.

Bytes moved, with b bytes a number: forward b for each number of q and o, and of k and v, which the tiles of all queries of a group
read from the cache; lse 4 a row. Backward reads q, k, v, o, do and writes dq, dk, dv, again once where the cache holds what the
blocks read repeatedly. FLOPs, for each pair of a query and a visible key: forward 2 (D + Dv), backward 6 D + 4 Dv and once more
2 (D + Dv), for s and dp are computed in both of its large kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

from fastprimer.kernels._attention_backward import attention_delta_kernel, attention_dk_dv_kernel, attention_dq_kernel
from fastprimer.kernels._attention_forward import attention_forward_kernel
from fastprimer.kernels._launch import architecture, as_heads, on_device, with_scratch


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def width(C: int) -> int:
    """Columns of a tile for C numbers: what a tensor core's product can take."""
    return max(16, triton.next_power_of_2(C))


FORWARD = {
    "sm_80": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    "sm_90": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 1)},
    "sm_100": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)},
    "sm_90 TMA": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "sm_100 TMA": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    "gfx": {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    "float32": {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
    "gfx float32": {64: Tile(64, 32, 8, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
DK_DV = {
    "sm_80": {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    "sm_90": {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 1)},
    "sm_100": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    "sm_90 TMA": {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2)},
    "sm_100 TMA": {64: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    "gfx": {64: Tile(32, 128, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    "float32": {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "gfx float32": {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
DQ = {
    "sm_80": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    "sm_90": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    "sm_100": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    "sm_90 TMA": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "sm_100 TMA": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "gfx": {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    "float32": {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "gfx float32": {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
}
"""By target and width: the largest found that spill no registers where the compile gate looks. Those of sm_90 are measured on an H100
(benchmarks/results), the others on no GPU yet.

In forward and for dq, BLOCK_M queries stay in registers and blocks of BLOCK_N keys pass by; for dk and dv it is the other way
round. "TMA": where tensor descriptors bring the tiles; sm_90 has none for dk and dv of 256 features, for every tile tried spills.
float32 is multiplied in full precision, which no tensor core does.
"""


def family_of(dtype: torch.dtype, target: str) -> str:
    """sm_80's tiles also suit the GPUs with 99 KiB of shared memory; sm_103 is like sm_100."""
    family = "gfx" if target.startswith("gfx") else {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(target, "sm_80")
    if dtype == torch.float32:
        return "gfx float32" if family == "gfx" else "float32"
    return family


def tile(table: dict[str, dict[int, Tile]], D: int, Dv: int, dtype: torch.dtype, target: str, TMA: bool) -> Tile:
    return table[family_of(dtype, target) + " TMA" * TMA][max(64, width(D), width(Dv))]


def has_tma(table: dict[str, dict[int, Tile]], target: str, *tensors: Tensor) -> bool:
    """Whether tensor descriptors read these tensors (B, tokens, heads, C): the table has a tile for it, C is a power of 2, and all
    addresses are multiples of 16. float32 goes without: its products are not made from shared memory.
    """
    tiles = table.get(f"{family_of(tensors[0].dtype, target)} TMA", {})
    return max(64, *(width(t.shape[-1]) for t in tensors)) in tiles and all(
        t.shape[-1] == width(t.shape[-1]) and t.data_ptr() % 16 == 0 and all(n > 0 and n % 8 == 0 for n in t.stride()[:3]) for t in tensors
    )


def scores(scale: float, softcap: Optional[float]) -> tuple[float, float]:
    """inner, slope: a logit in base 2 is slope · q k, or with a softcap slope · tanh(inner · q k)."""
    return (0.0, scale / math.log(2)) if softcap is None else (scale / softcap, softcap / math.log(2))


class Problem:
    """The arguments of an attention as the kernels take them: dense tensors (B, S, heads, D), packed ones as one of them."""

    def __init__(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap):
        self.q, self.k, self.v = as_heads(q), as_heads(k), as_heads(v)
        self.packed = cu_seqlens_q is not None
        self.cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()) if self.packed else (None, None)
        B, S, self.H, self.D = self.q.shape
        T, self.Hk, self.Dv = self.v.shape[1:]
        self.B, self.N = cu_seqlens_q.shape[0] - 1 if self.packed else B, S
        if self.packed:
            S, T = min(S, S if max_seqlen_q is None else max_seqlen_q), min(T, T if max_seqlen_k is None else max_seqlen_k)
        self.S, self.T = S, T
        self.LEFT, self.RIGHT, self.SOFTCAP = left is not None, right is not None, softcap is not None
        self.left, self.right = min(left or 0, S + T), min(right or 0, S + T)
        self.scale = scale
        self.inner, self.slope = scores(scale, softcap)

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Of sequences, tokens, heads of an x (B, tokens, heads, C); packed sequences are told apart by their first token."""
        batch, token, head, _ = x.stride()
        return 0 if self.packed else batch, token, head

    def stride_of_sequence(self, x: Tensor) -> int:
        """Of an output, which is contiguous."""
        return 0 if self.packed else x.stride(0)

    @property
    def strides_of_lse(self) -> tuple[int, int]:
        return (0, self.N) if self.packed else (self.H * self.N, self.N)

    def whole(self, length: int, block: int) -> bool:
        """Whether every sequence is known to be a multiple of a block."""
        return not self.packed and length % block == 0


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    scale: float,
    left: Optional[int],
    right: Optional[int],
    softcap: Optional[float],
) -> tuple[Tensor, Tensor]:
    """q (B, S, H, D), k (B, T, Hk, D), v (B, T, Hk, Dv) -> o (B, S, H, Dv), lse (B, H, S); packed: without B, lse (H, N)."""
    a = Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap)
    o = torch.empty((*q.shape[:-1], a.Dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((a.H, a.N) if a.packed else (a.B, a.H, a.N), dtype=torch.float32, device=q.device)
    target = architecture(q.device)
    TMA = has_tma(FORWARD, target, a.q, a.k, a.v)
    BLOCK_M, BLOCK_N, num_warps, num_stages = tile(FORWARD, a.D, a.Dv, q.dtype, target, TMA)
    tiles = triton.cdiv(a.S, BLOCK_M)
    if tiles * a.B:
        with on_device(q):
            with_scratch(
                attention_forward_kernel[(tiles * a.B * a.H,)],
                a.q, a.k, a.v, sinks if sinks is None else sinks.contiguous(), *a.cu_seqlens, o, lse,
                *a.strides(a.q), *a.strides(a.k), *a.strides(a.v), a.stride_of_sequence(o), *a.strides_of_lse,
                tiles, a.S, a.T, a.H, a.H // a.Hk, a.left, a.right, a.inner, a.slope,
                a.D, a.Dv, width(a.D), width(a.Dv), BLOCK_M, BLOCK_N,
                a.LEFT, a.RIGHT, a.SOFTCAP, a.whole(a.S, BLOCK_M), a.whole(a.T, BLOCK_N), TMA,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
    return o, lse


def attention_backward(
    do: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    scale: float,
    left: Optional[int],
    right: Optional[int],
    softcap: Optional[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv like q, k, v, and dsinks (H,) or (0,) without sinks."""
    a = Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap)
    do, lse = as_heads(do), lse.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    with on_device(q):
        delta, dsinks = _delta(a, do, dlse, as_heads(o), lse, sinks)
        _launch_dk_dv(a, do, lse, delta, dk, dv)
        _launch_dq(a, do, lse, delta, dq)
    return dq, dk, dv, q.new_empty(0) if sinks is None else dsinks.to(sinks.dtype)


def _delta(a: Problem, do: Tensor, dlse: Optional[Tensor], o: Tensor, lse: Tensor, sinks: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """delta, laid out like lse, and dsinks: torch sums the tiles' shares, in an order that the shape alone decides."""
    BLOCK_M = 2048 // width(a.Dv)
    tiles, sequences = triton.cdiv(a.N, BLOCK_M), do.shape[0]
    delta = torch.empty_like(lse)
    partial = torch.empty((sequences * tiles, a.H), dtype=torch.float32, device=lse.device)
    if partial.numel():
        attention_delta_kernel[(sequences * tiles * a.H,)](
            do, None if dlse is None else dlse.contiguous(), o, lse, sinks if sinks is None else sinks.contiguous(), delta, partial,
            *a.strides(do), *a.strides(o), *a.strides_of_lse, tiles, a.N, a.H, a.Dv, width(a.Dv), BLOCK_M, num_warps=4,
        )  # fmt: skip
    return delta, partial.sum(0)


def _launch_dk_dv(a: Problem, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    target = architecture(dk.device)
    TMA = has_tma(DK_DV, target, do, a.q, a.k, a.v)
    BLOCK_M, BLOCK_N, num_warps, num_stages = tile(DK_DV, a.D, a.Dv, dk.dtype, target, TMA)
    tiles = triton.cdiv(a.T, BLOCK_N)
    if tiles * a.B:
        with_scratch(
            attention_dk_dv_kernel[(tiles * a.B * a.Hk,)],
            do, a.q, a.k, a.v, lse, delta, *a.cu_seqlens, dk, dv,
            *a.strides(do), *a.strides(a.q), *a.strides(a.k), *a.strides(a.v),
            a.stride_of_sequence(dk), a.stride_of_sequence(dv), *a.strides_of_lse,
            tiles, a.S, a.T, a.Hk, a.H // a.Hk, a.left, a.right, a.scale, a.inner, a.slope,
            a.D, a.Dv, width(a.D), width(a.Dv), BLOCK_M, BLOCK_N,
            a.LEFT, a.RIGHT, a.SOFTCAP, a.whole(a.S, BLOCK_M), a.whole(a.T, BLOCK_N), TMA,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


def _launch_dq(a: Problem, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
    target = architecture(dq.device)
    TMA = has_tma(DQ, target, do, a.q, a.k, a.v)
    BLOCK_M, BLOCK_N, num_warps, num_stages = tile(DQ, a.D, a.Dv, dq.dtype, target, TMA)
    tiles = triton.cdiv(a.S, BLOCK_M)
    if tiles * a.B:
        with_scratch(
            attention_dq_kernel[(tiles * a.B * a.H,)],
            do, a.q, a.k, a.v, lse, delta, *a.cu_seqlens, dq,
            *a.strides(do), *a.strides(a.q), *a.strides(a.k), *a.strides(a.v), a.stride_of_sequence(dq), *a.strides_of_lse,
            tiles, a.S, a.T, a.H, a.H // a.Hk, a.left, a.right, a.scale, a.inner, a.slope,
            a.D, a.Dv, width(a.D), width(a.Dv), BLOCK_M, BLOCK_N,
            a.LEFT, a.RIGHT, a.SOFTCAP, a.whole(a.S, BLOCK_M), a.whole(a.T, BLOCK_N), TMA,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
