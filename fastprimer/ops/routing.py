r"""Routing: which experts a token goes to, with what weights, and the losses that keep the choice balanced.

Sources: top-k then softmax, Shazeer et al. ("Outrageously Large Neural Networks", 2017), section 2.1, and Jiang et al. ("Mixtral
of Experts", 2024), section 2.1; softmax then top-k, Lepikhin et al. ("GShard", 2020), algorithm 1; K = 1, Fedus et al. ("Switch
Transformers", 2021), section 2; sigmoid with a selection bias and groups, DeepSeek-AI ("DeepSeek-V3 Technical Report", 2024),
section 2.1.2; group-limited choice, DeepSeek-AI ("DeepSeek-V2", 2024), section 2.2.2.

**Forward.** For one token with logits l_e, e = 1..E:

    s_e      = softmax(l)_e     ("softmax", "softmax_topk")     or σ(l_e)     ("sigmoid")
    choice_e = s_e + bias_e     ("softmax_topk": l_e + bias_e; the bias steers the choice and nothing else)
    chosen   = the K largest choice_e, a tie going to the lower e; with groups, only from the top_groups best of the
               equal groups, a group being worth its largest choice (sigmoid: the sum of its two largest)
    w_k      = scale · s_k                             without renormalisation ("softmax", "sigmoid")
    w_k      = scale · s_k / Σ_j∈chosen s_j            with it, and for "softmax_topk" always

A renormalised softmax is the softmax over the chosen logits alone, for the common denominator cancels: so "softmax"
renormalised and "softmax_topk" give the same weights. Switch is K = 1 with renormalize=False: w is the probability, which
is what gives its router a gradient.

**Backward.** The choice is piecewise constant. With r_k = w_k / scale and dr_k = scale · dw_k,

    softmax over the chosen:      dl_k = r_k (dr_k − Σ_j r_j dr_j)
    softmax over all:             dl_e = s_e (ds_e − Σ_k s_k ds_k), where ds_k = dr_k for the chosen, else 0
    sigmoid:                      dl_k = dr_k s_k (1 − s_k)
    sigmoid, renormalised:        dl_k = r_k (dr_k − Σ_j r_j dr_j) (1 − s_k)

the last because r is the softmax of log s over the chosen, which does not divide 0 by 0 where every s underflows, and
∂log s_k/∂l_k = 1 − s_k.

**Capacity.** An expert may have room for a number of choices only; what comes later is dropped, its weight 0 (`within_capacity`).
Experts may choose tokens instead of tokens experts (`best_tokens`). Both are what a layer does around `route`, in plain torch.

**Losses**, over N tokens with p = softmax(l): balance (Switch, section 2.2, equation 4) and z (Zoph et al., "ST-MoE", 2022,
equation 5). In plain torch, differentiated by autograd, for they are small:

    balance = E Σ_e f_e P_e,    f_e = (1/N) · number of choices of e,    P_e = (1/N) Σ_n p_ne
    z       = (1/N) Σ_n (log Σ_e exp l_ne)²

f is a count without gradient, so ∂balance/∂P_e = E f_e: crowded experts are pushed down. For K > 1 f sums to K, as in
transformers: a perfectly even router has balance K.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastprimer.backends import choose, implementation
from fastprimer.config import is_count
from fastprimer.ops import _arguments as arguments

SCORES = ("softmax", "softmax_topk", "sigmoid")
SOFTMAX, SOFTMAX_TOPK, SIGMOID = range(3)
"""What a backend's functions take for `score`: a number, for a string that a native operator takes is never freed in torch 2.13."""


