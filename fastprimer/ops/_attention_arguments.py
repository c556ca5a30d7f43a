"""What training and decoding attention ask of their arguments."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.config import is_count, is_number
from fastprimer.ops import _arguments as arguments


def scale_limit(scale: float) -> str:
    """What kernels cannot take that fold the scale into an exponent of float32: one that is 0 there, or negative."""
    return "" if scale >= 2.0**-100 else f"its kernel takes a scale of at least 2**-100, not {scale}"


def heads_limit(q: Tensor, v: Tensor) -> str:
    """What kernels cannot take of D and Dv."""
    fits = q.shape[-1] <= 256 and 1 <= v.shape[-1] <= 256
    return "" if fits else f"its kernel takes heads of 1..256 features, not D = {q.shape[-1]} and Dv = {v.shape[-1]}"


def check_attention(name: str, q, k, v, scale, softcap, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    """Raise an error that names the argument unless these floating-point q, k, v describe one attention, dense or packed."""
    packed = cu_seqlens_q is not None
    dims = 3 if packed else 4
    q_letters, k_letters = ("(N, H, D)", "(N, Hk, D)") if packed else ("(B, S, H, D)", "(B, T, Hk, D)")
    if q.dim() != dims:
        hint = "" if packed else "; packed tensors need cu_seqlens_q"
        arguments.refuse(f"{name}: q", f"shape {q_letters}{hint}", tuple(q.shape))
    if q.shape[-1] == 0 or q.shape[-2] == 0:
        arguments.refuse(f"{name}: q", f"shape {q_letters} with H >= 1 and D >= 1", tuple(q.shape))
    D = q.shape[-1]
    if k.dim() != dims or k.shape[-1] != D:
        arguments.refuse(f"{name}: k", f"shape {k_letters} with q's D = {D}", tuple(k.shape))
    if v.dim() != dims or v.shape[:-1] != k.shape[:-1]:
        arguments.refuse(f"{name}: v", f"k's shape {tuple(k.shape[:-1])} + (Dv,)", tuple(v.shape))
    if not packed and k.shape[0] != q.shape[0]:
        arguments.refuse(f"{name}: k", f"q's batch {q.shape[0]}", k.shape[0])
    check_heads(name, q, k)
    for label, t in (("k", k), ("v", v)):
        arguments.check_like(f"{name}: {label}", t, q, "q")
    check_scores(name, q, scale, softcap, sinks)
    arguments.check(packed or cu_seqlens_k is None, f"{name}: cu_seqlens_k", "None without cu_seqlens_q", "a tensor")
    if packed:
        check_packing(name, "cu_seqlens_q", cu_seqlens_q, cu_seqlens_q, q)
        check_packing(name, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q, k)
        check_longest(f"{name}: max_seqlen_q", max_seqlen_q, cu_seqlens_q, q.shape[0])
        check_longest(f"{name}: max_seqlen_k", max_seqlen_k, cu_seqlens_k, k.shape[0])
    else:
        for label, longest, length in (("max_seqlen_q", max_seqlen_q, q.shape[1]), ("max_seqlen_k", max_seqlen_k, k.shape[1])):
            _check_length(f"{name}: {label}", longest)
            if longest is not None and longest < length:
                arguments.refuse(f"{name}: {label}", f"at least the {length} tokens of each sequence", longest)


def check_heads(name: str, q: Tensor, k: Tensor, label: str = "k") -> None:
    H, Hk = q.shape[-2], k.shape[-2]
    if Hk == 0 or H % Hk != 0:
        arguments.refuse(f"{name}: {label}", f"a number of heads Hk that divides H = {H}", Hk)


def check_scores(name: str, q: Tensor, scale, softcap, sinks) -> None:
    arguments.check(scale is None or is_number(scale), f"{name}: scale", "None or a finite number", scale)
    arguments.check_softcap(name, softcap)
    if sinks is not None:
        arguments.check_floating(f"{name}: sinks", sinks)
        arguments.check_shape(f"{name}: sinks", sinks, q.shape[-2:-1], "(H,)")
        arguments.check_device(f"{name}: sinks", sinks, q, "q")


def check_packing(name: str, label: str, cu_seqlens: Tensor, like: Tensor, tokens: Tensor) -> None:
    """Shape always; the values only where looking at them does not wait for a device or break a compiled graph."""
    label = f"{name}: {label}"
    arguments.check_integer(label, cu_seqlens)
    arguments.check(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 2, label, "shape (B + 1,) with B >= 1", tuple(cu_seqlens.shape))
    arguments.check_shape(label, cu_seqlens, like.shape, "of cu_seqlens_q")
    arguments.check_device(label, cu_seqlens, tokens, "q")
    if arguments.inspectable(cu_seqlens):
        values, N = cu_seqlens.tolist(), tokens.shape[0]
        rising = values[0] == 0 and values[-1] == N and all(a <= b for a, b in zip(values, values[1:], strict=False))
        arguments.check(rising, label, f"lengths summed up, from 0 to N = {N}, never falling", values)


def _check_length(label: str, longest: object) -> None:
    arguments.check(longest is None or (is_count(longest, 0) and longest < 2**63), label, "None or a number >= 0", longest)


def check_longest(label: str, longest: object, cu_seqlens: Tensor, N: int) -> None:
    """Kernels visit no row beyond it. Compared with the lengths where they can be looked at, else with their mean; in a compiled graph
    by the kernel itself, on the CPU."""
    _check_length(label, longest)
    if longest is None:
        return
    if arguments.inspectable(cu_seqlens):
        true = int(cu_seqlens.diff().max())
        arguments.check(longest >= true, label, f"at least the longest sequence's {true} tokens", longest)
    elif not torch.compiler.is_compiling():
        sequences = cu_seqlens.shape[0] - 1
        arguments.check(longest * sequences >= N, label, f"at least the mean of {sequences} sequences of {N} tokens together", longest)


def _is_side(w: object) -> bool:
    return w is None or (isinstance(w, int) and not isinstance(w, bool) and -1 <= w < 2**62)


def normalise_window(name: str, window: Optional[tuple], causal: bool) -> tuple[Optional[int], Optional[int]]:
    """(left, right) with causal folded in; None: unlimited. FlashAttention's -1 also means unlimited."""
    arguments.check_flag(f"{name}: causal", causal)
    if window is None:
        left = right = None
    else:
        fits = isinstance(window, (tuple, list)) and len(window) == 2 and all(map(_is_side, window))
        arguments.check(fits, f"{name}: window", "(left, right), each an integer >= 0, or None or -1 for no limit", window)
        left, right = (None if w == -1 else w for w in window)
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right
