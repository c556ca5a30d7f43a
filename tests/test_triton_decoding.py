"""The Triton decoding in the interpreter: lengths, splits, pages, masks, NaN, strides, same bits, bytes; and planted bugs, each caught."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.cases import Inputs  # noqa: E402
from fastprimer.cases.attention import decoding_case  # noqa: E402
from fastprimer.kernels import _attention, _decoding  # noqa: E402
from fastprimer.kernels import decoding as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, launched, random, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.decoding")

numpy_on_nan = "ignore:(overflow encountered|invalid value encountered|divide by zero encountered|All-NaN slice):RuntimeWarning"
pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings(numpy_on_nan),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of at most 32 queries, blocks of 16 keys and splits of 16, so that short sequences have many of them."""
    monkeypatch.setattr(kernels, "tile", lambda rows, *_: kernels.Tile(16 if rows <= 16 else 32, 16, 4, 1))
    monkeypatch.setattr(kernels, "KEYS_OF_A_SPLIT", 16)


def pages_of(cache, size, n):
    """A cache (B, T, ...) in pages in reverse order, with NaN in what no sequence uses, and its block table."""
    B, T = cache.shape[:2]
    whole = torch.full((B, n * size, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
    whole[:, :T] = cache
    pages = whole.unflatten(1, (n, size)).flatten(0, 1)
    return torch.cat((pages.flip(0), torch.full_like(pages[:1], torch.nan))), torch.arange(B * n - 1, -1, -1).view(B, n).int()


def inputs(lengths, S, H=4, Hk=2, D=16, Dv=None, T=None, page=0, dtype=torch.float32, append=True, sinks=False):
    """q, k_cache, v_cache, cache_seqlens, k, v, block_table, sinks; NaN behind the end of every sequence."""
    B, Dv, T = len(lengths), Dv or D, T or max(lengths) + S
    q, k, v = random(0, B, S, H, D, dtype=dtype), random(1, B, S, Hk, D, dtype=dtype), random(2, B, S, Hk, Dv, dtype=dtype)
    k_cache, v_cache = random(3, B, T, Hk, D, dtype=dtype), random(4, B, T, Hk, Dv, dtype=dtype)
    for b, length in enumerate(lengths):
        k_cache[b, length:] = v_cache[b, length:] = torch.nan
    table, n = None, -(-T // page) if page else 0
    if page:
        (k_cache, table), (v_cache, _) = pages_of(k_cache, page, n), pages_of(v_cache, page, n)
        used = torch.arange(n) * page < torch.tensor(lengths)[:, None] + S * append
        table = torch.where(used, table, 10**6).int()
    new = (k, v) if append else (None, None)
    return q, k_cache, v_cache, torch.tensor(lengths, dtype=torch.int32), *new, table, random(5, H, dtype=dtype) if sinks else None


def run(functions, tensors, scale=0.3, left=None, right=0, softcap=None, wide=lambda t: t):
    """o, lse, k_cache, v_cache; the tensors stay as they are."""
    tensors = [wide(t).clone() if t is not None and t.is_floating_point() else t for t in tensors]
    o, lse = functions.attention_with_kv_cache_forward(*tensors, scale, left, right, softcap)
    return o, lse, tensors[1], tensors[2]


def shares(tensors, **options):
    """Each result's share of its error budget, by name; the caches must be equal, NaN included."""
    got, expected = (run(functions, tensors, **options)[2:] for functions in (kernels, reference))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    return shares_of(
        lambda functions, wide: dict(zip(("o", "lse"), run(functions, tensors, **options, wide=wide), strict=False)), kernels, reference
    )


def check(tensors, **options):
    assert_within_budget(shares(tensors, **options))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 40), (64, 64), (80, 33), (128, 128), (256, 100)], ids=str)
def test_head_sizes_in_the_tiles_that_a_gpu_runs(heads, dtype, monkeypatch):
    monkeypatch.undo()
    check(inputs([130, 5], 2, 4, 1, *heads, dtype=dtype), scale=heads[0] ** -0.5)


