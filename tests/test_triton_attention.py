"""The Triton attention in the interpreter: tiles, masks, packing, strides, NaN, same bits, registration; and planted bugs, each caught."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import _attention, _attention_backward, _attention_forward  # noqa: E402
from fastprimer.kernels import attention as kernels  # noqa: E402
from fastprimer.testing import FORWARD_FACTOR, GRADIENT_FACTOR, poisoned_empty, share_of_budget  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.attention")

elsewhere = pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts")
numpy_on_infinities = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
pytestmark = [elsewhere, numpy_on_infinities]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = (kernels.FORWARD, kernels.DK_DV, kernels.DQ)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 queries and 32 keys, so that short sequences have many of them.

    Square, because the interpreter's float32 products round differently for other shapes: s is then not the same number in
    forward and backward, its error no longer cancels that of lse, and single elements of dv come close to the budget.
    """
    monkeypatch.setattr(kernels, "tile", lambda *_: kernels.Tile(32, 32, 4, 1))


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    opts = options(**opts)
    with poisoned_empty():
        got = run(kernels, tensors, opts)
    yardstick, truth = run(reference, tensors, opts), run(reference, tensors, opts, lambda t: t.double())
    assert all(a.shape == b.shape and a.is_contiguous() for a, b in zip(got, truth, strict=True))
    factors = [FORWARD_FACTOR] * 2 + [GRADIENT_FACTOR] * 4
    budgets = map(share_of_budget, got, truth, yardstick, factors)
    return dict(zip(("o", "lse", "dq", "dk", "dv", "dsinks"), budgets, strict=True))


def assert_within_budget(found):
    assert max(found.values()) <= 1, found


HEADS = [(1, 1), (3, 40), (64, 64), (80, 33), (128, 128), (256, 100)]  # D, Dv


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_sizes_in_the_tiles_that_a_gpu_runs(heads, dtype, request):
    unexplained = heads == (256, 100) and dtype == torch.float32
    request.applymarker(pytest.mark.xfail(unexplained, reason="dv at 1.13 of its budget, not yet understood"))
    tokens = (150, 140) if heads[0] == 64 and dtype != torch.float32 else (40, 70)
    assert_within_budget(shares(inputs(*tokens, 2, 1, *heads, dtype, B=1), scale=heads[0] ** -0.5, right=0))


MASKS = [(None, None), (None, 0), (None, -1), (0, 0), (5, 0), (40, 0), (None, 20), (20, None), (3, 50), (60, 7), (10**12, 10**12)]
"""left, right"""


