"""The Triton attention in the interpreter: tiles, masks, packing, strides, NaN, same bits, registration."""

import pytest
import torch

triton = pytest.importorskip("triton")

import attention_checks  # noqa: E402
import fastprimer as fp  # noqa: E402
from attention_checks import SINKS, check, inputs, kernels, lengths, options, run  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import _launch  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, launched, random  # noqa: E402

numpy_on_nan = "ignore:(overflow encountered|invalid value encountered|All-NaN slice):RuntimeWarning"
pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings(numpy_on_nan),
]

set_allocator = triton.set_allocator
TILES = (kernels.FORWARD, kernels.DK_DV, kernels.DQ)


@pytest.fixture
def small_tiles(monkeypatch):
    attention_checks.small_tiles(monkeypatch)


HEADS = [(1, 1), (3, 40), (64, 64), (80, 33), (128, 128), (256, 100)]  # D, Dv


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_sizes_in_the_tiles_that_a_gpu_runs(heads, dtype):
    tokens = (150, 140) if heads[0] == 64 and dtype != torch.float32 else (40, 70)
    check(inputs(*tokens, 2, 1, *heads, dtype, B=1), scale=heads[0] ** -0.5, right=0)


MASKS = [(None, None), (None, 0), (None, -1), (0, 0), (5, 0), (40, 0), (None, 20), (20, None), (3, 50), (60, 7), (10**12, 10**12)]
"""left, right"""


@pytest.mark.parametrize("sizes", [(48, 96), (50, 50), (37, 83), (90, 41), (1, 65), (33, 1)], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask, sizes, small_tiles):
    check(inputs(*sizes, B=1), left=mask[0], right=mask[1])


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("mask", [(None, None), (None, 0), (20, 9)], ids=str)
def test_softcap_and_sinks(mask, softcap, dtype, small_tiles):
    tensors = inputs(40, 70, 1, 1, dtype=dtype, B=2, sinks=True)
    check(tensors, left=mask[0], right=mask[1], softcap=softcap)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_gradient_of_the_sinks(softcap, packed, small_tiles):
    cu = lengths(3, 0, 33) if packed else None
    B, dtype = (None, torch.bfloat16) if packed else (2, torch.float32)
    check(inputs(36, 36, SINKS, 3, 8, dtype=dtype, B=B, sinks=True), cu_seqlens_q=cu, cu_seqlens_k=cu, left=5, right=0, softcap=softcap)


def test_tanh_is_accurate_at_every_size(small_tiles):
    for size in (1e-4, 0.3, 1.0, 1e4):
        check(inputs(5, 9, B=1), scale=size, softcap=1.0)
        check(inputs(5, 9, B=1), scale=0.3, softcap=0.3 / size)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (4, 4)], ids=str)
def test_groups(heads, small_tiles):
    check(inputs(20, 40, *heads, B=2, sinks=True), right=0)


