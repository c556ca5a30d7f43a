r"""RoPE, rotary position embedding: rotate pairs of features by angles proportional to the token's position.

Source: Su et al., "RoFormer" (2021), section 3.2.2, equation 15. The pairing of LLaMA / Hugging Face ("half-split")
differs from the paper's ("interleaved") by a fixed permutation of the features.

**Forward.** The first R of the D features form R/2 pairs (a, b): features (i, i + R/2), or (2i, 2i + 1) interleaved. With
the cosine c and sine s of the angle of pair i at the token's position,

    a' = a c − b s
    b' = a s + b c

and features R..D−1 pass through. A rotation preserves lengths, and the score of a rotated query at position m with a
rotated key at position n depends on m − n alone: R(m)ᵀ R(n) = R(n − m).

**The two pairings.** Let π be the permutation that lists the even features first, then the odd ones. Then
half_split(π x) = π interleaved(x): a model's query and key projections, permuted row-wise by π per head, give under one
pairing the very scores that the unpermuted ones give under the other. A third convention reads pairs (2i, 2i + 1) and
writes all a' before all b', x -> cat(x[0::2] c − x[1::2] s, x[0::2] s + x[1::2] c): that is half_split(π x), and since a
permutation of the features of both q and k changes no score, it too gives the scores of the interleaved pairing.

**Backward.** The map is linear and orthogonal, so its transpose is the rotation by the opposite angle:

    da = da' c + db' s
    db = db' c − da' s

which is the forward map with s replaced by −s. Nothing but cos, sin and positions is saved; cos and sin are constants.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation
from fastprimer.ops import _arguments as arguments


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool) -> Tensor:
    """x (B, S, H, D) or (N, H, D); the rotation itself is computed in float32 (float64 for float64)."""
    dtype = arguments.wide(x.dtype)
    half = cos.shape[-1]
    c, s = (_rows(t, x.shape[-3], positions).to(dtype).unsqueeze(-2) for t in (cos, sin))  # (..., S, 1, R/2): shared by the heads
    rotary, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        rotated = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = rotary[..., :half], rotary[..., half:]
        rotated = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1).contiguous()


def _rows(table: Tensor, S: int, positions: Optional[Tensor]) -> Tensor:
    """The row of each token; NaN where there is none."""
    if positions is None:
        return table[:S]
    rows = table[positions.clamp(0, table.shape[0] - 1)]
    return rows.masked_fill(((positions < 0) | (positions >= table.shape[0])).unsqueeze(-1), torch.nan)


def rope_forward(
    q: Tensor, k: Optional[Tensor], cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q (..., H, D), k (..., Hk, D) or None -> both rotated; (0,) in place of an absent k."""
    k_rotated = q.new_empty(0) if k is None else _rotate(k, cos, sin, positions, interleaved)
    return _rotate(q, cos, sin, positions, interleaved), k_rotated


