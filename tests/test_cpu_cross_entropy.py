"""What is particular to cross-entropy's CPU kernels: tiles, blocks and ranges, budgets, NaN, infinities, threads, memory."""

import subprocess
import sys

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from cpu_checks import assert_same_bits_for_any_number_of_threads, instruction_set, name, products_of_torch, tiles_of_bfloat16
from cross_entropy_checks import NOTHING, linear, plain, projection, reference, same, special_rows, targets, upstream
from fastprimer import testing
from fastprimer.backends import implementation, use_backend
from fastprimer.cases import CASES, loss_case
from fastprimer.verify import dtypes_of

EVERY = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "return_lse": True, "return_argmax": True}
LARGE = [
    loss_case("cross_entropy", "pieces-of-16-bits", 5, 17001, ignored=(1,), reduction="none", **EVERY),
    loss_case("linear_cross_entropy", "several-ranges", 300, 4400, 24, ignored=range(0, 300, 7), bias=True, reduction="none", **EVERY),
    loss_case("linear_cross_entropy", "several-columns", 140, 530, 530, ignored=(139,), memory_budget=0, reduction="none"),
    loss_case("linear_cross_entropy", "x-as-it-lies", 160, 300, 64, memory_budget=160 * 4 * 256, reduction="none"),
    loss_case("linear_cross_entropy", "many-tokens", 2100, 650, 16, memory_budget=2100 * 4 * 256, reduction="none", z_loss=0.01),
    loss_case("linear_cross_entropy", "few-words", 700, 200, 24, ignored=range(0, 700, 9), bias=True, reduction="none", **EVERY),
    loss_case("linear_cross_entropy", "one-tile", 1290, 35, 64, reduction="none"),
]
"""Beyond pieces of a row, a range of the vocabulary, the 256 columns of a block, the numbers that make a range short, and tokens that are
one stretch."""

SMALL = [c for c in CASES if c.op in ("cross_entropy", "linear_cross_entropy") and not c.bench]
FUSED = [c for c in SMALL if c.op == "linear_cross_entropy"]


def wrong(cases, dtype):
    return [str(row) for case in cases for row in testing.compare(case, dtype, "cpu") if not row.ok]


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "linear_cross_entropy"), ids=name)
@pytest.mark.parametrize("limit, library", [(2, True), (2, False), (1, False), (0, False)])
def test_large_cases_with_and_without_the_products_of_torch(limit, library, dtype):
    with instruction_set(limit), products_of_torch(library):
        assert not wrong([*LARGE, *(SMALL if not library else [])], dtype)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_tiles_of_bfloat16_on_any_processor(limit):
    """What a processor with products of bfloat16 runs, by plain loops where this one has none."""
    with instruction_set(limit), tiles_of_bfloat16():
        assert not wrong([*FUSED, LARGE[1]], torch.bfloat16)


@pytest.mark.parametrize("case", [*LARGE, *(c for c in SMALL if c.name in ("everything", "several-pieces", "partly-kept"))], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case):
    assert_same_bits_for_any_number_of_threads(case)


def inputs(N, C, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, C, generator=generator), torch.randn(V, C, generator=generator) / C**0.5
    return x.to(dtype), weight.to(dtype), torch.randint(0, V, (N,), generator=generator)


def results(x, weight, target, dloss=None, **options):
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    with use_backend("cpu"):
        loss = fp.linear_cross_entropy(*leaves, target, reduction="none", **options)
    return [loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if dloss is None else dloss)]


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "linear_cross_entropy"), ids=name)
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_nan_in_an_ignored_token_reaches_nothing(budget, dtype):
    device_or_skip("linear_cross_entropy", "cpu")
    x, weight, target = inputs(9, 20, 300, dtype)
    target[4] = -100
    dloss = torch.randn(9, generator=torch.Generator().manual_seed(1))
    clean = results(x, weight, target, dloss, memory_budget=budget)
    x[4], dloss[4] = torch.nan, torch.nan
    dirty = results(x, weight, target, dloss, memory_budget=budget)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert clean[0][4] == 0 and not clean[1][4].any()
    logits = torch.randn(3, 50)
    logits[1] = torch.nan
    logits.requires_grad_()
    with use_backend("cpu"):
        loss = fp.cross_entropy(logits, torch.tensor([1, -100, 2]), reduction="none")
    (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and dlogits.isfinite().all() and not dlogits[1].any()


def test_a_gradient_is_the_same_without_the_other():
    """Where tokens are in stretches; small cases are the contract's."""
    device_or_skip("linear_cross_entropy", "cpu")
    x, weight, target = inputs(700, 20, 40)
    _, *both = results(x, weight, target)
    for i, (one, other) in enumerate([(x, weight), (weight, x)]):
        leaf = one.clone().requires_grad_()
        with use_backend("cpu"):
            loss = fp.linear_cross_entropy(*((leaf, other) if i == 0 else (other, leaf)), target, reduction="sum")
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], both[i])