PACKED = {
    "equal": (lengths(16, 32, 16), None),
    "odd": (lengths(3, 40, 17, 1), None),
    "empty": (lengths(0, 20, 0, 33, 0), None),
    "other keys": (lengths(5, 0, 20, 30), lengths(40, 7, 0, 33)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [(None, None), (None, 0), (6, 10)], ids=str)
@pytest.mark.parametrize("packing", PACKED)
def test_packed(packing, mask, dtype, small_tiles):
    cu_q, cu_k = PACKED[packing]
    cu_k = cu_q if cu_k is None else cu_k
    tensors = inputs(int(cu_q[-1]), int(cu_k[-1]), 4, 2, dtype=dtype, sinks=True)
    check(tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, left=mask[0], right=mask[1])


def test_the_longest_sequence_sizes_the_grid(small_tiles, monkeypatch):
    cu = lengths(3, 40, 17)
    tensors, opts = inputs(60, 60), {"cu_seqlens_q": cu.long(), "cu_seqlens_k": cu.long(), "right": 0}
    seen = [launched(monkeypatch, kernels, f"attention_{name}_kernel") for name in ("forward", "dk_dv", "dq")]
    check(tensors, most_q=40, most_k=40, **opts)
    assert [launch[0] for launch in seen] == [(2 * 3 * 2,), (2 * 3 * 1,), (2 * 3 * 2,)]


LAYOUTS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a projection": lambda t: torch.cat((t, t + 1), -1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    "one token repeated": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_without_copies(layout, small_tiles, monkeypatch):
    q, k, v, sinks, do, dlse = inputs(20, 40, 4, 2, dtype=torch.bfloat16, B=2, sinks=True)
    q, k, v, do = (LAYOUTS[layout](t) for t in (q, k, v, do))
    seen = launched(monkeypatch, kernels, "attention_forward_kernel"), launched(monkeypatch, kernels, "attention_dk_dv_kernel")
    gaps = torch.stack((sinks, sinks + 1), -1)[:, 0], torch.stack((dlse, dlse), -1)[..., 0]
    check((q, k, v, gaps[0], do, gaps[1]), right=0)
    addresses = [t.data_ptr() for t in (q, k, v)]
    assert [t.data_ptr() for t in seen[0][1:4]] == addresses and [t.data_ptr() for t in seen[1][1:5]] == [do.data_ptr(), *addresses]


def test_features_that_are_not_adjacent_are_copied():
    q, k, v, _, do, dlse = inputs(6, 9, B=1)
    check((q.mT.contiguous().mT, k[..., ::2].repeat(1, 1, 1, 2), v, None, do.mT.contiguous().mT, dlse))


def test_an_unused_lse_and_an_expanded_gradient():
    tensors = inputs(20, 20, B=1)
    q, k, v, sinks, do, _ = tensors
    opts = options(right=0)
    o, lse = kernels.attention_forward(q, k, v, sinks, *opts)
    without = kernels.attention_backward(do, None, q, k, v, o, lse, sinks, *opts)
    zero = kernels.attention_backward(do, torch.zeros(()).expand(lse.shape), q, k, v, o, lse, sinks, *opts)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 0, 0)], ids=str)
def test_nothing_to_do(shape):
    B, S, T = shape
    for sinks in (False, True):
        o, lse, dq, dk, dv, dsinks = run(kernels, inputs(S, T, B=B, sinks=sinks), options(right=0))
        assert o.shape == dq.shape == (B, S, 2, 16) and lse.shape == (B, 2, S) and dk.shape == dv.shape == (B, T, 1, 16)
        assert not any(t.any() for t in (o, dq, dk, dv)) and dsinks.shape == ((2,) if sinks else (0,))
        if sinks:
            torch.testing.assert_close(lse, random(3, 2)[:, None].expand(lse.shape))
        else:
            assert (lse == -torch.inf).all()


def test_rows_without_keys_have_no_gradient_whatever_comes_in(small_tiles):
    q, k, v, _, do, dlse = inputs(50, 20, B=1)
    expected = run(kernels, (q, k, v, None, do, dlse), options(right=0))
    do[:, :30], dlse[..., :30] = torch.nan, torch.inf
    got = run(kernels, (q, k, v, None, do, dlse), options(right=0))
    assert (got[1][..., :30] == -torch.inf).all() and not got[0][:, :30].any() and not got[2][:, :30].any()
    assert torch.equal(got[2], expected[2])


def test_hidden_blocks_are_never_visited(small_tiles):
    """A NaN among the values of a block that is read spoils every row of the tile, for 0 · nan is nan; so does one in do."""
    tensors, opts = inputs(64, 96, B=1), options(left=4, right=0)
    expected = run(kernels, tensors, opts)
    for hidden, rows in ((slice(64, 96), slice(0, 32)), (slice(0, 32), slice(32, 64))):
        q, k, v, sinks, do, dlse = (t if t is None else t.clone() for t in tensors)
        k[:, hidden] = v[:, hidden] = torch.nan
        got = run(kernels, (q, k, v, sinks, do, dlse), opts)
        assert all(torch.equal(got[i][:, rows], expected[i][:, rows]) for i in (0, 2))
    q, k, v, sinks, do, dlse = tensors
    got = run(kernels, (q, k, v, sinks, torch.cat((do[:, :32], do[:, 32:] * torch.nan), 1), dlse), opts)
    assert all(torch.equal(got[i][:, :32], expected[i][:, :32]) for i in (3, 4))


