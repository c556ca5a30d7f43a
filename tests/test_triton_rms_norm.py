"""The Triton RMSNorm in the interpreter: every shape of tile, strides, same bits, registration; and planted bugs, each caught."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import rms_norm as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, random, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.rms_norm")

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts")

TILES = [(37, 1), (21, 3), (70, 128), (11, 1000), (3, 4096), (9, 8192), (11, 8200), (3, 20000)]
"""(N, C): packed rows, one row a tile, a row split in backward, a row split in both; more tiles than backward has programs."""


def shares(module, x, weight, residual, dy, dh, offset=1.0):
    """Each result's share of its error budget, by name."""

    def run(functions, wide):
        a, w, r, b, c = (t if t is None else wide(t) for t in (x, weight, residual, dy, dh))
        y, h, rstd = functions.rms_norm_forward(a, w, 1e-6, r, offset)
        dx, dweight = functions.rms_norm_backward(b, c, a if r is None else h, w, rstd, offset, True)
        return {"y": y, "h": h, "rstd": rstd, "dx": dx, "dweight": dweight}

    return shares_of(run, module, reference)


def inputs(N, C, dtype, weight=True, residual=True):
    return (
        random(0, N, C, dtype=dtype),
        random(1, C, dtype=dtype) if weight else None,
        random(2, N, C, dtype=dtype) if residual else None,
        random(3, N, C, dtype=dtype),
        random(4, N, C, dtype=dtype) if residual else None,
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("N", "C"), TILES)
def test_tiles(N, C, dtype):
    assert_within_budget(shares(kernels, *inputs(N, C, dtype)))


