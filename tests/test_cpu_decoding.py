"""What is particular to decoding on the CPU: chunks of keys, threads, memory that is not to be read, caches that are written."""

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer import testing
from fastprimer.backends import use_backend
from fastprimer.cases.attention import decoding_case
from fastprimer.peers import EAGER
from fastprimer.verify import dtypes_of

DTYPES = dtypes_of("cpu", "attention_with_kv_cache")
CASES = [
    decoding_case("group-of-one", [300, 40], 1, 5, 5, 33),
    decoding_case("group-of-three", [257, 511], 1, 9, 3, 64, window=(255, None)),
    decoding_case("group-of-five", [260, 256, 3], 1, 10, 2, 72, Dv=40, sinks=True),
    decoding_case("group-of-seven", [40, 513], 1, 14, 2, 20, softcap=4.0),
    decoding_case("many-heads", [70, 300], 2, 24, 12, 64),
    decoding_case("wide-heads", [30, 280], 1, 4, 2, 600, Dv=500),
    decoding_case("many-rows", [530, 20], 16, 16, 2, 48, window=(270, None)),
    decoding_case("own-key-only", [530, 20], 16, 2, 1, 32, window=(0, None)),
    decoding_case("few-see-all", [250, 258], 9, 2, 2, 32, window=(3, None), sinks=True),
    decoding_case("one-token-pages", [5, 19], 2, 4, 2, 16, page=1),
    decoding_case("odd-pages", [290, 19], 3, 4, 2, 16, page=11),
    decoding_case("negative-scale", [290], 2, 4, 2, 32, scale=-0.3, append=False),
    decoding_case("no-scale", [290], 2, 4, 2, 32, scale=0.0),
    decoding_case("one-feature", [40], 1, 2, 1, 1),
]


def name(dtype):
    return str(dtype)[6:]


def decode(*args, **kwargs):
    with use_backend("cpu"):
        return fp.attention_with_kv_cache(*args, **kwargs, return_lse=True)


def i(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_within_budget(limit, dtype):
    device_or_skip("attention_with_kv_cache", "cpu")
    try:
        if torch.ops.fastprimer.limit_cpu_instruction_set(limit) != limit:
            pytest.skip("this processor does not have it")
        wrong = [str(row) for case in CASES for row in testing.compare(case, dtype, "cpu") if not row.ok]
    finally:
        torch.ops.fastprimer.limit_cpu_instruction_set(2)
    assert not wrong


@pytest.mark.parametrize("case", CASES[2:8], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case):
    device_or_skip("attention_with_kv_cache", "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(testing.run(case, torch.bfloat16, lambda **a: decode(**{k: v for k, v in a.items() if k != "return_lse"})))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][k], other[k]) for other in results[1:] for k in results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "paged", "heads-first"])
def test_nan_behind_the_end_and_before_the_window_is_not_seen(layout, dtype):
    device_or_skip("attention_with_kv_cache", "cpu")
    lengths, S, left, page = [300, 35], 3, 40, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, S, h, 32, generator=generator).to(dtype) for h in (4, 2, 2))
    clean = [torch.randn(2, 320, 2, 32, generator=generator).to(dtype) for _ in range(2)]
    dirty = [t.clone() for t in clean]
    for t in dirty:
        for b, length in enumerate(lengths):
            t[b, length:] = torch.nan
            t[b, : max(length - left, 0)] = torch.inf
    options = {"k": k, "v": v, "window": (left, None)}
    expected = decode(q, *clean, i(*lengths), **options)
    if layout == "paged":
        options["block_table"] = i(*range(40)).view(2, 20)
        dirty = [t.view(40, page, 2, 32) for t in dirty]
    elif layout == "heads-first":
        dirty = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dirty]
    got = decode(q, *dirty, i(*lengths), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("key", [250, 256, 299, 301])
def test_nan_reaches_the_queries_that_see_it_alone(key):
    """Of 4 queries at the positions 298 .. 301, each sees 50 keys up to its own."""
    device_or_skip("attention_with_kv_cache", "cpu")
    generator = torch.Generator().manual_seed(0)
    q, k_cache, v_cache = (torch.randn(1, n, h, 24, generator=generator) for n, h in ((4, 6), (320, 3), (320, 3)))
    expected = decode(q, k_cache, v_cache, i(302), window=(49, None))
    v_cache[:, key] = torch.nan
    o, lse = decode(q, k_cache, v_cache, i(302), window=(49, None))
    positions = torch.arange(298, 302)
    sees = (key <= positions) & (key >= positions - 49)
    assert o[:, sees].isnan().all() and torch.equal(o[:, ~sees], expected[0][:, ~sees]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_token_by_token_equals_attention_over_the_whole(dtype, page):
    device_or_skip("attention_with_kv_cache", "cpu")
    T, options = 290, {"window": (200, None), "softcap": 10.0}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, h, 40, generator=generator).to(dtype) for h in (4, 2, 2))
    with use_backend("reference"):
        whole = fp.attention(*(t.double() for t in (q, k, v)), causal=True, **options)
        yardstick = fp.attention(q, k, v, causal=True, **options)
    shape = (40, page, 2, 40) if page else (2, T, 2, 40)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    table = {"block_table": torch.randperm(40, generator=generator).view(2, 20)} if page else {}
    steps = [slice(0, 16), slice(16, 17), *(slice(t, t + 7) for t in range(17, T, 7))]
    parts = [decode(q[:, s], k_cache, v_cache, i(s.start, s.start), k=k[:, s], v=v[:, s], **table, **options)[0] for s in steps]
    assert testing.share_of_budget(torch.cat(parts, 1), whole, yardstick, testing.FORWARD_FACTOR) <= 1


