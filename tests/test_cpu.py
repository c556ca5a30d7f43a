"""What is particular to the CPU kernels: instruction sets, threads, outputs that are stored past the caches."""

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from cpu_checks import assert_same_bits_for_any_number_of_threads, instruction_set, name, products_of_torch
from fastprimer import testing
from fastprimer.backends import declared, operations, use_backend
from fastprimer.cases import CASES, rms_norm_case, rope_case, swiglu_case
from fastprimer.cases.attention import attention_case
from fastprimer.verify import dtypes_of

OPERATIONS = [op for op in operations() if "cpu" in declared(op)]
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=name)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_instruction_set_is_within_budget(op, dtype, limit):
    if dtype not in dtypes_of("cpu", op):
        pytest.skip("its kernel does not take this dtype")
    small = [c for c in CASES if c.op == op and not c.bench and c.name != "widest"]
    with instruction_set(limit):
        wrong = [str(row) for case in small for row in testing.compare(case, dtype, "cpu") if not row.ok]
    assert not wrong


ATTENTION = [
    attention_case("blocks", (1, 300, 4, 64), (1, 300, 2, 64), causal=True),
    attention_case("window", (1, 400, 3, 80), (1, 400, 1, 80), causal=True, window=(130, None), sinks=True),
    attention_case("both-sides", (2, 150, 4, 24), (2, 333, 2, 24), window=(100, 31), softcap=4.0, Dv=100),
    attention_case("both-sides-of-one-head", (1, 700, 2, 16), (1, 600, 1, 16), window=(100, 60)),
    attention_case("packed", (700, 2, 64), (700, 1, 64), cu_q=[0, 300, 300, 333, 700], causal=True, sinks=True),
    attention_case("many-heads", (1, 9, 130, 16), (1, 150, 1, 16), causal=True),
    attention_case("rows-without-keys", (1, 300, 2, 32), (1, 140, 1, 32), causal=True),
    attention_case("odd-heads", (1, 40, 2, 23), (1, 140, 1, 23), Dv=7),
    attention_case("one-feature", (1, 40, 2, 1), (1, 140, 1, 1)),
    attention_case("negative-scale", (1, 140, 2, 32), (1, 140, 1, 32), scale=-0.3, causal=True),
    attention_case("no-scale", (1, 140, 2, 32), (1, 140, 1, 32), scale=0.0, causal=True),
    attention_case("short", (3, 13, 6, 40), (3, 16, 2, 40), Dv=24, window=(5, 2), softcap=2.0, sinks=True),
    attention_case("short-causal", (3, 16, 8, 128), (3, 16, 1, 128), causal=True, scale=-0.1),
    attention_case("short-and-many", (101, 3, 4, 8), (101, 5, 2, 8), causal=True),
    attention_case("no-sequences", (0, 3, 2, 16), (0, 3, 1, 16), sinks=True),
]
"""Several blocks of keys and tiles of queries, and what only this kernel takes."""


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "attention"), ids=name)
@pytest.mark.parametrize("limit, library", [(2, True), (2, False), (1, False), (0, False)])
def test_attention_with_and_without_the_products_of_torch(limit, library, dtype):
    with instruction_set(limit), products_of_torch(library):
        small = [c for c in CASES if c.op == "attention" and not c.bench] if (limit, library) == (2, False) else []
        wrong = [str(row) for case in [*small, *ATTENTION] for row in testing.compare(case, dtype, "cpu") if not row.ok]
    assert not wrong


def test_the_products_of_torch_are_left_where_mkldnn_is_switched_off():
    """Torch looks at the switch in every call: its bfloat16 product then throws, and that of float32 is another."""
    device_or_skip("attention", "cpu")
    with products_of_torch(True):
        with torch.backends.mkldnn.flags(enabled=False):
            assert not torch.ops.fastprimer.allow_brgemm(True)
        assert torch.ops.fastprimer.allow_brgemm(True)


def spoil(t, index):
    t = t.detach().clone()
    t[index] = torch.nan
    return t.requires_grad_()


