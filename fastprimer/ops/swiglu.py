r"""SwiGLU and its relatives: a feed-forward layer's gated activation.

Sources: Shazeer, "GLU Variants Improve Transformer" (2020), equations 5 and 6 (with the projections left outside);
Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2 (the tanh form); OpenAI, gpt-oss model card (2025), on its
mixture of experts (the clamped form).

**Forward.** Elementwise, with σ(t) = 1 / (1 + e^−t), a = gate and b = up:

    y = a_L σ(t) · (b_L + o)      a_L = min(a, L),   b_L = max(−L, min(b, L)),   t = a_L (α + β a_L²)

| activation  | α          | β          | L (limit) | o (offset) | formula                              |
| ----------- | ---------- | ---------- | --------- | ---------- | ------------------------------------ |
| "silu"      | 1          | 0          | none      | 0          | a σ(a) · b                           |
| "gelu_tanh" | 2 √(2/π)   | 0.044715 α | none      | 0          | a (1 + tanh(t / 2)) / 2 · b          |
| "gpt_oss"   | 1.702      | 0          | 7         | 1          | a_L σ(1.702 a_L) · (b_L + 1)         |

The tanh form is of the same kind because (1 + tanh(t / 2)) / 2 = σ(t). So one kernel body serves them all.

**Backward.** Since σ' = σ (1 − σ) and dt/da_L = α + 3 β a_L², the derivative of a_L σ(t) is, with p = a_L σ (1 − σ),

    σ + p (α + 3 β a_L²) = σ + α p + 3 β p a_L a_L

(multiplied from the left, p underflows before a_L² can overflow), and a clamp passes a gradient on only where it does not
clamp:

    dgate = dy (b_L + o) · (σ + α p + 3 β p a_L a_L) · [not a > L]
    dup   = dy · a_L σ · [not |b| > L]

1 − σ is computed as σ(−t): the subtraction would cancel. With e = e^−|t| and r = 1 / (1 + e), which neither overflow nor
cancel, σ is r or e r, depending on the sign of t, and σ (1 − σ) = e r². Only gate and up are saved; σ is recomputed.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation
from fastprimer.ops import _arguments as arguments

ACTIVATIONS = ("silu", "gelu_tanh", "gpt_oss")


def constants(activation: str) -> tuple[float, float, Optional[float], float]:
    """(α, β, L, o) of the table above. Literals: torch.compile would take the numbers of a global table for inputs of its graph."""
    if activation == "gelu_tanh":
        return 1.5957691216057308, 0.07135481627260025, None, 0.0
    return (1.702, 0.0, 7.0, 1.0) if activation == "gpt_oss" else (1.0, 0.0, None, 0.0)


def check_activation(name: str, activation: object, limit: object) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        arguments.refuse(f"{name}: activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0
    arguments.check(limit is None or number, f"{name}: limit", "a number > 0 or None", limit)


def halves(gate: Tensor, up: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """gate and up (..., F) as they are, or both out of a gate (..., 2F) that holds them side by side."""
    return gate.chunk(2, dim=-1) if up is None else (gate, up)


def exponent(a: Tensor, alpha: float, beta: float) -> Tensor:
    """t = a (α + β a²); without β an infinite a does no harm."""
    return a * (alpha + beta * a * a) if beta else a * alpha


def swiglu_forward(gate: Tensor, up: Optional[Tensor], alpha: float, beta: float, limit: Optional[float], offset: float) -> Tensor:
    """gate, up (..., F), or gate (..., 2F) and no up -> y (..., F); computed in float32 (float64 for float64), rounded once."""
    a, b = (half.to(arguments.wide(gate.dtype)) for half in halves(gate, up))
    if limit is not None:
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return (a * torch.sigmoid(exponent(a, alpha, beta)) * (b + offset)).to(gate.dtype).contiguous()


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Optional[Tensor], alpha: float, beta: float, limit: Optional[float], offset: float
) -> tuple[Tensor, Tensor]:
    """dy (..., F) and forward's inputs -> dgate, dup (..., F), or dgate (..., 2F) and (0,) without up."""
    a, b = (half.to(arguments.wide(gate.dtype)) for half in halves(gate, up))
    dy_a = dy_b = dy.to(a.dtype)
    if limit is not None:
        dy_a, dy_b = dy_a.masked_fill(a > limit, 0.0), dy_b.masked_fill(b.abs() > limit, 0.0)  # a NaN is not clamped
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    t = exponent(a, alpha, beta)
    sigma = torch.sigmoid(t)
    p = a * sigma * torch.sigmoid(-t)
    slope = sigma + alpha * p + (3 * beta * p * a * a if beta else 0.0)
    dgate, dup = dy_a * (b + offset) * slope, dy_b * (a * sigma)
    if up is None:
        return torch.cat((dgate, dup), dim=-1).to(gate.dtype).contiguous(), gate.new_empty(0)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


