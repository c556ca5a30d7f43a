"""Benchmarks for GPUs: sizes that fill one. Each is proven on a smaller case of the same kind (`proof`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from fastprimer.cases._case import Case
from fastprimer.cases.attention import attention_case, decoding_case
from fastprimer.cases.losses import loss_case
from fastprimer.cases.moe import moe_case, route_case
from fastprimer.cases.rms_norm import rms_norm_case
from fastprimer.cases.rope import rope_case
from fastprimer.cases.swiglu import swiglu_case


def _benchmark(make: Callable[..., Case], name: str, size: tuple, small: tuple, **options) -> Case:
    """size and small: the positional arguments of `make` after the name, of what is measured and of what is proven."""
    return dataclasses.replace(make(f"bench-{name}", *size, bench=True, **options), proof=make(f"proof-{name}", *small, **options))


def _attention(name: str, B: int, S: int, H: int, Hk: int, D: int, **options) -> Case:
    shapes = [((b, s, H, D), (b, s, Hk, D)) for b, s in ((B, S), (1, 2048))]
    return _benchmark(attention_case, name, *shapes, **options)


def _decoding(name: str, B: int, T: int, **options) -> Case:
    return _benchmark(decoding_case, name, ([T - 1] * B, 1, 32, 8, 128), ([4095] * 2, 1, 32, 8, 128), **options)


def _loss(op: str, name: str, N: int, V: int, C: int = 0) -> Case:
    return _benchmark(functools.partial(loss_case, op), name, (N, V, C), (512, V // 4, C // 4))


GPU = [
    _benchmark(rms_norm_case, "gpu", (16384, 4096), (512, 4096)),
    _benchmark(rms_norm_case, "gpu-residual", (16384, 4096), (512, 4096), residual=True),
    _benchmark(rms_norm_case, "gpu-per-head", (1 << 19, 128), (1 << 12, 128)),
    _benchmark(rope_case, "gpu", ((4, 4096), 32, 8, 128, 128, 4096), ((1, 512), 32, 8, 128, 128, 512)),
    _benchmark(swiglu_case, "gpu", (8192, 14336), (128, 14336)),
    _attention("gpu-4k", 4, 4096, 16, 16, 128),
    _attention("gpu-16k", 1, 16384, 16, 16, 128),
    _attention("gpu-causal-4k", 4, 4096, 16, 16, 128, causal=True),
    _attention("gpu-causal-16k", 1, 16384, 16, 16, 128, causal=True),
    _attention("gpu-groups", 1, 8192, 32, 8, 128, causal=True),
    _attention("gpu-64", 2, 8192, 32, 32, 64),
    _attention("gpu-causal-64", 2, 8192, 32, 32, 64, causal=True),
    _attention("gpu-window", 1, 16384, 16, 16, 128, causal=True, window=(1023, None)),
    _decoding("gpu", 32, 16384),
    _decoding("gpu-pages-of-64", 32, 16384, page=64),
    _benchmark(route_case, "gpu", (32768, 128, 8), (1024, 128, 8), float32=True),
    _benchmark(moe_case, "gpu", (32768, 2048, 768, 128, 8), (256, 512, 256, 16, 4)),
    _benchmark(moe_case, "gpu-512", (512, 2048, 768, 128, 8), (128, 512, 256, 32, 4)),
    _loss("cross_entropy", "gpu", 8192, 128256),
    _loss("linear_cross_entropy", "gpu", 8192, 128256, 4096),
]