def attention_results(q, k, v, do, dlse, **options):
    with use_backend("cpu"):
        o, lse = fp.attention(q, k, v, return_lse=True, **options)
        return [o, lse, *torch.autograd.grad((o, lse), (q, k, v), (do, dlse))]


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "attention"), ids=name)
@pytest.mark.parametrize("spoiled", range(4), ids=["q", "k", "v", "do"])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("S, token, left", [(200, 150, 20), (14, 9, 3)])
def test_nan_stays_where_the_mask_leaves_it(S, token, left, spoiled, dtype, library):
    """One token is NaN: outputs and gradients of all tokens that have no part in it stay what they are."""
    device_or_skip("attention", "cpu")
    generator = torch.Generator().manual_seed(0)
    shapes = (1, S, 4, 40), (1, S, 2, 40), (1, S, 2, 24), (1, S, 4, 24)
    clean = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    dirty = [spoil(t, (0, token)) if i == spoiled else t for i, t in enumerate(clean)]
    dlse = torch.randn(1, 4, S, generator=generator)
    with instruction_set(2), products_of_torch(library):
        expected, got = (attention_results(*ts, dlse, causal=True, window=(left, None)) for ts in (clean, dirty))
    i = torch.arange(S)
    # dk and dv of a key that a spoiled query sees are NaN, and so are those of keys that meet a query which sees a spoiled key.
    reached_queries = (i >= token) & (i <= token + left) if spoiled in (1, 2) else i == token
    reached_keys = (i >= token - left) & (i <= token + left if spoiled in (1, 2) else i <= token)
    for n, (a, b) in enumerate(zip(expected, got, strict=True)):
        untouched = ~(reached_queries if n < 3 else reached_keys)
        a, b = (t[:, :, untouched] if n == 1 else t[:, untouched] for t in (a, b))
        assert torch.isfinite(b).all(), n
        torch.testing.assert_close(b, a)
    assert any(t.isnan().any() for t in got)


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "attention"), ids=name)
@pytest.mark.parametrize("first, second", [(40, 37), (10, 12)])
def test_nan_stays_in_its_sequence(first, second, dtype):
    device_or_skip("attention", "cpu")
    N = first + second
    lengths = torch.tensor([0, first, first, N], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(N, h, 16, generator=generator).to(dtype).requires_grad_() for h in (4, 2, 2, 4)]
    dlse = torch.randn(4, N, generator=generator)
    expected = attention_results(*tensors, dlse, cu_seqlens_q=lengths)
    got = attention_results(*(spoil(t, slice(first, None)) for t in tensors), dlse, cu_seqlens_q=lengths)
    for n, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert torch.equal(*(t[:, :first] if n == 1 else t[:first] for t in (a, b))), n


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "attention"), ids=name)
def test_an_infinite_key_that_no_query_heeds_has_no_gradient(dtype):
    """Not even from the rows that fill up a tile of queries: they hold 0, and 0 times infinity is NaN."""
    device_or_skip("attention", "cpu")
    q, k, v = torch.rand(1, 20, 3, 33), torch.randn(1, 150, 1, 33), torch.randn(1, 150, 1, 17)
    k[0, 1, 0, 5] = -torch.inf
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    with use_backend("cpu"):
        o = fp.attention(*leaves)
        _, dk, dv = torch.autograd.grad(o, leaves, torch.randn_like(o))
    assert dk.isfinite().all() and dv.isfinite().all() and not dk[0, 1].any() and not dv[0, 1].any()


