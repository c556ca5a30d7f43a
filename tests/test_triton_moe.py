"""The Triton mixture of experts in the interpreter: dispatch, tiles, empty experts, strides, NaN, same bits; and planted bugs."""

import importlib
import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import _moe, _moe_backward, _moe_dispatch, _moe_forward  # noqa: E402
from fastprimer.kernels import moe as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, launched, random, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.moe")

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, on infinities
]

NAMES = "y", "hidden", "dx", "dgate_up", "ddown", "dweights"


def make_tiles_small(monkeypatch):
    """16 x 16 x 16, and chunks of 64 pairs, two scanned at a time, so that a small problem has many of each."""
    monkeypatch.setattr(kernels, "tile", lambda *_: kernels.Tile(16, 16, 16, 4, 1))
    monkeypatch.setitem(kernels.dispatch.__globals__, "CHUNK", 64)  # which may be those of a mutated copy
    monkeypatch.setitem(kernels.dispatch.__globals__, "SCANNED", 2)


@pytest.fixture
def small_tiles(monkeypatch):
    make_tiles_small(monkeypatch)


def some_experts(N, E, K, seed=7):
    """K different ones for every token."""
    return torch.rand(N, E, generator=torch.Generator().manual_seed(seed)).topk(K).indices


def inputs(N, C, F, E, K, dtype=torch.float32, experts=None):
    """dy, x, gate_up, down, weights, experts"""
    gate_up, down = random(2, E, 2 * F, C, dtype=dtype, scale=C**-0.5), random(3, E, C, F, dtype=dtype, scale=F**-0.5)
    experts = some_experts(N, E, K) if experts is None else experts
    return random(0, N, C, dtype=dtype), random(1, N, C, dtype=dtype), gate_up, down, random(4, N, K), experts


def run(functions, dy, x, gate_up, down, weights, experts):
    """y, hidden and the gradients, by name."""
    y, hidden = functions.moe_forward(x, gate_up, down, weights, experts)
    gradients = functions.moe_backward(dy, x, gate_up, down, weights, experts, hidden, True, True)
    return dict(zip(NAMES, (y, hidden, *gradients), strict=True))


def check(*tensors):
    wide = lambda t, widen: widen(t) if t.is_floating_point() else t  # noqa: E731
    assert_within_budget(shares_of(lambda functions, w: run(functions, *(wide(t, w) for t in tensors)), kernels, reference))