def route_forward(
    logits: Tensor,
    k: int,
    score: int,
    renormalize: bool,
    bias: Optional[Tensor],
    groups: Optional[int],
    top_groups: Optional[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """logits (N, E) -> weights (N, K) float32 (float64 for float64), experts (N, K) int64, best first."""
    l = logits.to(arguments.wide(logits.dtype))
    # torch.sigmoid rounds the last numbers of a tensor otherwise, which decides ties; torch.exp does not.
    choice = torch.softmax(l, -1) if score == SOFTMAX else 1 / (1 + torch.exp(-l)) if score == SIGMOID else l
    choice = choice.detach() if bias is None else (choice + bias.to(l.dtype)).detach()
    if groups is not None and top_groups is not None:
        choice = _only_best_groups(choice, groups, top_groups, 2 if score == SIGMOID else 1)
    experts = _top(choice, k)
    return _weights(l, experts, score, renormalize, scale).contiguous(), experts


def route_backward(dweights: Tensor, logits: Tensor, experts: Tensor, score: int, renormalize: bool, scale: float) -> Tensor:
    """dweights (N, K), logits (N, E), experts (N, K) -> dlogits (N, E)."""
    l = logits.to(arguments.wide(logits.dtype))
    dr = scale * dweights
    if score == SIGMOID:
        chosen = l.gather(-1, experts)
        rest = torch.sigmoid(-chosen)  # 1 - s would be 0 where s is nearly 1
        if renormalize:
            r = torch.softmax(logsigmoid(chosen), -1)
            dchosen = r * (dr - (r * dr).sum(-1, keepdim=True)) * rest
        else:
            dchosen = dr * torch.sigmoid(chosen) * rest
    elif renormalize or score == SOFTMAX_TOPK:
        r = torch.softmax(l.gather(-1, experts), -1)
        dchosen = r * (dr - (r * dr).sum(-1, keepdim=True))
    else:
        s = torch.softmax(l, -1)
        ds = torch.zeros_like(l).scatter(-1, experts, dr)
        return (s * (ds - (s * ds).sum(-1, keepdim=True))).to(logits.dtype)
    return torch.zeros_like(l).scatter(-1, experts, dchosen).to(logits.dtype)


def _top(values: Tensor, k: int) -> Tensor:
    """The k largest of each row, largest first; among equals the lower index first (torch.topk does not promise it)."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def _only_best_groups(choice: Tensor, groups: int, top_groups: int, best: int) -> Tensor:
    """choice (N, E) with −∞ outside the top_groups best groups."""
    by_group = choice.unflatten(-1, (groups, -1))  # (N, groups, E / groups)
    worth = by_group.topk(min(best, by_group.shape[-1]), -1).values.sum(-1)
    keep = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, _top(worth, top_groups), True)
    return by_group.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)


def _weights(l: Tensor, experts: Tensor, score: int, renormalize: bool, scale: float) -> Tensor:
    chosen = l.gather(-1, experts)
    if score == SIGMOID:
        r = torch.softmax(logsigmoid(chosen), -1) if renormalize else torch.sigmoid(chosen)
    elif renormalize or score == SOFTMAX_TOPK:
        r = torch.softmax(chosen, -1)
    else:
        r = torch.softmax(l, -1).gather(-1, experts)
    return scale * r


def _triton_limit(logits, *_) -> str:
    if logits.shape[1] > 8192:
        return f"its kernel takes at most 8192 experts, for it holds a token's logits in registers, not E = {logits.shape[1]}"
    return arguments.dtype_limit(logits, None, "float32 bfloat16 float16 float64")


LIMITS = {
    "route": {
        "cpu": lambda logits, *_: arguments.dtype_limit(logits, None, "float32 bfloat16 float16 float64"),
        "triton": _triton_limit,
        "cuda": lambda logits, *_: (
            arguments.dtype_limit(logits, None, "float32 bfloat16 float16")
            or ("its kernel takes at most 4096 experts" if logits.shape[1] > 4096 else "")
        ),
    }
}


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, k, score, renormalize, bias, groups, top_groups, scale):
        functions = implementation("route", backend)
        weights, experts = functions.route_forward(logits, k, score, renormalize, bias, groups, top_groups, scale)
        ctx.save_for_backward(logits, experts)
        ctx.mark_non_differentiable(experts)
        ctx.backend, ctx.options = backend, (score, renormalize, scale)
        return weights, experts

    @staticmethod
    def backward(ctx, dweights, _):
        backend = "reference" if torch.is_grad_enabled() else ctx.backend
        dlogits = implementation("route", backend).route_backward(dweights, *ctx.saved_tensors, *ctx.options)
        return None, dlogits, *([None] * 7)


def check_choice(
    op: str, E: int, k: object, score: object, groups: object, top_groups: object, *, k_name: str = "k", E_name: str = "E"
) -> None:
    """Refuse how K of E experts are to be chosen, as `op` and under its names of k and E, unless `route` can do it."""
    if not is_count(k, 1) or k > E:
        arguments.refuse(f"{op}: {k_name}", f"a number in 1..{E_name} = {E}", k)
    if score not in SCORES:
        arguments.refuse(f"{op}: score", f"one of {', '.join(SCORES)}", repr(score))
    if (groups is None) != (top_groups is None):
        arguments.refuse(f"{op}: top_groups", f"a number with groups = {groups}, or both None", top_groups)
    if groups is None:
        return
    if not is_count(groups, 1) or E % groups:
        arguments.refuse(f"{op}: groups", f"a divisor of {E_name} = {E}", groups)
    if not is_count(top_groups, 1) or top_groups > groups:
        arguments.refuse(f"{op}: top_groups", f"a number in 1..groups = {groups}", top_groups)
    room = top_groups * (E // groups)
    if k > room:
        arguments.refuse(f"{op}: {k_name}", f"at most {room}, the experts in top_groups groups", k)


def route(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    bias: Optional[Tensor] = None,
    groups: Optional[int] = None,
    top_groups: Optional[int] = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose K experts for every token.

    Args:
        logits: (N, E), the router's output, floating point.
        k: experts per token, 1 <= k <= E; 1 with renormalize=False is Switch.
        score: "softmax" over all experts, then top-k; "softmax_topk": top-k, then softmax; "sigmoid".
        renormalize: divide the chosen scores by their sum ("softmax_topk" does always).
        bias: (E,), floating point, added for the choice only; it has no gradient (DeepSeek-V3 adjusts it by counting).
        groups, top_groups: choose only among the experts of the top_groups best of `groups` equal groups; both or neither.
        scale: multiplies the weights.

    Returns:
        weights (N, K), float32 (float64 for float64 logits), and experts (N, K), int64; the best expert first, and of two
        equal ones the lower number first.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Sources: at the head of fastprimer/ops/routing.py.
    """
    arguments.check_floating("route: logits", logits)
    arguments.check(logits.dim() == 2 and logits.shape[1] > 0, "route: logits", "shape (N, E)", tuple(logits.shape))
    E = logits.shape[1]
    check_choice("route", E, k, score, groups, top_groups)
    if bias is not None:
        arguments.check_floating("route: bias", bias)
        arguments.check_shape("route: bias", bias, (E,), "(E,)")
        arguments.check_device("route: bias", bias, logits, "logits")
    arguments.check_flag("route: renormalize", renormalize)
    call = logits, k, SCORES.index(score), renormalize, bias, groups, top_groups, arguments.number("route: scale", scale)
    backend = choose("route", *call)
    if arguments.needs_gradient(logits):
        return Route.apply(backend, *call)
    return implementation("route", backend).route_forward(*call)


def counts_of(experts: Tensor, E: int) -> Tensor:
    """experts, int of any shape -> (E,), int64: how often each number occurs."""
    chosen = experts.reshape(-1).long()
    return torch.zeros(E, dtype=torch.int64, device=experts.device).scatter_add(0, chosen, torch.ones_like(chosen))


def within_capacity(experts: Tensor, E: int, capacity: int) -> Tensor:
    """experts (N, K) -> bool (N, K): whether a choice is among the first `capacity` of its expert; all first choices come before all
    second ones, and of those the earlier token's (Lepikhin et al., "GShard", 2020, algorithm 1)."""
    chosen = experts.t().reshape(-1)
    order = torch.sort(chosen, stable=True).indices
    counts = counts_of(chosen, E)
    rank = torch.arange(chosen.shape[0], device=chosen.device) - (counts.cumsum(0) - counts)[chosen[order].long()]
    return torch.zeros_like(rank).scatter(0, order, rank).view(experts.shape[1], experts.shape[0]).t() < capacity


def best_tokens(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """logits (N, E) -> weights and tokens (E, capacity): every expert's most probable tokens, by the softmax over each token's experts
    (Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022, section 3.2)."""
    p = torch.softmax(logits.to(arguments.wide(logits.dtype)), -1).t()
    tokens = _top(p.detach(), capacity)
    return p.gather(1, tokens), tokens


# torch has two ways to take rows and to add them up, and the gradient of each is the other one of its kind. On the CPU index_add sums in
# order and index_put by atomic additions, on a GPU it is the other way round.


def rows_of(x: Tensor, numbers: Tensor) -> Tensor:
    """Rows `numbers` of x (N, C)."""
    return x.index_select(0, numbers) if x.is_cpu else x[numbers]


def sums_of_rows(x: Tensor, numbers: Tensor, N: int) -> Tensor:
    """x (P, C), numbers (P,) -> (N, C): row n is the sum of those rows of x whose number is n, in their order."""
    zeros = x.new_zeros(N, x.shape[1])
    return zeros.index_add(0, numbers, x) if x.is_cpu else zeros.index_put((numbers,), x, accumulate=True)


def load_balancing_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """Switch's balance loss of a router: E Σ_e f_e P_e (see the head of this file).

    Args:
        logits: (N, E), floating point; experts: int (N, K), the choice that `route` made.

    Returns:
        A scalar, float32 (float64 for float64); K for a perfectly even router; 0 for no token.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Fedus et al. (2021), section 2.2, equation 4.
    """
    arguments.check_floating("load_balancing_loss: logits", logits)
    arguments.check(logits.dim() == 2, "load_balancing_loss: logits", "shape (N, E)", tuple(logits.shape))
    arguments.check_integer("load_balancing_loss: experts", experts)
    fits = experts.dim() == 2 and experts.shape[0] == logits.shape[0]
    if not fits:
        arguments.refuse("load_balancing_loss: experts", f"shape (N = {logits.shape[0]}, K)", tuple(experts.shape))
    arguments.check_device("load_balancing_loss: experts", experts, logits, "logits")
    N, E = logits.shape
    arguments.check_numbers("load_balancing_loss: experts", experts, E)
    p = torch.softmax(logits.to(arguments.wide(logits.dtype)), -1)
    return E * (counts_of(experts, E) * p.sum(0)).sum() / max(N, 1) ** 2


def router_z_loss(logits: Tensor) -> Tensor:
    """ST-MoE's router z-loss: the mean over tokens of (log Σ_e exp l_e)², which keeps logits small.

    Args:
        logits: (N, E), floating point.

    Returns:
        A scalar, float32 (float64 for float64); 0 for no token.

    Raises:
        TypeError, ValueError: logits are not that; the message says what came.

    Source: Zoph et al. (2022), equation 5.
    """
    arguments.check_floating("router_z_loss: logits", logits)
    arguments.check(logits.dim() == 2, "router_z_loss: logits", "shape (N, E)", tuple(logits.shape))
    lse = torch.logsumexp(logits.to(arguments.wide(logits.dtype)), -1)
    return lse.square().sum() / max(logits.shape[0], 1)
