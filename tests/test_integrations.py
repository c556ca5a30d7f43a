"""The signatures of flash_attn: the same results as torch's, whatever is not supported refused by name."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastprimer as fp
from fastprimer.integrations import flash_attn as fa

DOUBLE = torch.float64


def random(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def sdpa(q, k, v, mask=None, scale=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def band(S, T, left, right):
    distance = torch.arange(T) - (torch.arange(S)[:, None] + T - S)
    return (distance >= -left) & (distance <= right)


def test_parameters_stand_in_the_order_of_flash_attn():
    common = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs".split()
    cache = "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal"
    rest = "window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    packed = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k".split()
    assert list(inspect.signature(fa.flash_attn_func).parameters) == ["q", "k", "v", *common]
    assert list(inspect.signature(fa.flash_attn_varlen_func).parameters) == ["q", "k", "v", *packed, *common, "block_table"]
    assert list(inspect.signature(fa.flash_attn_with_kvcache).parameters) == f"{cache} {rest}".split()


def test_dense():
    q, k, v = random(2, 5, 4, 8), random(2, 9, 2, 8), random(2, 9, 2, 8)
    torch.testing.assert_close(fa.flash_attn_func(q, k, v), sdpa(q, k, v))
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, 0.0, 0.3, True), sdpa(q, k, v, band(5, 9, 99, 0), 0.3))
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, window_size=(2, 1)), sdpa(q, k, v, band(5, 9, 2, 1)))
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, window_size=(-1, 0)), sdpa(q, k, v, band(5, 9, 99, 0)))
    o, lse, probabilities = fa.flash_attn_func(q, k, v, softcap=0.0, deterministic=True, return_attn_probs=True)
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(2, 2)) * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert probabilities is None and o.shape == q.shape
    capped = torch.tanh(scores / 2) * 2
    expected = torch.einsum("bhst,bthd->bshd", capped.softmax(-1), v.repeat_interleave(2, 2))
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, softcap=2.0), expected)


def test_packed_with_an_empty_sequence():
    lengths_q, lengths_k = [3, 0, 4], [5, 2, 4]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    q, k, v = random(7, 4, 8), random(11, 2, 8), random(11, 2, 8)
    o, lse, _ = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 5, causal=True, return_attn_probs=True)
    parts = [fa.flash_attn_func(a[None], b[None], c[None], causal=True)[0]
             for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True) if len(a)]  # fmt: skip
    torch.testing.assert_close(o, torch.cat(parts))
    assert lse.shape == (4, 7)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("S", [1, 5, 20])
def test_decoding_equals_attention_over_everything(S, paged):
    lengths = [3, 0]
    past = [(random(1, n, 2, 8), random(1, n, 2, 8)) for n in lengths]
    q, k, v = random(2, S, 4, 8), random(2, S, 2, 8), random(2, S, 2, 8)
    caches = [torch.full((2, 32, 2, 8), torch.nan, dtype=DOUBLE) for _ in range(2)]
    for b, kv in enumerate(past):
        for cache, t in zip(caches, kv, strict=True):
            cache[b, : lengths[b]] = t[0]
    table = None
    if paged:
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
        caches = [cache.view(4, 16, 2, 8) for cache in caches]
    o, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), block_table=table, causal=True, return_softmax_lse=True
    )
    for b, (k0, v0) in enumerate(past):
        expected = fa.flash_attn_func(q[b : b + 1], torch.cat((k0, k[b : b + 1]), 1), torch.cat((v0, v[b : b + 1]), 1), causal=True)
        torch.testing.assert_close(o[b : b + 1], expected)
    assert lse.shape == (2, 4, S)


def test_rotary_positions_follow_the_cache():
    length, S = 4, 3
    angle = torch.outer(torch.arange(10), 10.0 ** -torch.arange(3)).double()
    cos, sin = angle.cos(), angle.sin()
    k0, v0 = random(1, length, 2, 8), random(1, length, 2, 8)
    q, k, v = random(1, S, 4, 8), random(1, S, 2, 8), random(1, S, 2, 8)

    def decoded(**options):
        k_cache, v_cache = (F.pad(t, (0, 0, 0, 0, 0, S)) for t in (k0, v0))
        return fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=length, **options)

    positions = torch.arange(length, length + S)[None]
    for interleaved in (True, False):
        turn = {"cos": cos, "sin": sin, "interleaved": interleaved}
        keys = torch.cat((k0, fp.rope(k, None, positions=positions, **turn)[0]), 1)
        values = torch.cat((v0, v), 1)
        causal = fa.flash_attn_func(fp.rope(q, None, positions=positions, **turn)[0], keys, values, causal=True)
        torch.testing.assert_close(decoded(causal=True, rotary_interleaved=interleaved), causal)
        full = fa.flash_attn_func(fp.rope(q, None, positions=positions[:, :1].expand(1, S), **turn)[0], keys, values)
        torch.testing.assert_close(decoded(rotary_interleaved=interleaved), full)


@pytest.mark.parametrize("S", [2, 20])
def test_queries_of_autocast_may_be_wider_than_the_cache(S):
    q, k, v = (random(1, S, 2, 8).float() for _ in range(3))
    caches, lengths = [torch.zeros(1, 24, 2, 8, dtype=torch.bfloat16) for _ in range(2)], torch.zeros(1, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        o = fa.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    torch.testing.assert_close(o.float(), fa.flash_attn_func(q, k, v, causal=True), rtol=0.02, atol=0.02)


def test_a_full_cache_needs_no_lengths():
    q, k_cache, v_cache = random(2, 1, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 8)
    torch.testing.assert_close(fa.flash_attn_with_kvcache(q, k_cache, v_cache), sdpa(q, k_cache, v_cache))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("flash_attn_func", {"dropout_p": 0.1}),
        ("flash_attn_func", {"alibi_slopes": torch.ones(4)}),
        ("flash_attn_varlen_func", {"block_table": torch.zeros(1, 1, dtype=torch.int32)}),
        ("flash_attn_with_kvcache", {"cache_batch_idx": torch.zeros(1, dtype=torch.int32)}),
        ("flash_attn_with_kvcache", {"cache_leftpad": torch.zeros(1, dtype=torch.int32)}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(function, arguments):
    q, k, v = random(1, 2, 4, 8), random(1, 6, 2, 8), random(1, 6, 2, 8)
    if function == "flash_attn_varlen_func":
        lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32)
        call = lambda: fa.flash_attn_varlen_func(q[0], k[0], v[0], *lengths, 2, 6, **arguments)  # noqa: E731
    else:
        call = lambda: getattr(fa, function)(q, k, v, **arguments)  # noqa: E731
    with pytest.raises(NotImplementedError, match=f"{function}: {next(iter(arguments))}: expected"):
        call()


def test_many_queries_need_their_own_keys():
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache: q: expected at most 16 queries"):
        fa.flash_attn_with_kvcache(random(1, 17, 2, 8), random(1, 20, 2, 8), random(1, 20, 2, 8))


def test_nothing_is_appended_to_a_cache_that_is_too_short():
    k_cache, v_cache, new = (random(1, n, 2, 8).fill_(x) for n, x in ((30, 0), (30, 0), (20, 1)))
    with pytest.raises(ValueError, match=r"cache_seqlens: expected 0..30 tokens, the new ones included, got .11, 31."):
        fa.flash_attn_with_kvcache(random(1, 20, 2, 8), k_cache, v_cache, new, new, cache_seqlens=11, causal=True)
    short = random(1, 19, 2, 8)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache: k: expected as many new keys as queries, 20, got 19"):
        fa.flash_attn_with_kvcache(random(1, 20, 2, 8), k_cache, v_cache, short, short, cache_seqlens=0, causal=True)
    assert not k_cache.any() and not v_cache.any()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("q", random(4), "4 dimensions, got (4,)"),
        ("q", [1.0], "a tensor, got list"),
        ("k_cache", None, "a tensor, got NoneType"),
        ("k_cache", random(4), "4 dimensions, got (4,)"),
        ("block_table", torch.zeros(1, dtype=torch.int32), "shape (B, n), got (1,)"),
        ("cache_seqlens", [3], "an integer, got [3]"),
        ("cache_seqlens", 3.0, "an integer, got 3.0"),
        ("cache_seqlens", 2**40, "0..6 tokens, got 1099511627776"),
        ("cache_seqlens", -1, "0..6 tokens, got -1"),
        ("cache_seqlens", torch.tensor([[1]]), "shape (B,) = (1,), got (1, 1)"),
        ("cache_seqlens", torch.tensor([1.0]), "int32 or int64, got torch.float32"),
        ("softmax_scale", "x", "a finite number, got 'x'"),
        ("window_size", 2, "two integers, got 2"),
        ("window_size", (1.0, 0), "two integers, got (1.0, 0)"),
        ("k", random(1, 5, 2, 8), "as many new keys as queries, 1, got 5"),
    ],
)
@pytest.mark.parametrize("rotary", [False, True])
def test_errors_of_a_cache_name_the_argument(name, value, expected, rotary):
    arguments = {"q": random(1, 1, 4, 8), "k_cache": random(1, 6, 2, 8), "v_cache": random(1, 6, 2, 8), "cache_seqlens": 0}
    if rotary:
        arguments |= {"k": random(1, 1, 2, 8), "v": random(1, 1, 2, 8), "rotary_cos": torch.ones(6, 4), "rotary_sin": torch.ones(6, 4)}
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        fa.flash_attn_with_kvcache(**arguments | {name: value})
    assert str(error.value) == f"flash_attn_with_kvcache: {name}: expected {expected}"


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_a_longest_length_is_an_integer(name):
    q, ends = random(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(TypeError, match=f"flash_attn_varlen_func: {name}: expected an integer, got 6.0"):
        fa.flash_attn_varlen_func(q, q, q, ends, ends, **({"max_seqlen_q": 6, "max_seqlen_k": 6} | {name: 6.0}))


@pytest.mark.parametrize("given", ["rotary_cos", "rotary_sin"])
def test_a_rotation_needs_both_tables(given):
    q, cache, new = random(1, 1, 2, 8), torch.zeros(1, 4, 2, 8), random(1, 1, 2, 8)
    with pytest.raises(ValueError, match="rotary_cos: expected rotary_cos, rotary_sin and new keys k together"):
        fa.flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=0, **{given: torch.ones(4, 4)})


def test_numbers_may_come_as_numpy_or_tensors():
    q, kv, ends = torch.randn(6, 2, 16), torch.randn(6, 1, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
    expected = fa.flash_attn_varlen_func(q, kv, kv, ends, ends, 4, 4, softmax_scale=0.5)
    for longest in (np.int64(4), torch.tensor(4)):
        o = fa.flash_attn_varlen_func(q, kv, kv, ends, ends, longest, longest, softmax_scale=torch.tensor(0.5), window_size=None)
        assert torch.equal(o, expected)
    query, caches = q[None, :1], [torch.randn(1, 8, 1, 16) for _ in "kv"]
    expected = fa.flash_attn_with_kvcache(query, *caches, cache_seqlens=5)
    for length in (np.int64(5), torch.tensor(5)):
        assert torch.equal(fa.flash_attn_with_kvcache(query, *caches, cache_seqlens=length), expected)
