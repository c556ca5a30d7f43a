"""What a user without fastprimer would write: the peers of benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def _rms_norm(x, weight=None, eps=1e-6, *, residual=None, weight_offset=0.0):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight if weight is None or weight_offset == 0 else weight + weight_offset, eps)
    return y if residual is None else (y, h)


def _rope(q, k, cos, sin, *, positions=None, interleaved=False):
    """Half-split as in Hugging Face's models, where the tables are as wide as a head and of q's dtype."""
    rows = slice(0, q.shape[1]) if positions is None else positions
    if interleaved:  # as in the paper: a pair is a complex number
        turn = torch.complex(cos[rows], sin[rows]).unsqueeze(-2)
        return tuple(
            torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(x.dtype) for x in (q, k)
        )
    cos, sin = (torch.cat((t[rows], t[rows]), -1).to(q.dtype).unsqueeze(-2) for t in (cos, sin))
    return tuple(x * cos + _rotate_half(x) * sin for x in (q, k))


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _swiglu(gate, up=None, *, activation="silu", limit=None):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    if activation == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _attention(q, k, v, *, causal=False, window=None, return_lse=False):
    S, T = q.shape[1], k.shape[1]
    masked = window is not None or (causal and S != T)  # SDPA's own causal mask is aligned at the first key
    mask = _window_mask(S, T, *(window or (None, None)), causal, q.device) if masked else None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, enable_gqa=gqa).transpose(1, 2)


@functools.cache
def _window_mask(S: int, T: int, left, right, causal: bool, device) -> torch.Tensor:
    distance = torch.arange(T, device=device) - (torch.arange(S, device=device)[:, None] + T - S)
    right = 0 if causal else right
    visible = torch.ones_like(distance, dtype=torch.bool) if left is None else distance >= -left
    return visible if right is None else visible & (distance <= right)


def _attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens, *, k, v, block_table=None, return_lse=False):
    """For sequences of one length, which with the new tokens fill their caches: no length has to be read.

    The query heads of a group are rows beside each other: so the cache is read once for all of them, and torch's CPU kernel is up to ten
    times as fast as with enable_gqa.
    """
    S, T = q.shape[1], k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]
    if block_table is None:
        k_cache[:, T - S :], v_cache[:, T - S :] = k, v
    else:
        position = torch.arange(T - S, T, device=q.device)
        place = block_table[:, position // k_cache.shape[1]], position % k_cache.shape[1]
        k_cache[place], v_cache[place] = k, v
        k_cache, v_cache = (cache[block_table].flatten(1, 2) for cache in (k_cache, v_cache))
    G = q.shape[2] // k_cache.shape[2]
    mask = None if S == 1 else _window_mask(S, T, None, None, True, q.device).repeat_interleave(G, 0)
    rows = q.unflatten(2, (-1, G)).transpose(1, 2).flatten(2, 3)  # (B, Hk, S G, D)
    o = F.scaled_dot_product_attention(rows, k_cache.transpose(1, 2), v_cache.transpose(1, 2), mask)
    return o.unflatten(2, (S, G)).transpose(1, 2).flatten(2, 3)


def _route(logits, k, *, score="softmax", renormalize=True, bias=None, groups=None, top_groups=None, scale=1.0):
    """As in transformers' Mixtral and DeepSeek-V3."""
    l = logits.float()
    s = torch.sigmoid(l) if score == "sigmoid" else torch.softmax(l, -1) if score == "softmax" else l
    choice = s.detach() if bias is None else s.detach() + bias
    if groups is not None:
        by_group = choice.unflatten(-1, (groups, -1))
        worth = by_group.topk(2 if score == "sigmoid" else 1, -1).values.sum(-1)
        mask = torch.zeros_like(worth).scatter(-1, worth.topk(top_groups, -1).indices, 1.0)
        choice = by_group.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
    experts = choice.topk(k, -1).indices
    weights = s.gather(-1, experts)
    if score == "softmax_topk":
        weights = torch.softmax(weights, -1)
    elif renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, experts


