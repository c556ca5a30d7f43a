r"""Top-k mixture of experts: a router picks K of E feed-forward networks for every token and weighs their outputs.

The chapter on routing is fastprimer/ops/routing.py. Sources: Shazeer et al. ("Outrageously Large Neural Networks: The
Sparsely-Gated Mixture-of-Experts Layer", 2017), section 2; Jiang et al. ("Mixtral of Experts", 2024), section 2.1.

**Forward.** Token n goes to experts e = experts[n, k] with weights w = weights[n, k]:

    [a; b] = gate_up[e] x_n        the pre-activation, hidden[n, k]: two halves of F numbers
    u      = silu(a) · b
    y_n    = Σ_k weights[n, k] · down[e] u

No token is dropped, an expert may be empty.

**Backward.** With dy_n and, for every pair (n, k), d = down[e]ᵀ dy_n, the gradient of w u (that of u itself is du = w d):

    dweights[n, k] = dy_n · (down[e] u) = d · u            (so y need not be stored per expert)
    ddown[e]       = Σ_(n, k): experts = e  dy_n (w u)ᵀ
    du             = w d
    [da; db]       = [du · b · σ(a) (1 + a (1 − σ(a))); du · silu(a)]           (the chapter on SwiGLU)
    dgate_up[e]    = Σ_(n, k): experts = e  [da; db] x_nᵀ
    dx_n           = Σ_k gate_up[e]ᵀ [da; db]

Saved: x, the routing and hidden (rounded to x's dtype, in forward and backward alike). This reference sends every token
through every expert and masks, which costs E / K times the work and needs no index arithmetic at all; an empty expert's
gradient is exactly 0. Kernels for GPUs hand on u and what follows from it in x's type: in float16 what is beyond 65504, silu(a) b for
example, is infinite there, where this reference, in float32 between its products, goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation
from fastprimer.ops import _arguments as arguments
from fastprimer.ops.swiglu import constants, swiglu_backward, swiglu_forward


def moe_forward(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, C), gate_up (E, 2F, C), down (E, C, F), weights, experts (N, K) -> y (N, C), hidden (N, K, 2F)."""
    x_wide, gate_up_wide, down_wide, w = _widened(x, gate_up, down, weights)
    chosen = _chosen(experts, gate_up.shape[0])
    hidden = sum(_where(c, (x_wide @ m.t()).unsqueeze(1)) for c, m in zip(chosen, gate_up_wide.unbind(), strict=True)).to(x.dtype)
    u = w * swiglu_forward(hidden.to(w.dtype), None, *constants("silu"))
    y = sum(_where(c.any(1), _where(c, u).sum(1) @ m.t()) for c, m in zip(chosen, down_wide.unbind(), strict=True))
    return y.to(x.dtype).contiguous(), hidden.contiguous()


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
    """-> dx (N, C), dgate_up (E, 2F, C) and ddown (E, C, F), or (0,) where nobody needs them, dweights (N, K)."""
    x_wide, gate_up_wide, down_wide, w = _widened(x, gate_up, down, weights)
    dy, hidden = dy.to(x_wide.dtype), hidden.to(x_wide.dtype)
    chosen = _chosen(experts, gate_up.shape[0])
    u = swiglu_forward(hidden, None, *constants("silu"))
    d = sum(_where(c, (dy @ m).unsqueeze(1)) for c, m in zip(chosen, down_wide.unbind(), strict=True))
    dweights = (d * u).sum(-1)
    dhidden, _ = swiglu_backward(w * d, hidden, None, *constants("silu"))
    routed = [_where(c, dhidden).sum(1) for c in chosen]  # (N, 2F) for each expert
    dx, dgate_up, ddown = x.new_empty(0), gate_up.new_empty(0), down.new_empty(0)
    if needs_dx:
        dx = sum(_where(c.any(1), r @ m) for c, r, m in zip(chosen, routed, gate_up_wide.unbind(), strict=True))
    if needs_dexperts:
        dgate_up = torch.stack([r.t() @ _where(c.any(1), x_wide) for c, r in zip(chosen, routed, strict=True)])
        ddown = torch.stack([_where(c.any(1), dy).t() @ _where(c, w * u).sum(1) for c in chosen])
    return dx.to(x.dtype), dgate_up.to(gate_up.dtype), ddown.to(down.dtype), dweights.to(weights.dtype)


def _widened(x, gate_up, down, weights):
    dtype = arguments.wide(x.dtype)
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), weights.to(dtype).unsqueeze(-1)


def _chosen(experts: Tensor, E: int) -> list[Tensor]:
    """For each expert, (N, K, 1): whether that choice is this expert."""
    return [(experts == e).unsqueeze(-1) for e in range(E)]


def _where(chosen: Tensor, values: Tensor) -> Tensor:
    """0 where not chosen, whatever an expert that was not asked would say: 0 · inf is nan."""
    return torch.where(chosen, values, 0.0)