@pytest.mark.parametrize("page", [0, 1, 16, 17, 48, 256])
@pytest.mark.parametrize("append", [True, False])
def test_pages_lengths_and_splits(page, append, monkeypatch):
    seen = launched(monkeypatch, kernels, "attention_with_kv_cache_kernel")
    check(inputs([100, 0, 16, 31], 3, 1, 1, page=page, append=append, sinks=True))
    splits = 2
    assert seen[0] == (4 * splits,)


@pytest.mark.parametrize("S", [1, 3, 16])
@pytest.mark.parametrize("mask", [(None, None), (0, 0), (5, 0), (20, None), (7, 2), (10**12, 10**12)], ids=str)
@pytest.mark.parametrize("page", [0, 32])
def test_masks(page, mask, S):
    check(inputs([70, 33, 1], S, 2, 1, page=page, dtype=torch.bfloat16), left=mask[0], right=mask[1])


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(sinks, softcap):
    check(inputs([40, 3], 2, sinks=sinks), left=30, softcap=softcap)


@pytest.mark.parametrize("heads", [(1, 1), (20, 1), (5, 5), (40, 2)], ids=str)
def test_groups(heads):
    """Up to 16 queries of 20 heads a key/value head: several tiles."""
    check(inputs([33, 20], 16 if heads[0] == 40 else 3, *heads, 8))


def test_many_splits(monkeypatch):
    """More splits than are combined at once, some of them without keys."""
    monkeypatch.setattr(kernels, "processors", lambda device: 40)
    seen = launched(monkeypatch, kernels, "attention_combine_kernel")
    check(inputs([320, 0, 30], 2, 2, 1, sinks=True))
    assert seen[5] == 20
    assert kernels.number_of_splits(1, 10**6, torch.device("cpu")) == 80 and kernels.number_of_splits(500, 10**6, torch.device("cpu")) == 1


def test_nothing_to_attend_to():
    for sinks in (False, True):
        o, lse, *_ = run(kernels, inputs([0, 0], 2, T=40, append=False, sinks=sinks))
        assert not o.any()
        expected = random(5, 4)[:, None].expand(lse.shape) if sinks else torch.full_like(lse, -torch.inf)
        torch.testing.assert_close(lse, expected)


def test_nan_reaches_no_query_that_does_not_see_it():
    """Neither a key or a value before the window, nor one that only a later query sees; the NaN behind the end is in all tests."""
    for cache in (1, 2):
        for S in (1, 4):
            tensors = inputs([64 - S], S, 2, 1)
            expected = run(kernels, tensors, left=20)
            tensors[cache][:, : 64 - S - 20] = torch.nan
            before = run(kernels, tensors, left=20)
            assert all(map(torch.equal, before[:2], expected[:2]))
        tensors = inputs([60], 4, 2, 1)
        tensors[3 + cache][:, 2] = torch.nan
        o, lse, *_ = run(kernels, tensors, left=20)
        assert torch.equal(o[:, :2], expected[0][:, :2]) and torch.equal(lse[..., :2], expected[1][..., :2])
        assert o[:, 2:].isnan().all() and lse[..., 2:].isnan().all() == (cache == 1)


def test_a_token_beyond_the_capacity_is_dropped():
    q, k_cache, v_cache, lengths, k, v, *rest = inputs([10, 4], 3, T=12)
    rows = torch.cat((k_cache, k_cache)), torch.cat((v_cache, v_cache))  # what follows the cache in memory
    caches = [t[:2] for t in rows]
    before = [t[2:].clone() for t in rows]
    kernels.attention_with_kv_cache_forward(q, *caches, lengths, k, v, *rest, 0.3, None, 0, None)
    assert all(torch.equal(t[2:].nan_to_num(7), b.nan_to_num(7)) for t, b in zip(rows, before, strict=True))
    assert torch.equal(caches[0][0, 10:], k[0, :2]) and torch.equal(caches[1][1, 4:7], v[1])