def test_the_operator_checks_what_it_is_given():
    device_or_skip("attention_with_kv_cache", "cpu")
    forward = torch.ops.fastprimer.attention_with_kv_cache_forward
    q, cache, new = torch.randn(2, 3, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 3, 2, 8)
    rest = None, 1.0, None, None, None
    before = cache.clone()
    for call in (
        lambda: forward(q, cache, cache, i(4, 10), None, None, None, *rest),
        lambda: forward(q, cache, cache, i(4, -1), None, None, None, *rest),
        lambda: forward(q, cache, cache.clone(), i(4, 7), new, new, None, *rest),
        lambda: forward(q, cache, cache, i(4, 7), new, None, None, *rest),
        lambda: forward(q, cache, cache, i(4, 5), new[:1], new, None, *rest),
        lambda: forward(q, cache, cache, i(4), None, None, None, *rest),
        lambda: forward(q, cache, cache, i(4, 5), None, None, i(0, 2).view(2, 1), *rest),
        lambda: forward(q, cache, cache, i(4, 5), None, None, i(0, 1), *rest),
        lambda: forward(q[:1], cache, cache, i(4), None, None, None, *rest),
        lambda: forward(q, cache[..., :4], cache, i(4, 5), None, None, None, *rest),
        lambda: forward(q, cache, cache[:, :5], i(4, 5), None, None, None, *rest),
        lambda: forward(q, cache.double(), cache, i(4, 5), None, None, None, *rest),
        lambda: forward(q, cache, cache, i(4, 5), None, None, None, torch.zeros(3), 1.0, None, None, None),
        lambda: forward(q, cache, cache, i(4, 5), None, None, None, None, 1.0, -2, None, None),
    ):
        with pytest.raises(RuntimeError, match="fastprimer: .*: expected"):
            call()
    assert torch.equal(cache, before)


def test_caches_of_scattered_features_are_refused():
    device_or_skip("attention_with_kv_cache", "cpu")
    cache = torch.randn(1, 9, 8, 2).transpose(2, 3)
    with pytest.raises(fp.BackendError, match="lie next to each other"):
        decode(torch.randn(1, 1, 2, 8), cache, cache, i(4))


def test_autograd_is_told_that_the_caches_change():
    device_or_skip("attention_with_kv_cache", "cpu")
    q, k, caches = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), torch.randn(2, 1, 9, 2, 8)
    q.requires_grad_()
    o = fp.attention(q, caches[0], caches[1])
    with torch.no_grad():
        decode(q, caches[0], caches[1], i(4), k=k, v=k)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.slow
def test_compiled_graphs_see_the_caches_before_and_after():
    device_or_skip("attention_with_kv_cache", "cpu")

    def step(q, k_cache, v_cache, lengths, k, v):
        before = k_cache.sum()
        return fp.attention_with_kv_cache(q, k_cache, v_cache, lengths, k=k, v=v), before, k_cache.sum(), v_cache * 2

    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    caches = torch.randn(2, 2, 9, 2, 16)
    mine, others = caches.clone(), caches.clone()
    torch.compiler.reset()
    with use_backend("cpu"):
        got = torch.compile(step, fullgraph=True)(q, *mine, i(3, 5), k, v)
        expected = step(q, *others, i(3, 5), k, v)
    torch.testing.assert_close(got, expected)
    assert torch.equal(mine, others) and not torch.equal(mine, caches)


@pytest.mark.parametrize("S, page", [(1, 0), (4, 0), (1, 16), (3, 16)])
def test_the_peer_of_the_benchmarks_computes_the_same(S, page):
    case = decoding_case("peer", [48 - S] * 2, S, 4, 2, 16, page=page)
    arguments, others = (case.arguments(testing.Inputs(torch.float32, "cpu", 0)) for _ in range(2))
    with use_backend("reference"):
        expected, _ = fp.attention_with_kv_cache(**arguments)
    torch.testing.assert_close(EAGER["attention_with_kv_cache"](**others), expected)
    assert torch.equal(others["k_cache"], arguments["k_cache"]) and torch.equal(others["v_cache"], arguments["v_cache"])
