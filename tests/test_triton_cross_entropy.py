"""The Triton cross-entropy in the interpreter: pieces, budgets, NaN, ignored tokens, strides, same bits, no waiting."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from cross_entropy_checks import (  # noqa: E402
    EVERY,
    IGNORED,
    NOTHING,
    SPECIAL,
    check,
    check_small_gradients,
    check_targets_that_do_not_exist,
    far_rows,
    linear,
    logits_of,
    make_small,
    plain,
    projection,
    reference,
    same,
    special_rows,
    targets,
    upstream,
)
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import cross_entropy as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, launched, random  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # numpy's, on infinities
]


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch, kernels)


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
        width = kernels.piece_columns(N, V, budget)
        assert width == V or width % 256 == 0
        assert width in (V, 256) or 4 * N * width <= max(budget, kernels.PIECE)
        for each in (2, 4, 8):
            kept = reference.kept_columns(N, V, budget, each)
            size = lambda n, each=each: each * n + (4 * -(-n // 128) if each == 2 else 0)  # noqa: E731
            assert kept == V or (kept % 256 == 0 and size(kept) * N <= budget < size(kept + 256) * max(N, 1))
            assert (kept == V) == (size(V) * max(N, 1) <= budget) and kept <= V
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
        loss, lse, _, argmax, *_ = kernels.linear_cross_entropy_forward(x, weight, target, bias, *NOTHING, budget)
        expected = reference.linear_cross_entropy_forward(x, weight, target, bias, *NOTHING, budget)
        torch.testing.assert_close((loss, lse), expected[:2], equal_nan=True)
        assert torch.equal(argmax, expected[3])


def test_a_tie_goes_to_the_lower_column(small):
    few = torch.randint(-1, 2, (30, 600), generator=torch.Generator().manual_seed(0)).float()
    few[:, :300] -= (torch.arange(30) % 2)[:, None]
    few[torch.arange(30) % 3 == 0] = 0.0
    few[1] = torch.where(few[1] == 0, -0.0, 0.0)
    assert torch.equal(kernels.cross_entropy_forward(few, targets(30, 600), *NOTHING)[3], few.argmax(-1))
    x, weight = few[:, :4].contiguous(), torch.eye(4).repeat(150, 1)
    argmax = kernels.linear_cross_entropy_forward(x, weight, targets(30, 600), None, *NOTHING, 0)[3]
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


def test_a_weight_that_is_nan_is_nothing_to_an_ignored_token(small):
    x, weight, bias = projection(5, 20, 300)
    weight[7, 3] = torch.nan
    dx = linear(kernels, x, weight, bias, targets(5, 300, (2,)), NOTHING, 1 << 20, *upstream(5))["dx"]
    assert not dx[2].any() and dx[torch.arange(5) != 2].isnan().any(1).all()


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