def test_nothing_is_written_before_a_sequence():
    q, k_cache, v_cache, lengths, k, v, *rest = inputs([2, 4], 1, T=6)
    lengths[1] = -1
    before = k_cache.clone()
    kernels.attention_with_kv_cache_forward(q, k_cache, v_cache, lengths, k, v, *rest, 0.3, None, 0, None)
    before[0, 2] = k[0, 0]
    assert torch.equal(k_cache.nan_to_num(7), before.nan_to_num(7))


def test_a_page_that_does_not_exist_is_not_followed():
    """The interpreter would see it."""
    q, k_cache, v_cache, lengths, k, v, table, *rest = inputs([20, 20], 1, page=16)
    table[0, 1], table[1, 1] = -(2**30), 2**30
    kernels.attention_with_kv_cache_forward(q, k_cache, v_cache, lengths, k, v, table, *rest, 0.3, None, 0, None)


@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("append", [False, True])
def test_without_pages_there_is_nothing_to_attend_to(columns, append):
    q, k_cache, v_cache, lengths, k, v, table, *rest = inputs([20, 20], 1, page=16, append=append)
    k_cache, v_cache, table = k_cache[:0], v_cache[:0], table[:, :columns]
    o, lse = kernels.attention_with_kv_cache_forward(q, k_cache, v_cache, lengths, k, v, table, *rest, 0.3, None, 0, None)
    assert not o.any() and torch.isneginf(lse).all()


LAYOUTS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a projection": lambda t: torch.cat((t, t + 1), -1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page", [0, 16])
def test_strides_without_copies(page, layout, monkeypatch):
    q, k_cache, v_cache, lengths, k, v, table, sinks = inputs([20, 40], 2, page=page, sinks=True)
    expected = run(kernels, (q, k_cache, v_cache, lengths, k, v, table, sinks))
    q, k_cache, v_cache, k, v = (LAYOUTS[layout](t) for t in (q, k_cache, v_cache, k, v))
    table = table if table is None else torch.stack((table, table), -1)[..., 0]
    seen = launched(monkeypatch, kernels, "attention_with_kv_cache_kernel"), launched(monkeypatch, kernels, "append_kernel")
    gaps = torch.stack((lengths, lengths), -1)[:, 0], torch.stack((sinks, sinks), -1)[:, 0]
    got = kernels.attention_with_kv_cache_forward(q, k_cache, v_cache, gaps[0].long(), k, v, table, gaps[1], 0.3, None, 0, None)
    torch.testing.assert_close((*got, k_cache, v_cache), expected, rtol=0, atol=0, equal_nan=True)
    assert [t.data_ptr() for t in seen[0][1:4]] == [t.data_ptr() for t in (q, k_cache, v_cache)]
    assert [t.data_ptr() for t in seen[1][1:5]] == [t.data_ptr() for t in (k, v, k_cache, v_cache)]


