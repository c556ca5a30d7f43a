"""Cross-entropy in Triton, plain and fused with the projection: launches. The mathematics stands in fastprimer/ops/cross_entropy.py.

    cross_entropy          forward   all of the vocabulary is one piece                        cross_entropy_fold_kernel
                           backward  dlogits, tile by tile                                     cross_entropy_gradient_kernel
    linear_cross_entropy   forward   for each piece: logits, loss so far                       product of torch, fold kernel
                                     and if it is kept in 16 bits, that                        cross_entropy_keep_kernel
                           backward  for each piece: logits unless they were kept, dlogits     product of torch, gradient kernel
                                     dweight's rows = dlogitsᵀ x, dx += dlogits weight         products of torch, where they are needed

A piece is as many columns of the vocabulary as fit into PIECE bytes, or the memory budget (a quarter of it in a forward pass that keeps
16 bits beside them) if that is more. It holds logits in float32, and where it is to be kept so it is `kept` itself, in which the fold
leaves z. dlogits are handed to the products in x's type, for the matrix units, and so that float16 does not lose the small ones, times
a power of two that takes the largest near its end.

FLOPs: 2 N V C a product; forward has one, backward two, and one more for what was not kept. Bytes moved by the kernels for each logit,
with b bytes a number of x: plain forward b, backward 2 b; fused forward 4 (8 with a softcap or a bias where it is kept; 6 more to keep
it in 16 bits), backward 4 + b (2 + b where it is). Products move 4 a logit forward (writing it) and 2 b backward (reading dlogits
twice), and for each piece x, and dx four times.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

from fastprimer.backends import outside_autocast
from fastprimer.kernels._cross_entropy import cross_entropy_fold_kernel, cross_entropy_gradient_kernel, cross_entropy_keep_kernel
from fastprimer.kernels._launch import as_rows, on_device, wide
from fastprimer.ops.cross_entropy import BLOCK, keeps_16_bits, kept_columns

PIECE = 64 * 2**20
"""Bytes of logits in a piece, at least: enough for a product that keeps a GPU busy."""
SUMMED = 32
"""Rows of which one program sums the gradient of the bias."""


class Tile(NamedTuple):
    COLUMNS: int
    num_warps: int


def fold_tile(columns: int) -> Tile:
    """8 columns a thread, each with four numbers of its own in registers; at most 2048 at a time."""
    COLUMNS = min(2048, triton.next_power_of_2(columns))
    return Tile(COLUMNS, max(1, COLUMNS // 256))


def gradient_tile(columns: int) -> Tile:
    """8 columns a thread, which are 16 bytes of a half type."""
    COLUMNS = min(1024, triton.next_power_of_2(columns))
    return Tile(COLUMNS, max(1, COLUMNS // 256))


def piece_columns(N: int, V: int, budget: int) -> int:
    """The width of a piece: of how many columns there is room for N rows in float32, a multiple of 256, or all V."""
    room = max(budget, PIECE) // (4 * max(N, 1))
    return min(V, max(room // 256 * 256, 256))


def pieces(V: int, kept: int, width: int) -> list[tuple[int, int]]:
    """(first, end) of one piece after the other, each of them all kept or not at all."""
    return [(first, min(first + width, stop)) for start, stop in ((0, kept), (kept, V)) for first in range(start, stop, width)]


def _buffer(like: Tensor, N: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(N, columns) with rows that begin at a multiple of 128 bytes, whatever V is: for accesses of 16 bytes and for the products."""
    return torch.empty((N, triton.cdiv(columns, 64) * 64), dtype=dtype, device=like.device)