SIZES = [
    (1, 1, 1, 1, 1),
    (150, 40, 24, 1, 1),
    (13, 16, 12, 4, 4),
    (40, 33, 17, 3, 2),
    (70, 100, 140, 5, 2),
    (3, 8, 8, 70, 6),
]
"""(N, C, F, E, K): one number; several tiles an expert; every expert; odd sizes; several blocks of columns; few rows, many experts."""


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_in_the_tiles_that_a_gpu_runs(size, dtype):
    check(*inputs(*size, dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_many_tiles(dtype, small_tiles):
    check(*inputs(40, 35, 24, 3, 2, dtype))
    check(*inputs(24, 32, 16, 2, 2, dtype))  # multiples of the tile


def test_empty_experts_have_no_gradient(small_tiles):
    experts = torch.tensor([1, 4])[some_experts(20, 2, 1)]
    tensors = inputs(20, 24, 20, 6, 1, experts=experts)
    check(*tensors)
    got = run(kernels, *tensors)
    for gradient in (got["dgate_up"], got["ddown"]):
        assert not gradient[[0, 2, 3, 5]].any() and gradient[1].any() and gradient[4].any()


@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_takes_all(expert, small_tiles):
    check(*inputs(50, 24, 20, 3, 1, experts=torch.full((50, 1), expert)))


@pytest.mark.parametrize("size", [(0, 8, 6, 4, 2), (5, 8, 6, 4, 0), (5, 0, 6, 4, 2), (5, 8, 0, 4, 2)], ids=str)
def test_nothing_to_do(size):
    tensors = [torch.zeros_like(t) if 0 in t.shape else t for t in inputs(*(max(n, 1) for n in size))]
    N, C, F, E, K = size
    shapes = (N, C), (N, C), (E, 2 * F, C), (E, C, F), (N, K), (N, K)
    tensors = [t[tuple(slice(n) for n in shape)].contiguous() for t, shape in zip(tensors, shapes, strict=True)]
    got, expected = run(kernels, *tensors), run(reference, *tensors)
    for name in NAMES:
        assert got[name].shape == expected[name].shape and not got[name].any()


def random_experts(P, E, seed):
    """Some of them do not exist."""
    return torch.randint(-2, E + 2, (P,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("E", [1, 5, 40])
@pytest.mark.parametrize("P", [1, 63, 64, 65, 400])
def test_dispatch_is_a_stable_sort(P, E, small_tiles):
    experts = random_experts(P, E, P)
    bins = torch.where((experts >= 0) & (experts < E), experts, E)
    order, offsets, work = _moe_dispatch.dispatch(experts.view(P, 1), E, 16)
    assert torch.equal(order.long(), torch.sort(bins, stable=True).indices)
    counts = torch.bincount(bins, minlength=E + 1).tolist()
    assert offsets.tolist() == [0, *itertools.accumulate(counts)]
    tiles = [(e, offsets[e].item() + first) for e in range(E + 1) for first in range(0, counts[e], 16)]
    assert len(tiles) <= work.shape[1] == _moe_dispatch.tiles_at_most(P, E, 16)
    assert [tuple(t) for t in work.t().tolist()[: len(tiles)]] == tiles and (work[0, len(tiles) :] == -1).all()


def test_the_list_is_long_enough_for_the_worst_experts():
    for P, E, BLOCK_M in itertools.product([1, 2, 5, 17, 64, 1000], [1, 3, 8, 100], [16, 128]):
        with_one = min(E, P - 1)  # that many experts have one pair, one bin has the others
        assert with_one + triton.cdiv(P - with_one, BLOCK_M) <= _moe_dispatch.tiles_at_most(P, E, BLOCK_M) <= P


def test_experts_that_do_not_exist_contribute_nothing(small_tiles):
    experts = torch.tensor([[-1, 2], [0, 7], [3, 2**40], [-(2**40), 99], [1, 0], [2, 1]]).repeat(5, 1)
    tensors = inputs(30, 24, 20, 3, 2, experts=experts)
    tensors[4][experts == 99] = torch.nan
    got, expected = run(kernels, *tensors), run(reference, *tensors)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name])
    nobody = torch.tensor([4, 3])
    assert not got["y"][3].any() and not got["dx"][3].any() and not got["dweights"][3].any() and not got["hidden"][3].any()
    assert not any(t.any() for t in run(kernels, *inputs(2, 8, 6, 3, 1, experts=nobody[:, None])).values())


LAYOUTS = {
    "columns of a wider row": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    "every other row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    "one row repeated": lambda t: t[..., :1, :].expand(t.shape),
    "first dimension last in memory": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, small_tiles, monkeypatch):
    view = LAYOUTS[layout]
    dy, x, gate_up, down, weights, experts = inputs(20, 24, 20, 3, 2, torch.bfloat16)
    experts = torch.stack((experts, experts + 1), -1)[..., 0].int()
    seen = launched(monkeypatch, kernels, "moe_hidden_kernel"), launched(monkeypatch, kernels, "moe_dhidden_kernel")
    x, gate_up, down = view(x), view(gate_up), view(down)
    check(view(dy), x, gate_up, down, view(weights), experts)
    assert seen[0][2].data_ptr() == gate_up.data_ptr() and seen[1][2].data_ptr() == down.data_ptr()
    assert (seen[0][1].data_ptr() == x.data_ptr()) == (x.stride(-1) == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_another_type(dtype):
    *tensors, weights, experts = inputs(20, 24, 20, 3, 2, torch.bfloat16)
    check(*tensors, weights.to(dtype), experts)


def test_nan_in_a_token_stays_there(small_tiles):
    experts = some_experts(30, 3, 2)
    tensors = inputs(30, 24, 20, 4, 2, experts=experts)
    clean = run(kernels, *tensors)
    others = torch.arange(30) != 11
    for special, spoiled in itertools.product((torch.nan, torch.inf), (0, 1)):
        copies = [t.clone() for t in tensors]
        copies[spoiled][11, 5] = special
        copies[2][3] = copies[3][3] = torch.nan  # an expert that nobody chose
        got = run(kernels, *copies)
        assert all(torch.equal(got[name][others], clean[name][others]) for name in ("y", "hidden", "dx", "dweights"))
        chosen = torch.zeros(4, dtype=torch.bool).index_fill(0, experts[11], True)
        assert all(torch.equal(got[name][~chosen], clean[name][~chosen]) for name in ("dgate_up", "ddown"))
        assert got["y"][11].isnan().any() or spoiled == 0
    copies = [t.clone() for t in tensors]
    copies[4][11] = torch.nan
    got = run(kernels, *copies)
    assert all(torch.equal(got[name][others], clean[name][others]) for name in ("y", "dx")) and got["y"][11].isnan().all()


def far(t):
    """The same matrices or rows, the last of three beyond 2^31 elements (of which only they are ever touched)."""
    assert len(t) == 3
    rest = t[0].numel()
    x = torch.empty(2**31 + rest, dtype=t.dtype).as_strided(t.shape, (2**30, *t.stride()[1:]))
    return x.copy_(t)


@pytest.mark.parametrize("which", range(4))
def test_offsets_beyond_32_bits(which):
    tensors = list(inputs(3, 16, 8, 3, 3, torch.bfloat16))
    tensors[which] = far(tensors[which])
    check(*tensors)


def test_same_bits_in_every_program_order(small_tiles):
    tensors = inputs(40, 20, 24, 3, 2, torch.bfloat16)
    results = []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            results.append(run(kernels, *tensors))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in NAMES)


def test_gradients_in_float64():
    _, x, gate_up, down, weights, experts = inputs(3, 4, 3, 3, 2)
    leaves = [t.double().requires_grad_() for t in (x, gate_up, down, weights)]
    with fp.use_backend("triton"):
        assert torch.autograd.gradcheck(lambda *a: fp.moe(*a, experts), leaves, fast_mode=True)
    tensors = [t.double() if t.is_floating_point() else t for t in inputs(40, 33, 17, 3, 2)]
    got, expected = run(kernels, *tensors), run(reference, *tensors)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-13)


def test_tiles_are_what_triton_can_launch():
    tables = kernels.HIDDEN, kernels.PRODUCT, kernels.DHIDDEN, kernels.GRADIENT
    dtypes, targets = (*HALF_AND_SINGLE, torch.float64), ("sm_80", "sm_90", "sm_103", "sm_120", "gfx942")
    for table, dtype, target in itertools.product(tables, dtypes, targets):
        for sizes in itertools.product([1, 17, 64, 5000], [1, 24, 2048], [1, 40, 4096]):
            *block, num_warps, _ = kernels.tile(table, *sizes, dtype, target)
            assert all(16 <= n <= 256 and n & (n - 1) == 0 for n in block) and num_warps in (4, 8)
    for dtype, target, rows in itertools.product(dtypes, targets, [1, 17, 64, 5000]):  # one list of tiles for all of these
        assert len({kernels.tile(table, rows, 64, 64, dtype, target).BLOCK_M for table in tables[:3]}) == 1


def test_operators():
    dy, x, gate_up, down, weights, experts = inputs(9, 16, 12, 4, 2)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    call = lambda *a: fp.moe(*a, experts)  # noqa: E731
    with fp.use_backend("triton"):
        assert fp.explain(fp.moe, *leaves, experts).backend == "triton"
        y = call(*leaves)
        grads = torch.autograd.grad(y, leaves, dy)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
        many = torch.zeros(5000, 2, 16), torch.zeros(5000, 16, 1)
        assert "at most 4095 experts" in fp.explain(fp.moe, x, *many, weights, experts).refusals["triton"]
    assert torch.equal(compiled, y)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled, leaves, dy), grads, strict=True))
    args = tuple(t.detach() for t in (*leaves, experts))
    torch.library.opcheck(torch.ops.fastprimer_triton.moe_forward.default, args)
    hidden = torch.ops.fastprimer_triton.moe_forward(*args)[1]
    torch.library.opcheck(torch.ops.fastprimer_triton.moe_backward.default, (dy, *args, hidden, True, True))