@pytest.mark.parametrize("S, T", [(40, 30), (20, 10)])
def test_upstream_gradients_of_rows_without_keys_are_ignored(S, T):
    device_or_skip("attention", "cpu")
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (S, T, T))
    do, dlse = torch.randn(1, S, 2, 16), torch.randn(1, 2, S)
    expected = attention_results(q, k, v, do, dlse, causal=True)
    dlse[:, :, :10] = torch.tensor([torch.nan, torch.inf]).repeat(5)
    got = attention_results(q, k, v, do, dlse, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert (got[1][:, :, :10] == -torch.inf).all() and not got[0][:, :10].any() and not got[2][:, :10].any()


def test_rms_norm_where_dy_times_x_overflows():
    device_or_skip("rms_norm", "cpu")
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(5, 70, generator=generator) * 1e17, torch.randn(5, 70, generator=generator) * 1e25
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        leaves = [x.to(dtype).requires_grad_(), torch.ones(70, dtype=dtype, requires_grad=True)]
        with use_backend(backend):
            results.append(torch.autograd.grad(fp.rms_norm(*leaves), leaves, dy.to(dtype)))
    for expected, mine in zip(*results, strict=True):
        largest = expected.abs().max()
        torch.testing.assert_close(mine / largest, (expected / largest).float())


def test_a_longest_length_that_is_wrong_is_seen_in_a_compiled_graph_too():
    """Where lengths cannot be looked at before; with it the kernel would copy all keys into room for a few."""
    device_or_skip("attention", "cpu")
    q, lengths = torch.randn(4000, 1, 64), torch.tensor([0, 4000], dtype=torch.int32)
    call = torch.compile(lambda q, n: fp.attention(q, q, q, cu_seqlens_q=n, max_seqlen_q=4, max_seqlen_k=4), backend="eager")
    with pytest.raises(RuntimeError, match="cu_seqlens_.: expected no sequence longer than its max_seqlen, 4"):
        call(q, lengths)


def test_rms_norm_checks_its_operators_arguments():
    device_or_skip("rms_norm", "cpu")
    nothing, rstd = torch.empty(3, 0), torch.empty(3)
    with pytest.raises(RuntimeError, match="x: expected shape"):
        torch.ops.fastprimer.rms_norm_forward(nothing, None, 1e-6, None, 0.0)
    with pytest.raises(RuntimeError, match="h: expected shape"):
        torch.ops.fastprimer.rms_norm_backward(nothing, None, nothing, None, rstd, 0.0, True)


def test_attention_checks_its_operators_arguments():
    device_or_skip("attention", "cpu")
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 5, 1, 8)
    packed, lengths = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    forward, backward = torch.ops.fastprimer.attention_forward, torch.ops.fastprimer.attention_backward
    rest = None, None, 1.0, None, None, None
    o, lse = forward(q, k, k, None, None, None, *rest)
    for call in (
        lambda: forward(q, k[..., :4], k, None, None, None, *rest),
        lambda: forward(q, k, k[:, :4], None, None, None, *rest),
        lambda: forward(q, k.double(), k, None, None, None, *rest),
        lambda: forward(q, k, k, torch.zeros(3), None, None, *rest),
        lambda: forward(q, k, k, None, lengths, lengths, *rest),
        lambda: forward(packed, packed, packed, None, lengths, lengths + 1, *rest),
        lambda: forward(packed, packed, packed, None, lengths, None, *rest),
        lambda: forward(q, k, k, None, None, 3000000 * lengths, *rest),
        lambda: backward(o, None, q, k, k, o, lse, None, None, 3000000 * lengths, *rest),
        lambda: forward(packed, packed, packed, None, lengths, lengths, 3, None, *rest[2:]),
        lambda: forward(packed, packed, packed, None, lengths, lengths, None, 3, *rest[2:]),
        lambda: forward(q, k, k, None, None, None, None, None, 1.0, -2, None, None),
        lambda: backward(o[:, :3], None, q, k, k, o, lse, None, None, None, *rest),
        lambda: backward(o, None, q, k, k, o, lse[..., :3], None, None, None, *rest),
        lambda: backward(o, lse[:, :1], q, k, k, o, lse, None, None, None, *rest),
    ):
        with pytest.raises(RuntimeError, match="fastprimer: .*: expected"):
            call()