def test_nan_in_a_token_that_counts_stays_visible():
    device_or_skip("linear_cross_entropy", "cpu")
    x, weight, target = inputs(9, 20, 300)
    x[4] = torch.nan
    loss, dx, dweight = results(x, weight, target)
    assert loss.isnan().nonzero().flatten().tolist() == [4] and dx.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert dweight.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_words_that_are_ruled_out_have_probability_zero(op, dtype):
    """Logits of -infinity, a whole tile of them and more."""
    device_or_skip(op, "cpu")
    x, weight, target = inputs(5, 20, 700, dtype)
    bias = torch.zeros(700, dtype=dtype)
    bias[100:650] = -torch.inf
    target %= 100
    answers = []
    for backend in ("reference", "cpu"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with use_backend(backend):
            if op == "cross_entropy":
                loss = fp.cross_entropy(leaves[0] @ leaves[1].t() + bias, target)
            else:
                loss = fp.linear_cross_entropy(*leaves, target, bias=bias, memory_budget=1 << 20)
        answers.append([loss, *torch.autograd.grad(loss, leaves)])
    for expected, mine in zip(*answers, strict=True):
        rounding = {} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-10 * expected.abs().max().item()}
        torch.testing.assert_close(mine, expected, **rounding)
    assert not answers[1][2][100:650].any()


def forward(logits):
    """lse and argmax of the kernel, which must not depend on how the rows lie in the registers."""
    target = torch.zeros(len(logits), dtype=torch.int64)
    shifted = torch.nn.functional.pad(logits, (1, 2), value=torch.nan)[:, 1:-2]
    (_, lse, _, argmax), (_, other_lse, _, other_argmax) = (
        torch.ops.fastprimer.cross_entropy_forward(rows, target, -100, 0.0, 0.0, None) for rows in (logits, shifted)
    )
    torch.testing.assert_close(lse, other_lse, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(argmax, other_argmax)
    return lse, argmax


def assert_right(logits):
    """lse to four units in the last place of float32, in which it is summed and returned."""
    lse, argmax = forward(logits)
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), -1).float(), rtol=5e-7, atol=5e-7)
    assert torch.equal(argmax, logits.double().argmax(-1))


def at_all_sizes(test):
    """On either side of what one register, two of them, a group and a piece of the row hold; with every instruction set."""
    test = pytest.mark.parametrize("V", [1, 15, 31, 32, 33, 63, 64, 65, 127, 128, 129, 190, 4097, 8191, 8193])(test)
    test = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)(test)
    return pytest.mark.parametrize("limit", [0, 1, 2])(test)


def different(V, dtype):
    """V negative numbers down to -100 in random order."""
    order = torch.randperm(V, generator=torch.Generator().manual_seed(V))
    return torch.linspace(-100, -3, V).to(dtype)[order]


