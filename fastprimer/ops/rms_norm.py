r"""RMSNorm: scale every row to unit root mean square, then every column by a learned weight.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), section 4, equation 4. The residual sum that
precedes a norm in a pre-norm decoder is fused, for it reads the same row.

**Forward.** For one row of C numbers, with h = x + residual (or h = x), w = weight + weight_offset (or w = 1):

    rstd  = 1 / sqrt(mean(h²) + eps)
    h_hat = h · rstd
    y     = h_hat · w

**Backward.** Let g = dy · w be the gradient of h_hat, and dh that of the output h, where it was used further (the residual
stream; 0 otherwise). Since y depends on h both directly and through rstd, and ∂rstd/∂h_i = −rstd³ h_i / C,

    dx_i = rstd g_i + (Σ_j g_j h_j) · ∂rstd/∂h_i            + dh_i
         = rstd g_i − rstd³ h_i · mean(g h)                 + dh_i
         = rstd · (g_i − h_hat_i · mean(g h_hat))           + dh_i

The sum h = x + residual passes one gradient on to both: dresidual = dx. Each row adds to every column's weight:

    dweight = Σ_rows dy · h_hat

Only h, weight and rstd are saved. Statistics and sums are float32 (float64 for float64 inputs); y is rounded once.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation
from fastprimer.config import is_number
from fastprimer.ops import _arguments as arguments


def rms_norm_forward(
    x: Tensor, weight: Optional[Tensor], eps: float, residual: Optional[Tensor], weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., C) -> y (..., C), h (..., C) or (0,) without residual (h is x then), rstd (...)."""
    h = x if residual is None else x + residual
    h_wide = h.to(arguments.wide(x.dtype))
    rstd = torch.rsqrt(h_wide.square().mean(-1) + eps)
    y = h_wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else h.contiguous(), rstd.contiguous()


def rms_norm_backward(
    dy: Tensor, dh: Optional[Tensor], h: Tensor, weight: Optional[Tensor], rstd: Tensor, weight_offset: float, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dy, dh, h (..., C), rstd (...) -> dx (..., C), which is dresidual too, and dweight (C,), or (0,) where nobody needs it."""
    dy_wide = dy.to(rstd.dtype)
    h_hat = h.to(rstd.dtype) * rstd.unsqueeze(-1)
    g = dy_wide if weight is None else dy_wide * (weight.to(rstd.dtype) + weight_offset)
    dx = rstd.unsqueeze(-1) * (g - h_hat * (g * h_hat).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + dh
    if weight is None or not needs_dweight:
        dweight = h.new_empty(0, dtype=h.dtype if weight is None else weight.dtype)
    else:
        dweight = (dy_wide * h_hat).reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(h.dtype).contiguous(), dweight


LIMITS = {
    "rms_norm": {
        "cpu": lambda x, weight, *_: arguments.dtype_limit(x, weight, "float32 bfloat16 float16 float64"),
        "triton": lambda x, weight, *_: arguments.dtype_limit(x, weight, "float32 bfloat16 float16"),
        "cuda": lambda x, weight, *_: (
            arguments.dtype_limit(x, weight, "float32 bfloat16 float16")
            or ("its kernel takes rows of at most 2^30 numbers" if x.shape[-1] > 2**30 else "")
        ),
    }
}


LARGE = 2**25
"""Numbers from which on Triton's kernels are on the whole as fast or faster, and their longer calls do not show: 95% to 100% of a copy's
bandwidth on an H100 forward and 85% to 88% backward, the CUDA kernels' 86% to 98% and 75% to 90%."""


def _faster(x: Tensor, *_) -> str:
    return "triton" if x.dtype in (torch.bfloat16, torch.float16) and x.numel() >= LARGE else ""


FASTER = {"rms_norm": _faster}


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, eps, residual, weight_offset):
        y, h, rstd = implementation("rms_norm", backend).rms_norm_forward(x, weight, eps, residual, weight_offset)
        h = x if residual is None else h
        ctx.save_for_backward(h, weight, rstd)
        ctx.backend, ctx.eps, ctx.weight_offset, ctx.has_residual = backend, eps, weight_offset, residual is not None
        ctx.set_materialize_grads(False)
        if ctx.has_residual and not (ctx.needs_input_grad[1] or ctx.needs_input_grad[4]):
            ctx.mark_non_differentiable(h)  # a frozen stream stays one, whatever the weight
        return (y, h) if ctx.has_residual else y

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        backend = ctx.backend
        if torch.is_grad_enabled():  # A second derivative is wanted: recompute rstd within the graph, in plain torch.
            backend = "reference"
            rstd = rms_norm_forward(h, weight, ctx.eps, None, ctx.weight_offset)[2]
        if dy is None:
            dy = torch.zeros_like(h)
        needs_dweight = ctx.needs_input_grad[2]
        dx, dweight = implementation("rms_norm", backend).rms_norm_backward(dy, dh, h, weight, rstd, ctx.weight_offset, needs_dweight)
        return None, dx, dweight if needs_dweight else None, None, dx if ctx.has_residual else None, None


def rms_norm(
    x: Tensor, weight: Optional[Tensor] = None, eps: float = 1e-6, *, residual: Optional[Tensor] = None, weight_offset: float = 0.0
):
    """Normalise the last dimension of x, optionally after adding a residual.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64; any strides, any number of rows, C >= 1.
        weight: (C,) in x's dtype or float32 (another one is served by the reference alone), or None for no weight.
        eps: added to the mean square, > 0 or 0.
        residual: (..., C) like x, added to x first.
        weight_offset: added to the weight (1.0 for Gemma's "w + 1"); without a weight it has no effect.

    Returns:
        y (..., C) in x's dtype; with residual the pair (y, h), h = x + residual being what was normalised.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device does not fit; the message names it.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Source: Zhang and Sennrich (2019), section 4. The derivation stands at the head of fastprimer/ops/rms_norm.py.
    """
    arguments.check_floating("rms_norm: x", x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"rms_norm: x: expected shape (..., C) with C >= 1, got {tuple(shape)}")
    if weight is not None:
        arguments.check_floating("rms_norm: weight", weight)
        arguments.check_shape("rms_norm: weight", weight, shape[-1:], "(C,)")
        arguments.check_device("rms_norm: weight", weight, x, "x")
    if residual is not None:
        arguments.check_floating("rms_norm: residual", residual)
        arguments.check_shape("rms_norm: residual", residual, shape, "of x")
        arguments.check_like("rms_norm: residual", residual, x, "x")
    if not (is_number(eps) and eps >= 0):
        hint = "; a residual is passed by its name" if isinstance(eps, Tensor) else ""
        arguments.refuse("rms_norm: eps", f"a finite number >= 0{hint}", eps if isinstance(eps, Tensor) else repr(eps))
    if not is_number(weight_offset):
        raise TypeError(f"rms_norm: weight_offset: expected a finite number, got {weight_offset!r}")
    backend = choose("rms_norm", x, weight, eps, residual, weight_offset)
    if arguments.needs_gradient(x, weight, residual):
        x, weight, residual = arguments.distinct(x, weight, residual)
        return RMSNorm.apply(backend, x, weight, eps, residual, weight_offset)
    y, h, _ = implementation("rms_norm", backend).rms_norm_forward(x, weight, eps, residual, weight_offset)
    return y if residual is None else (y, h)
