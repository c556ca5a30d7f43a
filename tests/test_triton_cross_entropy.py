"""The Triton cross-entropy in the interpreter: pieces, budgets, NaN, ignored tokens, strides, same bits, no waiting; planted bugs."""

import importlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import _cross_entropy  # noqa: E402
from fastprimer.kernels import cross_entropy as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, launched, random, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.cross_entropy")

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # numpy's, on infinities
]

IGNORED = -100
NOTHING, EVERY = (IGNORED, 0.0, 0.0, None), (IGNORED, 0.1, 0.01, 5.0)
"""ignore_index, label_smoothing, z_loss, softcap"""


def make_small(monkeypatch, module):
    """Pieces of 256 columns, tiles of 128, sums over 4 rows, so that a small problem has many of each."""
    monkeypatch.setattr(module, "PIECE", 0)
    monkeypatch.setattr(module, "SUMMED", 4)
    monkeypatch.setattr(module, "fold_tile", lambda _: kernels.Tile(128, 4))
    monkeypatch.setattr(module, "gradient_tile", lambda _: kernels.Tile(128, 4))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch, kernels)


def targets(N, V, ignored=()):
    target = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    target[list(ignored)] = IGNORED
    return target


def logits_of(N, V, dtype=torch.float32, **options):
    return random(0, N, V, dtype=dtype, scale=2.0, **options)


def projection(N, C, V, dtype=torch.float32):
    """x, weight, bias"""
    return random(0, N, C, dtype=dtype), random(1, V, C, dtype=dtype, scale=2 * C**-0.5), random(2, V, dtype=dtype)


def upstream(N, both=True):
    return random(3, N), random(4, N) if both else None


def plain(functions, logits, target, options, dloss, dlse):
    loss, lse, argmax = functions.cross_entropy_forward(logits, target, *options)
    dlogits = functions.cross_entropy_backward(dloss, dlse, logits, target, lse, *options)
    return {"loss": loss, "lse": lse, "argmax": argmax, "dlogits": dlogits}


def linear(functions, x, weight, bias, target, options, budget, dloss, dlse):
    loss, lse, argmax, kept = functions.linear_cross_entropy_forward(x, weight, target, bias, *options, budget)
    gradients = functions.linear_cross_entropy_backward(dloss, dlse, x, weight, target, lse, kept, bias, *options)
    return {"loss": loss, "lse": lse, "argmax": argmax, "kept": kept, **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}


def check(run, module, *arguments):
    """Like the reference: argmax the same, all else within its budget."""
    chosen = []

    def call(functions, wide):
        floating = lambda a: isinstance(a, torch.Tensor) and a.is_floating_point()  # noqa: E731
        results = run(functions, *(wide(a) if floating(a) else a for a in arguments))
        chosen.append(results.pop("argmax"))
        return results

    found = shares_of(call, module, reference)
    assert torch.equal(chosen[0], chosen[2])
    assert_within_budget(found)


def same(got, expected, **tolerance):
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], equal_nan=True, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


BUDGETS = {"nothing": 0, "a part": 4 * 7 * 300, "all": 4 * 7 * 601}
"""Of 7 x 601 logits."""


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_pieces(budget, dtype, small):
    x, weight, bias = projection(7, 20, 601, dtype)
    target = targets(7, 601, (0, 4, 6))
    check(linear, kernels, x, weight, bias, target, EVERY, BUDGETS[budget], *upstream(7))
    check(linear, kernels, x, weight, None, target.int(), NOTHING, BUDGETS[budget], *upstream(7, False))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("options", [NOTHING, EVERY, (0, 1.0, 0.0, None), (IGNORED, 0.0, 0.0, 4.0)], ids=str)
def test_blocks_of_a_row(options, dtype, small):
    for V in (1, 127, 128, 129, 300):
        target = targets(5, V, (2,)).where(torch.arange(5) != 2, options[0])
        check(plain, kernels, logits_of(5, V, dtype), target, options, *upstream(5))


