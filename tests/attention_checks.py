"""What the tests of the Triton attention share: inputs, options, small tiles, and every result's share of its error budget."""

from __future__ import annotations

import importlib

import torch

from fastprimer.kernels import attention as kernels
from kernel_checks import assert_within_budget, random, shares_of

reference = importlib.import_module("fastprimer.ops.attention")

SINKS = 24
"""So many heads make a sample of dsinks, one number a head: over 96 heads kernel and reference err alike, but of three heads
the reference's error is by chance so small, in one draw of thirty, that the kernel's exceeds the budget. With fewer heads
dsinks is not compared."""


def small_tiles(monkeypatch):
    """Tiles of 32 queries and 32 keys, so that short sequences have many of them."""
    monkeypatch.setattr(kernels, "tile", lambda *_: kernels.Tile(32, 32, 4, 1))


def lengths(*numbers):
    return torch.tensor([0, *numbers]).cumsum(0).int()


def inputs(S, T, H=2, Hk=1, D=16, Dv=None, dtype=torch.float32, B=None, sinks=False):
    """q, k, v, sinks, do, dlse; without B packed."""
    queries, keys = ((S,), (T,)) if B is None else ((B, S), (B, T))
    q, k, v = random(0, *queries, H, D, dtype=dtype), random(1, *keys, Hk, D, dtype=dtype), random(2, *keys, Hk, Dv or D, dtype=dtype)
    dlse = random(5, H, S) if B is None else random(5, B, H, S)
    return q, k, v, random(3, H, dtype=dtype) if sinks else None, random(4, *queries, H, Dv or D, dtype=dtype), dlse


def options(cu_seqlens_q=None, cu_seqlens_k=None, most_q=None, most_k=None, scale=0.3, left=None, right=None, softcap=None):
    return cu_seqlens_q, cu_seqlens_k, most_q, most_k, scale, left, right, softcap


def run(functions, tensors, opts, wide=lambda t: t):
    """o, lse, dq, dk, dv, dsinks"""
    q, k, v, sinks, do, dlse = (t if t is None else wide(t) for t in tensors)
    o, lse = functions.attention_forward(q, k, v, sinks, *opts)
    return o, lse, *functions.attention_backward(do, dlse, q, k, v, o, lse, sinks, *opts)


def shares(tensors, **opts):
    """Each result's share of its error budget, by name."""
    names, opts = ("o", "lse", "dq", "dk", "dv", "dsinks"), options(**opts)
    found = shares_of(lambda functions, wide: dict(zip(names, run(functions, tensors, opts, wide), strict=True)), kernels, reference)
    if tensors[3] is not None and len(tensors[3]) < SINKS:
        del found["dsinks"]
    return found


def check(tensors, **opts):
    assert_within_budget(shares(tensors, **opts))