def test_nan_in_a_hidden_key_reaches_nobody_who_cannot_see_it(small_tiles):
    q, k, v, _, do, dlse = inputs(40, 40, B=1)
    expected = run(kernels, (q, k, v, None, do, dlse), options(right=0))
    k[:, 25] = torch.nan
    o, lse, dq, *_ = run(kernels, (q, k, v, None, do, dlse), options(right=0))
    assert torch.equal(o[:, :25], expected[0][:, :25]) and torch.equal(lse[..., :25], expected[1][..., :25])
    assert torch.equal(dq[:, :25], expected[2][:, :25])
    assert o[:, 25:].isnan().all() and lse[..., 25:].isnan().all() and dq[:, 25:].isnan().all()


def assert_nan_of_one_sequence_stays_there(dtype):
    cu_q, cu_k = lengths(5, 0, 20, 30), lengths(40, 7, 1, 33)
    tensors = inputs(55, 81, 2, 1, dtype=dtype)
    for mask in ((None, 0), (3, 3)):
        opts = options(cu_q, cu_k, left=mask[0], right=mask[1])
        expected = run(kernels, tensors, opts)
        for spoiled in range(4):
            copies = [t if t is None else t.clone() for t in tensors]
            ends = {0: cu_q, 1: cu_k, 2: cu_k, 4: cu_q}
            for index, ends_of in ends.items():
                copies[index][ends_of[spoiled] : ends_of[spoiled + 1]] = torch.nan
            got = run(kernels, copies, opts)
            for result, ends_of in ((0, cu_q), (2, cu_q), (3, cu_k), (4, cu_k)):
                elsewhere = torch.ones(int(ends_of[-1]), dtype=torch.bool)
                elsewhere[ends_of[spoiled] : ends_of[spoiled + 1]] = False
                assert torch.equal(got[result][elsewhere], expected[result][elsewhere])


def test_nan_of_one_sequence_stays_there(small_tiles):
    assert_nan_of_one_sequence_stays_there(torch.float32)


@pytest.fixture
def descriptors(small_tiles, monkeypatch):
    """As on a GPU that has tensor descriptors; says of each kernel whether its launches were given any."""
    monkeypatch.setattr(_launch, "WITHOUT_GPU", "sm_90")
    names = [f"attention_{name}_kernel" for name in ("forward", "dk_dv", "dq")]
    seen = [launched(monkeypatch, kernels, name) for name in names]
    return lambda: [launch[-1] for launch in seen]


@pytest.mark.parametrize("mask", [(None, None), (None, 0), (20, 9)], ids=str)
@pytest.mark.parametrize("heads", [(16, 16), (64, 32)], ids=str)
def test_tensor_descriptors(heads, mask, descriptors):
    check(inputs(70, 90, 4, 2, *heads, dtype=torch.bfloat16, B=2, sinks=True), left=mask[0], right=mask[1], softcap=4.0)
    assert descriptors() == [True] * 3


@pytest.mark.parametrize("packing", PACKED)
def test_tensor_descriptors_of_packed_sequences(packing, descriptors):
    cu_q, cu_k = PACKED[packing]
    cu_k = cu_q if cu_k is None else cu_k
    tensors = inputs(int(cu_q[-1]), int(cu_k[-1]), 4, 2, dtype=torch.float16)
    check(tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, left=20, right=0)
    assert descriptors() == [True] * 3


def test_tensor_descriptors_end_where_a_sequence_ends(descriptors):
    """The NaN of one sequence never reaches the next, though a tile may hold rows of both."""
    assert_nan_of_one_sequence_stays_there(torch.bfloat16)
    assert descriptors() == [True] * 3