def test_widths():
    for N, V, budget in itertools.product((0, 1, 60, 8192, 10**6), (1, 255, 256, 50257, 262144), (0, 10**6, 2**28, 2**34)):
        width, kept = kernels.piece_columns(N, V, budget), reference.kept_columns(N, V, budget)
        assert width == V or width % 256 == 0
        assert width in (V, 256) or 4 * N * width <= max(budget, kernels.PIECE)
        assert 0 <= kept <= V and (kept == 0 or kept <= width)
        parts = kernels.pieces(V, kept, width)
        assert [v for part in parts for v in range(*part)] == list(range(V)) and kept in (0, *(end for _, end in parts))
    for columns in (1, 2, 3, 1000, 2048, 10**6):
        for COLUMNS, num_warps in (kernels.fold_tile(columns), kernels.gradient_tile(columns)):
            assert COLUMNS & (COLUMNS - 1) == 0 == num_warps & (num_warps - 1) and 1 <= num_warps <= 8


class Watched(TorchDispatchMode):
    """Raises where torch would wait for a device; notes the largest tensor."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("local_scalar_dense", "nonzero", "masked_select", "is_nonzero")), function
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.numel())
        return result


def test_it_neither_waits_nor_forms_the_logits(small):
    for dtype in (torch.float32, torch.float16):
        x, weight, bias = projection(6, 4, 600, dtype)
        with Watched() as watched:
            linear(kernels, x, weight, bias, targets(6, 600, (3,)), EVERY, 0, *upstream(6))
        assert watched.largest == 600 * 4  # weight; a piece is 6 x 256
    with Watched():
        plain(kernels, logits_of(4, 70), targets(4, 70, (3,)), EVERY, *upstream(4))


SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.0])


def special_rows(V):
    """Rows of few different numbers, of NaN, of an infinity alone, and of one NaN each."""
    generator = torch.Generator().manual_seed(0)
    mixed = [
        SPECIAL[torch.tensor(some)[torch.randint(len(some), (3, V), generator=generator)]] for some in ((0, 2, 3), (1, 2, 4), (2, 3, 4))
    ]
    alone = SPECIAL[:3, None].expand(3, V)
    one = torch.where(torch.arange(V) == torch.tensor([[0], [V - 1], [V // 2]]), torch.nan, random(0, 3, V))
    late = torch.where(torch.arange(V) < V - 1, -torch.inf, random(1, 2, V))
    return torch.cat((*mixed, alone, one, late))


@pytest.mark.parametrize("options", [NOTHING, EVERY, (IGNORED, 0.0, 0.0, 2.0)], ids=str)
def test_nan_and_infinity_are_what_they_are_in_the_reference(options, small):
    logits = special_rows(200)
    N = len(logits)
    for target in (targets(N, 200, (1,)), torch.full((N,), 199)):
        arguments = target, options, *upstream(N)
        same(plain(kernels, logits, *arguments), plain(reference, logits, *arguments))


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_special_numbers_in_any_piece(budget, small):
    """By the bias, for all rows at once."""
    x, weight, _ = projection(2, 8, 530)
    target = targets(2, 530)
    for first, second, place in itertools.product(range(4), (10, 300), (310, 529)):
        bias = random(2, 530)
        bias[place], bias[second] = SPECIAL[first], SPECIAL[(first + 1) % 3]
        loss, lse, argmax, _ = kernels.linear_cross_entropy_forward(x, weight, target, bias, *NOTHING, budget)
        expected = reference.linear_cross_entropy_forward(x, weight, target, bias, *NOTHING, budget)
        torch.testing.assert_close((loss, lse), expected[:2], equal_nan=True)
        assert torch.equal(argmax, expected[2])


def test_a_tie_goes_to_the_lower_column(small):
    few = torch.randint(-1, 2, (30, 600), generator=torch.Generator().manual_seed(0)).float()
    few[:, :300] -= (torch.arange(30) % 2)[:, None]
    few[torch.arange(30) % 3 == 0] = 0.0
    few[1] = torch.where(few[1] == 0, -0.0, 0.0)
    assert torch.equal(kernels.cross_entropy_forward(few, targets(30, 600), *NOTHING)[2], few.argmax(-1))
    x, weight = few[:, :4].contiguous(), torch.eye(4).repeat(150, 1)
    argmax = kernels.linear_cross_entropy_forward(x, weight, targets(30, 600), None, *NOTHING, 0)[2]
    assert torch.equal(argmax, (x @ weight.t()).argmax(-1))


@pytest.mark.parametrize("budget, dtype", [(0, torch.float32), (4 * 9 * 256, torch.float16), (1 << 20, torch.bfloat16)], ids=str)
def test_what_an_ignored_token_holds_reaches_nothing(budget, dtype, small):
    x, weight, bias = projection(9, 20, 600, dtype)
    target, (dloss, dlse) = targets(9, 600, (4, 8)), upstream(9)
    clean = linear(kernels, x, weight, bias, target, EVERY, budget, dloss, dlse)
    x, dloss, dlse = x.clone(), dloss.clone(), dlse.clone()
    x[4], x[8, 0], dloss[4], dloss[8], dlse[8] = torch.nan, torch.inf, torch.inf, torch.nan, torch.inf
    dirty = linear(kernels, x, weight, bias, target, EVERY, budget, dloss, dlse)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert not clean["loss"][4] and not clean["lse"][4] and clean["argmax"][4] == -1
    assert not clean["dx"][4].any() and not clean["kept"][4].any()
    logits = logits_of(9, 70, dtype)
    logits[4], logits[8, 0] = torch.nan, -torch.inf
    dlogits = plain(kernels, logits, target % 70 - (target < 0) * (target % 70 - IGNORED), EVERY, dloss, dlse)["dlogits"]
    assert dlogits.isfinite().all() and not dlogits[4].any() and dlogits[3].all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_token_ignored(reduction):
    x, weight, bias = (t.requires_grad_() for t in projection(5, 8, 30))
    with fp.use_backend("triton"):
        loss = fp.linear_cross_entropy(x, weight, targets(5, 30, range(5)), bias=bias, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (x, weight, bias)))


def test_nan_in_a_token_stays_there(small):
    x, weight, bias = projection(6, 20, 300)
    arguments = weight, bias, targets(6, 300, (1,)), EVERY, 0, *upstream(6)
    clean = linear(kernels, x, *arguments)
    x = x.clone()
    x[4, 3] = torch.nan
    dirty = linear(kernels, x, *arguments)
    others = torch.arange(6) != 4
    assert all(torch.equal(dirty[name][others], clean[name][others]) for name in ("loss", "lse", "argmax", "dx"))
    assert dirty["loss"][4].isnan() and dirty["dx"][4].isnan().all() and dirty["dweight"].isnan().any()


def check_targets_that_do_not_exist(module):
    """Nothing is read beyond the logits, which the interpreter would see; the token's loss and gradient are NaN, others are right."""
    wrong = torch.tensor([-1, 300, 2**40, -(2**40), 299, 0])
    (x, weight, bias), (dloss, dlse) = projection(6, 6, 300), upstream(6)
    right = torch.where((wrong >= 0) & (wrong < 300), wrong, 0)
    for results, expected in (
        [linear(module, x, weight, bias, target, EVERY, 4 * 6 * 256, dloss, dlse) for target in (wrong, right)],
        [plain(module, logits_of(6, 300), target, EVERY, dloss, dlse) for target in (wrong, right)],
    ):
        assert results["loss"].isnan().tolist() == [True] * 4 + [False] * 2
        gradient = "dx" if "dx" in results else "dlogits"
        assert results[gradient][:4].isnan().all() and torch.equal(results[gradient][4:], expected[gradient][4:])
        assert all(torch.equal(results[name], expected[name]) for name in ("lse", "argmax"))