def _cuda_limit(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> str:
    reason = arguments.dtype_limit(x, None, "float32 bfloat16 float16")
    if reason:
        return reason
    if gate_up.shape[0] > 8192:
        return "its kernel takes at most 8192 experts"
    if max(experts.numel(), x.shape[1], gate_up.shape[1]) >= 2**30:
        return "its kernel takes fewer than 2^30 pairs of a token and an expert, and rows of fewer than 2^30 numbers"
    return ""


def _triton_limit(x, gate_up, down, weights, experts) -> str:
    if gate_up.shape[0] > 4095:
        return f"its kernels take at most 4095 experts, whose counts one program holds in registers, not E = {gate_up.shape[0]}"
    if experts.numel() > 2**30:
        return f"its kernels number the pairs of a token and an expert in 32 bits, at most 2^30, not N K = {experts.numel()}"
    return arguments.dtype_limit(x, None, "float32 bfloat16 float16 float64")


LIMITS = {
    "moe": {
        "cpu": lambda x, *_: arguments.dtype_limit(x, None, "float32 bfloat16 float16"),
        "triton": _triton_limit,
        "cuda": _cuda_limit,
    }
}


MANY_ROWS = 64
"""Of an expert, on average: from there on Triton's products, which use Hopper's wgmma, overtake those of the CUDA kernels (measured on an
H100, 16-bit types). Below, a call's own cost and the reading of the weights decide."""


def _faster(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> str:
    many = experts.shape[0] * experts.shape[1] >= MANY_ROWS * gate_up.shape[0]
    return "triton" if many and x.dtype in (torch.bfloat16, torch.float16) else ""


FASTER = {"moe": _faster}


class MoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, gate_up, down, weights, experts):
        y, hidden = implementation("moe", backend).moe_forward(x, gate_up, down, weights, experts)
        ctx.save_for_backward(x, gate_up, down, weights, experts, hidden)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, down, weights, experts, hidden = ctx.saved_tensors
        backend = ctx.backend
        if torch.is_grad_enabled():  # A second derivative is wanted: recompute hidden within the graph, in plain torch.
            backend = "reference"
            hidden = implementation("moe", backend).moe_forward(x, gate_up, down, weights, experts)[1]
        needs = ctx.needs_input_grad[1:5]
        given = dy, x, gate_up, down, weights, experts, hidden, needs[0], needs[1] or needs[2]
        grads = implementation("moe", backend).moe_backward(*given)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The weighted sum of K experts' SwiGLU networks for every token; no token is dropped.

    Args:
        x: (N, C), float32, bfloat16, float16 or float64.
        gate_up: (E, 2F, C), each expert's two input projections, gate first; down: (E, C, F); both like x (autocast casts).
        weights: (N, K), floating point (float32 from `route`); experts: int (N, K), in 0..E-1, distinct within a row.

    Returns:
        (N, C) in x's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Expert numbers are checked on the CPU only: on a GPU
            one outside 0..E-1 contributes nothing.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Source: Jiang et al. (2024), section 2.1.
    """
    for label, t in (("x", x), ("gate_up", gate_up), ("down", down), ("weights", weights)):
        arguments.check_floating(f"moe: {label}", t)
    x, gate_up, down = arguments.autocast(x, gate_up, down)
    arguments.check(x.dim() == 2, "moe: x", "shape (N, C)", tuple(x.shape))
    N, C = x.shape
    fits = gate_up.dim() == 3 and gate_up.shape[0] > 0 and gate_up.shape[1] % 2 == 0 and gate_up.shape[2] == C
    if not fits:
        arguments.refuse("moe: gate_up", f"shape (E, 2F, C = {C})", tuple(gate_up.shape))
    E, F = gate_up.shape[0], gate_up.shape[1] // 2
    arguments.check_shape("moe: down", down, (E, C, F), "(E, C, F)")
    if weights.dim() != 2 or weights.shape[0] != N:
        arguments.refuse("moe: weights", f"shape (N = {N}, K)", tuple(weights.shape))
    arguments.check_integer("moe: experts", experts)
    arguments.check_shape("moe: experts", experts, weights.shape, "of weights")
    arguments.check_like("moe: gate_up", gate_up, x, "x")
    arguments.check_like("moe: down", down, x, "x")
    arguments.check_device("moe: weights", weights, x, "x")
    arguments.check_device("moe: experts", experts, x, "x")
    arguments.check_numbers("moe: experts", experts, E)
    backend = choose("moe", x, gate_up, down, weights, experts)
    if arguments.needs_gradient(x, gate_up, down, weights):
        return MoE.apply(backend, x, gate_up, down, weights, experts)
    return implementation("moe", backend).moe_forward(x, gate_up, down, weights, experts)[0]