def _moe(x, gate_up, down, weights, experts):
    """Tokens sorted by expert, then torch's grouped products: what transformers calls grouped_mm."""
    N, K = experts.shape
    chosen, order = torch.sort(experts.reshape(-1))
    counts = torch.zeros(len(gate_up), dtype=torch.int32, device=x.device).scatter_add(
        0, chosen, torch.ones_like(chosen, dtype=torch.int32)
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    a, b = F.grouped_mm(x[order // K], gate_up.transpose(-2, -1), offs=ends).chunk(2, -1)
    z = F.grouped_mm(F.silu(a) * b, down.transpose(-2, -1), offs=ends)
    z = z * weights.reshape(-1)[order].unsqueeze(-1).to(x.dtype)
    unsorted = torch.zeros_like(z).index_copy(0, order, z)
    return unsorted.view(N, K, -1).sum(1)


def _flex_attention() -> Callable:
    call = torch.compile(flex_attention)

    def attention(q, k, v, *, causal=False, window=None, return_lse=False):
        mask = _block_mask(q.shape[1], k.shape[1], *(window or (None, None)), causal, q.device)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return call(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attention


@functools.cache
def _block_mask(S: int, T: int, left, right, causal: bool, device):
    left, right = T if left is None else left, 0 if causal else T if right is None else right
    visible = lambda b, h, i, j: (j >= i + T - S - left) & (j <= i + T - S + right)  # noqa: E731
    return create_block_mask(visible, None, None, S, T, device=device)


def _cross_entropy(logits, target):
    return F.cross_entropy(logits.float(), target)


def _linear_cross_entropy(x, weight, target, *, memory_budget=None):
    """Keeps all logits, whatever the budget."""
    return F.cross_entropy((x @ weight.T).float(), target)


def _plain_attention(q, k, v, *, causal=False, window=None, return_lse=False):
    """As transformers' eager_attention_forward: every score is written down."""
    S, T = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal or window is not None:
        scores = scores.masked_fill(~_window_mask(S, T, *(window or (None, None)), causal, q.device), -torch.inf)
    return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def _sdpa_by(backend: str) -> Callable[[], Callable]:
    """scaled_dot_product_attention by one of torch's implementations, which it would choose among by itself."""

    def make() -> Callable:
        def attention(q, k, v, **options):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return _attention(q, k, v, **options)

        return attention

    return make


def _transformers_rms_norm() -> Callable:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def rms_norm(x, weight=None, eps=1e-6, *, residual=None):
        h = x if residual is None else x + residual
        y = LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=eps), h)
        return y if residual is None else (y, h)

    return rms_norm


def _transformers_moe() -> Callable:
    """Mixtral's experts in their eager form, a loop over experts."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def moe(x, gate_up, down, weights, experts):
        how = SimpleNamespace(_experts_implementation="eager")
        layer = SimpleNamespace(num_experts=len(gate_up), gate_up_proj=gate_up, down_proj=down, act_fn=F.silu, config=how)
        return MixtralExperts.forward(layer, x, experts, weights.to(x.dtype))

    return moe


def _liger_rms_norm() -> Callable:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def rms_norm(x, weight, eps=1e-6, *, residual=None, weight_offset=0.0):
        h = x if residual is None else x + residual
        y = LigerRMSNormFunction.apply(h, weight, eps, weight_offset, "llama", False)  # not in place: the gradient is used again
        return y if residual is None else (y, h)

    return rms_norm


def _liger_rope() -> Callable:
    """It rotates in place: of its own copies, which are made in the forward pass."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def rope(q, k, cos, sin):
        cos, sin = (torch.cat((t, t), -1).to(q.dtype)[None] for t in (cos, sin))
        rotated = LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)
        return tuple(t.transpose(1, 2) for t in rotated)

    return rope


def _liger_swiglu() -> Callable:
    """Its gradients take the place of its inputs: of its own copies, which are made in the forward pass."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate.clone(), up.clone())


def _liger_moe() -> Callable:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def moe(x, gate_up, down, weights, experts):
        return LigerFusedMoEFunction.apply(x, gate_up, down, experts.int(), weights.to(x.dtype))

    return moe


def _liger_linear_cross_entropy() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, target, *, memory_budget=None: liger_fused_linear_cross_entropy(x, weight, target)


EAGER: dict[str, Callable] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "attention_with_kv_cache": _attention_with_kv_cache,
    "route": _route,
    "moe": _moe,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""The usual way, by operation, with the arguments of its public function."""

NAMES = {"attention": "sdpa", "attention_with_kv_cache": "sdpa", "moe": "grouped_mm"}
"""What the usual way is called where it is not plain eager torch."""

OTHERS: dict[tuple[str, str], Callable[[], Callable]] = {
    ("attention", "plain"): lambda: _plain_attention,
    ("attention", "flex"): _flex_attention,
    ("attention", "cudnn"): _sdpa_by("CUDNN_ATTENTION"),
    ("attention", "flash"): _sdpa_by("FLASH_ATTENTION"),
    ("attention", "efficient"): _sdpa_by("EFFICIENT_ATTENTION"),
    ("rms_norm", "transformers"): _transformers_rms_norm,
    ("moe", "transformers"): _transformers_moe,
    ("rms_norm", "liger"): _liger_rms_norm,
    ("moe", "liger"): _liger_moe,
    ("rope", "liger"): _liger_rope,
    ("swiglu", "liger"): _liger_swiglu,
    ("linear_cross_entropy", "liger"): _liger_linear_cross_entropy,
}
"""By operation and name: makes the peer."""

COPIES_FIRST = (("rope", "liger"), ("swiglu", "liger"))
"""They write into their inputs, which contestants share, and here into copies: only their backward pass is fairly timed."""

GPU_ONLY = ("cudnn", "flash", "efficient", "liger")
PEERS = ("eager", "sdpa", "grouped_mm", "compiled", *dict.fromkeys(name for _, name in OTHERS))


def peers(op: str, device: str, measured: str, wanted: list[str] | None = None) -> dict[str, Callable[[], Callable]]:
    """What makes each peer of an operation, by name; `wanted`: only these ("eager" is the usual way, whatever its name).

    On a CPU flex_attention has no backward pass, and SDPA one implementation. Liger-Kernel is a peer on a GPU, where it is installed.
    """
    usual = NAMES.get(op, "eager")
    makers: dict[str, Callable[[], Callable]] = {usual: lambda: EAGER[op], "compiled": lambda: torch.compile(EAGER[op])}
    fair = {key: maker for key, maker in OTHERS.items() if measured == "backward" or key not in COPIES_FIRST}
    makers |= {name: maker for (of, name), maker in fair.items() if of == op}
    if device != "cuda" and measured != "forward":
        makers.pop("flex", None)
    for name in GPU_ONLY if device != "cuda" else () if find_spec("liger_kernel") else ("liger",):
        makers.pop(name, None)
    if find_spec("transformers") is None:
        makers.pop("transformers", None)
    chosen = None if wanted is None else {usual if name == "eager" else name for name in wanted}
    return {name: maker for name, maker in makers.items() if chosen is None or name in chosen}
