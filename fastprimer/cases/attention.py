"""The cases of attention and of decoding."""

from __future__ import annotations

import torch

from fastprimer.cases._case import Case, Inputs, Work, size


def _attention_work(a: dict) -> Work:
    q, k, v = a["q"], a["k"], a["v"]
    pairs = q.shape[-3] * k.shape[-3] * (q.shape[0] if q.dim() == 4 else 1) * q.shape[-2]
    if a.get("causal"):
        pairs //= 2
    flops = 2 * pairs * (q.shape[-1] + v.shape[-1])
    moved = 2 * size(q) + size(k, v)
    return Work(moved, 2 * moved, flops, flops * 5 // 2)


def attention_case(name: str, q: tuple, k: tuple, Dv=None, cu_q=None, cu_k=None, sinks=False, bench=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        a = {"q": inputs.normal(*q), "k": inputs.normal(*k), "v": inputs.normal(*k[:-1], Dv or k[-1]), "return_lse": True, **options}
        if sinks:
            a["sinks"] = inputs.normal(q[-2])
        if cu_q:
            a |= {"cu_seqlens_q": inputs.tensor(cu_q), "cu_seqlens_k": inputs.tensor(cu_k or cu_q)}
        return a

    return Case("attention", name, arguments, ("o", "lse"), bench, _attention_work)


ATTENTION = [
    attention_case("full", (2, 5, 4, 16), (2, 7, 2, 16)),
    attention_case("causal", (2, 9, 4, 32), (2, 9, 1, 32), causal=True),
    attention_case("causal-bottom-right", (1, 3, 2, 16), (1, 8, 2, 16), causal=True),
    attention_case("rows-without-keys", (1, 6, 2, 16), (1, 3, 1, 16), causal=True),
    attention_case("window", (1, 12, 4, 16), (1, 12, 2, 16), causal=True, window=(3, None)),
    attention_case("window-both", (1, 10, 2, 16), (1, 12, 2, 16), window=(2, 3)),
    attention_case("softcap", (1, 6, 2, 16), (1, 6, 2, 16), softcap=2.0, scale=0.7),
    attention_case("sinks", (2, 5, 4, 16), (2, 5, 2, 16), causal=True, sinks=True),
    attention_case("value-size", (1, 5, 2, 24), (1, 6, 1, 24), Dv=8),
    attention_case("packed", (9, 4, 16), (9, 2, 16), cu_q=[0, 4, 4, 9], causal=True),
    attention_case("packed-lengths", (5, 2, 16), (8, 1, 16), cu_q=[0, 2, 2, 5], cu_k=[0, 0, 3, 8], causal=True),
    attention_case("bench-causal", (1, 1024, 16, 64), (1, 1024, 4, 64), causal=True, bench=True),
]


def decoding_case(name: str, lengths: list, S: int, H: int, Hk: int, D: int, pages=0, append=True, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        B, T = len(lengths), max(lengths) + S
        size = 16
        shape = (pages, size, Hk, D) if pages else (B, T, Hk, D)
        a = {"q": inputs.normal(B, S, H, D, grad=False), "cache_seqlens": inputs.tensor(lengths), "return_lse": True, **options}
        a |= {"k_cache": inputs.normal(*shape, grad=False), "v_cache": inputs.normal(*shape, grad=False)}
        if append:
            a |= {"k": inputs.normal(B, S, Hk, D, grad=False), "v": inputs.normal(B, S, Hk, D, grad=False)}
        if pages:
            n = -(-T // size)
            a["block_table"] = torch.randperm(pages, generator=inputs.generator)[: B * n].view(B, n).int().to(inputs.device)
        return a

    return Case("attention_with_kv_cache", name, arguments, ("o", "lse"))


DECODING = [
    decoding_case("append", [5, 0, 17], 1, 4, 2, 16),
    decoding_case("speculative", [3, 9], 4, 4, 1, 32, window=(4, None)),
    decoding_case("paged", [20, 3], 2, 2, 2, 16, pages=7),
    decoding_case("read-only", [6, 2], 2, 4, 2, 16, append=False),
]
