r"""Cross-entropy, plain and fused with the projection onto the vocabulary.

The surprise −log p of the right token. Sources: label smoothing, Szegedy et al. ("Rethinking the Inception Architecture", 2016),
section 7; z-loss, Chowdhery et al. ("PaLM", 2022), section 5; soft-capped logits, Gemma Team ("Gemma 2", 2024), section 2; a running
maximum and sum, Milakov and Gimelshein ("Online normalizer calculation for softmax", 2018); logits tile by tile, Wijmans et al. ("Cut
Your Losses", 2024).

**Forward.** For one token with logits l_v (v = 1..V) and target t; z_v = l_v, or c · tanh(l_v / c) with a softcap c:

    lse  = log Σ_v exp z_v
    loss = lse − (1 − ε) z_t − (ε / V) Σ_v z_v + ζ lse²

with label smoothing ε and z-loss coefficient ζ; ε = ζ = 0 leaves lse − z_t = −log softmax(z)_t. The token that the model
would have said, argmax = argmax_v z_v (the lowest v of equal ones, and where a softcap saturates many are equal once they are rounded,
on one backend others than on the next), falls out of the same sweep. A token whose target is ignore_index is not looked at: its loss and
lse are 0, its argmax is −1. The mean divides by the number of the other tokens.

A sweep needs no more than one piece of the vocabulary at a time. From m = max z_v and s = Σ exp(z_v − m) over what has been seen, and
the same m', s' of the next piece,

    M = max(m, m'),    s ← s exp(m − M) + s' exp(m' − M),    m ← M,        and in the end lse = m + log s.

**Backward.** With p_v = exp(z_v − lse) = ∂lse/∂z_v, dloss the token's upstream gradient, and dlse that of lse where it is used too,

    dz_v = (dloss (1 + 2 ζ lse) + dlse) p_v − dloss ((1 − ε) [v = t] + ε / V)
    dl_v = dz_v · (1 − (z_v / c)²)                                (softcap only: tanh' = 1 − tanh²)

and 0 for ignored tokens. With logits L = X Wᵀ + bias (N x V) and dL as above,

    dX = dL W,    dW = dLᵀ X,    dbias = Σ_n dL_n

**Rounding.** Where logits are large, the last digits of lse are not those of the loss or of p: for a token that the model is sure of,
lse and z_t are almost the same number. So the loss is log Σ exp(z_v − m) + (m − z_t), and backward is handed two numbers, lse as it was
rounded and κ = exp(lse − exact lse): p_v = κ exp(z_v − lse) has an error of a few units in the last place whatever lse is.

**Memory.** lse and κ are all that backward needs besides the inputs: it recomputes any part of L, so that training takes four
products of N V C multiplications and additions instead of three. Within `memory_budget` bytes the forward also hands on `kept`, z of
the first columns of the vocabulary (`kept_columns` says how many), and only the rest is computed twice: in float32, or in 16 bits where
x and bias have no more.
Those are numbers of fixed point, and every BLOCK columns of a token have a shift, 31 below m, the largest z so far,

    z_v ≈ shift + kept_v / STEPS,    kept_v = round((z_v − shift) STEPS) in −2^15 .. 2^15 − 1,    shift = m − 31,

so that z is wrong by at most 2^−11 and p by as much of itself, which is what rounding it to float16 does; below m − 63 it counts as −∞,
p < e^−63 as 0. (The slope of a softcap, 1 − (z/c)², is small where z nears c, and would be lost: there z stays float32.) Keeping all
of z takes about 2 N V bytes (4 N V in float32, 8 N V in float64); a budget of 0 keeps nothing. Every gradient is summed in float32 in
a fixed order.

Each token's loss is a separate output of the operation, so `reduction` is plain torch outside it and per-token gradients are right
by construction. This reference holds N x V numbers; a backend of linear_cross_entropy never does, beyond the budget.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation, outside_autocast, transforming
from fastprimer.ops import _arguments as arguments
from fastprimer.ops import _loss_arguments as loss_arguments

DEFAULT_BUDGET = 8
"""Bytes of z that linear_cross_entropy keeps for backward by default, for each byte of x."""
BLOCK, STEPS, TOP = 128, 1024, 31
"""Of what is kept in 16 bits: columns that share a shift, steps that a unit of z has, and the largest z less the shift."""


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: Optional[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, V), target (N,) -> loss, lse, κ (N,), all float32 (float64 for float64), argmax (N,) int64."""
    return _losses(_capped(logits, softcap), target, ignore_index, label_smoothing, z_loss)


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
    """dloss (N,), dlse (N,) or None, logits (N, V), target, lse and κ (N,) -> dlogits (N, V)."""
    dlogits = _dlogits(dloss, dlse, logits, target, lse, correction, ignore_index, label_smoothing, z_loss, softcap)
    return dlogits.to(logits.dtype).contiguous()


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
    """x (N, C), weight (V, C), target (N,), bias (V,) or None

    -> loss, lse, κ, argmax (N,), kept (N, columns), shift (N, blocks).

    kept is z of the first `kept_columns`, 0 for ignored tokens: in lse's dtype, without blocks, or int16 with its shifts in float32.
    """
    z = _capped(_logits(x, weight, bias), softcap)
    in_16_bits = keeps_16_bits(x, bias, softcap)
    columns = kept_columns(x.shape[0], weight.shape[0], memory_budget, 2 if in_16_bits else max(4, x.element_size()))
    valid = (target != ignore_index).unsqueeze(-1)
    kept, shift = torch.where(valid, z[:, :columns], 0.0), z.new_empty(x.shape[0], 0)
    if in_16_bits:
        row_shift = torch.where(valid, z.amax(-1, keepdim=True) - TOP, 0.0)
        kept = ((kept - row_shift) * STEPS).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
        shift = row_shift.expand(-1, (columns + BLOCK - 1) // BLOCK)
    return *_losses(z, target, ignore_index, label_smoothing, z_loss), kept.contiguous(), shift.contiguous()


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
    """-> dx (N, C), dweight (V, C), or (0,) where nobody needs it, dbias (V,) or (0,) without bias.

    This reference recomputes all of z and reads nothing of kept.
    """
    dlogits = _dlogits(dloss, dlse, _logits(x, weight, bias), target, lse, correction, ignore_index, label_smoothing, z_loss, softcap)
    valid = (target != ignore_index).unsqueeze(-1)  # 0 · nan is nan
    dx = torch.where(valid, dlogits @ weight.to(dlogits.dtype), 0.0) if needs_dx else x.new_empty(0)
    dweight = dlogits.t() @ torch.where(valid, x.to(dlogits.dtype), 0.0) if needs_dweight else weight.new_empty(0)
    dbias = x.new_empty(0) if bias is None else dlogits.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias


def keeps_16_bits(x: Tensor, bias: Optional[Tensor], softcap: Optional[float]) -> bool:
    """Whether z is kept in 16 bits: where no gradient that comes of it is wanted in more, and none depends on more."""
    return x.element_size() == 2 and (bias is None or bias.element_size() == 2) and softcap is None


def kept_columns(N: int, V: int, memory_budget: int, size: int) -> int:
    """Of how many columns of the vocabulary the budget has room for z of `size` bytes, shifts included: all, or a multiple of 256."""
    shift = 4 if size == 2 else 0
    room, all_columns = memory_budget // torch.sym_max(N, 1), size * V + (V + BLOCK - 1) // BLOCK * shift
    columns = room // (256 * size + 2 * shift) * 256
    return torch.sym_min(V, torch.sym_max(columns, torch.sym_min(room, all_columns) // all_columns * V))


def _losses(z: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    valid = target != ignore_index
    m = z.detach().amax(-1)
    m = torch.where(m.isinf(), 0.0, m)
    near = z - m.unsqueeze(-1)
    log_sum = torch.logsumexp(near, -1)
    lse = m + log_sum
    near_target = near.gather(-1, torch.where(valid, target, 0).long().unsqueeze(-1)).squeeze(-1)
    loss = log_sum - (1 - label_smoothing) * near_target
    loss = loss + z_loss * lse * lse  # in this order: a square may be infinite, and 0 of it is NaN
    if label_smoothing != 0:
        loss = loss - label_smoothing * near.mean(-1)
    correction = _correction(m, log_sum.detach(), lse.detach())
    return *(torch.where(valid, t, 0.0) for t in (loss, lse, correction)), torch.where(valid, z.argmax(-1), -1)


def _correction(m: Tensor, log_sum: Tensor, lse: Tensor) -> Tensor:
    """κ = exp(lse − (m + log_sum)), where lse is that sum as it was rounded.

    Source: Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B.
    """
    part = lse - m
    return torch.where(lse.isinf(), 1.0, torch.exp((lse - part - m) + (part - log_sum)))


def _capped(logits: Tensor, softcap: Optional[float]) -> Tensor:
    z = logits.to(arguments.wide(logits.dtype))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _logits(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    dtype = arguments.wide(x.dtype)
    if _by_tensor_cores(x, weight):
        logits = torch.mm(x, weight.t(), out_dtype=dtype)  # as they round, whoever uses them
    else:
        logits = x.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def _by_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these with a float32 result: on NVIDIA's GPUs, and not where that is to be differentiated."""
    differentiated = torch.is_grad_enabled() or transforming()
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and torch.version.hip is None and half and not differentiated


def _dlogits(dloss, dlse, logits, target, lse, correction, ignore_index, label_smoothing, z_loss, softcap):
    z = _capped(logits, softcap)
    V = z.shape[-1]
    valid = target != ignore_index
    # The mean over no token at all has an infinite dloss: an ignored token's gradient is 0 whatever dloss is.
    dloss = torch.where(valid, dloss, 0.0).unsqueeze(-1)
    dtop = dloss * (1 + 2 * z_loss * lse).unsqueeze(-1)
    if dlse is not None:
        dtop = dtop + dlse.unsqueeze(-1)
    is_target = torch.arange(V, device=z.device) == target.unsqueeze(-1)
    p = correction.unsqueeze(-1) * torch.exp(z - lse.unsqueeze(-1))
    dz = dtop * p - dloss * ((1 - label_smoothing) * is_target.to(z.dtype) + label_smoothing / V)
    if softcap is not None:
        dz = dz * (1 - (z / softcap).square())
    return torch.where(valid.unsqueeze(-1), dz, 0.0)


LIMITS = {
    "cross_entropy": {
        "cpu": lambda logits, *_: arguments.dtype_limit(logits, None, "float32 bfloat16 float16 float64"),
        "triton": lambda logits, *_: arguments.dtype_limit(logits, None, "float32 bfloat16 float16 float64"),
        "cuda": lambda logits, *_: arguments.dtype_limit(logits, None, "float32 bfloat16 float16"),
    },
    "linear_cross_entropy": {
        "cpu": lambda x, *_: arguments.dtype_limit(x, None, "float32 bfloat16 float16"),
        "triton": lambda x, *_: arguments.dtype_limit(x, None, "float32 bfloat16 float16 float64"),
        "cuda": lambda x, *_: arguments.dtype_limit(x, None, "float32 bfloat16 float16"),
    },
}


class CrossEntropy(torch.autograd.Function):
    """Per-token losses, lse and argmax of logits, or of x weightᵀ + bias where weight is given."""

    @staticmethod
    def forward(ctx, backend, x, weight, bias, target, memory_budget, options):
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.options = backend, options
        kept = shift = None
        if weight is None:
            loss, lse, correction, argmax = implementation("cross_entropy", backend).cross_entropy_forward(x, target, *options)
        else:
            functions = implementation("linear_cross_entropy", backend)
            outputs = functions.linear_cross_entropy_forward(x, weight, target, bias, *options, memory_budget)
            loss, lse, correction, argmax, kept, shift = outputs
        ctx.save_for_backward(x, weight, bias, target, lse, correction, kept, shift)
        ctx.mark_non_differentiable(argmax)
        return loss, lse, argmax

    @staticmethod
    def backward(ctx, dloss, dlse, _):
        x, weight, bias, target, lse, correction, kept, shift = ctx.saved_tensors
        options, backend = ctx.options, ctx.backend
        if dloss is None:
            if dlse is None:
                return (None,) * 7
            dloss = torch.zeros_like(dlse)
        if torch.is_grad_enabled():  # A second derivative is wanted: recompute lse within the graph, in plain torch.
            backend = "reference"
            logits = x if weight is None else outside_autocast(_logits)(x, weight, bias)
            _, lse, correction, _ = implementation("cross_entropy", backend).cross_entropy_forward(logits, target, *options)
        if weight is None:
            dx = implementation("cross_entropy", backend).cross_entropy_backward(dloss, dlse, x, target, lse, correction, *options)
            return None, dx, *[None] * 5
        given = dloss, dlse, x, weight, target, lse, correction, kept, shift, bias
        needs = ctx.needs_input_grad[1:4]
        grads = implementation("linear_cross_entropy", backend).linear_cross_entropy_backward(*given, *options, *needs[:2])
        return None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 3


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: Optional[float] = None,
    return_lse: bool = False,
    return_argmax: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of logits with target token numbers.

    Args:
        logits: (..., V), floating point.
        target: int (...), each in 0..V-1 or ignore_index.
        ignore_index: tokens with this target have loss 0 and no gradient.
        reduction: "mean" over the tokens not ignored (nan if there is none, as in torch), "sum", or "none".
        label_smoothing: ε in 0..1, spread evenly over the vocabulary.
        z_loss: coefficient of lse², added to each token's loss.
        softcap: c > 0 replaces logits by c tanh(logits / c).
        return_lse: also return lse (...), differentiable; 0 for ignored tokens.
        return_argmax: also return the most probable token numbers, int64 (...), the lowest of equal ones; -1 for ignored tokens.

    Returns:
        loss, float32 (float64 for float64 logits): a scalar, or (...) for reduction "none". With return_lse or return_argmax a tuple:
        (loss, lse), (loss, argmax) or (loss, lse, argmax).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. A target out of range raises ValueError on
            the CPU (RuntimeError in compiled code and under torch.func's transforms); on a GPU it is not checked, for that would wait
            for the device: the kernels make such a token's loss NaN, the reference fails within torch.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Sources: at the head of fastprimer/ops/cross_entropy.py.
    """
    arguments.check_floating("cross_entropy: logits", logits)
    arguments.check(logits.dim() >= 1 and logits.shape[-1] > 0, "cross_entropy: logits", "shape (..., V), V >= 1", tuple(logits.shape))
    options = loss_arguments.options("cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, return_argmax)
    target, all_count = loss_arguments.checked_target("cross_entropy", target, logits, logits.shape[-1], ignore_index)
    rows, flat = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    backend = choose("cross_entropy", rows, flat, *options)
    if arguments.needs_gradient(logits):
        outputs = CrossEntropy.apply(backend, rows, None, None, flat, 0, options)
    else:
        loss, lse, _, argmax = implementation("cross_entropy", backend).cross_entropy_forward(rows, flat, *options)
        outputs = loss, lse, argmax
    return _asked_for(outputs, target, all_count, ignore_index, reduction, return_lse, return_argmax)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Optional[Tensor] = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: Optional[float] = None,
    return_lse: bool = False,
    return_argmax: bool = False,
    memory_budget: Optional[int] = None,
) -> Tensor | tuple[Tensor, ...]:
    """cross_entropy(x @ weight.T + bias, target), of whose logits there is a piece at a time (but on the reference).

    Args:
        x: (..., C), the last hidden state; float32, bfloat16, float16 or float64.
        weight: (V, C), the output projection, like x; bias: (V,), floating point, or None. Under autocast they are cast as by a linear
            layer.
        memory_budget: bytes of logits that may be kept for backward, which recomputes the rest: 4 N V (float64: 8 N V) keep all and are
            fastest, and about 2.04 N V suffice for bfloat16 and float16 with a bias of 16 bits or none and no softcap; 0 needs least
            memory. Default: 8 times the bytes of x, which keeps all of a vocabulary of up to about 8 C words.
        target and the others: as for `cross_entropy`.

    Returns:
        As `cross_entropy`.

    Raises:
        TypeError, ValueError: as `cross_entropy`; also for an empty weight (one sharded by ZeRO-3 must be gathered first).
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Sources: at the head of fastprimer/ops/cross_entropy.py.
    """
    name = "linear_cross_entropy"
    for label, tensor in (("x", x), ("weight", weight)) + ((("bias", bias),) if bias is not None else ()):
        arguments.check_floating(f"{name}: {label}", tensor)
    options = loss_arguments.options(name, ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, return_argmax)
    loss_arguments.check_budget(name, memory_budget)
    x, weight, bias = arguments.autocast(x, weight, bias)
    loss_arguments.check_projection(name, x, weight, bias)
    target, all_count = loss_arguments.checked_target(name, target, x, weight.shape[0], ignore_index)
    rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    gradient = arguments.needs_gradient(x, weight, bias)
    budget = DEFAULT_BUDGET * x.numel() * x.element_size() if memory_budget is None else memory_budget
    budget = budget if gradient else 0
    backend = choose(name, rows, weight, flat, bias, *options, budget)
    if gradient:
        rows, weight = arguments.distinct(rows, weight)
        outputs = CrossEntropy.apply(backend, rows, weight, bias, flat, budget, options)
    else:
        functions = implementation(name, backend)
        loss, lse, _, argmax, *_ = functions.linear_cross_entropy_forward(rows, weight, flat, bias, *options, budget)
        outputs = loss, lse, argmax
    return _asked_for(outputs, target, all_count, ignore_index, reduction, return_lse, return_argmax)


def _asked_for(outputs, target: Tensor, all_count: bool, ignore_index: int, reduction: str, return_lse: bool, return_argmax: bool):
    loss, lse, argmax = outputs
    if reduction == "none":
        loss = loss.reshape(target.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.mean() if all_count else loss.sum() / (target != ignore_index).sum()
    extra = ((lse.reshape(target.shape),) if return_lse else ()) + ((argmax.reshape(target.shape),) if return_argmax else ())
    return (loss, *extra) if extra else loss
