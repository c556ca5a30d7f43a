"""The cases of attention and of decoding."""

from __future__ import annotations

import torch

from fastprimer.cases._case import Case, Inputs, Work, size


def _visible_pairs(S: int, T: int, causal: bool, window: tuple | None) -> int:
    """How many (query, key) pairs of one sequence and head the mask leaves."""
    left, right = window or (None, None)
    if causal:
        right = 0
    diagonal = torch.arange(S) + T - S
    begin = torch.zeros_like(diagonal) if left is None else (diagonal - left).clamp(min=0)
    end = torch.full_like(diagonal, T) if right is None else (diagonal + right + 1).clamp(max=T)
    return int((end - begin).clamp(min=0).sum())


def _attention_work(a: dict) -> Work:
    """Backward: dq, dk, dv, dP, and the scores once more, which no memory linear in S can have kept (FlashAttention counts so too)."""
    q, k, v = a["q"], a["k"], a["v"]
    mask = a.get("causal", False), a.get("window")
    if q.dim() == 4:
        pairs = q.shape[0] * _visible_pairs(q.shape[1], k.shape[1], *mask)
    else:
        lengths = zip(a["cu_seqlens_q"].diff().tolist(), a["cu_seqlens_k"].diff().tolist(), strict=True)
        pairs = sum(_visible_pairs(S, T, *mask) for S, T in lengths)
    products = 2 * pairs * q.shape[-2]
    D, Dv = q.shape[-1], v.shape[-1]
    o = size(q) // D * Dv
    return Work(size(q, k, v) + o, 2 * (size(q, k, v) + o), products * (D + Dv), products * (3 * D + 2 * Dv))


def attention_case(
    name: str, q: tuple, k: tuple, Dv=None, cu_q=None, cu_k=None, sinks=False, bench=False, view=lambda t: t, view_kv=None, **options
) -> Case:
    """q and k: the shapes of what `view` and `view_kv` (by default `view`) turn into queries, keys and values, whose last size is Dv."""
    view_kv = view_kv or view

    def arguments(inputs: Inputs) -> dict:
        a = {"q": inputs.normal(*q, view=view), "k": inputs.normal(*k, view=view_kv)}
        a |= {"v": inputs.normal(*k[:-1], Dv or k[-1], view=view_kv), "return_lse": True, **options}
        if sinks:
            a["sinks"] = inputs.normal(a["q"].shape[-2])
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
    attention_case("tile", (1, 64, 2, 64), (1, 64, 1, 64), causal=True),
    attention_case("tile-and-one", (1, 65, 2, 128), (1, 65, 2, 128), causal=True, window=(16, None)),
    attention_case("tile-less-one", (1, 63, 2, 16), (1, 65, 1, 16), window=(None, 5), softcap=1.5),
    attention_case("ragged", (2, 70, 2, 64), (2, 70, 2, 64), sinks=True),
    attention_case("long-keys", (1, 3, 4, 80), (1, 70, 2, 80), causal=True, Dv=64, sinks=True),
    attention_case("long-queries", (1, 70, 2, 40), (1, 5, 1, 40), window=(2, 3), sinks=True),
    attention_case("head-24", (1, 33, 6, 24), (1, 33, 2, 24), causal=True, softcap=5.0),
    attention_case("head-80", (1, 17, 2, 80), (1, 30, 2, 80), window=(9, 4)),
    attention_case("head-256", (1, 20, 2, 256), (1, 36, 1, 256), causal=True),
    attention_case("large-values", (1, 19, 2, 40), (1, 19, 2, 40), Dv=128, causal=True, window=(4, None)),
    attention_case("group-of-five", (1, 30, 5, 16), (1, 30, 1, 16), causal=True),
    attention_case("window-of-two", (1, 66, 2, 32), (1, 66, 1, 32), causal=True, window=(1, 0)),
    attention_case("packed-window", (70, 6, 40), (70, 2, 40), cu_q=[0, 33, 33, 70], window=(7, 2), sinks=True),
    attention_case("packed-full", (66, 2, 64), (66, 2, 64), cu_q=[0, 3, 66]),
    attention_case(
        "packed-unlike", (40, 4, 128), (50, 1, 128), Dv=64, cu_q=[0, 0, 25, 40], cu_k=[0, 10, 10, 50], causal=True, window=(9, None)
    ),
    attention_case("packed-ends-empty", (12, 2, 16), (12, 1, 16), cu_q=[0, 0, 12, 12], causal=True, max_seqlen_q=12, max_seqlen_k=12),
    attention_case("heads-first", (2, 4, 21, 32), (2, 2, 21, 32), causal=True, view=lambda t: t.transpose(1, 2)),
    attention_case("features-first", (1, 11, 16, 4), (1, 11, 16, 4), Dv=4, view=lambda t: t.transpose(-1, -2)),
    attention_case("sliced", (2, 36, 2, 32), (2, 40, 2, 32), causal=True, view=lambda t: t[:, ::2]),
    attention_case("unaligned", (1, 18, 2, 34), (1, 18, 1, 34), causal=True, view=lambda t: t[..., 1:33]),
    attention_case("expanded", (1, 20, 4, 32), (1, 20, 1, 32), causal=True, view_kv=lambda t: t.expand(-1, -1, 4, -1)),
    attention_case("packed-sliced", (40, 2, 64), (40, 1, 64), cu_q=[0, 7, 20], causal=True, view=lambda t: t[::2]),
    attention_case("one-token", (2, 1, 2, 16), (2, 1, 2, 16), causal=True, sinks=True),
    attention_case("no-queries", (1, 0, 2, 16), (1, 4, 1, 16)),
    attention_case("no-keys", (1, 4, 2, 16), (1, 0, 1, 16), sinks=True),
    attention_case("no-tokens", (0, 2, 16), (0, 1, 16), cu_q=[0, 0, 0]),
    attention_case("bench-causal", (1, 1024, 16, 64), (1, 1024, 4, 64), causal=True, bench=True),
    attention_case("bench-causal-128", (1, 1024, 16, 128), (1, 1024, 4, 128), causal=True, bench=True),
    attention_case("bench-heads", (1, 2048, 8, 64), (1, 2048, 8, 64), causal=True, bench=True),
    attention_case("bench-window", (1, 4096, 4, 64), (1, 4096, 1, 64), causal=True, window=(256, None), bench=True),
    attention_case("bench-short", (1, 256, 16, 64), (1, 256, 4, 64), causal=True, bench=True),
]