REFUSED = {
    "float32": (16, lambda t: t.float()),
    "no power of 2": (24, lambda t: t),
    "unaligned": (16, lambda t: torch.nn.functional.pad(t, (1, 0))[..., 1:]),
    "rows of odd multiples of 8 bytes": (16, lambda t: torch.nn.functional.pad(t, (0, 4))[..., :16]),
    "one token repeated": (16, lambda t: t[:, :1].expand(t.shape)),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_pointers_where_descriptors_cannot_be(layout, descriptors):
    D, view = REFUSED[layout]
    q, k, v, _, do, dlse = inputs(20, 40, 4, 2, D, dtype=torch.bfloat16, B=2)
    check((*map(view, (q, k, v)), None, view(do), dlse), right=0)
    assert descriptors() == [False] * 3


def test_the_allocator_of_the_user_stays(descriptors, monkeypatch):
    seen = []
    monkeypatch.setattr(triton, "set_allocator", lambda allocator: (seen.append(allocator), set_allocator(allocator)))
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    check(inputs(20, 20, dtype=torch.bfloat16, B=1))
    assert seen and _allocation._allocator.get() is before


def far(which):
    """Three tokens (or sequences, or heads), the last one beyond 2^31 elements (of which only theirs are ever touched)."""
    C = 16
    wide = torch.empty(2**31 + C, dtype=torch.bfloat16)
    shape, strides = {
        "sequences": ((3, 1, 1, C), (2**30, C, C, 1)),
        "tokens": ((1, 3, 1, C), (C, 2**30, C, 1)),
        "heads": ((1, 1, 3, C), (C, C, 2**30, 1)),
    }[which]
    return wide.as_strided(shape, strides).copy_(random(0, *shape))


@pytest.mark.parametrize("which", ["sequences", "tokens", "heads"])
def test_offsets_beyond_32_bits(which):
    x = far(which)
    check((x, x, x, None, x, random(5, x.shape[0], x.shape[2], x.shape[1])), right=0)


def test_same_bits_in_every_program_order(small_tiles):
    tensors, results = inputs(50, 70, 4, 2, dtype=torch.bfloat16, B=2, sinks=True), []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            results.append(run(kernels, tensors, options(left=30, right=0)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_tiles_are_what_triton_can_launch():
    for table in TILES:
        for target in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950"):
            for dtype in HALF_AND_SINGLE:
                for D, Dv in [(n, n) for n in range(1, 257)] + [(1, 256), (256, 1)]:
                    q, v = (torch.empty(2, 32, 2, C, dtype=dtype, device="meta") for C in (D, Dv))
                    TMA = kernels.has_tma(table, target, q, v)
                    assert not TMA or (D == Dv and D in (16, 32, 64, 128, 256) and target in ("sm_90", "sm_100", "sm_103"))
                    BLOCK_M, BLOCK_N, num_warps, num_stages = kernels.tile(table, D, Dv, dtype, target, TMA)
                    assert all(n >= 16 and n & (n - 1) == 0 for n in (BLOCK_M, BLOCK_N))
                    assert num_warps in (4, 8) and 1 <= num_stages <= 4


def test_refusals():
    q, k, v, *_ = inputs(3, 3, B=1)
    with fp.use_backend("triton"):
        for arguments, reason in [
            ((q.double(), k.double(), v.double()), "not float64"),
            ((torch.zeros(1, 2, 1, 257), torch.zeros(1, 2, 1, 257), torch.zeros(1, 2, 1, 8)), "1..256 features, not D = 257"),
            ((q, k, v[..., :0]), "Dv = 0"),
        ]:
            with pytest.raises(fp.BackendError, match=reason):
                fp.attention(*arguments)
        with pytest.raises(fp.BackendError, match="a scale of at least 2\\*\\*-100, not -1"):
            fp.attention(q, k, v, scale=-1.0)


def test_operators():
    q, k, v, sinks, do, dlse = inputs(10, 12, 4, 2, B=2, sinks=True)
    leaves = [t.requires_grad_() for t in (q, k, v, sinks)]

    def call(q, k, v, sinks):
        return fp.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)

    with fp.use_backend("triton"):
        assert fp.explain(fp.attention, q, k, v).backend == "triton"
        outputs = call(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [do, dlse])
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled[0], outputs[0]) and torch.equal(compiled[1], outputs[1])
    assert all(map(torch.equal, torch.autograd.grad(compiled, leaves, [do, dlse]), grads))
    with fp.use_backend("reference"):
        torch.testing.assert_close(grads, torch.autograd.grad(call(*leaves), leaves, [do, dlse]))
    cu = lengths(4, 6)
    for tensors, opts in [
        (inputs(10, 12, B=2, sinks=True), options(right=0)),
        (inputs(10, 10), options(cu, cu, 6, 6, softcap=2.0)),
    ]:
        q, k, v, sinks, do, dlse = tensors
        o, lse = kernels.attention_forward(q, k, v, sinks, *opts)
        torch.library.opcheck(torch.ops.fastprimer_triton.attention_forward.default, (q, k, v, sinks, *opts))
        torch.library.opcheck(torch.ops.fastprimer_triton.attention_backward.default, (do, dlse, q, k, v, o, lse, sinks, *opts))