def test_targets_that_do_not_exist(small):
    check_targets_that_do_not_exist(kernels)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "columns of a wider row": lambda t: torch.nn.functional.pad(t, (1, 2))[:, 1:-2],
    "one row repeated": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, small, monkeypatch):
    view = LAYOUTS[layout]
    spread = lambda t: t.repeat_interleave(3)[::3]  # noqa: E731
    seen = launched(monkeypatch, kernels, "cross_entropy_fold_kernel"), launched(monkeypatch, kernels, "cross_entropy_gradient_kernel")
    logits, (dloss, dlse) = view(logits_of(9, 100, torch.bfloat16)), upstream(9)
    check(plain, kernels, logits, spread(targets(9, 100, (2,))), EVERY, spread(dloss), dlse[:1].expand(9))
    assert all(launches[1].data_ptr() == logits.data_ptr() for launches in seen)
    x, weight, bias = projection(9, 20, 300)
    check(
        linear, kernels, view(x), view(weight), spread(bias), targets(9, 300, (2,)), EVERY, 4 * 9 * 256, dloss[:1].expand(9), spread(dlse)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_bias_of_another_type(dtype, small):
    x, weight, bias = projection(9, 20, 300, torch.bfloat16)
    check(linear, kernels, x, weight, bias.to(dtype), targets(9, 300), NOTHING, 4 * 9 * 256, *upstream(9))


def far_rows():
    """Three rows of logits, the last beyond 2^31 elements (of which only they are ever touched)."""
    return torch.empty(2**31 + 70, dtype=torch.bfloat16).as_strided((3, 70), (2**30, 1)).copy_(logits_of(3, 70))


def test_offsets_beyond_32_bits(small):
    check(plain, kernels, far_rows(), targets(3, 70), NOTHING, *upstream(3))
    columns = torch.empty(2**31 + 70, dtype=torch.bfloat16).as_strided((70, 3), (1, 2**30)).copy_(logits_of(70, 3))
    check(plain, kernels, columns, torch.full((70,), 2), NOTHING, *upstream(70))


def test_no_tokens():
    x, weight, bias = projection(0, 6, 20)
    results = linear(kernels, x, weight, bias, targets(0, 20), EVERY, 1 << 20, *upstream(0))
    assert results["kept"].shape == (0, 20) and results["argmax"].dtype == torch.int64
    assert results["dx"].shape == (0, 6) and results["dweight"].shape == (20, 6) and results["dbias"].shape == (20,)
    assert not results["dweight"].any() and not results["dbias"].any()
    assert plain(kernels, torch.empty(0, 20), targets(0, 20), EVERY, *upstream(0))["dlogits"].shape == (0, 20)


def check_small_gradients(module):
    """What would be nothing in float16: dlogits of 2^-18 / 600 in the sum of dx."""
    x, weight, _ = projection(4, 6, 600, torch.float16)
    dloss = random(3, 4).abs() * 2**-18
    dloss[3] = torch.inf  # of an ignored token
    check(linear, module, x * 0.03, weight * 30, None, targets(4, 600, (3,)), NOTHING, 0, dloss, None)


def test_small_gradients_in_float16(small):
    check_small_gradients(kernels)


def test_same_bits_in_every_program_order(small):
    x, weight, bias = projection(7, 20, 530, torch.bfloat16)
    results = []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            results.append(linear(kernels, x, weight, bias, targets(7, 530, (3,)), EVERY, 4 * 7 * 256, *upstream(7)))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}], ids=["plain", "every option"])