@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_every_half_number_survives_conversion(limit, dtype):
    """All 65,536 of them, subnormal, infinite and signed zeros too, loaded, widened, rounded and stored: h = x + (-0)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    with instruction_set(limit), use_backend("cpu"):
        h = fp.rms_norm(x, residual=torch.full_like(x, -0.0))[1]
    assert torch.equal(h.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(h.view(torch.int16)[numbers], x.view(torch.int16)[numbers])


@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_nan_of_all_ones_stays_nan(limit, dtype):
    """The NaN of memory filled with ones: rounding to 16 bits by an addition would carry it into a zero."""
    ones = torch.full((50,), -1, dtype=torch.int32).view(torch.float32)
    logits = torch.randn(2, 50).to(dtype).requires_grad_()
    with instruction_set(limit), use_backend("cpu"):
        y = fp.rms_norm(torch.ones(1, 50, dtype=dtype), ones)
        dlogits = torch.autograd.grad(fp.cross_entropy(logits, torch.tensor([3, 40]), reduction="none"), logits, ones[:2])[0]
    assert y.isnan().all() and dlogits.isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_sigmoid_of_every_number(limit, dtype):
    """silu(x) for all numbers of 16 bits, in float32 of as many: right to the last places, except that e^x below 2^-126 is 0."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x.to(dtype) if dtype != torch.float16 else x.view(torch.float16)
    x = x[x.isfinite()]
    with instruction_set(limit), use_backend("cpu"):
        y = fp.swiglu(x, torch.ones_like(x)).double()
    truth = (x.double() * torch.sigmoid(x.double())).to(dtype)  # underflows where dtype does
    subnormal = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
    allowed = 2 * torch.finfo(dtype).eps * truth.double().abs() + subnormal + 88 * 2.0**-126
    assert ((y - truth.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_slope_far_from_zero(limit, dtype):
    """Where sigma is 1, the derivative of silu is 1, and 0 on the other side: e^-|t| is 0 there, and no estimate's last digit shows."""
    gate = torch.tensor([1e4, 6e4, 1e30, 3e38], dtype=torch.float64).clamp(max=torch.finfo(dtype).max).to(dtype)
    gate = torch.cat([gate, -gate]).repeat(5).requires_grad_()
    with instruction_set(limit), use_backend("cpu"):
        dgate = torch.autograd.grad(fp.swiglu(gate, torch.ones_like(gate)).sum(), gate)[0]
    assert torch.equal(dgate, (gate > 0).to(dtype))


def test_a_head_so_large_that_it_is_stored_past_the_caches():
    q, angles = torch.randn(1, 1, 1, 2**22 + 64).bfloat16(), torch.rand(1, 2**21 + 1).bfloat16()
    with use_backend("cpu"):
        y = fp.rope(q, None, angles.cos(), angles.sin())[0]
    with use_backend("reference"):
        torch.testing.assert_close(y, fp.rope(q, None, angles.cos(), angles.sin())[0])


CASES_FOR_THREADS = [
    *(rms_norm_case("threads", *shape, residual=True) for shape in [(513, 1000), (40, 70000), (3, 64)]),
    rope_case("threads", (3, 333), 5, 2, 64, 48, P=400, positions=lambda p: p),
    swiglu_case("threads", 37, 20011),
    swiglu_case("threads-packed", 513, 300, layout="packed", activation="gpt_oss"),
    *ATTENTION[:4],
    *(case for case in ATTENTION if case.name == "short-and-many"),
]


@pytest.mark.parametrize("case", CASES_FOR_THREADS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case):
    assert_same_bits_for_any_number_of_threads(case)


def assert_like_its_parts(function, tensors, dys, parts=4):
    """Outputs and gradients of a call are those of calls on parts of its rows, bit for bit."""

    def results(tensors, dys):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]

    whole = results(tensors, dys)
    for i, rows in enumerate(torch.arange(len(tensors[0])).chunk(parts)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        for got, expected in zip(whole, results([t[part] for t in tensors], [d[part] for d in dys]), strict=True):
            assert torch.equal(got[part], expected), i


@pytest.mark.parametrize("width", [2048, 2035])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
@pytest.mark.parametrize("op", ["rms_norm", "rope", "swiglu", "swiglu-packed", "route"])
@pytest.mark.parametrize("limit", [1, 2])
def test_large_outputs_are_stored_right(op, dtype, width, limit):
    """Beyond 8 MiB they go past the caches, if their rows are aligned; a part of them is small enough not to."""
    rows = (20 << 20) // (width * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    x, dy, other = random(rows, width), random(rows, width), random(rows, width)
    with instruction_set(limit), use_backend("cpu"):
        if op == "rms_norm":
            assert_like_its_parts(fp.rms_norm, [x], [dy])
        elif op == "rope":
            D = 128 if width % 128 == 0 else 55
            cos, sin = (random(1, D // 2).to(torch.promote_types(dtype, torch.float32)) for _ in range(2))
            heads = [t.view(rows, 1, -1, D) for t in (x, dy)]
            assert_like_its_parts(lambda q: fp.rope(q, None, cos, sin)[0], heads[:1], heads[1:])
        elif op == "swiglu":
            assert_like_its_parts(fp.swiglu, [x, other], [dy])
        elif op == "route":
            dweights = dy[:, :4].to(torch.promote_types(dtype, torch.float32))
            assert_like_its_parts(lambda logits: fp.route(logits, 4, score="sigmoid")[0], [x], [dweights])
        else:
            assert_like_its_parts(fp.swiglu, [torch.cat((x, other), -1)], [dy])