SHARED, FORWARD, BACKWARD, DISPATCH, LAUNCHES = _moe, _moe_forward, _moe_backward, _moe_dispatch, kernels
PLANTED = {
    "a rank that counts later pairs": (DISPATCH, "other[None, :] < pair[:, None]", "other[None, :] > pair[:, None]"),
    "a count of the chunk lost": (
        DISPATCH,
        "tl.store(counts_ptr + chunk.to(tl.int64) * (E + 1) + bin, rank + 1,",
        "tl.store(counts_ptr + bin, rank + 1,",
    ),
    "an earlier chunk forgotten": (DISPATCH, "total += tl.sum(count, 0)", "total = tl.sum(count, 0)"),
    "a bin's first place forgotten": (DISPATCH, "position += tl.load(offsets_ptr + bin, mask=inside, other=0)", "position += 0"),
    "an expert too large is one": (DISPATCH, "(expert >= 0) & (expert < E), expert, E)", "expert >= 0, expert, E)"),
    "a negative expert is one": (DISPATCH, "(expert >= 0) & (expert < E), expert, E)", "expert < E, expert, E)"),
    "a row between two tiles": (DISPATCH, "(tile - first_tile) * BLOCK_M", "(tile - first_tile) * (BLOCK_M + 1)"),
    "the list's rest not marked": (DISPATCH, "range(end_tile, tiles, AT_ONCE)", "range(end_tile + 1, tiles, AT_ONCE)"),
    "the matrix of the first expert": (
        FORWARD,
        "gate_up_ptr + expert.to(tl.int64) * stride_matrix_expert",
        "gate_up_ptr + 0 * stride_matrix_expert",
    ),
    "down of the first expert": (
        SHARED,
        "matrix_ptr + expert.to(tl.int64) * stride_matrix_expert",
        "matrix_ptr + 0 * stride_matrix_expert",
    ),
    "down of the first expert in backward": (
        BACKWARD,
        "down_ptr + expert.to(tl.int64) * stride_matrix_expert",
        "down_ptr + 0 * stride_matrix_expert",
    ),
    "x by pair": (FORWARD, "pair // K * stride_x_row", "pair * stride_x_row"),
    "dy by position": (BACKWARD, "dy_ptr + (pair // K * stride_dy_row)", "dy_ptr + (position // K * stride_dy_row)"),
    "rows of the next expert stored": (
        SHARED,
        "exists = position < tl.load(offsets_ptr + expert + 1)",
        "exists = position < tl.load(offsets_ptr + expert + 1) + 1",
    ),
    "a tail of the sum unmasked": (
        SHARED,
        "tl.load(rows_ptr + first + k, mask=first + k < size, other=0.0)",
        "tl.load(rows_ptr + first + k)",
    ),
    "a tail of the matrix unmasked": (
        SHARED,
        "mask=(first + k < size) & inside, other=0.0)",
        "mask=(first + k < size + 1) & inside, other=0.0)",
    ),
    "columns unmasked": (SHARED, "mask=exists[:, None] & (column < columns))", "mask=exists[:, None] & (column < columns + 1))"),
    "the weight forgotten": (SHARED, "z = z * weight[:, None]", "z = z * 1"),
    "a pair left out of the sum": (SHARED, "for k in range(0, K):", "for k in range(1, K):"),
    "a network that does not exist gives something": (SHARED, "tl.where(expert < E, size, 0), stride_k", "size, stride_k"),
    "gate and up exchanged": (FORWARD, "(a * sigma * b)", "(b * sigma * a / sigma * (1 / (1 + tl.exp(-b))))"),
    "u of hidden before it was rounded": (FORWARD, "a, b = a.to(WIDE), b.to(WIDE)", "a, b = a.to(WIDE) * 1.02, b.to(WIDE)"),
    "half of hidden not stored": (FORWARD, "tl.store(place + F, b, mask=inside)", "tl.store(place, a, mask=inside)"),
    "the weight forgotten in du": (BACKWARD, "du = w * d", "du = d"),
    "the weight forgotten in ddown": (BACKWARD, "(w * u).to", "u.to"),
    "silu's slope without its second term": (BACKWARD, "(sigma + a * sigma_slope)", "sigma"),
    "dweights of the last block alone": (BACKWARD, "partial_ptr + pair * blocks + block,", "partial_ptr + pair * blocks,"),
    "a block of dweights dropped": (LAUNCHES, "partial.sum(1)", "partial[:, 1:].sum(1)"),
    "rows of the next expert in the gradient": (BACKWARD, "exists = first + k < end", "exists = first + k < end + 1"),
    "an empty expert's gradient not cleared": (
        BACKWARD,
        "mask=(m < rows) & (n < columns))",
        "mask=(m < rows) & (n < columns) & (tl.load(offsets_ptr + expert) < end))",
    ),
    "a block of rows left out of the gradient": (
        BACKWARD,
        "range(begin, rest, BLOCK_K)",
        "range(begin, rest - BLOCK_K, BLOCK_K)",
    ),
    "the last positions left out of the gradient": (BACKWARD, "if rest < end:", "if rest > end:"),
    "the gradient of another expert": (BACKWARD, "(expert * rows + m)", "((expert + 1) % 2 * rows + m)"),
    "left and right not gathered alike": (
        LAUNCHES,
        "p.gradient(dhidden, p.x, False, True, d)",
        "p.gradient(dhidden, p.x, False, False, d)",
    ),
}