def test_gradients_in_float64(options, small):
    x, weight, bias = (t.double().requires_grad_() for t in projection(3, 4, 7))
    target = targets(3, 7, (1,))

    def fused(x, weight, bias):
        return fp.linear_cross_entropy(x, weight, target, bias=bias, reduction="none", return_lse=True, **options)

    with fp.use_backend("triton"):
        assert torch.autograd.gradcheck(fused, (x, weight, bias), fast_mode=True)
        call = lambda l: fp.cross_entropy(l, target, return_lse=True, **options)  # noqa: E731
        assert torch.autograd.gradcheck(call, (logits_of(3, 7).double().requires_grad_(),), fast_mode=True)
    x, weight, bias = (t.double() for t in projection(9, 20, 600))
    opts = IGNORED, *(options.get(name, default) for name, default in (("label_smoothing", 0.0), ("z_loss", 0.0), ("softcap", None)))
    arguments = x, weight, bias, targets(9, 600, (3,)), opts, 8 * 9 * 256, *(t.double() for t in upstream(9))
    same(linear(kernels, *arguments), linear(reference, *arguments), rtol=1e-12, atol=1e-13)


def test_autocast_does_not_reach_the_products_within():
    x, weight, _ = projection(6, 8, 30)
    with fp.use_backend("triton"):
        with torch.autocast("cpu", torch.bfloat16):
            under = fp.linear_cross_entropy(x, weight, targets(6, 30), reduction="none")
        half = fp.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets(6, 30), reduction="none")
    assert torch.equal(under, half)