def rope_backward(
    dq: Tensor, dk: Optional[Tensor], cos: Tensor, sin: Tensor, positions: Optional[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The same rotation by the opposite angle."""
    return rope_forward(dq, dk, cos, -sin, positions, interleaved)


def _limit(names: str):
    """What a kernel for queries of these dtypes cannot take: tables of other dtypes than q's or float32."""

    def reason(q, k, cos, sin, *_) -> str:
        return (
            arguments.dtype_limit(q, cos, names, "cos and sin")
            or arguments.dtype_limit(q, sin, names, "cos and sin")
            or ("" if cos.dtype == sin.dtype else "its kernel takes cos and sin of one dtype")
        )

    return reason


LIMITS = {
    "rope": {
        "cpu": _limit("float32 bfloat16 float16 float64"),
        "triton": _limit("float32 bfloat16 float16 float64"),
        "cuda": _limit("float32 bfloat16 float16"),
    }
}


class RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, cos, sin, positions, interleaved):
        ctx.save_for_backward(cos, sin, positions)
        ctx.backend, ctx.interleaved = backend, interleaved
        ctx.set_materialize_grads(False)
        q_rotated, k_rotated = implementation("rope", backend).rope_forward(q, k, cos, sin, positions, interleaved)
        if k is None:
            return q_rotated
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(q_rotated)
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(k_rotated)
        return q_rotated, k_rotated

    @staticmethod
    def backward(ctx, dq, dk=None):
        functions = implementation("rope", "reference" if torch.is_grad_enabled() else ctx.backend)
        if dq is not None:
            dq, dk_rotated = functions.rope_backward(dq, dk, *ctx.saved_tensors, ctx.interleaved)
            dk = None if dk is None else dk_rotated
        elif dk is not None:  # q was not used
            dk, _ = functions.rope_backward(dk, None, *ctx.saved_tensors, ctx.interleaved)
        return None, dq, dk, None, None, None, None


def rope(
    q: Tensor, k: Optional[Tensor], cos: Tensor, sin: Tensor, *, positions: Optional[Tensor] = None, interleaved: bool = False
) -> tuple[Tensor, Optional[Tensor]]:
    """Rotate queries and keys by their positions; returns new tensors (q, k).

    Args:
        q: (B, S, H, D), or packed (N, H, D); float32, bfloat16, float16 or float64.
        k: likewise with Hk heads, or None (then None is returned for it).
        cos, sin: (P, R/2), R <= D, in q's dtype or float32 (others by the reference alone): cosine and sine of the angle of each pair at
            positions 0..P-1; constants.
        positions: int (B, S), or packed (N,): each token's row of cos and sin; by default 0..S-1 (packed: 0..N-1).
        interleaved: pair features (2i, 2i + 1) as in the paper, instead of (i, i + R/2) as in LLaMA.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device does not fit; the message names it.
        IndexError: a position outside 0..P-1. Checked on the CPU only: elsewhere, and in compiled code, such a token becomes NaN.

    Source: Su et al. ("RoFormer", 2021), section 3.2.2.
    """
    arguments.check_floating("rope: q", q)
    shape = q.shape
    if len(shape) not in (3, 4):
        arguments.refuse("rope: q", "shape (B, S, H, D) or (N, H, D)", tuple(shape))
    D = shape[-1]
    if k is not None:
        arguments.check_floating("rope: k", k)
        arguments.check_like("rope: k", k, q, "q")
        k_shape = k.shape
        if len(k_shape) != len(shape) or k_shape[:-2] != shape[:-2] or k_shape[-1] != D:
            expected = (*shape[:-2], k_shape[-2] if len(k_shape) == len(shape) else "Hk", D)
            arguments.refuse("rope: k", f"shape (..., Hk, D) = {expected}", tuple(k_shape))
    for name, table in (("rope: cos", cos), ("rope: sin", sin)):
        arguments.check_floating(name, table)
        arguments.check_device(name, table, q, "q")
        if table.requires_grad and torch.is_grad_enabled():
            arguments.refuse(name, "a constant", "one that requires a gradient")
    rows = cos.shape
    if len(rows) != 2 or not 0 < 2 * rows[1] <= D:
        arguments.refuse("rope: cos", f"shape (P, R/2) with 0 < R <= D = {D}", tuple(rows))
    arguments.check_shape("rope: sin", sin, rows, "of cos")
    if positions is None:
        if shape[-3] > rows[0]:
            arguments.refuse("rope: cos", f"at least {shape[-3]} rows, one per position", rows[0])
    else:
        arguments.check_integer("rope: positions", positions)
        arguments.check_shape("rope: positions", positions, shape[:-2], "(B, S) or (N,)")
        arguments.check_device("rope: positions", positions, q, "q")
        if positions.numel() and arguments.inspectable(positions):
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or high >= rows[0]:
                raise IndexError(f"rope: positions: expected numbers in 0..{rows[0] - 1}, the rows of cos, got {low}..{high}")
    arguments.check_flag("rope: interleaved", interleaved)
    backend = choose("rope", q, k, cos, sin, positions, interleaved)
    if arguments.needs_gradient(q, k):
        q, k, cos, sin = arguments.distinct(q, k, cos, sin)
        rotated = RoPE.apply(backend, q, k, cos, sin, positions, interleaved)
        return rotated if k is not None else (rotated, None)
    q, rotated_k = implementation("rope", backend).rope_forward(q, k, cos, sin, positions, interleaved)
    return q, rotated_k if k is not None else None
