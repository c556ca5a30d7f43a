"""The mixture of experts in Triton: launches. The mathematics stands in fastprimer/ops/moe.py.

With P = N·K pairs of a token and an expert, put in the experts' order by _moe_dispatch.py:

    forward    hidden, u = gate_up[e] x_n, SwiGLU of it           gather, product, SwiGLU        moe_hidden_kernel
               z         = w · down[e] u                          product, weight                moe_product_kernel
               y         = sum over k of z                                                       moe_combine_kernel
    backward   d         = down[e]ᵀ dy_n -> dweights, dhidden, wu gather, product, SwiGLU        moe_dhidden_kernel
               dx        = sum over k of gate_up[e]ᵀ dhidden      product; sum                   moe_product_, moe_combine_kernel
               dgate_up[e], ddown[e]                              products over e's pairs        moe_gradient_kernel, twice

(dx, and the gradients of the experts, only where they are needed.)

What one kernel hands to the next lies in the order of the experts (u, dhidden, wu), or of the pairs (hidden, z), in x's type; an
expert's rows are not padded. An expert number outside 0..E-1, which cannot be checked on a GPU without waiting for it, is read
nowhere: its pair contributes 0 and has the gradient 0.

FLOPs: forward 6 P C F, backward 12 P C F. Bytes moved at least, with b bytes a number: forward the matrices that were chosen, each
3 C F b, and 2 C b a token (x, y); backward them and all gradients, again 3 C F b each, and 3 C b a token (x, dy, dx). To that comes
what kernels hand on, b times, for every pair: forward 4 F (hidden; u twice) and 2 C (z twice), backward 2 F (hidden), 8 F (dhidden
three times, wu twice) and 2 C (dx by pair, twice). What a block of columns reads that another has read is meant to be in the cache:
a token's row, and a matrix for GROUP tiles of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastprimer.kernels._launch import architecture, as_rows, on_device, wide
from fastprimer.kernels._moe import moe_combine_kernel, moe_product_kernel
from fastprimer.kernels._moe_backward import moe_dhidden_kernel, moe_gradient_kernel
from fastprimer.kernels._moe_dispatch import Dispatch, dispatch
from fastprimer.kernels._moe_forward import moe_hidden_kernel
from fastprimer.kernels.attention import family_of

GROUP = 8
"""Tiles of rows that share a block of columns in the cache."""
COMBINED = 1024
"""Numbers in a tile of moe_combine_kernel."""


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


HIDDEN = {
    "sm_80": Tile(128, 64, 32, 8, 3),
    "sm_90": Tile(128, 128, 64, 8, 4),
    "sm_100": Tile(128, 64, 64, 8, 3),
    "gfx": Tile(128, 64, 32, 8, 1),
    "float32": Tile(64, 32, 16, 4, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
PRODUCT = {
    "sm_80": Tile(128, 128, 32, 8, 3),
    "sm_90": Tile(128, 256, 64, 8, 3),
    "sm_100": Tile(128, 128, 64, 8, 3),
    "gfx": Tile(128, 128, 32, 8, 1),
    "float32": Tile(64, 64, 16, 4, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
DHIDDEN = {
    "sm_80": Tile(128, 64, 64, 8, 3),
    "sm_90": Tile(128, 256, 64, 8, 3),
    "sm_100": Tile(128, 64, 64, 8, 3),
    "gfx": Tile(128, 64, 32, 8, 1),
    "float32": Tile(64, 32, 16, 8, 2),
    "float64": Tile(32, 32, 16, 4, 1),
}
GRADIENT = {
    "sm_80": Tile(128, 128, 32, 8, 3),
    "sm_90": Tile(128, 256, 64, 8, 5),
    "sm_100": Tile(128, 128, 64, 8, 3),
    "gfx": Tile(128, 128, 32, 8, 1),
    "float32": Tile(64, 64, 16, 8, 2),
    "float64": Tile(32, 32, 32, 4, 1),
}
"""By target: BLOCK_M x BLOCK_N of the result at a time (twice that many for HIDDEN), BLOCK_K terms of the sum.