@at_all_sizes
def test_the_largest_is_found_wherever_it_is(V, dtype, limit):
    """Where all are negative, or it alone is not, or is a zero of either sign, or -infinity is all else."""
    places = torch.arange(V) if V < 200 else torch.tensor([0, 1, V // 2, V - 33, V - 2, V - 1])
    row = different(V, dtype)
    with instruction_set(limit):
        for largest in (-1.0, 0.0, -0.0, 2.0, 30000.0):
            for others in (row, torch.full_like(row, -torch.inf)):
                logits = others.repeat(len(places), 1)
                logits[torch.arange(len(places)), places] = largest
                assert_right(logits)


def nan_of_both_signs(dtype):
    nan = torch.tensor(torch.nan, dtype=dtype)
    integer = nan.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    return nan, (integer | torch.iinfo(integer.dtype).min).view(dtype)


@at_all_sizes
def test_special_numbers(V, dtype, limit):
    row = different(V, dtype)
    every = row.repeat(V, 1) if V < 200 else row.repeat(3, 1)
    diagonal = torch.arange(len(every)), torch.arange(len(every)) * (V - 1) // max(len(every) - 1, 1)
    with instruction_set(limit):
        assert_right(torch.stack([row, -row, torch.zeros_like(row), -torch.zeros_like(row), torch.full_like(row, -torch.inf)]))
        zeros = torch.zeros(3, V, dtype=dtype)
        zeros[0, ::2] = zeros[1, 1::2] = zeros[2, : V // 2] = -0.0
        assert_right(zeros)  # of which the first is the largest
        for nan in nan_of_both_signs(dtype):
            for sign in (1, -1):
                logits = sign * every
                logits[diagonal] = nan
                lse, argmax = forward(logits)
                assert lse.isnan().all() and torch.equal(argmax, diagonal[1])
        logits = every.clone()
        logits[diagonal] = torch.inf
        lse, argmax = forward(logits)
        assert (lse == torch.inf).all() and torch.equal(argmax, diagonal[1])


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_nan_and_infinity_are_what_they_are_in_the_reference(limit):
    """In one piece of a row or several, alone or with others of them, in plain logits and, by a bias, in the fused ones."""
    plainly, fused = (implementation(op, "cpu") for op in ("cross_entropy", "linear_cross_entropy"))
    with instruction_set(limit):
        for V in (200, 9000):
            logits = special_rows(V)
            arguments = targets(len(logits), V, (1,)), NOTHING, *upstream(len(logits))
            same(plain(plainly, logits, *arguments), plain(reference, logits, *arguments))
        x, weight, _ = projection(2, 8, 530)
        for bias in special_rows(530):
            arguments = x, weight, bias, targets(2, 530), NOTHING, 1 << 20, *upstream(2)
            same(linear(fused, *arguments), linear(reference, *arguments))


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_exponentials_of_every_size(dtype, limit):
    """Two logits whose distance is in their sum, up to where it is too small to be seen; a constant makes no difference."""
    for distance in (0, *(2.0**e for e in range(-8, 8)), 0.6875, 1.375, 2.78125, 87.5, 88.0, 104.0, 1000.0, 30000.0, torch.inf):
        for top in (0.0, 1.0, -1.0, 100.0, -100.0, 1024.0):
            logits = torch.full((2, 130), -torch.inf)
            logits[:, 7] = top
            logits[0, 128] = logits[1, 64:] = top - distance
            with instruction_set(limit):
                assert_right(logits.to(dtype))


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_large_logits_cost_no_accuracy(dtype, limit):
    """lse is rounded once, however far from zero its logits are, but for what a sum in float32 is off by."""
    random = torch.rand(300, generator=torch.Generator().manual_seed(0))
    for top in (3.0, 17.25, 99.5, -99.5, 501.0, -1000.0, 1028.0, -5000.0, 30000.0, 1e30, -1e30):
        if abs(top) < torch.finfo(dtype).max:
            logits = (top - 8 * random).to(dtype).unsqueeze(0)
            with instruction_set(limit):
                lse, _ = forward(logits)
            exact = torch.logsumexp(logits.double(), -1)
            unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
            assert (lse - exact).abs() <= 0.5 * unit.double() + 3e-7, top


@pytest.mark.parametrize("V", [1 << 18, 256_001])
def test_large_vocabularies(V):
    device_or_skip("linear_cross_entropy", "cpu")
    assert not wrong([loss_case("linear_cross_entropy", "large", 3, V, 8, reduction="none", return_argmax=True)], torch.bfloat16)
    assert not wrong([loss_case("cross_entropy", "large", 3, V, reduction="none", return_argmax=True)], torch.bfloat16)


def test_operators_check_what_they_are_given():
    device_or_skip("linear_cross_entropy", "cpu")
    ops = torch.ops.fastprimer
    x, weight, target = inputs(4, 8, 6)
    options = -100, 0.0, 0.0, None
    loss, lse, correction, _, kept, shift = ops.linear_cross_entropy_forward(x, weight, target, None, *options, 1 << 10)
    assert kept.shape == (4, 6) and ops.linear_cross_entropy_forward(x, weight, target, None, *options, 95)[4].shape == (4, 0)
    for bad, message in [
        ((x[0], weight, target, None), "x: expected shape"),
        ((x, weight[:, 1:], target, None), "weight: expected shape"),
        ((x, weight.half(), target, None), "weight: expected dtype"),
        ((x, weight, target[:3], None), "target: expected shape"),
        ((x, weight, target + 6, None), "target: expected numbers in 0..5"),
        ((x, weight, target, weight[:3, 0]), "bias: expected another shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.linear_cross_entropy_forward(*bad, *options, 0)
    backward = ops.linear_cross_entropy_backward
    with pytest.raises(RuntimeError, match="dloss: expected another shape"):
        backward(loss[:2], None, x, weight, target, lse, correction, kept, shift, None, *options, True, True)
    with pytest.raises(RuntimeError, match="kept: expected shape"):
        backward(loss, None, x, weight, target, lse, correction, kept[:, :4], shift, None, *options, True, True)
    with pytest.raises(RuntimeError, match="kept: expected another dtype"):
        backward(loss, None, x.bfloat16(), weight.bfloat16(), target, lse, correction, kept, shift, None, *options, True, True)
    with pytest.raises(RuntimeError, match="shift: expected another shape"):
        backward(loss, None, x.bfloat16(), weight.bfloat16(), target, lse, correction, kept.short(), shift, None, *options, True, True)
    with pytest.raises(RuntimeError, match="dlse: expected another dtype"):
        backward(loss, loss.double(), x, weight, target, lse, correction, kept, shift, None, *options, True, True)
    with pytest.raises(RuntimeError, match="target: expected numbers in 0..5"):
        ops.cross_entropy_forward(x @ weight.t(), target - 7, *options)
    with pytest.raises(RuntimeError, match="lse: expected another shape"):
        ops.cross_entropy_backward(loss, None, x @ weight.t(), target, lse[:1], correction, *options)


PEAK = """
import resource, sys
import torch
import fastprimer as fp
torch.set_num_threads(2)
N, C, V = 1024, 512, 32000
dtype = getattr(torch, sys.argv[2])
x, weight = (torch.randn(n, C, dtype=dtype, requires_grad=True) for n in (N, V))
target = torch.randint(0, V, (N,))
with fp.use_backend("cpu"):
    fp.linear_cross_entropy(x[:8], weight[:64], target[:8] % 64).backward()  # what is loaded once
    weight.grad = None
    gradients = torch.ones(N, C, dtype=dtype), torch.ones(V, C, dtype=dtype)  # as much as what is returned, touched and freed
    del gradients
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(fp.linear_cross_entropy(x, weight, target, memory_budget=int(sys.argv[1])), (x, weight))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("spread", [1, 30], ids=["near", "far"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_gradients_of_what_was_kept_in_16_bits(dtype, spread):
    """Also of z that are further apart than 16 bits tell."""
    device_or_skip("linear_cross_entropy", "cpu")
    x, weight, target = inputs(150, 64, 700, dtype)
    recomputed, kept = (results(x * spread, weight, target, memory_budget=budget) for budget in (0, 1 << 30))
    assert torch.equal(recomputed[0], kept[0])
    for a, b in zip(recomputed[1:], kept[1:], strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(b, a, rtol=2**-6, atol=2**-10 * a.abs().max().item())


@pytest.mark.parametrize("softcap, scale", [(0.05, 1), (5.0, 1), (30.0, 300)], ids=["small", "usual", "saturated"])
def test_the_slope_of_a_softcap_is_not_lost_in_what_is_kept(softcap, scale):
    device_or_skip("linear_cross_entropy", "cpu")
    x, weight, target = inputs(64, 64, 2000, torch.bfloat16)
    recomputed, kept = (results(x, weight * scale, target, softcap=softcap, memory_budget=budget) for budget in (0, 1 << 30))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))


def test_what_is_kept_in_16_bits():
    """Nothing of which a gradient is wanted in more, nor where a softcap's slope would be lost."""
    device_or_skip("linear_cross_entropy", "cpu")
    x, weight, target = inputs(4, 8, 300)
    half, bias = torch.bfloat16, torch.zeros(300)
    for dtype, b, softcap, expected in [
        (torch.float32, None, None, torch.float32),
        (half, None, None, torch.int16),
        (torch.float16, bias.half(), None, torch.int16),
        (half, bias, None, torch.float32),
        (half, None, 30.0, torch.float32),
    ]:
        arguments = x.to(dtype), weight.to(dtype), target, b, -100, 0.0, 0.0, softcap
        size = 2 * 300 + 4 * 3 if expected == torch.int16 else 4 * 300
        for functions in (torch.ops.fastprimer, reference):
            for budget, columns in ((4 * size, 300), (4 * size - 1, 256), (0, 0)):
                kept, shift = functions.linear_cross_entropy_forward(*arguments, budget)[4:]
                assert (kept.dtype, kept.shape) == (expected, (4, columns))
                assert shift.shape == (4, -(-columns // 128) if expected == torch.int16 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("budget, limit", [(0, 16_000_000), (88 << 20, 110_000_000)])
def test_extra_memory(budget, limit, dtype):
    """The peak of a process beyond its inputs and gradients: the logits alone would be 131 MB."""
    device_or_skip("linear_cross_entropy", "cpu")
    child = subprocess.run([sys.executable, "-c", PEAK, str(budget), name(dtype)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(child.stdout) * unit < limit