def plant(monkeypatch, folder, module, old, new):
    """Put the kernels (or functions) of a mutated copy wherever those of the original are used."""
    copy, originals = mutated(module, old, new, folder), dict(vars(module))
    for user in (SHARED, FORWARD, BACKWARD, DISPATCH, LAUNCHES):
        for name, value in vars(copy).items():
            if callable(value) and value is not originals.get(name) and vars(user).get(name) is originals.get(name):
                monkeypatch.setattr(user, name, value)


def checks(monkeypatch):
    """Every mechanism once: several chunks, tiles and blocks, an empty expert, experts that do not exist; stable, in every order."""
    make_tiles_small(monkeypatch)
    dispatch = kernels.dispatch
    monkeypatch.setattr(kernels, "dispatch", lambda experts, E, rows: checked_dispatch(dispatch(experts, E, rows), experts, E))
    experts = some_experts(50, 4, 2)
    experts = torch.where(experts == 2, 4, experts)
    experts[::7, 0], experts[1::7, 1] = 9, -1
    check(*inputs(50, 40, 24, 5, 2, torch.bfloat16, experts))
    check(*inputs(20, 17, 33, 2, 2))
    kernels.dispatch(some_experts(130, 3, 2), 3, 16)  # five chunks


def checked_dispatch(d, experts, E):
    bins = torch.where((experts >= 0) & (experts < E), experts, E).flatten()
    assert torch.equal(d.order.long(), torch.sort(bins, stable=True).indices)
    return d


def test_planted_bugs_have_a_sound_original(monkeypatch):
    checks(monkeypatch)


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *PLANTED[bug])
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError, IndexError)):
        checks(monkeypatch)