@pytest.mark.parametrize("strides", [(2**30, 16, 16, 1), (16, 2**30, 16, 1), (16, 16, 2**30, 1)], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_offsets_beyond_32_bits(paged, strides):
    """Three sequences or pages, tokens or heads of which the last lies beyond 2^31 elements (only theirs are ever touched)."""
    shape = [3 if stride == 2**30 else 1 for stride in strides[:3]] + [16]
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided(shape, strides)
    B, Hk = 1 if paged else shape[0], shape[2]
    table = torch.tensor([[shape[0] - 1]]) if paged else None
    room = torch.full((B,), shape[1] - 1, dtype=torch.int32)
    q, k = random(0, B, 1, 3, 16, dtype=torch.bfloat16), random(1, B, 1, Hk, 16, dtype=torch.bfloat16)
    near = far.copy_(random(3, *shape)).clone(memory_format=torch.contiguous_format)
    expected, got = (
        kernels.attention_with_kv_cache_forward(q, cache, cache, room, k, k, table, None, 0.3, None, 0, None) for cache in (near, far)
    )
    assert all(map(torch.equal, got, expected)) and torch.equal(far, near)


def test_same_bits_in_every_program_order():
    tensors, results = inputs([100, 40], 2, 2, 1, page=16, dtype=torch.bfloat16, sinks=True), []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            results.append(run(kernels, tensors, left=70))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


def test_bytes_moved(monkeypatch):
    """Those of CASES and, with splits, their partial results, written and read: keys and values once for all heads of a group."""
    monkeypatch.undo()
    case = decoding_case("traffic", [255, 511], 1, 8, 2, 64)
    arguments = case.arguments(Inputs(torch.bfloat16, "cpu", 0))
    work = case.work(arguments)
    with fp.use_backend("triton"), interpreter.counted_traffic() as traffic:
        o, lse = fp.attention_with_kv_cache(**arguments)
    splits, single = 2, 8 * 4 * lse.numel()  # lse and the lengths
    partial = splits * 2 * 4 * o.numel() + (splits - 1) * 2 * o.numel()  # and q
    assert work.bytes_forward <= traffic.bytes <= work.bytes_forward + partial + single


def test_tiles_are_what_triton_can_launch(monkeypatch):
    monkeypatch.undo()
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        for dtype in HALF_AND_SINGLE:
            for D in range(1, 257):
                for rows in (1, 16, 17, 33, 1000):
                    BLOCK_M, BLOCK_N, num_warps, num_stages = kernels.tile(rows, D, 1, dtype, target)
                    assert all(n >= 16 and n & (n - 1) == 0 for n in (BLOCK_M, BLOCK_N))
                    assert num_warps in (4, 8) and 1 <= num_stages <= 4
    assert [kernels.tile(rows, 64, 64, torch.bfloat16, "sm_90").BLOCK_M for rows in (1, 16, 17, 65)] == [16, 16, 32, 64]


def test_refusals():
    q, k_cache, v_cache, lengths, *_ = inputs([3], 1)
    wide = torch.zeros(1, 4, 2, 300)
    with fp.use_backend("triton"):
        for arguments, reason in [
            ((q.double(), k_cache.double(), v_cache.double(), lengths), "not float64"),
            ((q, k_cache, wide, lengths), "of 1..256 features, not D = 16 and Dv = 300"),
            ((q, k_cache.mT.contiguous().mT, v_cache, lengths), "next to each other"),
        ]:
            with pytest.raises(fp.BackendError, match=reason):
                fp.attention_with_kv_cache(*arguments)
        with pytest.raises(fp.BackendError, match="a scale of at least 2\\*\\*-100, not -1"):
            fp.attention_with_kv_cache(q, k_cache, v_cache, lengths, scale=-1.0)


def test_operator():
    q, k_cache, v_cache, lengths, k, v, table, sinks = inputs([20, 40], 2, page=16, sinks=True)

    def call(k_cache, v_cache):
        o = fp.attention_with_kv_cache(q, k_cache, v_cache, lengths, k=k, v=v, block_table=table, sinks=sinks)
        return o, k_cache * 1, v_cache * 1

    with fp.use_backend("triton"):
        assert fp.explain(fp.attention_with_kv_cache, q, k_cache, v_cache, lengths, block_table=table).backend == "triton"
        results = [
            function(k_cache.clone(), v_cache.clone()) for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager"))
        ]
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    operator = torch.ops.fastprimer_triton.attention_with_kv_cache_forward.default
    assert [a.name for a in operator._schema.arguments if a.is_write] == ["k_cache", "v_cache"]
    q, k_cache, v_cache, lengths, k, v, table, _ = inputs([3, 5], 1, T=6)  # no NaN, which opcheck would find unequal to itself
    torch.library.opcheck(operator, (q, k_cache.nan_to_num(), v_cache.nan_to_num(), lengths, k, v, table, None, 0.3, None, 0, None))


SHARED, DECODING = _attention, _decoding
PLANTED = {
    "a new token one slot too far": (DECODING, "batch).to(tl.int64) + s", "batch).to(tl.int64) + s + 1"),
    "new tokens not counted": (DECODING, "tl.int64) + new, capacity)", "tl.int64), capacity)"),
    "v into the pages of k": (DECODING, "v_cache_ptr += page * stride_v_page", "v_cache_ptr += page * stride_k_page"),
    "heads beyond the first ones lost": (DECODING, "for first in range(0, Hk, HEADS):", "for first in range(0, 1, HEADS):"),
    "a page of the first block only": (DECODING, "+ first // PAGE)", "+ 0 * first)"),
    "a page a key ignored": (DECODING, "+ token // PAGE, mask", "+ 0 * token, mask"),
    "block table of the first sequence": (
        DECODING,
        "block_table_ptr + batch * stride_table_batch + token",
        "block_table_ptr + 0 * batch * stride_table_batch + token",
    ),
    "window one too wide": (DECODING, "length - S - left, 0)", "length - S - left - 1, 0)"),
    "a key of the window lost": (DECODING, "length - S - left, 0)", "length - S - left + 1, 0)"),
    "a split skipped": (DECODING, "begin += split * share", "begin += (split + 1) * share"),
    "splits that overlap": (DECODING, "tl.minimum(begin + share, length)", "length"),
    "all lengths those of the first": (DECODING, "tl.minimum(tl.load(cache_seqlens_ptr + batch)", "tl.minimum(tl.load(cache_seqlens_ptr)"),
    "head mapping": (DECODING, "head * GROUP + member % GROUP", "head + member % GROUP * Hk"),
    "a sink a split": (DECODING, "is_query & (split == 0)", "is_query"),
    "positions ignored": (DECODING, "key[None, :], length - S, end", "key[None, :], length - 1, end"),
    "0 · nan": (DECODING, "tl.where(v == v, v, 0.0)", "v"),
    "a NaN that is swallowed": (DECODING, 'tl.where(spoiled, float("nan"), p)', "p"),
    "weights of splits left out": (DECODING, "part * weight[:, None]", "part"),
    "splits beyond the first ones lost": (DECODING, "for first in range(0, splits, AT_ONCE):", "for first in range(0, AT_ONCE, AT_ONCE):"),
    "lse in base 2": (DECODING, "lse = lse * LN_2", "lse = lse * 1.0"),
    "combined lse in base 2": (DECODING, "top + tl.log2(total)) * LN_2", "top + tl.log2(total))"),
    "causal off by one": (SHARED, "sees = sees & (distance <= right)", "sees = sees & (distance <= right + 1)"),
    "total not rescaled": (SHARED, "total * rescale", "total"),
}  # fmt: skip


def checks():
    check(inputs([50, 0, 33], 2, 6, 2, 16, 8, page=16, sinks=True), left=30, softcap=3.0)
    check(inputs([30, 41], 3, 4, 2, 12, page=24))
    check(inputs([10, 20], 3, 4, 2, 12), right=None)
    check(inputs([300], 1, 10, 2, sinks=True))
    check(inputs([20], 2, 70, 70, 16))
    test_nan_reaches_no_query_that_does_not_see_it()
    test_a_token_beyond_the_capacity_is_dropped()
    test_nothing_is_written_before_a_sequence()


def many_splits(monkeypatch):
    monkeypatch.setattr(kernels, "processors", lambda device: 10)


def test_planted_bugs_have_a_sound_original(monkeypatch):
    many_splits(monkeypatch)
    checks()


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    module, old, new = PLANTED[bug]
    many_splits(monkeypatch)
    copy, originals = mutated(module, old, new, tmp_path), dict(vars(module))
    for user in (SHARED, DECODING, kernels):
        for name, value in vars(copy).items():
            if callable(value) and value is not originals.get(name) and vars(user).get(name) is originals.get(name):
                monkeypatch.setattr(user, name, value)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        checks()
