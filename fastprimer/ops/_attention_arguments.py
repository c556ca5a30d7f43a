"""What training and decoding attention ask of their arguments."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from fastprimer.ops import _arguments as arguments


def check_attention(name: str, q, k, v, scale, softcap, sinks, cu_seqlens_q, cu_seqlens_k) -> None:
    """Raise an error that names the argument unless these floating-point q, k, v describe one attention, dense or packed."""
    packed = cu_seqlens_q is not None
    dims = 3 if packed else 4
    q_letters, k_letters = ("(N, H, D)", "(N, Hk, D)") if packed else ("(B, S, H, D)", "(B, T, Hk, D)")
    hint = "" if packed else "; packed tensors need cu_seqlens_q"
    arguments.check(q.dim() == dims and min(q.shape[-2:]) > 0, f"{name}: q", f"shape {q_letters}{hint}", tuple(q.shape))
    D = q.shape[-1]
    arguments.check(k.dim() == dims and k.shape[-1] == D, f"{name}: k", f"shape {k_letters} with q's D = {D}", tuple(k.shape))
    arguments.check(
        v.dim() == dims and v.shape[:-1] == k.shape[:-1], f"{name}: v", f"k's shape {tuple(k.shape[:-1])} + (Dv,)", tuple(v.shape)
    )
    if not packed:
        arguments.check(k.shape[0] == q.shape[0], f"{name}: k", f"q's batch {q.shape[0]}", k.shape[0])
    check_heads(name, q, k)
    for label, t in (("k", k), ("v", v)):
        arguments.check_like(f"{name}: {label}", t, q, "q")
    check_scores(name, q, scale, softcap, sinks)
    arguments.check(packed or cu_seqlens_k is None, f"{name}: cu_seqlens_k", "None without cu_seqlens_q", "a tensor")
    if packed:
        check_packing(name, "cu_seqlens_q", cu_seqlens_q, cu_seqlens_q, q)
        check_packing(name, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q, k)


def check_heads(name: str, q: Tensor, k: Tensor) -> None:
    H, Hk = q.shape[-2], k.shape[-2]
    arguments.check(Hk > 0 and H % Hk == 0, f"{name}: k", f"a number of heads Hk that divides H = {H}", Hk)


def check_scores(name: str, q: Tensor, scale, softcap, sinks) -> None:
    arguments.check(scale is None or isinstance(scale, (int, float)), f"{name}: scale", "None or a number", scale)
    arguments.check(softcap is None or softcap > 0, f"{name}: softcap", "None or a number > 0", softcap)
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


def normalise_window(name: str, window: Optional[tuple], causal: bool) -> tuple[Optional[int], Optional[int]]:
    """(left, right) with causal folded in; None: unlimited. FlashAttention's -1 also means unlimited."""
    if window is None:
        left = right = None
    else:
        fits = isinstance(window, (tuple, list)) and len(window) == 2 and all(w is None or (isinstance(w, int) and w >= -1) for w in window)
        arguments.check(fits, f"{name}: window", "(left, right), each a number >= 0 or None", window)
        left, right = (None if w == -1 else w for w in window)
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right
