r"""Attention with grouped queries: every query averages the values, weighted by the softmax of its scores with the keys.

Sources: Vaswani et al. ("Attention Is All You Need", 2017), section 3.2.1; grouped queries, Ainslie et al. ("GQA", 2023), section
2.2; log-sum-exp and backward by recomputation, Dao et al. ("FlashAttention", 2022), appendix B; sliding window, Beltagy et al.
("Longformer", 2020), section 3.1; softcap, Gemma Team ("Gemma 2", 2024), section 2; sinks, Xiao et al. ("Efficient Streaming
Language Models with Attention Sinks", 2023) in the learnable form of gpt-oss.

**Forward.** For one query head h and its key/value head h // (H / Hk), query i of S, key j of T:

    s_ij  = scale · q_i · k_j
    z_ij  = s_ij, or c · tanh(s_ij / c) with a softcap c, or −∞ where key j is not visible to query i
    lse_i = log(Σ_j exp z_ij + exp sink)           (the sink: an extra logit per head that has no value; absent by default)
    p_ij  = exp(z_ij − lse_i)
    o_i   = Σ_j p_ij v_j

Key j is visible if i + T − S − left <= j <= i + T − S + right; causal sets right to 0 (bottom-right aligned: the last query
sees the last key). In packed sequences S and T are the lengths of the sequence that i and j both belong to. A row that sees
no key (and no sink) has o_i = 0 and lse_i = −∞.

**Backward.** Given do_i and dlse_i. From o = P v and from lse:

    dv_j  = Σ_i p_ij do_i
    dp_ij = do_i · v_j
    dz_ij = p_ij (dp_ij − Σ_j' p_ij' dp_ij' + dlse_i) = p_ij (dp_ij − delta_i)

for ∂p_ij'/∂z_ij = p_ij ([j = j'] − p_ij') and ∂lse_i/∂z_ij = p_ij. The inner sum needs no pass over the keys:

    delta_i = Σ_j p_ij (do_i · v_j) − dlse_i = do_i · o_i − dlse_i

The sink is one more logit, whose value vector is 0, so dsink = −Σ_i exp(sink − lse_i) delta_i, over all sequences. Then

    ds_ij = dz_ij (1 − (z_ij / c)²)                (softcap only)
    dq_i  = scale Σ_j ds_ij k_j
    dk_j  = scale Σ_i ds_ij q_i

with dk and dv summed over the H / Hk query heads of the group. Saved: q, k, v, o, lse. This reference holds S x T
numbers per head and treats packed sequences as one sequence with a block-diagonal mask, so that a NaN in one of them
spreads (0 · nan is nan); the kernels do neither. Within a sequence the GPU kernels too multiply what a block holds of masked
keys by 0, so that a NaN there reaches queries that do not see it; the CPU kernel keeps it out. In float16 the GPU kernels multiply a ds
that is rounded to float16: where it lies below 6e-5, as with upstream gradients of 1e-4 and less, digits are lost (torch.amp.GradScaler).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.backends import choose, implementation
from fastprimer.ops import _arguments as arguments
from fastprimer.ops._attention_arguments import check_attention, heads_limit, normalise_window, scale_limit


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
    packed = q.dim() == 3
    visible = visible_keys(q, k, cu_seqlens_q, cu_seqlens_k, left, right)
    o, lse = attend(*(t.unsqueeze(0) if packed else t for t in (q, k, v)), visible, sinks, scale, softcap)
    return (o.squeeze(0), lse.squeeze(0)) if packed else (o, lse)


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
    packed = q.dim() == 3
    dtype = arguments.wide(q.dtype)
    visible = visible_keys(q, k, cu_seqlens_q, cu_seqlens_k, left, right)
    if packed:
        do, q, k, v, o, lse = (t.unsqueeze(0) for t in (do, q, k, v, o, lse))
        dlse = None if dlse is None else dlse.unsqueeze(0)
    groups = q.shape[2] // k.shape[2]
    qg, dog, og = (_grouped(t.to(dtype), groups) for t in (q, do, o))
    lse = lse.unflatten(1, (-1, groups)).unsqueeze(-1)  # (B, Hk, G, S, 1)
    z = _logits(qg, k.to(dtype), visible, scale, softcap)
    p = torch.exp(z - torch.where(lse == -torch.inf, 0.0, lse))
    delta = (dog * og).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
    sees_nothing = lse == -torch.inf  # such a row has no gradient, whatever dlse is there
    if dlse is not None:
        delta = delta - torch.where(sees_nothing, 0.0, dlse.unflatten(1, (-1, groups)).unsqueeze(-1))
    dv = torch.einsum("bkgst,bskgd->btkd", p, dog)
    dz = p * (torch.einsum("bskgd,btkd->bkgst", dog, v.to(dtype)) - delta)
    if softcap is not None:
        dz = dz * (1 - (torch.where(z == -torch.inf, 0.0, z) / softcap).square())
    dq = scale * torch.einsum("bkgst,btkd->bskgd", dz, k.to(dtype)).flatten(2, 3)
    dk = scale * torch.einsum("bkgst,bskgd->btkd", dz, qg)
    if sinks is None:
        dsinks = q.new_empty(0)
    else:
        logit = sinks.to(dtype).unflatten(0, (-1, groups))[None, :, :, None, None]
        p_sink = torch.where(sees_nothing, 0.0, torch.exp(logit - lse))
        dsinks = -(p_sink * delta).sum((0, 3, 4)).flatten().to(sinks.dtype)
    dq, dk, dv = dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
    return (dq.squeeze(0), dk.squeeze(0), dv.squeeze(0), dsinks) if packed else (dq, dk, dv, dsinks)


def attend(q, k, v, visible, sinks, scale, softcap):
    """The forward formulas for (B, S, H, D) and a mask `visible`, broadcast to (B, 1, 1, S, T)."""
    dtype = arguments.wide(q.dtype)
    groups = q.shape[2] // k.shape[2]
    z = _logits(_grouped(q.to(dtype), groups), k.to(dtype), visible, scale, softcap)
    top = z.detach().amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).unflatten(0, (-1, groups))[None, :, :, None, None]
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == -torch.inf, 0.0, top)  # a row that sees nothing: exp(−∞ − 0) = 0
    e = torch.exp(z - top)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    o = torch.einsum("bkgst,btkd->bskgd", e / total, v.to(dtype)).flatten(2, 3)
    lse = torch.where(empty, -torch.inf, top + torch.log(total)).squeeze(-1).flatten(1, 2)
    return o.to(q.dtype).contiguous(), lse.contiguous()


def visible_keys(q, k, cu_seqlens_q, cu_seqlens_k, left, right) -> Tensor:
    """Which key each query sees, by position within its own sequence: (1, 1, 1, S, T)."""
    S, T = q.shape[-3], k.shape[-3]
    i = torch.arange(S, device=q.device).unsqueeze(1)
    j = torch.arange(T, device=q.device).unsqueeze(0)
    if cu_seqlens_q is None:
        distance = j - (i + T - S)
        visible = torch.ones_like(distance, dtype=torch.bool)
    else:
        batch = cu_seqlens_q.shape[0] - 1
        sequence_i = torch.bucketize(i, cu_seqlens_q[1:], right=True)
        sequence_j = torch.bucketize(j, cu_seqlens_k[1:], right=True)
        visible = (sequence_i == sequence_j) & (sequence_i < batch)
        end_i = cu_seqlens_q[1:][sequence_i.clamp(max=batch - 1)]
        end_j = cu_seqlens_k[1:][sequence_j.clamp(max=batch - 1)]
        distance = (j - end_j) - (i - end_i)  # aligned at the ends of the two sequences
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    return visible[None, None, None]


def _grouped(t: Tensor, groups: int) -> Tensor:
    return t.unflatten(2, (-1, groups))  # (B, S, H, D) -> (B, S, Hk, G, D)


def _logits(qg: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: Optional[float]) -> Tensor:
    s = scale * torch.einsum("bskgd,btkd->bkgst", qg, k)
    z = s if softcap is None else softcap * torch.tanh(s / softcap)
    return z.masked_fill(~visible, -torch.inf)


def _cpu_limit(q, k, v, *_) -> str:
    return heads_limit(q, v) or arguments.dtype_limit(q, None, "float32 bfloat16 float16")


def _gpu_limit(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, *_) -> str:
    return _cpu_limit(q, k, v) or scale_limit(scale)


LIMITS = {
    "attention": {
        "cpu": _cpu_limit,
        "triton": _gpu_limit,
        "cuda": _gpu_limit,
    }
}


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, v, sinks, *options):
        cu_seqlens_q, cu_seqlens_k, *ctx.options = options
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        o, lse = implementation("attention", backend).attention_forward(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *ctx.options)
        ctx.save_for_backward(q, k, v, o, lse, sinks, cu_seqlens_q, cu_seqlens_k)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, sinks, *cu_seqlens = ctx.saved_tensors
        backend = ctx.backend
        if torch.is_grad_enabled():  # A second derivative is wanted: recompute o and lse within the graph, in plain torch.
            backend = "reference"
            o, lse = implementation("attention", backend).attention_forward(q, k, v, sinks, *cu_seqlens, *ctx.options)
        if do is None:
            do = torch.zeros_like(o)
        functions = implementation("attention", backend)
        dq, dk, dv, dsinks = functions.attention_backward(do, dlse, q, k, v, o, lse, sinks, *cu_seqlens, *ctx.options)
        return None, dq, dk, dv, dsinks if sinks is not None else None, *([None] * 8)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Optional[tuple] = None,
    scale: Optional[float] = None,
    softcap: Optional[float] = None,
    sinks: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    return_lse: bool = False,
):
    """Grouped-query attention, dense or over packed sequences.

    Args:
        q: (B, S, H, D), or packed (N, H, D) with cu_seqlens_q; float32, bfloat16, float16, or float64 (by the reference alone).
        k, v: (B, T, Hk, D), (B, T, Hk, Dv), or packed likewise; Hk divides H; dtype and device of q (autocast casts them).
        causal: query i sees keys j <= i + T - S (bottom-right aligned).
        window: (left, right), inclusive: query i sees keys i + T - S - left .. i + T - S + right; None on a side, or
            FlashAttention's -1: unlimited.
        scale: of the scores, by default D ** -0.5.
        softcap: c > 0 replaces scaled scores by c tanh(score / c), before masking.
        sinks: (H,), floating point: a learnable extra logit per head, neither scaled nor capped; it takes part in lse.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (B + 1,), cumulative lengths of the packed sequences, from 0 to N; empty
            sequences are allowed; cu_seqlens_k defaults to cu_seqlens_q. On a GPU their values are not inspected, which would wait for the
            device: rows beyond the last of them are undefined.
        max_seqlen_q, max_seqlen_k: an upper bound of the sequences' lengths, where one is known on the host; it saves a kernel empty
            work: without it a GPU has blocks for N tokens of every sequence, most of which find nothing to do, and 2^31 blocks are
            refused. One that is too small is an error, detected on a GPU only if it is below the mean length.
        return_lse: return (o, lse).

    Returns:
        o (B, S, H, Dv) in q's dtype, or (N, H, Dv); lse (B, H, S) or (H, N), float32 (float64 for float64), differentiable.
        A row that sees no key: o 0, lse -inf and zero gradients (with sinks: lse is the sink, which has lse's gradient).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Sources: at the head of fastprimer/ops/attention.py.
    """
    for label, t in (("q", q), ("k", k), ("v", v)):
        arguments.check_floating(f"attention: {label}", t)
    q, k, v = arguments.autocast(q, k, v)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    check_attention("attention", q, k, v, scale, softcap, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = normalise_window("attention", window, causal)
    arguments.check_flag("attention: return_lse", return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap
    backend = choose("attention", q, k, v, sinks, *options)
    if arguments.needs_gradient(q, k, v, sinks):
        q, k, v, sinks = arguments.distinct(q, k, v, sinks)
        if cu_seqlens_k is cu_seqlens_q:
            options = cu_seqlens_q, None, *options[2:]
        o, lse = Attention.apply(backend, q, k, v, sinks, *options)
    else:
        o, lse = implementation("attention", backend).attention_forward(q, k, v, sinks, *options)
    return (o, lse) if return_lse else o