@pytest.mark.parametrize(("weight", "residual"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("N", "C"), [(21, 48), (9, 8200)])
def test_absent_tensors(N, C, weight, residual):
    assert_within_budget(shares(kernels, *inputs(N, C, torch.bfloat16, weight, residual)))


def test_float32_weight_of_a_bfloat16_input():
    x, weight, residual, dy, dh = inputs(21, 48, torch.bfloat16)
    found = shares(kernels, x, weight.float() * 1.001, residual, dy, dh)
    assert_within_budget(found)
    assert kernels.rms_norm_backward(dy, dh, x, weight.float(), random(5, 21).abs(), 0.0, True)[1].dtype == torch.float32


def test_strides():
    N, C = 12, 40
    x = random(0, 6, 2, 2 * C)[..., :C]
    residual = random(1, C, 6, 2).permute(1, 2, 0)
    dy, dh = random(2, C).expand(6, 2, C), random(3, 2, 6, C).transpose(0, 1)
    weight = random(4, 2 * C)[::2]
    assert kernels.as_rows(x).data_ptr() == x.data_ptr() and kernels.as_rows(x).stride() == (2 * C, 1)
    assert kernels.as_rows(dy).stride() == (0, 1) and kernels.as_rows(residual).shape == (N, C)
    assert_within_budget(shares(kernels, x, weight, residual, dy, dh))


def test_zero_rows():
    x, weight = torch.empty(3, 0, 8), torch.ones(8)
    y, h, rstd = kernels.rms_norm_forward(x, weight, 1e-6, x, 0.0)
    dx, dweight = kernels.rms_norm_backward(y, None, h, weight, rstd, 0.0, True)
    assert y.shape == h.shape == dx.shape == x.shape and rstd.shape == (3, 0)
    assert torch.equal(dweight, torch.zeros(8))


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")  # of a tile's rows behind the last
def test_rows_whose_mean_square_is_subnormal():
    x = random(0, 2, 64).float() * 1e-20
    (y, _, rstd), (expected, _, scale) = (f.rms_norm_forward(x, None, 0.0, None, 0.0) for f in (kernels, reference))
    torch.testing.assert_close((y, rstd), (expected, scale))


def far_rows(C=64):
    """Three rows, the last one beyond 2^31 elements (of which only the rows are ever touched)."""
    x = torch.empty(2**31 + C, dtype=torch.bfloat16).as_strided((3, C), (2**30, 1))
    return x.copy_(random(0, 3, C))


def test_offsets_beyond_32_bits():
    x = far_rows()
    _, weight, _, dy, _ = inputs(3, 64, torch.bfloat16)
    assert_within_budget(shares(kernels, x, weight, None, dy, None))


@pytest.mark.parametrize(("N", "C"), [(70, 128), (11, 8200)])
def test_same_bits_in_every_program_order(N, C):
    x, weight, residual, dy, dh = inputs(N, C, torch.bfloat16)
    results = []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            y, h, rstd = kernels.rms_norm_forward(x, weight, 1e-6, residual, 0.0)
            results.append([y, h, rstd, *kernels.rms_norm_backward(dy, dh, h, weight, rstd, 0.0, True)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_tiles_are_what_triton_can_launch():
    for C in [*range(1, 300), 4095, 4096, 4097, 8191, 8193, 16385, 262144]:
        for limits in (kernels.FORWARD, kernels.BACKWARD):
            ROWS, COLUMNS, SPLIT, num_warps = kernels.tile(C, limits)
            assert SPLIT == (COLUMNS < C) and (ROWS == 1 or not SPLIT)
            assert all(n & (n - 1) == 0 for n in (ROWS, COLUMNS, num_warps)) and 1 <= num_warps <= 16


def test_operators():
    x, weight, residual, dy, dh = inputs(6, 48, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    with fp.use_backend("triton"):
        assert fp.explain(fp.rms_norm, x, weight).backend == "triton"
        y, h = fp.rms_norm(x, weight, residual=residual)
        grads = torch.autograd.grad([y, h], leaves, [dy, dh])
        compiled = torch.compile(lambda *a: fp.rms_norm(a[0], a[1], residual=a[2]), fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled[0], y) and torch.equal(torch.autograd.grad(compiled, leaves, [dy, dh])[1], grads[1])
    with fp.use_backend("reference"):
        expected = torch.autograd.grad(fp.rms_norm(x, weight, residual=residual), leaves, [dy, dh])
    torch.testing.assert_close(grads, expected)
    x, weight, residual = (t.detach() for t in leaves)
    rstd = torch.ops.fastprimer_triton.rms_norm_forward(x, weight, 1e-6, residual, 0.0)[2]
    for args in [(x, weight, 1e-6, residual, 0.0), (x, None, 1e-6, None, 0.0)]:
        torch.library.opcheck(torch.ops.fastprimer_triton.rms_norm_forward.default, args)
    for args in [(dy, dh, x, weight, rstd, 0.0, True), (dy, dh, x, weight, rstd, 0.0, False), (dy, None, x, None, rstd, 0.0, True)]:
        torch.library.opcheck(torch.ops.fastprimer_triton.rms_norm_backward.default, args)


PLANTED = {
    "unmasked tail": ("(row < N)[:, None] & (column < C)[None, :]", "(row < N)[:, None] & (column >= 0)[None, :]", (21, 48)),
    "unmasked rows": ("tl.store(rstd_ptr + row, rstd, mask=row < N)", "tl.store(rstd_ptr + row, rstd)", (21, 48)),
    "masked load without other": ("stride_x_row), mask=inside, other=0.0)", "stride_x_row), mask=inside)", (21, 48)),
    "dropped weight offset": ("(weight.to(tl.float32) + weight_offset)[None, :]", "weight.to(tl.float32)[None, :]", (21, 48)),
    "eps twice": ("/ C + eps)", "/ C + 2 * eps)", (21, 48)),
    "mean over the tile": ("tl.sum(products, 1) / C", "tl.sum(products, 1) / COLUMNS", (21, 48)),
    "dh forgotten": ("        dx += tl.load(_at(dh_ptr", "        dx = dx + 0 * tl.load(_at(dh_ptr", (21, 48)),
    "wrong dweight reduction": ("column, tl.sum(dweight, 0)", "column, tl.max(dweight, 0)", (70, 128)),
    "partials of one program": ("partial.sum(0)", "partial[0]", (700, 128)),
    "programs share a partial": ("partial_ptr + program * C + column,", "partial_ptr + column,", (700, 128)),
    "split dweight of the last row": ("share + tl.sum(dy_block", "tl.sum(dy_block", (11, 8200)),
    "second block left out of the statistics": ("squares += block * block", "squares += 0 * block", (2, 20000)),
}


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path):
    old, new, (N, C) = PLANTED[bug]
    x, weight, residual, dy, dh = inputs(N, C, torch.float32)
    x, residual = x * 1e-3, residual * 1e-3
    assert_within_budget(shares(kernels, x, weight, residual, dy, dh))
    planted = mutated(kernels, old, new, tmp_path)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        assert_within_budget(shares(planted, x, weight, residual, dy, dh))


def test_planted_32_bit_offset_is_caught(tmp_path):
    planted = mutated(kernels, "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", tmp_path)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        planted.rms_norm_forward(far_rows(), None, 1e-6, None, 0.0)