def _widened(bias: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """The bias as its products' logits are, so that a thread reads it at the same columns as them."""
    return None if bias is None else bias.to(dtype).contiguous()


class Losses:
    """The outputs of forward, folded together piece by piece."""

    def __init__(self, like: Tensor, target: Tensor, V: int, bias: Optional[Tensor], options: tuple, one_piece: bool):
        N = target.shape[0]
        self.N, self.V, self.target, self.WIDE = N, V, target.contiguous(), wide(like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.bias = _widened(bias, dtype)
        self.ignore_index, self.constants = options[0], (options[1], options[2], options[3] or 0.0)
        self.loss, self.lse, self.correction = (torch.empty(N, dtype=dtype, device=like.device) for _ in range(3))
        self.argmax = torch.empty(N, dtype=torch.int64, device=like.device)
        self.state = None if one_piece else torch.empty((4, N), dtype=dtype, device=like.device)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.loss, self.lse, self.correction, self.argmax

    def keep(self, z: Tensor, first: int, kept: Tensor, shift: Tensor) -> None:
        """z (N, columns) of a piece that is folded, into its columns of kept and shift."""
        COLUMNS, num_warps = fold_tile(z.shape[1])
        cross_entropy_keep_kernel[(self.N,)](
            z, self.target, self.state, kept, shift, z.stride(0), kept.stride(0), shift.stride(0),
            first, z.shape[1], self.ignore_index, COLUMNS, num_warps=num_warps,
        )  # fmt: skip

    def fold(self, logits: Tensor, first: int, keep: bool = False) -> None:
        """logits (N, columns) of a piece, without bias; with `keep` they become z. Pieces come in order."""
        columns = logits.shape[1]
        COLUMNS, num_warps = fold_tile(columns)
        cross_entropy_fold_kernel[(self.N,)](
            logits, self.bias, self.target, self.loss, self.lse, self.correction, self.argmax, self.state,
            *logits.stride(), self.N, first, columns, self.V, self.ignore_index,
            first == 0, first + columns == self.V, keep, *self.constants, self.WIDE, COLUMNS, num_warps=num_warps,
        )  # fmt: skip


class Gradients:
    """What every launch of the gradient kernel has in common."""

    def __init__(self, dloss, dlse, target, lse, correction, bias, V: int, options: tuple, like: Tensor, scale: Optional[Tensor] = None):
        self.bias = _widened(bias, lse.dtype)
        self.vectors = [None if t is None else t.contiguous() for t in (target, dloss, dlse, lse, correction)]
        self.V, self.WIDE, self.scale = V, wide(like), scale
        self.ignore_index, self.constants = options[0], (options[1], options[2], options[3] or 0.0)

    def dlogits(self, z: Tensor, dlogits: Tensor, first: int, raw: bool, shift: Optional[Tensor] = None) -> Optional[Tensor]:
        """z (N, columns), or `raw` logits, -> dlogits, in place of what is there; returns this piece of dbias. shift: of z in 16 bits."""
        N, columns = z.shape
        COLUMNS, num_warps = gradient_tile(columns)
        ROWS = 1 if self.bias is None else SUMMED
        chunks = triton.cdiv(N, ROWS)
        partial = None if self.bias is None else torch.empty((chunks, columns), dtype=self.vectors[-1].dtype, device=z.device)
        cross_entropy_gradient_kernel[(chunks * triton.cdiv(columns, COLUMNS),)](
            z, shift, self.bias, *self.vectors, self.scale, dlogits, partial,
            *z.stride(), 0 if shift is None else shift.stride(0), dlogits.stride(0), N, first, columns, self.V, self.ignore_index,
            raw, *self.constants, self.WIDE, ROWS, COLUMNS, num_warps=num_warps,
        )  # fmt: skip
        return None if partial is None else partial.sum(0)


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: Optional[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, V), target (N,) -> loss, lse, κ, all float32 (float64 for float64), and argmax, int64 (N,)."""
    losses = Losses(logits, target, logits.shape[1], None, (ignore_index, label_smoothing, z_loss, softcap), one_piece=True)
    if losses.N:
        with on_device(logits):
            losses.fold(logits, 0)
    return losses.outputs()


def cross_entropy_backward(
    dloss: Tensor,
    dlse: Optional[Tensor],
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    correction: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
) -> Tensor:
    """-> dlogits (N, V)."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if dlogits.numel():
        options = ignore_index, label_smoothing, z_loss, softcap
        with on_device(logits):
            gradients = Gradients(dloss, dlse, target, lse, correction, None, logits.shape[1], options, logits)
            gradients.dlogits(logits, dlogits, 0, raw=True)
    return dlogits


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed in float32 (float64 for float64). On the CPU and on ROCm torch does not do that for half types."""
    if a.device.type == "cpu" or (torch.version.hip is not None and a.dtype != out.dtype):
        dtype = torch.promote_types(a.dtype, torch.float32)
        out.copy_(a.to(dtype) @ b.to(dtype))
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@outside_autocast
def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Optional[Tensor],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C), target (N,), bias (V,) or None -> loss, lse, κ, argmax (N,), kept (N, kept_columns), shift (N, blocks)."""
    N, V, in_16_bits = x.shape[0], weight.shape[0], keeps_16_bits(x, bias, softcap)
    columns = kept_columns(N, V, memory_budget, 2 if in_16_bits else max(4, x.element_size()))
    width = piece_columns(N, V, memory_budget // 4 if in_16_bits else memory_budget)  # logits beside kept, or within it
    parts = pieces(V, columns, width)
    one_piece = len(parts) == 1 and not (columns and in_16_bits)
    losses = Losses(x, target, V, bias, (ignore_index, label_smoothing, z_loss, softcap), one_piece)
    dtype = losses.lse.dtype
    kept = torch.empty((N, columns), dtype=torch.int16 if in_16_bits else dtype, device=x.device)
    shift = torch.empty((N, triton.cdiv(columns, BLOCK) if in_16_bits else 0), dtype=dtype, device=x.device)
    if N:
        buffer = _buffer(x, N, min(width, V if in_16_bits else V - columns), dtype)
        with on_device(x):
            x = x.contiguous()  # as it is in backward, where the library is to round the same product alike
            for first, end in parts:
                keep = end <= columns
                logits = kept[:, first:end] if keep and not in_16_bits else buffer[:, : end - first]
                _multiply(x, weight[first:end].t(), logits)
                losses.fold(logits, first, keep)
                if keep and in_16_bits:
                    losses.keep(logits, first, kept, shift)
    return *losses.outputs(), kept, shift


@outside_autocast
def linear_cross_entropy_backward(
    dloss: Tensor,
    dlse: Optional[Tensor],
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    correction: Tensor,
    kept: Tensor,
    shift: Tensor,
    bias: Optional[Tensor],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (N, C), dweight (V, C), or (0,) where nobody needs it, dbias (V,) or (0,) without bias. Nothing of kept is changed.

    torch sums dbias' shares, one for each SUMMED rows: an order that the shape alone decides.
    """
    (N, C), V, columns = x.shape, weight.shape[0], kept.shape[1]
    dbias = torch.zeros(0 if bias is None else V, dtype=x.dtype if bias is None else bias.dtype, device=x.device)
    dweight = torch.empty((V, C) if needs_dweight else 0, dtype=weight.dtype, device=x.device)
    if N == 0:
        return torch.empty((N, C) if needs_dx else 0, dtype=x.dtype, device=x.device), dweight.zero_(), dbias
    dx = torch.empty((N, C) if needs_dx else 0, dtype=lse.dtype, device=x.device)
    shift = shift if kept.dtype == torch.int16 else None
    width = piece_columns(N, V, (4 if shift is None else 2) * kept.numel())
    parts = pieces(V, columns, width)
    share = torch.empty_like(dx) if len(parts) > 1 else dx
    with on_device(x):
        valid = target != ignore_index
        x = torch.where(valid.unsqueeze(-1), as_rows(x), 0.0)  # 0 · nan is nan
        scale = _scale(dloss, dlse, lse, valid, z_loss) if x.dtype == torch.float16 else None
        options = ignore_index, label_smoothing, z_loss, softcap
        gradients = Gradients(dloss, dlse, target, lse, correction, bias, V, options, x, scale)
        dlogits = _buffer(x, N, width, x.dtype)
        buffer = _buffer(x, N, min(width, V - columns), lse.dtype)
        for first, end in parts:
            z, dl = kept[:, first:end] if end <= columns else buffer[:, : end - first], dlogits[:, : end - first]
            if end > columns:
                _multiply(x, weight[first:end].t(), z)
            dbias_piece = gradients.dlogits(z, dl, first, raw=end > columns, shift=shift if end <= columns else None)
            if bias is not None:
                dbias[first:end] = dbias_piece
            if needs_dx:
                _multiply(dl, weight[first:end], share if first else dx)
                if first:
                    dx += share
            if not needs_dweight:
                continue
            if dweight.dtype == lse.dtype:
                _multiply(dl.t(), x, dweight[first:end])
            else:  # a library may split a product, and add up the parts in the type of the result
                rows = torch.empty((end - first, C), dtype=lse.dtype, device=x.device)
                _multiply(dl.t(), x, rows)
                dweight[first:end] = rows if scale is None else rows / scale
        if needs_dx:
            if scale is not None:
                dx /= scale
            dx = torch.where(valid.unsqueeze(-1), dx, 0.0)  # dlogits of 0 times a weight that is NaN are none
    return dx.to(x.dtype), dweight, dbias


def _scale(dloss: Tensor, dlse: Optional[Tensor], lse: Tensor, valid: Tensor, z_loss: float) -> Tensor:
    """A power of two, () on the device, that takes the largest number dlogits may have to at most 2^15; a float16 ends at 2^16."""
    largest = dloss.abs() * (2 + 2 * abs(z_loss) * lse.abs()) + (0.0 if dlse is None else dlse.abs())
    largest = torch.where(valid & largest.isfinite(), largest, 0.0).max()
    return torch.exp2(torch.floor(15 - torch.log2(largest)).clamp(-100, 100))
