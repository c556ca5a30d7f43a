r"""Decoding: attention of a few new tokens to a cache of keys and values, contiguous or in pages.

The mathematics is that of the chapter on attention, with S <= 16 queries at the end of each sequence of the batch; the
sequences have different lengths, and the new keys and values are first appended to the cache (the one in-place operation
of this package). No gradient: decoding is not trained through.

Source of the paged cache: Kwon et al. ("PagedAttention", 2023), section 4.1.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.backends import autocasting, choose, implementation
from fastprimer.ops import _arguments as arguments
from fastprimer.ops._attention_arguments import check_heads, check_scores, heads_limit, normalise_window, scale_limit
from fastprimer.ops.attention import attend

MAX_QUERIES = 16


def attention_with_kv_cache_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    block_table: Optional[Tensor],
    sinks: Optional[Tensor],
    scale: float,
    left: Optional[int],
    right: Optional[int],
    softcap: Optional[float],
) -> tuple[Tensor, Tensor]:
    """q (B, S, H, D) -> o (B, S, H, Dv), lse (B, H, S); writes k and v into the caches at cache_seqlens."""
    B, S = q.shape[:2]
    lengths = cache_seqlens.long()
    if k is not None:
        position = lengths.unsqueeze(1) + torch.arange(k.shape[1], device=q.device)  # (B, S)
        if block_table is None:
            place = torch.arange(B, device=q.device).unsqueeze(1), position
        else:
            size = k_cache.shape[1]
            place = block_table.long().gather(1, position // size), position % size
        k_cache[place], v_cache[place] = k, v
        lengths = lengths + k.shape[1]
    if block_table is not None:
        if k_cache.shape[0] == 0:
            block_table = block_table[:, :0]
        block_table = block_table.clamp(0, k_cache.shape[0] - 1)  # what lies behind a sequence's last page may be anything
        k_cache, v_cache = (cache[block_table.long()].flatten(1, 2) for cache in (k_cache, v_cache))
    j = torch.arange(k_cache.shape[1], device=q.device)
    i = lengths[:, None, None] - S + torch.arange(S, device=q.device)[:, None]  # (B, S, 1): each query's own position
    visible = j < lengths[:, None, None]
    if left is not None:
        visible = visible & (j >= i - left)
    if right is not None:
        visible = visible & (j <= i + right)
    # What lies behind a sequence's end may be anything: 0 · nan is nan, so it must not reach the sums.
    beyond = (j >= lengths[:, None])[..., None, None]
    k_cache, v_cache = k_cache.masked_fill(beyond, 0), v_cache.masked_fill(beyond, 0)
    return attend(q, k_cache, v_cache, visible[:, None, None], sinks, scale, softcap)


def _limit(q, k_cache, v_cache, *_) -> str:
    if not all(cache.shape[-1] == 1 or cache.stride(-1) == 1 for cache in (k_cache, v_cache)):
        return "its kernel takes caches in which the features of a head lie next to each other"
    return arguments.dtype_limit(q, None, "float32 bfloat16 float16") or (
        "" if v_cache.shape[-1] else "its kernel takes values of at least one feature"
    )


def _gpu_limit(q, k_cache, v_cache, cache_seqlens, k, v, block_table, sinks, scale, *_) -> str:
    return heads_limit(q, v_cache) or _limit(q, k_cache, v_cache) or scale_limit(scale)


LIMITS = {"attention_with_kv_cache": {"cpu": _limit, "triton": _gpu_limit, "cuda": _gpu_limit}}

LARGE_CACHE = 2**28
"""Numbers of keys from which on Triton reads pages faster than the CUDA kernel (100% and 83% of a copy's bandwidth on an H100), and its
longer call does not show."""


def _faster(q, k_cache, v_cache, cache_seqlens, k, v, block_table, *_) -> str:
    return "triton" if block_table is not None and k_cache.numel() >= LARGE_CACHE and q.dtype != torch.float32 else ""


FASTER = {"attention_with_kv_cache": _faster}


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    causal: bool = True,
    window: Optional[tuple] = None,
    scale: Optional[float] = None,
    softcap: Optional[float] = None,
    sinks: Optional[Tensor] = None,
    return_lse: bool = False,
):
    """Attention of S new queries per sequence to its cached keys and values; appends k and v to the cache in place first.

    Args:
        q: (B, S, H, D), 1 <= S <= 16: the queries of each sequence's last S tokens; in the caches' dtype (autocast casts q, k, v to it),
            float32, bfloat16 or float16 (float64 by the reference alone).
        k_cache, v_cache: (B, T, Hk, D), (B, T, Hk, Dv), or pages (pages, page_size, Hk, D) with block_table.
        cache_seqlens: int (B,), how many tokens each sequence has in the cache, before k and v are appended.
        k, v: (B, S, Hk, D), (B, S, Hk, Dv), the new tokens' keys and values, both or neither.
        block_table: int (B, n), the pages of each sequence in order.
        causal: query i sees keys up to its own position (the default here: these are a sequence's last tokens).
        window, scale, softcap, sinks, return_lse: as for `attention`.

    Returns:
        o (B, S, H, Dv), and lse (B, H, S) with return_lse.

    Raises:
        TypeError, ValueError: an argument does not fit (a cache too short included, on the CPU); nothing is written then. On a GPU
            tokens beyond a cache's room are not written.
        RuntimeError: a gradient was asked for.
        fastprimer.BackendError: the backend asked for by name cannot serve this call.

    Source: Kwon et al. (2023), section 4.1.
    """
    name = "attention_with_kv_cache"
    for label, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if t is not None or label not in ("k", "v"):
            arguments.check_floating(f"{name}: {label}", t)
    q, k, v = as_the_cache(q, k, v, k_cache)
    arguments.check(q.dim() == 4 and 1 <= q.shape[1] <= MAX_QUERIES, f"{name}: q", f"shape (B, S <= {MAX_QUERIES}, H, D)", tuple(q.shape))
    check_cached(name, q, k_cache, v_cache, cache_seqlens, k, v, block_table)
    arguments.check_flag(f"{name}: return_lse", return_lse)
    check_scores(name, q, scale, softcap, sinks)
    if arguments.needs_gradient(q, k_cache, v_cache, k, v, sinks):
        raise RuntimeError(f"{name}: decoding has no backward: call it under torch.no_grad(), or train with fastprimer.attention")
    left, right = normalise_window(name, window, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    call = q, k_cache, v_cache, cache_seqlens, k, v, block_table, sinks, scale, left, right, softcap
    o, lse = implementation(name, choose(name, *call)).attention_with_kv_cache_forward(*call)
    if k is not None and not torch.compiler.is_compiling():  # a kernel writes without autograd's knowledge
        torch.autograd.graph.increment_version((k_cache, v_cache))
    return (o, lse) if return_lse else o


def as_the_cache(q: Tensor, k: Optional[Tensor], v: Optional[Tensor], k_cache: Tensor) -> tuple:
    """q, k, v, under autocast in the cache's dtype."""
    if not autocasting(q.device.type):
        return q, k, v
    return tuple(None if t is None else t.to(k_cache.dtype) for t in (q, k, v))


def check_cached(name, q, k_cache, v_cache, cache_seqlens, k, v, block_table) -> None:
    """Raise an error that names the argument unless queries q, of any number, fit caches into which k and v can be appended."""
    arguments.check(q.dim() == 4 and min(q.shape[-2:]) > 0, f"{name}: q", "shape (B, S, H, D)", tuple(q.shape))
    B, S, _, D = q.shape
    leading = (B,) if block_table is None else k_cache.shape[:1]
    letters = "(B, T, Hk, D)" if block_table is None else "(pages, page_size, Hk, D)"
    fits = k_cache.dim() == 4 and k_cache.shape[:1] == leading and k_cache.shape[-1] == D
    if not fits:
        arguments.refuse(f"{name}: k_cache", f"shape {letters} with B = {B}, D = {D}", tuple(k_cache.shape))
    fits = v_cache.dim() == 4 and v_cache.shape[:-1] == k_cache.shape[:-1]
    if not fits:
        arguments.refuse(f"{name}: v_cache", f"k_cache's shape {tuple(k_cache.shape[:-1])} + (Dv,)", tuple(v_cache.shape))
    check_heads(name, q, k_cache, "k_cache")
    arguments.check((k is None) == (v is None), f"{name}: v", "both k and v or neither", "one of them")
    tensors = [("k_cache", k_cache), ("v_cache", v_cache)]
    if k is not None:
        arguments.check_shape(f"{name}: k", k, (B, S, *k_cache.shape[2:]), "(B, S, Hk, D)")
        arguments.check_shape(f"{name}: v", v, (B, S, *v_cache.shape[2:]), "(B, S, Hk, Dv)")
        tensors += [("k", k), ("v", v)]
        for label, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            one_place_each = all(size == 1 or stride for size, stride in zip(cache.shape, cache.stride(), strict=True))
            arguments.check(
                one_place_each, f"{name}: {label}", "memory for each token, not an expanded tensor", f"strides {cache.stride()}"
            )
        same = k_cache is v_cache
        if not arguments.traced(k_cache):  # nothing, and a meta tensor, lies at 0
            same = k_cache.data_ptr() == v_cache.data_ptr() != 0
        arguments.check(not same, f"{name}: v_cache", "other memory than k_cache's", "the same")
    for label, t in tensors:
        arguments.check_like(f"{name}: {label}", t, q, "q")
    arguments.check_integer(f"{name}: cache_seqlens", cache_seqlens)
    arguments.check_shape(f"{name}: cache_seqlens", cache_seqlens, (B,), "(B,)")
    arguments.check_device(f"{name}: cache_seqlens", cache_seqlens, q, "q")
    room = k_cache.shape[1]
    if block_table is not None:
        arguments.check_integer(f"{name}: block_table", block_table)
        if block_table.dim() != 2 or block_table.shape[0] != B:
            arguments.refuse(f"{name}: block_table", f"shape (B = {B}, n)", tuple(block_table.shape))
        arguments.check_device(f"{name}: block_table", block_table, q, "q")
        room = room * block_table.shape[1]
    if B and arguments.inspectable(cache_seqlens):
        low, high = (int(bound) for bound in torch.aminmax(cache_seqlens))
        high += 0 if k is None else S
        arguments.check(low >= 0 and high <= room, f"{name}: cache_seqlens", f"0..{room} tokens, the new ones included", (low, high))
        if block_table is not None:  # entries behind a sequence's last page may be anything
            lengths = cache_seqlens + (0 if k is None else S)
            used = torch.arange(block_table.shape[1], device=block_table.device) * k_cache.shape[1] < lengths[:, None]
            wrong = bool((used & ((block_table < 0) | (block_table >= k_cache.shape[0]))).any())
            arguments.check(not wrong, f"{name}: block_table", f"pages in 0..{k_cache.shape[0] - 1}", block_table.tolist())
