"""Independent formulations of every operation, differentiated by autograd: what the reference itself is checked against.

Written on purpose in another way than the chapters: torch.nn.functional where it has the operation, matrices for
rotations, loops over sequences, tokens and experts where the chapters use masks. Slow, and nothing but right.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))


def rms_norm(x, weight=None, eps=1e-6, *, residual=None, weight_offset=0.0):
    h = x if residual is None else x + residual
    scale = None if weight is None else _wide(weight) + weight_offset
    y = F.rms_norm(_wide(h), h.shape[-1:], scale, eps).to(x.dtype)
    return y if residual is None else (y, h)


def rope(q, k, cos, sin, *, positions=None, interleaved=False):
    """A pair of features is a vector, a rotation a product with a 2 x 2 matrix."""
    turn = torch.stack((torch.stack((_wide(cos), -_wide(sin)), -1), torch.stack((_wide(sin), _wide(cos)), -1)), -2)
    R = 2 * cos.shape[1]

    def rotate(x):
        rows = torch.arange(x.shape[-3], device=x.device) if positions is None else positions
        pairs = _wide(x[..., :R]).unflatten(-1, (-1, 2)) if interleaved else _wide(x[..., :R]).unflatten(-1, (2, -1)).transpose(-1, -2)
        rotated = (turn[rows].unsqueeze(-4) @ pairs.unsqueeze(-1)).squeeze(-1)
        rotated = rotated if interleaved else rotated.transpose(-1, -2)
        return torch.cat((rotated.flatten(-2).to(x.dtype), x[..., R:]), -1)

    return rotate(q), None if k is None else rotate(k)


def swiglu(gate, up=None, *, activation="silu", limit=None):
    """σ as exp(log σ), whose derivative cancels nowhere; F.silu's and F.gelu's do, and are compared in the tests."""
    a, b = (_wide(t) for t in (gate.unflatten(-1, (2, gate.shape[-1] // 2)).unbind(-2) if up is None else (gate, up)))
    if activation == "gpt_oss" or limit is not None:
        limit = 7.0 if limit is None else limit
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    t = {"silu": a, "gelu_tanh": math.sqrt(8 / math.pi) * (a + 0.044715 * a**3), "gpt_oss": 1.702 * a}[activation]
    return (a * torch.exp(F.logsigmoid(t)) * (b + (activation == "gpt_oss"))).to(gate.dtype)


def attention(q, k, v, *, causal=False, window=None, scale=None, softcap=None, sinks=None, cu_seqlens_q=None, cu_seqlens_k=None,
              max_seqlen_q=None, max_seqlen_k=None, return_lse=False):  # fmt: skip
    """One sequence at a time, and of it one query at a time."""
    options = causal, window, q.shape[-1] ** -0.5 if scale is None else scale, softcap
    if cu_seqlens_q is None:
        pairs = [_one_sequence(q[b], k[b], v[b], sinks, *options) for b in range(q.shape[0])]
        o, lse = torch.stack([o for o, _ in pairs]), torch.stack([lse for _, lse in pairs])
    else:
        ends = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False)
        pairs = [_one_sequence(q[a:b], k[c:d], v[c:d], sinks, *options) for a, b, c, d in ends]
        o, lse = torch.cat([o for o, _ in pairs]), torch.cat([lse for _, lse in pairs], -1)
    return (o, lse) if return_lse else o


def _one_sequence(q, k, v, sinks, causal, window, scale, softcap):
    S, T, H, Dv = q.shape[0], k.shape[0], q.shape[1], v.shape[-1]
    if S == 0:
        return q.new_zeros(0, H, Dv), _wide(q.new_zeros(H, 0))
    k, v = (_wide(t).repeat_interleave(H // k.shape[1], 1).transpose(0, 1) for t in (k, v))
    left, right = window or (None, None)
    rows, lses = [], []
    for i in range(S):
        low = 0 if left is None else max(0, i + T - S - left)
        high = T if right is None else min(T, i + T - S + right + 1)
        high = max(low, min(high, i + T - S + 1) if causal else high)
        scores, values = (k[:, low:high] @ _wide(q[i]).unsqueeze(-1)).squeeze(-1) * scale, v[:, low:high]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            scores = torch.cat((scores, _wide(sinks).unsqueeze(-1)), -1)
            values = torch.cat((values, values.new_zeros(H, 1, Dv)), 1)
        if scores.shape[-1] == 0:
            rows.append(values.new_zeros(H, Dv))
            lses.append(values.new_full((H,), -torch.inf))
        else:
            rows.append((torch.softmax(scores, -1).unsqueeze(-2) @ values).squeeze(-2))
            lses.append(torch.logsumexp(scores, -1))
    return torch.stack(rows).to(q.dtype), torch.stack(lses, -1)


def attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens, *, k=None, v=None, block_table=None, causal=True, window=None, scale=None,
                            softcap=None, sinks=None, return_lse=False):  # fmt: skip
    """Each sequence's keys and values one by one, written where they belong and laid end to end, then the oracle of attention."""
    options = causal, window, q.shape[-1] ** -0.5 if scale is None else scale, softcap
    S, size = q.shape[1], k_cache.shape[1]
    o, lse = torch.empty_like(q[..., :1]).repeat(1, 1, 1, v_cache.shape[-1]), _wide(q[..., 0]).transpose(1, 2).clone()
    for b, length in enumerate(cache_seqlens.tolist()):
        for i in range(S if k is not None else 0):
            page, slot = (b, length) if block_table is None else (int(block_table[b, length // size]), length % size)
            k_cache[page, slot], v_cache[page, slot] = k[b, i], v[b, i]
            length += 1
        caches = (c[b] if block_table is None else c[block_table[b].long()].flatten(0, 1) for c in (k_cache, v_cache))
        o[b], lse[b] = _one_sequence(q[b], *(c[:length] for c in caches), sinks, *options)
    return (o, lse) if return_lse else o


def route(logits, k, *, score="softmax", renormalize=True, bias=None, groups=None, top_groups=None, scale=1.0):
    """One token at a time, with Python's sort."""
    l = _wide(logits)
    N, E = l.shape
    s = {"softmax": lambda: F.softmax(l, -1), "softmax_topk": lambda: l, "sigmoid": lambda: 1 / (1 + torch.exp(-l))}[score]()
    choice = (s if bias is None else s + _wide(bias)).tolist()
    experts = []
    for row in choice:
        allowed = range(E)
        if groups is not None:
            size, best = E // groups, 2 if score == "sigmoid" else 1
            worth = [sum(sorted(row[g * size : (g + 1) * size], reverse=True)[:best]) for g in range(groups)]
            kept = sorted(range(groups), key=lambda g: (-worth[g], g))[:top_groups]
            allowed = [e for e in range(E) if e // size in kept]
        experts.append(sorted(allowed, key=lambda e: (-row[e], e))[:k])
    experts = torch.tensor(experts, dtype=torch.int64, device=l.device).view(N, k)
    weights = torch.stack([s[n, e] for n, e in zip(range(N), experts, strict=True)]) if N else s[:, :k]
    if score == "softmax_topk":
        weights = F.softmax(weights, -1)
    elif renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, experts


def moe(x, gate_up, down, weights, experts):
    """One token and one of its experts at a time."""
    rows = []
    for n in range(x.shape[0]):
        row = _wide(x.new_zeros(x.shape[1]))
        for w, e in zip(weights[n], experts[n].tolist(), strict=True):
            a, b = _wide((_wide(gate_up[e]) @ _wide(x[n])).to(x.dtype)).chunk(2)  # stored in x's dtype, as a layer does
            row = row + _wide(w) * (_wide(down[e]) @ (F.silu(a) * b))
        rows.append(row)
    if not rows:  # the inputs still take part, for autograd's sake
        return x * (0 * (gate_up.sum() + down.sum() + weights.sum()))
    return torch.stack(rows).to(x.dtype)


def cross_entropy(logits, target, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None,
                  return_lse=False, return_argmax=False):  # fmt: skip
    z = _wide(logits) if softcap is None else softcap * torch.tanh(_wide(logits) / softcap)
    target = target.long()
    loss = F.cross_entropy(z, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    kept = target != ignore_index
    loss = loss + z_loss * torch.where(kept, torch.logsumexp(z, -1), 0.0) ** 2
    loss = {"none": loss, "sum": loss.sum(), "mean": loss[kept].mean()}[reduction]
    lse = z.max(-1).values + (z - z.max(-1, keepdim=True).values).exp().sum(-1).log()
    extra = [torch.where(kept, lse, 0.0)] if return_lse else []
    extra += [torch.where(kept, z.max(-1).indices, -1)] if return_argmax else []
    return (loss, *extra) if extra else loss


def linear_cross_entropy(x, weight, target, *, bias=None, memory_budget=None, **options):
    return cross_entropy(F.linear(_wide(x), _wide(weight), _wide(bias)), target, **options)


ORACLES = {
    function.__name__: function
    for function in (rms_norm, rope, swiglu, attention, attention_with_kv_cache, route, moe, cross_entropy, linear_cross_entropy)
}
