"""Relations that attention and decoding must keep on every backend, whatever the reference says.

The Triton kernels take part in Triton's interpreter, in a child process (test_interpreter.py), or on a GPU.
"""

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer.backends import BACKENDS, BackendError, declared, interpreting, use_backend
from fastprimer.cases import CASES, Inputs
from fastprimer.peers import EAGER


def backends_of(*ops):
    wanted = ["triton"] if interpreting() else BACKENDS
    return pytest.mark.parametrize("backend", [b for b in wanted if all(b in declared(op) for op in ops)])


def random(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def results(q, k, v, **options):
    """o, lse and the gradients of a fixed random combination of both."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o, lse = fp.attention(q, k, v, return_lse=True, **options)
    return o.detach(), lse.detach(), *torch.autograd.grad((o, lse), (q, k, v), (random(o.device, *o.shape, seed=7), torch.zeros_like(lse)))


@backends_of("attention")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (9, None)}], ids=str)
def test_packed_equals_one_by_one(backend, options):
    device = device_or_skip("attention", backend)
    lengths = [(7, 7), (0, 5), (70, 80), (3, 0), (20, 33)]
    S, T = (sum(n) for n in zip(*lengths, strict=True))
    q, k, v = random(device, S, 4, 16), random(device, T, 2, 16, seed=1), random(device, T, 2, 24, seed=2)
    ends = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in zip(*lengths, strict=True)]
    do = random(device, S, 4, 24, seed=3)
    with use_backend(backend):
        packed = [t.detach().requires_grad_() for t in (q, k, v)]
        o = fp.attention(*packed, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **options)
        grads = torch.autograd.grad(o, packed, do)
        for (a, b), (c, d) in zip(*(zip(e.tolist(), e.tolist()[1:], strict=False) for e in ends), strict=True):
            alone = [t.detach()[None].requires_grad_() for t in (q[a:b], k[c:d], v[c:d])]
            o_alone = fp.attention(*alone, **options)
            expected = torch.autograd.grad(o_alone, alone, do[None, a:b])
            torch.testing.assert_close(o[a:b], o_alone[0])
            for grad, range_, one in zip(grads, ((a, b), (c, d), (c, d)), expected, strict=True):
                torch.testing.assert_close(grad[slice(*range_)], one[0])


@backends_of("attention")
@pytest.mark.parametrize("scale", [1e-46, -1e-46, 1e-300, 0.0])
def test_a_scale_that_is_none_in_float32_is_0(backend, scale):
    """Of two backends on a GPU it is none at all; the others see all keys alike."""
    device = device_or_skip("attention", backend)
    q, v = random(device, 1, 40, 2, 16), random(device, 1, 40, 2, 16, seed=1)
    if backend in ("triton", "cuda"):
        with use_backend(backend), pytest.raises(BackendError, match="scale of at least"):
            fp.attention(q, q, v, causal=True, scale=scale)
        return
    with use_backend(backend):
        o = fp.attention(q, q, v, causal=True, scale=scale)
    torch.testing.assert_close(o, v.cumsum(1) / torch.arange(1, 41, device=device)[:, None, None])


@backends_of("attention")
@pytest.mark.parametrize("S", [1, 3, 17, 40])
def test_a_sink_far_above_the_scores_takes_it_all(backend, S):
    """Then o is 0 and lse the sink, whose gradient is what lse's is; the exponential of the sink alone would be infinite."""
    device = device_or_skip("attention", backend)
    q, k = random(device, 1, S, 2, 16), random(device, 1, 40, 1, 16, seed=1)
    sinks = torch.tensor([200.0, 0.0], device=device, requires_grad=True)
    with use_backend(backend):
        o, lse = fp.attention(q, k, k, sinks=sinks, return_lse=True)
        (dsinks,) = torch.autograd.grad(lse.sum(), sinks)
    assert not o[:, :, 0].any() and (lse[:, 0] == 200).all()
    assert dsinks[0] == S and 0 < dsinks[1] < S


@backends_of("attention")
@pytest.mark.parametrize("window", [(0, 0), (16, None), (5, 40), (None, 3), (64, 64)], ids=str)
def test_a_window_equals_a_mask(backend, window):
    """Blocks outside of the window are never visited: the same as if all were, and were masked."""
    device = device_or_skip("attention", backend)
    S, T, (left, right) = 140, 200, window
    q, k, v = random(device, 1, S, 2, 16), random(device, 1, T, 1, 16, seed=1), random(device, 1, T, 1, 16, seed=2)
    distance = torch.arange(T, device=device) - torch.arange(S, device=device)[:, None] - (T - S)
    visible = (distance >= -(T if left is None else left)) & (distance <= (T if right is None else right))
    with use_backend(backend):
        o, lse, *grads = results(q, k, v, window=window)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    z = torch.einsum("bshd,btd->bhst", wide[0], wide[1][:, :, 0]) / 4
    z = z.masked_fill(~visible, -torch.inf)
    expected = torch.einsum("bhst,btd->bshd", z.softmax(-1), wide[2][:, :, 0])
    expected_grads = torch.autograd.grad(expected, wide, random(device, *o.shape, seed=7).double())
    torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-5, atol=1e-5)
    for got, want in zip((o, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@backends_of("attention", "attention_with_kv_cache")
@pytest.mark.parametrize("page", [0, 16, 64])
@pytest.mark.parametrize("options", [{}, {"window": (11, None), "softcap": 5.0}], ids=str)
def test_decoding_equals_attention(backend, page, options):
    """Two sequences of 90 tokens, in steps of up to 16 tokens, into caches that are NaN at first."""
    device = device_or_skip("attention_with_kv_cache", backend)
    B, S, H, Hk, D = 2, 90, 4, 2, 16
    q, k, v = random(device, B, S, H, D), random(device, B, S, Hk, D, seed=1), random(device, B, S, Hk, D, seed=2)
    pages = -(-S // page) if page else 0
    shape = (B * pages, page, Hk, D) if page else (B, S, Hk, D)
    k_cache, v_cache = (torch.full(shape, torch.nan, device=device) for _ in range(2))
    table = torch.randperm(B * pages, generator=torch.Generator().manual_seed(0)).view(B, pages).int().to(device) if page else None
    with use_backend(backend):
        whole = fp.attention(q, k, v, causal=True, **options)
        begin = 0
        for step in (1, 15, 16, 2, 1, 16, 16, 16, 7):
            part, length = slice(begin, begin + step), torch.full((B,), begin, dtype=torch.int32, device=device)
            o = fp.attention_with_kv_cache(
                q[:, part], k_cache, v_cache, length, k=k[:, part], v=v[:, part], block_table=table, **options
            )  # fmt: skip
            torch.testing.assert_close(o, whole[:, part])
            begin += step
    assert begin == S
    appended = k_cache if table is None else k_cache[table.long()].flatten(1, 2)[:, :S]
    assert torch.equal(appended, k)


@backends_of("attention_with_kv_cache")
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_lies_behind_a_sequence_in_the_cache_has_no_say(backend, page, what):
    device = device_or_skip("attention_with_kv_cache", backend)
    lengths = torch.tensor([5, 33, 0], dtype=torch.int32, device=device)
    q = random(device, 3, 2, 4, 32)
    shape = (9, page, 2, 32) if page else (3, 48, 2, 32)
    table = torch.arange(9, dtype=torch.int32, device=device).view(3, 3) if page else None
    clean = [random(device, *shape, seed=seed) for seed in (1, 2)]
    dirty = [t.clone() for t in clean]
    for t in dirty:
        for sequence, length in zip(t.view(3, 48, 2, 32), lengths.tolist(), strict=True):
            sequence[length:] = what
    with use_backend(backend):
        expected, got = (fp.attention_with_kv_cache(q, *caches, lengths, block_table=table, return_lse=True) for caches in (clean, dirty))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@backends_of("attention_with_kv_cache")
@pytest.mark.parametrize("pages, columns", [(0, 0), (0, 2), (2, 0)])
def test_a_cache_without_pages_is_empty(backend, pages, columns):
    device = device_or_skip("attention_with_kv_cache", backend)
    lengths, table = (torch.zeros(*shape, dtype=torch.int32, device=device) for shape in ((3,), (3, columns)))
    caches = (random(device, pages, 16, 2, 32) for _ in range(2))
    with use_backend(backend):
        o, lse = fp.attention_with_kv_cache(random(device, 3, 2, 4, 32), *caches, lengths, block_table=table, return_lse=True)
    assert not o.any() and (lse == -torch.inf).all()


def test_a_call_that_failed_leaves_the_cache_as_long_as_it_was():
    cache = fp.layers.LayerCache(torch.zeros(1, 40, 1, 4), torch.zeros(1, 40, 1, 4))
    for S in (1, 20):  # a step, and a prompt
        q, k = random("cpu", 1, S, 2, 4), random("cpu", 1, S, 1, 4)
        with pytest.raises(RuntimeError, match="no_grad"):
            cache.attend(q, k.clone().requires_grad_(), k, None)
        with pytest.raises(TypeError, match="dtype"):
            cache.attend(q.half(), k.half(), k.half(), None)
        assert cache.length == 0 and not cache.k.requires_grad


def test_shapes_alone():
    q = torch.empty(1, 3, 2, 8, device="meta")
    assert fp.attention(q, q, q).shape == q.shape


PEERS = {
    "rms_norm": ("odd", "gemma"),
    "rope": ("interleaved", "positions"),
    "swiglu": ("odd", "gpt-oss"),
    "attention": ("full", "causal", "causal-bottom-right", "window", "window-both"),
}


@pytest.mark.parametrize("op, name", [(op, name) for op in PEERS for name in PEERS[op]])
def test_peers_of_benchmarks_compute_the_same(op, name):
    case = next(c for c in CASES if c.op == op and c.name == name)
    arguments = case.arguments(Inputs(torch.float32, "cpu", 0)) | ({"return_lse": False} if op == "attention" else {})
    expected, got = (t if isinstance(t, tuple) else (t,) for t in (getattr(fp, op)(**arguments), EAGER[op](**arguments)))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