TILES, LAUNCHES = _cross_entropy, kernels
PLANTED = {
    "a later maximum without rescaling": (TILES, "s = tl.where(more, s * e + 1, s + e)", "s = tl.where(more, s + 1, s + e)"),
    "a smaller number counts fully": (TILES, "s = tl.where(more, s * e + 1, s + e)", "s = tl.where(more, s * e + 1, s + 1)"),
    "two infinities make a NaN": (TILES, "e = tl.where(z == m, 1.0, tl.exp(-tl.abs(z - m)))", "e = tl.exp(-tl.abs(z - m))"),
    "a NaN is not the largest": (TILES, "more = (z > m) | ((z != z) & (m == m))", "more = z > m"),
    "a tie to the higher column": (TILES, "more = (z > m) | ((z != z) & (m == m))", "more = (z >= m) | ((z != z) & (m == m))"),
    "lanes in the wrong order": (TILES, "place, NOBODY), 0)", "COLUMNS - 1 - place, NOBODY), 0)"),
    "the tail counts": (TILES, 'z = tl.where(inside, z, float("-inf"))', "z = tl.where(inside, z, 0.0)"),
    "the tail smoothed": (TILES, "total += tl.where(inside, z, 0.0)", "total += tl.where(inside, z, 1.0)"),
    "the tail read": (TILES, "inside = (column < columns) & valid if MASKED", "inside = (column <= columns) & valid if MASKED"),
    "a piece's own number of columns": (TILES, "argmax = first + tl.min(", "argmax = tl.min("),
    "an earlier piece forgotten": (TILES, "s_row * _weight(top, most) + s_before * _weight(m_before, most)", "s_row * _weight(top, most)"),
    "an earlier piece not rescaled": (TILES, "s_before * _weight(m_before, most)", "s_before"),
    "the argmax of the last piece": (TILES, "tl.where(more, argmax, tl.load(argmax_ptr + row))", "argmax"),
    "a sum per piece": (TILES, "total_row += tl.load(state_ptr + 2 * N + row)", "total_row += 0 * tl.load(state_ptr + 2 * N + row)"),
    "the target of an earlier piece": (TILES, "z_target += tl.load(state_ptr", "z_target += 0 * tl.load(state_ptr"),
    "the target without bias": (TILES, "z_target += tl.load(bias_ptr + target", "z_target += 0 * tl.load(bias_ptr + target"),
    "the target uncapped": (TILES, "tl.where(here, capped(z_target, SOFTCAP), 0.0)", "tl.where(here, z_target, 0.0)"),
    "a target read beyond the row": (TILES, "(target >= first) & (target < first + columns)", "target >= first"),
    "a bias by piece": (TILES, "tl.load(bias_ptr + first + column,", "tl.load(bias_ptr + column,"),
    "kept before bias and cap": (TILES, "if KEEP and (SOFTCAP > 0 or bias_ptr is not None):", "if KEEP and SOFTCAP < 0:"),
    "ignored rows kept": (TILES, "        if KEEP:\n            for start", "        if KEEP and not KEEP:\n            for start"),
    "an ignored token speaks": (TILES, "tl.store(argmax_ptr + row, -1)", "tl.store(argmax_ptr + row, 0)"),
    "a wrong target unnoticed": (TILES, 'z_target, float("nan"))', "z_target, 0.0)"),
    "z-loss forgotten": (TILES, "+ Z_LOSS * lse * lse", "+ 0 * lse"),
    "z-loss without gradient": (TILES, "dloss * (1 + 2 * Z_LOSS * lse)", "dloss"),
    "smoothing without gradient": (TILES, "dz -= dloss * LABEL_SMOOTHING / V", "dz -= 0 * dloss"),
    "dlse forgotten": (TILES, "dtop += tl.load(dlse_ptr + row).to(WIDE)", "dtop += 0 * tl.load(dlse_ptr + row).to(WIDE)"),
    "a target in every piece": (TILES, "tl.where(first + column == target,", "tl.where(column == target,"),
    "the softcap's slope forgotten": (TILES, "dz *= 1 - t * t", "dz *= 1 - 0 * t"),
    "an ignored token's gradient": (TILES, "dl = tl.where(valid, dz, 0.0)", "dl = dz"),
    "dlogits beyond the piece": (TILES, "mask=column < columns)\n        else:", "mask=column <= columns)\n        else:"),
    "rows of the next sum": (TILES, "tl.minimum(first_row + ROWS, N)", "tl.minimum(first_row + ROWS + 1, N)"),
    "another sum's place": (TILES, "partial_ptr += chunk.to(tl.int64) * columns", "partial_ptr += chunk.to(tl.int64) // 2 * columns"),
    "what was kept capped again": (
        LAUNCHES,
        "gradients.dlogits(z, dl, first, raw=end > columns)",
        "gradients.dlogits(z, dl, first, raw=True)",
    ),
    "an ignored token in dweight": (LAUNCHES, "x = torch.where(valid.unsqueeze(-1), as_rows(x), 0.0)", "x = as_rows(x)"),
    "dx of the last piece": (LAUNCHES, "dx += share", "dx = share"),
    "one row's share of the bias": (LAUNCHES, "partial.sum(0)", "partial[0]"),
    "a piece of kept and not kept": (LAUNCHES, "for start, stop in ((0, kept), (kept, V))", "for start, stop in ((0, V),)"),
    "float16 without a scale": (LAUNCHES, "torch.exp2(torch.floor(15 - torch.log2(largest)).clamp(-100, 100))", "torch.ones_like(largest)"),
    "a scale of an infinity": (LAUNCHES, "torch.where(valid & largest.isfinite(), largest, 0.0)", "largest"),
    "float16 scaled for ever": (LAUNCHES, "dx /= scale", "dx /= 1"),
}


