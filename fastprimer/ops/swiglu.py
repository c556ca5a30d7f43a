r"""SwiGLU: a feed-forward layer's gated activation, silu(gate) · up.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5 (with the projections left outside).

**Forward.** Elementwise, with σ(a) = 1 / (1 + e^−a):

    y = a σ(a) · b          a = gate, b = up

**Backward.** Since σ' = σ (1 − σ), the derivative of a σ(a) is σ + a σ (1 − σ) = σ (1 + a (1 − σ)):

    dup   = dy · a σ(a)
    dgate = dy · b · σ(a) (1 + a (1 − σ(a)))

Only gate and up are saved; σ is recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation
from fastprimer.ops import _arguments as arguments


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> y (..., F); computed in float32 (float64 for float64), rounded once."""
    dtype = arguments.wide(gate.dtype)
    a, b = gate.to(dtype), up.to(dtype)
    return (a * torch.sigmoid(a) * b).to(gate.dtype).contiguous()


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dy, gate, up (..., F) -> dgate, dup (..., F)."""
    dtype = arguments.wide(gate.dtype)
    dy, a, b = dy.to(dtype), gate.to(dtype), up.to(dtype)
    sigma = torch.sigmoid(a)
    dgate = dy * b * sigma * (1 + a * (1 - sigma))
    dup = dy * a * sigma
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


LIMITS = {"swiglu": {}}


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return implementation("swiglu", backend).swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        backend = "reference" if torch.is_grad_enabled() else ctx.backend
        return None, *implementation("swiglu", backend).swiglu_backward(dy, gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    Args:
        gate, up: (..., F), floating point, of one shape, dtype and device; any strides, so the two halves of one projection
            need no copy.

    Returns:
        (..., F), contiguous, in that dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices differ; the message names the argument.

    Source: Shazeer (2020), equation 5.
    """
    arguments.check_floating("swiglu: gate", gate)
    arguments.check_floating("swiglu: up", up)
    arguments.check_shape("swiglu: up", up, gate.shape, "of gate")
    arguments.check_like("swiglu: up", up, gate, "gate")
    backend = choose("swiglu", gate, up)
    if arguments.needs_gradient(gate, up):
        return SwiGLU.apply(backend, *arguments.distinct(gate, up))
    return implementation("swiglu", backend).swiglu_forward(gate, up)