LIMITS = {
    "swiglu": {
        "cpu": lambda gate, *_: arguments.dtype_limit(gate, None, "float32 bfloat16 float16 float64"),
        "triton": lambda gate, *_: arguments.dtype_limit(gate, None, "float32 bfloat16 float16 float64"),
        "cuda": lambda gate, *_: arguments.dtype_limit(gate, None, "float32 bfloat16 float16"),
    }
}


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, gate, up, alpha, beta, limit, offset):
        ctx.save_for_backward(gate, up)
        ctx.backend, ctx.activation = backend, (alpha, beta, limit, offset)
        return implementation("swiglu", backend).swiglu_forward(gate, up, alpha, beta, limit, offset)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        backend = "reference" if torch.is_grad_enabled() else ctx.backend
        dgate, dup = implementation("swiglu", backend).swiglu_backward(dy, gate, up, *ctx.activation)
        return None, dgate, None if up is None else dup, None, None, None, None


def swiglu(gate: Tensor, up: Optional[Tensor] = None, *, activation: str = "silu", limit: Optional[float] = None) -> Tensor:
    """silu(gate) * up, elementwise, or another gated activation.

    Args:
        gate, up: (..., F), floating point, of one shape, dtype and device; any strides, so the two halves of one projection
            need no copy. Or gate alone, (..., 2F), with gate and up side by side in it: then its gradient is one tensor too.
        activation: "silu" (SwiGLU), "gelu_tanh" (GEGLU, tanh form) or "gpt_oss" (clamped, and up + 1).
        limit: gate is clamped from above and up from both sides at this number > 0; by default 7 for "gpt_oss", else nowhere.

    Returns:
        (..., F), contiguous, in that dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices differ, or an unknown activation; the message names the argument.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Source: Shazeer (2020), equation 5. The derivation stands at the head of fastprimer/ops/swiglu.py.
    """
    arguments.check_floating("swiglu: gate", gate)
    if up is None:
        whole = gate.dim() > 0 and gate.shape[-1] % 2 == 0
        arguments.check(whole, "swiglu: gate", "shape (..., 2F), for up is not given", tuple(gate.shape))
    else:
        arguments.check_floating("swiglu: up", up)
        arguments.check_shape("swiglu: up", up, gate.shape, "of gate")
        arguments.check_like("swiglu: up", up, gate, "gate")
    check_activation("swiglu", activation, limit)
    alpha, beta, usual_limit, offset = constants(activation)
    if limit is None:
        limit = usual_limit
    elif limit > torch.finfo(arguments.wide(gate.dtype)).max:
        limit = None
    options = alpha, beta, limit, offset
    backend = choose("swiglu", gate, up, *options)
    if arguments.needs_gradient(gate, up):
        return SwiGLU.apply(backend, *arguments.distinct(gate, up), *options)
    return implementation("swiglu", backend).swiglu_forward(gate, up, *options)