def plant(monkeypatch, folder, module, old, new):
    """The launches of a copy in which one line is another, with small tiles."""
    copy = mutated(module, old, new, folder)
    if module is TILES:
        for name in ("cross_entropy_fold_kernel", "cross_entropy_gradient_kernel"):
            monkeypatch.setattr(kernels, name, getattr(copy, name))
        copy = kernels
    make_small(monkeypatch, copy)
    return copy


def checks(module):
    """Every mechanism once: pieces of both kinds, tails, special numbers, ties, ignored tokens and targets that do not exist."""
    rows = special_rows(100)
    arguments = rows, targets(len(rows), 100, (1,)), NOTHING, *upstream(len(rows))
    same(plain(module, *arguments), plain(reference, *arguments))
    ties = torch.randint(0, 2, (6, 150), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(module.cross_entropy_forward(ties, targets(6, 150), *NOTHING)[2], ties.argmax(-1))
    assert module.pieces(600, 256, 512) == [(0, 256), (256, 600)]
    x, weight, bias = projection(5, 20, 530)
    dloss, dlse = upstream(5)
    x[2], dloss[2] = torch.nan, torch.inf
    check(linear, module, x, weight, bias, targets(5, 530, (2,)), EVERY, 4 * 5 * 300, dloss, dlse)
    for budget in (0, 1 << 20):
        check(linear, module, x, weight, None, targets(5, 530, (2,)), NOTHING, budget, dloss, None)
    check_targets_that_do_not_exist(module)
    check_small_gradients(module)


def test_planted_bugs_have_a_sound_original(small):
    checks(kernels)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    planted = plant(monkeypatch, tmp_path, *PLANTED[bug])
    with pytest.raises((AssertionError, RuntimeError, triton.runtime.errors.InterpreterError)):
        checks(planted)


@pytest.mark.parametrize("kernel", ["fold", "gradient"])
def test_planted_32_bit_offset_is_caught(kernel, tmp_path, monkeypatch):
    lines = {
        "fold": ("row = tl.program_id(0).to(tl.int64)\n    logits_ptr", "row = tl.program_id(0)\n    logits_ptr"),
        "gradient": ("row = tl.cast(row, tl.int64)", "row = tl.cast(row, tl.int32)"),
    }
    plant(monkeypatch, tmp_path, TILES, *lines[kernel])
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        check(plain, kernels, far_rows(), targets(3, 70), NOTHING, *upstream(3))
