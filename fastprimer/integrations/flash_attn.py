"""fp.attention and fp.attention_with_kv_cache with the signatures of the package flash_attn (Dao et al.), version 2.

    from fastprimer.integrations.flash_attn import flash_attn_func

Tensors have the same layout there as here: (B, S, H, D), packed (N, H, D). An argument that asks for what is not supported
(dropout, ALiBi, a cache with a batch index or left padding) raises NotImplementedError, which names it. Hints (`deterministic`,
`num_splits`) are taken and have no effect: every result is deterministic. float32 and the CPU are served too.
"""

from __future__ import annotations

import operator
from typing import Optional, Union

import torch
from torch import Tensor

from fastprimer import ops
from fastprimer.ops import _arguments as arguments
from fastprimer.ops.decoding import MAX_QUERIES, as_the_cache, check_cached

UNLIMITED = (-1, -1)


def _refuse(function: str, **given) -> None:
    """Each argument as (its value, the value that asks for nothing)."""
    for name, (value, nothing) in given.items():
        if value is not nothing and value != nothing:
            raise NotImplementedError(f"{function}: {name}: expected {nothing!r}, the only value that is supported, got {value!r}")


def _options(function: str, softmax_scale, causal: bool, window_size, softcap: float) -> dict:
    scale = None if softmax_scale is None else arguments.number(f"{function}: softmax_scale", softmax_scale)
    return {"causal": causal, "window": _window(function, window_size), "scale": scale, "softcap": softcap or None}


def _window(function: str, window_size) -> Optional[tuple[int, int]]:
    try:
        return None if window_size is None else tuple(_integer(f"{function}: window_size", side) for side in window_size)
    except TypeError:
        raise TypeError(f"{function}: window_size: expected two integers, got {window_size!r}") from None


def _integer(name: str, value):
    """A number of tokens as FlashAttention takes it: also an integer of numpy, or a tensor of one."""
    if value is None or isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """q (B, S, H, D), k, v (B, T, Hk, D) -> o (B, S, H, D); with return_attn_probs (o, lse (B, H, S), None)."""
    _refuse("flash_attn_func", dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None))
    options = _options("flash_attn_func", softmax_scale, causal, window_size, softcap)
    o, lse = ops.attention(q, k, v, **options, return_lse=True)
    return (o, lse, None) if return_attn_probs else o


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
):
    """Packed sequences: q (N, H, D), k, v (M, Hk, D), cu_seqlens int32 (B + 1,) -> o (N, H, D); lse is (H, N)."""
    name = "flash_attn_varlen_func"
    _refuse(name, dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None), block_table=(block_table, None))
    given = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    longest = {label: _integer(f"{name}: {label}", value) for label, value in given.items()}
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, **longest}
    options = _options(name, softmax_scale, causal, window_size, softcap)
    o, lse = ops.attention(q, k, v, **packed, **options, return_lse=True)
    return (o, lse, None) if return_attn_probs else o


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
):
    """q (B, S, H, D) attends to its sequence in the caches (B, T, Hk, D), or pages with block_table; new k, v are appended in place.

    With rotary_cos and rotary_sin (P, R/2), q and k are rotated first: k at the positions that it is appended at, q at those of
    its own tokens if causal or with a window, else all at the first of them. More than 16 queries are taken in parts, which only
    causal attention to appended keys allows. Without cache_seqlens the caches are full.
    """
    name = "flash_attn_with_kvcache"
    _refuse(name, cache_batch_idx=(cache_batch_idx, None), cache_leftpad=(cache_leftpad, None), alibi_slopes=(alibi_slopes, None))
    for label, tensor in (("q", q), ("k_cache", k_cache)):  # whose sizes are read here
        arguments.check_floating(f"{name}: {label}", tensor)
        if tensor.dim() != 4:
            arguments.refuse(f"{name}: {label}", "4 dimensions", tuple(tensor.shape))
    if block_table is not None:
        arguments.check_integer(f"{name}: block_table", block_table)
        if block_table.dim() != 2:
            arguments.refuse(f"{name}: block_table", "shape (B, n)", tuple(block_table.shape))
    B, S = q.shape[:2]
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, Tensor) or cache_seqlens.dim() == 0:
        length = room if cache_seqlens is None else _integer(f"{name}: cache_seqlens", cache_seqlens)
        if not 0 <= length <= room:
            arguments.refuse(f"{name}: cache_seqlens", f"0..{room} tokens", length)
        cache_seqlens = torch.full((B,), length, dtype=torch.int32, device=q.device)
    arguments.check_integer(f"{name}: cache_seqlens", cache_seqlens)
    arguments.check_shape(f"{name}: cache_seqlens", cache_seqlens, (B,), "(B,)")
    if k is not None and k.dim() == 4 and k.shape[1] != S:
        raise NotImplementedError(f"{name}: k: expected as many new keys as queries, {S}, got {k.shape[1]}")
    options = {"block_table": block_table, **_options(name, softmax_scale, causal, window_size, softcap)}
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise ValueError(f"{name}: rotary_cos: expected rotary_cos, rotary_sin and new keys k together, got only some of them")
    if rotary_cos is not None:
        own = cache_seqlens[:, None] + torch.arange(S, device=q.device, dtype=cache_seqlens.dtype)
        local = causal or options["window"] not in (None, UNLIMITED)
        rotary = {"cos": rotary_cos, "sin": rotary_sin, "interleaved": rotary_interleaved}
        q, _ = ops.rope(q, None, positions=own if local else cache_seqlens[:, None].expand(B, S), **rotary)
        k, _ = ops.rope(k, None, positions=own, **rotary)
    if S <= MAX_QUERIES:
        o, lse = ops.attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens, k=k, v=v, **options, return_lse=True)
        return (o, lse) if return_softmax_lse else o
    if not (causal and k is not None):
        raise NotImplementedError(f"{name}: q: expected at most {MAX_QUERIES} queries unless causal and with their own k and v, got {S}")
    o, lse = _in_parts(name, q, k_cache, v_cache, cache_seqlens, k, v, **options)
    return (o, lse) if return_softmax_lse else o


def _in_parts(name: str, q, k_cache, v_cache, cache_seqlens, k, v, block_table, **options) -> tuple[Tensor, Tensor]:
    """o and lse of any number of causal queries and their own keys and values, some after the others."""
    q, k, v = as_the_cache(q, k, v, k_cache)
    check_cached(name, q, k_cache, v_cache, cache_seqlens, k, v, block_table)  # for all of them, before any is appended
    parts = []
    for begin in range(0, q.shape[1], MAX_QUERIES):
        part = slice(begin, begin + MAX_QUERIES)
        new = q[:, part], k_cache, v_cache, cache_seqlens + begin
        parts.append(ops.attention_with_kv_cache(*new, k=k[:, part], v=v[:, part], block_table=block_table, **options, return_lse=True))
    return torch.cat([o for o, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