@pytest.mark.parametrize("sizes", [(48, 96), (50, 50), (37, 83), (90, 41), (1, 65), (33, 1)], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask, sizes, small_tiles):
    assert_within_budget(shares(inputs(*sizes, B=1), left=mask[0], right=mask[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("mask", [(None, None), (None, 0), (20, 9)], ids=str)
def test_softcap_and_sinks(mask, softcap, dtype, small_tiles):
    tensors = inputs(40, 70, 3, 3, dtype=dtype, B=2, sinks=True)
    assert_within_budget(shares(tensors, left=mask[0], right=mask[1], softcap=softcap))


def test_tanh_is_accurate_at_every_size(small_tiles):
    for size in (1e-4, 0.3, 1.0, 1e4):
        assert_within_budget(shares(inputs(5, 9, B=1), scale=size, softcap=1.0))
        assert_within_budget(shares(inputs(5, 9, B=1), scale=0.3, softcap=0.3 / size))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (4, 4)], ids=str)
def test_groups(heads, small_tiles):
    assert_within_budget(shares(inputs(20, 40, *heads, B=2, sinks=True), right=0))


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
    assert_within_budget(shares(tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, left=mask[0], right=mask[1]))


def test_the_longest_sequence_sizes_the_grid(small_tiles, monkeypatch):
    cu = lengths(3, 40, 17)
    tensors, opts = inputs(60, 60), {"cu_seqlens_q": cu.long(), "cu_seqlens_k": cu.long(), "right": 0}
    seen = [launched(monkeypatch, f"attention_{name}_kernel") for name in ("forward", "dk_dv", "dq")]
    assert_within_budget(shares(tensors, most_q=40, most_k=40, **opts))
    assert [launch[0] for launch in seen] == [(2 * 3 * 2,), (2 * 3 * 1,), (2 * 3 * 2,)]


def launched(monkeypatch, name):
    """A list that takes in the grid and the arguments of every launch of a kernel from now on."""
    kernel, seen = getattr(kernels, name), []

    class Recorder:
        def __getitem__(self, grid):
            seen.append(grid)
            return lambda *args, **launch: (seen.extend(args), kernel[grid](*args, **launch))

    monkeypatch.setattr(kernels, name, Recorder())
    return seen


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
    seen = launched(monkeypatch, "attention_forward_kernel"), launched(monkeypatch, "attention_dk_dv_kernel")
    gaps = torch.stack((sinks, sinks + 1), -1)[:, 0], torch.stack((dlse, dlse), -1)[..., 0]
    assert_within_budget(shares((q, k, v, gaps[0], do, gaps[1]), right=0))
    addresses = [t.data_ptr() for t in (q, k, v)]
    assert [t.data_ptr() for t in seen[0][1:4]] == addresses and [t.data_ptr() for t in seen[1][1:5]] == [do.data_ptr(), *addresses]


def test_features_that_are_not_adjacent_are_copied():
    q, k, v, _, do, dlse = inputs(6, 9, B=1)
    assert_within_budget(shares((q.mT.contiguous().mT, k[..., ::2].repeat(1, 1, 1, 2), v, None, do.mT.contiguous().mT, dlse)))


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


def test_nan_of_one_sequence_stays_there(small_tiles):
    cu_q, cu_k = lengths(5, 0, 20, 30), lengths(40, 7, 1, 33)
    tensors = inputs(55, 81, 2, 1)
    for mask in ((None, None), (None, 0), (3, 3)):
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
    assert_within_budget(shares((x, x, x, None, x, random(5, x.shape[0], x.shape[2], x.shape[1])), right=0))


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
            for dtype in DTYPES:
                for D, Dv in [(n, n) for n in range(1, 257)] + [(1, 256), (256, 1)]:
                    BLOCK_M, BLOCK_N, num_warps, num_stages = kernels.tile(table, D, Dv, dtype, target)
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
        with pytest.raises(fp.BackendError, match="a scale > 0, not -1"):
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


FORWARD, BACKWARD, SHARED, LAUNCHES = _attention_forward, _attention_backward, _attention, kernels
PLANTED = {
    "causal off by one": (SHARED, "sees = sees & (distance <= right)", "sees = sees & (distance <= right + 1)"),
    "aligned at the top left": (SHARED, "distance = key - row - shift", "distance = key - row"),
    "window off by one": (SHARED, "sees = sees & (distance >= -left)", "sees = sees & (distance > -left)"),
    "a key beyond the end is seen": (SHARED, "sees = key < T", "sees = key <= T"),
    "a key block skipped": (SHARED, "return begin, full_begin, full_end, end", "return begin, full_begin, full_end, full_end"),
    "a block of the window skipped": (SHARED, "begin = tl.maximum(first + shift - before, 0) // COLUMNS * COLUMNS", "begin = COLUMNS"),
    "full blocks begin too early": (SHARED, "tl.cdiv(tl.maximum(last + shift - before", "tl.cdiv(tl.maximum(first + shift - before"),
    "full blocks end too late": (SHARED, "full_end = tl.minimum(tl.maximum(first +", "full_end = tl.minimum(tl.maximum(last +"),
    "unmasked features": (SHARED, "tl.load(place, mask=(column < C)[None, :]", "tl.load(place, mask=(column < C + 1)[None, :]"),
    "unmasked rows": (SHARED, "tl.load(place, mask=(first + row < rows)[:, None],", "tl.load(place, mask=(first + row <= rows)[:, None],"),
    "packed offset of the length": (SHARED, "tl.load(cu_seqlens_ptr + batch + 1) - start", "tl.load(cu_seqlens_ptr + batch + 1)"),
    "tanh without its sign": (SHARED, "tl.where(x < 0, -t, t)", "t"),
    "o not rescaled": (FORWARD, "o * rescale[:, None]", "o"),
    "total not rescaled": (FORWARD, "total * rescale", "total"),
    "sink left out of lse": (FORWARD, 'total = tl.where(top == float("-inf"), 0.0, 1.0)', "total = tl.zeros((BLOCK_M,), tl.float32)"),
    "lse in base 2": (FORWARD, "* LN_2", "* 1.0"),
    "head mapping": (
        FORWARD,
        "k_ptr += batch * stride_k_batch + first_k * stride_k_token + head // group",
        "k_ptr += batch * stride_k_batch + first_k * stride_k_token + head % group",
    ),
    "v of another sequence": (FORWARD, "batch * stride_v_batch + first_k", "batch * stride_v_batch + first_q"),
    "delta without dlse": (BACKWARD, "delta -= tl.load(dlse_ptr", "delta -= 0 * tl.load(dlse_ptr"),
    "softcap's derivative dropped": (BACKWARD, "ds = ds * (1 - s * s)", "ds = ds * 1"),
    "dk of one head": (BACKWARD, "step // blocks", "0 * step"),
    "p not masked": (BACKWARD, "p, ds = tl.where(sees, p, 0.0), tl.where", "p, ds = p, tl.where"),
    "ds not masked in dq": (BACKWARD, "LEFT, RIGHT), ds, 0.0)", "LEFT, RIGHT), ds, ds)"),
    "scale left out of dk": (BACKWARD, "dk * scale", "dk"),
    "sign of dsinks": (BACKWARD, "-tl.sum(share, 0)", "tl.sum(share, 0)"),
    "partials of one tile": (LAUNCHES, "partial.sum(0)", "partial[0]"),
}


def plant(monkeypatch, folder, module, old, new):
    """Put the kernels (or functions) of a mutated copy wherever those of the original are used."""
    copy, originals = mutated(module, old, new, folder), dict(vars(module))
    for user in (SHARED, FORWARD, BACKWARD, LAUNCHES):
        for name, value in vars(copy).items():
            if callable(value) and value is not originals.get(name) and vars(user).get(name) is originals.get(name):
                monkeypatch.setattr(user, name, value)


def checks():
    """Every mechanism once: a window over several blocks with sinks, softcap and groups; packed causal sequences, odd sizes."""
    assert_within_budget(shares(inputs(70, 100, 4, 2, 16, 8, B=2, sinks=True), left=40, right=20, softcap=3.0))
    cu = {"cu_seqlens_q": lengths(3, 40, 0), "cu_seqlens_k": lengths(70, 33, 2)}
    assert_within_budget(shares(inputs(43, 105, 2, 1, 12), right=0, **cu))
    assert_within_budget(shares(inputs(33, 64, 1, 1, 12, B=1)))


def test_planted_bugs_have_a_sound_original(small_tiles):
    checks()


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, small_tiles, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *PLANTED[bug])
    if bug == "partials of one tile":
        monkeypatch.setattr(kernels, "width", lambda C: 2048 if C == 8 else 16)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        checks()