Of the tiles without spills sm_90's are the fastest on an H100 (bfloat16, 32768 tokens of 2048 features, 128 experts of 768, 8 a token:
forward 6.7 -> 5.1 ms). No other GPU has timed the others.

For one target HIDDEN, PRODUCT and DHIDDEN have the same BLOCK_M, for they share the list of tiles.
"""


def tile(table: dict[str, Tile], rows: int, columns: int, terms: int, dtype: torch.dtype, target: str, odd: bool = False) -> Tile:
    """The table's tile, no larger than a product of `rows` rows (or so many an expert) needs; few rows need fewer warps.

    With an odd width numbers come one by one, each with an address of its own, and fewer of them fit into the registers.
    """
    whole = table[family_of(dtype, target).removeprefix("gfx ") if dtype != torch.float64 else "float64"]
    most = (whole.BLOCK_M, min(32, whole.BLOCK_N // 2), min(32, whole.BLOCK_K)) if odd else whole[:3]
    BLOCK_M, BLOCK_N, BLOCK_K = (min(m, max(16, triton.next_power_of_2(n))) for m, n in zip(most, (rows, columns, terms), strict=True))
    few = BLOCK_M < most[0] and 2 * BLOCK_M * BLOCK_N < most[0] * most[1]
    num_warps = min(4, whole.num_warps) if few else whole.num_warps
    return Tile(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, whole.num_stages)


class Problem:
    """The sizes of a mixture of experts, and what its launches have in common."""

    def __init__(self, x: Tensor, gate_up: Tensor, weights: Tensor, experts: Tensor):
        self.N, self.C = x.shape
        self.E, self.F, self.K = gate_up.shape[0], gate_up.shape[1] // 2, experts.shape[1]
        self.P = self.N * self.K
        self.x, self.weights = as_rows(x) if x.numel() else x, weights.contiguous()
        self.dtype, self.device, self.WIDE = x.dtype, x.device, wide(x)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def tile(self, table: dict[str, Tile], columns: int, terms: int, rows: int | None = None) -> Tile:
        """`rows`: by default those that an expert has if all have as many."""
        rows = triton.cdiv(self.P, self.E) if rows is None else rows
        odd = self.C % 8 != 0 or self.F % 8 != 0
        return tile(table, rows, columns, terms, self.dtype, architecture(self.device), odd)

    def dispatch(self, experts: Tensor) -> Dispatch:
        return dispatch(experts, self.E, self.tile(PRODUCT, self.C, self.F).BLOCK_M)

    def multiply(self, rows: Tensor, matrix: Tensor, weights: Tensor | None, d: Dispatch) -> Tensor:
        """rows (P, size) by position, matrix (E, size, columns) -> z (P, columns) by pair."""
        size, columns = matrix.shape[1:]
        z = self.new(self.P, columns)
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = self.tile(PRODUCT, columns, size)
        if columns:
            moe_product_kernel[(d.tiles * triton.cdiv(columns, BLOCK_N),)](
                rows, matrix, weights, *d, z, *matrix.stride(), d.tiles, self.E, size, columns,
                BLOCK_M, BLOCK_N, BLOCK_K, size % BLOCK_K == 0, columns % BLOCK_N == 0, GROUP, self.WIDE,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        return z

    def combine(self, z: Tensor) -> Tensor:
        """z (P, C) -> (N, C), the sum over each token's pairs."""
        y = self.new(self.N, self.C)
        COLUMNS = min(COMBINED, triton.next_power_of_2(max(self.C, 1)))
        ROWS = min(COMBINED // COLUMNS, triton.next_power_of_2(max(self.N, 1)))
        if y.numel():
            grid = triton.cdiv(self.N, ROWS) * triton.cdiv(self.C, COLUMNS)
            num_warps = max(1, ROWS * COLUMNS // 256)
            moe_combine_kernel[(grid,)](z, y, self.N, self.K, self.C, self.WIDE, ROWS, COLUMNS, num_warps=num_warps)
        return y

    def gradient(self, left: Tensor, right: Tensor, left_gathered: bool, right_gathered: bool, d: Dispatch) -> Tensor:
        """left (·, rows), right (·, columns), each by token (gathered) or by position -> (E, rows, columns)."""
        rows, columns = left.shape[1], right.shape[1]
        gradient = self.new(self.E, rows, columns)
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = self.tile(GRADIENT, columns, triton.cdiv(self.P, self.E), rows)
        if gradient.numel():
            moe_gradient_kernel[(self.E * triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N),)](
                left, right, d.order, d.offsets, gradient, left.stride(0), right.stride(0), rows, columns, self.K,
                left_gathered, right_gathered, BLOCK_M, BLOCK_N, BLOCK_K, rows % BLOCK_M == 0, columns % BLOCK_N == 0, GROUP, self.WIDE,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        return gradient


def moe_forward(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, C), gate_up (E, 2F, C), down (E, C, F), weights, experts (N, K) -> y (N, C), hidden (N, K, 2F)."""
    p = Problem(x, gate_up, weights, experts)
    hidden, z = p.new(p.N, p.K, 2 * p.F), p.new(p.P, p.C)
    with on_device(x):
        if p.P:
            d = p.dispatch(experts)
            u = p.new(p.P, p.F)
            BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = p.tile(HIDDEN, p.F, p.C)
            if p.F:
                moe_hidden_kernel[(d.tiles * triton.cdiv(p.F, BLOCK_N),)](
                    p.x, gate_up, *d, hidden, u, p.x.stride(0), *gate_up.stride(), d.tiles, p.E, p.C, p.F, p.K,
                    BLOCK_M, BLOCK_N, BLOCK_K, p.C % BLOCK_K == 0, p.F % BLOCK_N == 0, GROUP, p.WIDE,
                    num_warps=num_warps, num_stages=num_stages,
                )  # fmt: skip
            z = p.multiply(u, down.transpose(1, 2), p.weights, d)
        return p.combine(z), hidden


def moe_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    hidden: Tensor,
    needs_dx: bool,
    needs_dexperts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx (N, C), dgate_up (E, 2F, C) and ddown (E, C, F), or (0,) where nobody needs them, dweights (N, K).

    torch sums dweights' shares, one for each block of columns: an order that the shape alone decides.
    """
    p = Problem(x, gate_up, weights, experts)
    if p.P == 0:
        needed = (x, needs_dx), (gate_up, needs_dexperts), (down, needs_dexperts), (weights, True)
        return tuple(torch.zeros(t.shape if needs else 0, dtype=t.dtype, device=t.device) for t, needs in needed)
    dx, dgate_up, ddown = p.new(0), p.new(0), p.new(0)
    dy = as_rows(dy) if dy.numel() else dy
    with on_device(x):
        d = p.dispatch(experts)
        dhidden, wu = p.new(p.P, 2 * p.F), p.new(p.P, p.F)
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages = p.tile(DHIDDEN, p.F, p.C)
        blocks = triton.cdiv(p.F, BLOCK_N)
        partial = p.new(p.P, blocks, dtype=torch.promote_types(x.dtype, torch.float32))
        if p.F:
            moe_dhidden_kernel[(d.tiles * blocks,)](
                dy, down, p.weights, hidden.contiguous(), *d, dhidden, wu, partial,
                dy.stride(0), *down.stride(), d.tiles, p.E, p.C, p.F, p.K,
                BLOCK_M, BLOCK_N, BLOCK_K, p.C % BLOCK_K == 0, p.F % BLOCK_N == 0, GROUP, p.WIDE,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        if needs_dx:
            dx = p.combine(p.multiply(dhidden, gate_up, None, d))
        if needs_dexperts:
            dgate_up = p.gradient(dhidden, p.x, False, True, d)
            ddown = p.gradient(dy, wu, True, False, d)
    return dx, dgate_up, ddown, partial.sum(1).view(p.N, p.K).to(weights.dtype)