PAIRS = """
    16 full dense group softcap
    16 causal sliced group values
    16 window heads-first all plain
    16 both packed all sinks
    16 right packed one sinks
    32 full packed group sinks
    32 causal sliced one softcap
    32 window sliced group softcap
    32 both dense all plain
    32 right heads-first one values
    64 full heads-first group plain
    64 causal dense all softcap
    64 window packed one plain
    64 both sliced one sinks
    64 right dense all values
    80 full sliced one sinks
    80 causal dense group plain
    80 window sliced one values
    80 both packed all values
    80 right heads-first group softcap
    128 full dense one values
    128 causal heads-first all sinks
    128 window heads-first one sinks
    128 both packed group softcap
    128 right sliced all plain
    256 full packed all softcap
    256 causal packed group softcap
    256 window dense group plain
    256 full dense all sinks
    256 both heads-first one values
    256 right sliced group plain
"""
"""Every pair of a head size, a mask, a layout, a number of key/value heads and an option occurs in one of these cases."""

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (13, None)},
    "both": {"window": (11, 6)},
    "right": {"window": (None, 4)},
}
OPTIONS = {"plain": {}, "softcap": {"softcap": 3.0}, "sinks": {"sinks": True}, "values": {"Dv": 48}}


def pair_case(D: str, mask: str, layout: str, heads: str, option: str) -> Case:
    """19 queries and 26 keys, or three packed sequences; 8 query heads, or 24 where of so few the error is a matter of luck."""
    H = 24 if option == "sinks" or D == "256" else 8
    Hk = {"one": 1, "group": H // 4, "all": H}[heads]
    q, k, view = (1, 19, H, int(D)), (1, 26, Hk, int(D)), {}
    if layout == "packed":
        q, k, view = (26, H, int(D)), (31, Hk, int(D)), {"cu_q": [0, 7, 7, 26], "cu_k": [0, 9, 11, 31]}
    elif layout == "heads-first":
        q, k, view = (1, H, 19, int(D)), (1, Hk, 26, int(D)), {"view": lambda t: t.transpose(1, 2)}
    elif layout == "sliced":
        q, k, view = (1, 38, H, int(D)), (1, 52, Hk, int(D)), {"view": lambda t: t[:, ::2]}
    return attention_case(f"{D}-{mask}-{layout}-{heads}-{option}", q, k, **view, **MASKS[mask], **OPTIONS[option])


ATTENTION += [pair_case(*row.split()) for row in PAIRS.strip().splitlines()]


def _decoding_work(a: dict) -> Work:
    q, k_cache, v_cache = a["q"], a["k_cache"], a["v_cache"]
    S, H, D = q.shape[1:]
    Hk, Dv, new = k_cache.shape[2], v_cache.shape[3], 0 if a.get("k") is None else S
    lengths = a["cache_seqlens"].tolist()
    left = (a.get("window") or (None, None))[0]
    seen = [length + new if left is None else min(length + new, left + S) for length in lengths]
    appended = 2 * len(lengths) * new * Hk * (D + Dv)  # read and written
    bytes_ = q.element_size() * (sum(seen) * Hk * (D + Dv) + appended) + size(q) + size(q) // D * Dv
    return Work(bytes_, 0, 2 * sum(seen) * S * H * (D + Dv), 0)


def decoding_case(
    name: str,
    lengths: list,
    S: int,
    H: int,
    Hk: int,
    D: int,
    *,
    Dv=None,
    page=0,
    append=True,
    sinks=False,
    bench=False,
    view=None,
    **options,
) -> Case:
    """`page`: tokens a page; 0: a contiguous cache. `view` turns (B, Hk, T, D), or (pages, Hk, page, D), into a cache."""

    def arguments(inputs: Inputs) -> dict:
        B, T, Dv_ = len(lengths), max(lengths, default=0) + S, Dv or D
        n = -(-T // page) if page else 0
        pages = B * n + 2
        places = (pages, page) if page else (B, T)

        def cache(width: int) -> torch.Tensor:
            shape = (*places, Hk, width) if view is None else (places[0], Hk, places[1], width)
            return inputs.normal(*shape, grad=False, view=view or (lambda t: t))

        a = {"q": inputs.normal(B, S, H, D, grad=False), "cache_seqlens": inputs.tensor(lengths), "return_lse": True, **options}
        a |= {"k_cache": cache(D), "v_cache": cache(Dv_)}
        if append:
            a |= {"k": inputs.normal(B, S, Hk, D, grad=False), "v": inputs.normal(B, S, Hk, Dv_, grad=False)}
        if page:
            a["block_table"] = torch.randperm(pages, **inputs.drawn)[: B * n].view(B, n).int().to(inputs.device)
        if sinks:
            a["sinks"] = inputs.normal(H, grad=False)
        return a

    return Case("attention_with_kv_cache", name, arguments, ("o", "lse"), bench, _decoding_work, ("k_cache", "v_cache"))


DECODING = [
    decoding_case("append", [5, 0, 17], 1, 4, 2, 16),
    decoding_case("speculative", [3, 9], 4, 4, 1, 32, window=(4, None)),
    decoding_case("paged", [20, 3], 2, 2, 2, 16, page=16),
    decoding_case("read-only", [6, 2], 2, 4, 2, 16, append=False),
    decoding_case("nothing-cached", [0, 1, 0], 2, 2, 1, 16, append=False, sinks=True),
    decoding_case("tile", [63, 64, 65], 1, 8, 2, 64),
    decoding_case("many-queries", [40, 7], 16, 8, 2, 32, sinks=True),
    decoding_case("large-group", [33], 3, 20, 1, 128),
    decoding_case("one-head-each", [30, 5], 1, 3, 3, 80, softcap=3.0),
    decoding_case("value-size", [12, 70], 2, 4, 2, 24, Dv=8),
    decoding_case("large-values", [19], 1, 4, 2, 40, Dv=100, window=(9, None)),
    decoding_case("head-256", [21, 40], 5, 2, 1, 256, scale=0.05),
    decoding_case("not-causal", [21, 4], 5, 2, 1, 32, causal=False),
    decoding_case("window-right", [21, 4], 5, 2, 1, 32, causal=False, window=(6, 1)),
    decoding_case("narrow-window", [150, 2], 2, 4, 2, 16, window=(3, None)),
    decoding_case("splits", [700, 0, 90], 1, 8, 2, 32, sinks=True, softcap=20.0),
    decoding_case("paged-splits", [600, 64], 1, 4, 1, 64, page=64),
    decoding_case("paged-32", [31, 32, 33], 3, 4, 2, 40, page=32, window=(20, None)),
    decoding_case("paged-256", [300, 10], 4, 4, 2, 32, page=256, sinks=True),
    decoding_case("paged-read-only", [48, 17], 1, 4, 4, 64, page=16, append=False),
    decoding_case("heads-first", [50, 9], 2, 6, 2, 32, view=lambda t: t.transpose(1, 2)),
    decoding_case("paged-heads-first", [50, 9], 1, 6, 2, 32, page=16, view=lambda t: t.transpose(1, 2)),
    decoding_case("odd-features", [18, 3], 1, 2, 1, 33, view=lambda t: t.transpose(1, 2)),
    decoding_case("no-sequences", [], 1, 2, 1, 16),
    decoding_case("bench-one-token", [4095] * 8, 1, 32, 8, 128, bench=True),
    decoding_case("bench-pages-of-64", [4095] * 8, 1, 32, 8, 128, page=64, bench=True),
    decoding_case("bench-four-tokens", [4092] * 8, 4, 32, 8, 128, bench=True),
]
