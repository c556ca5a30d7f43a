"""Bugs planted in the Triton cross-entropy: each is caught in the interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")

from cross_entropy_checks import (  # noqa: E402
    EVERY,
    NOTHING,
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
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import _cross_entropy  # noqa: E402
from fastprimer.kernels import cross_entropy as kernels  # noqa: E402
from mutation import mutated  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),  # numpy's, on infinities
]

TILES, LAUNCHES = _cross_entropy, kernels
PLANTED = {
    "a later maximum without rescaling": (TILES, "s = tl.where(more, s * e + 1, s + e)", "s = tl.where(more, s + 1, s + e)"),
    "a smaller number counts fully": (TILES, "s = tl.where(more, s * e + 1, s + e)", "s = tl.where(more, s * e + 1, s + 1)"),
    "two infinities make a NaN": (TILES, "e = tl.where(z == m, 1.0, tl.exp(-tl.abs(z - m)))", "e = tl.exp(-tl.abs(z - m))"),
    "a NaN is not the largest": (TILES, "more = (z > m) | ((z != z) & (m == m))", "more = z > m"),
    "a tie to the higher column": (TILES, "more = (z > m) | ((z != z) & (m == m))", "more = (z >= m) | ((z != z) & (m == m))"),
    "lanes in the wrong order": (
        TILES,
        "tl.min(tl.where(tl.where(has_nan, m != m, m == top), place, NOBODY), 0)",
        "tl.max(tl.where(tl.where(has_nan, m != m, m == top), place, -1), 0)",
    ),
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
    "ignored rows kept": (TILES, "    if KEEP:\n        for start", "    if KEEP and not KEEP:\n        for start"),
    "an ignored token speaks": (TILES, "tl.store(argmax_ptr + row, -1)", "tl.store(argmax_ptr + row, 0)"),
    "a wrong target unnoticed": (TILES, 'z_target, float("nan"))', "z_target, 0.0)"),
    "z-loss forgotten": (TILES, "+ Z_LOSS * lse * lse", "+ 0 * lse"),
    "z-loss without gradient": (TILES, "dloss * (1 + 2 * Z_LOSS * lse)", "dloss"),
    "smoothing without gradient": (TILES, "dz -= dloss * LABEL_SMOOTHING / V", "dz -= 0 * dloss"),
    "dlse forgotten": (TILES, "dtop += tl.load(dlse_ptr + row).to(WIDE)", "dtop += 0 * tl.load(dlse_ptr + row).to(WIDE)"),
    "the gradient by the rounded lse": (TILES, "dtop *= tl.load(correction_ptr + row).to(WIDE)", "dtop *= 1.0"),
    "the loss by the rounded lse": (TILES, "log_s + (1 - LABEL_SMOOTHING) * (top - z_target)", "lse - (1 - LABEL_SMOOTHING) * z_target"),
    "a target in every piece": (TILES, "tl.where(first + column == target,", "tl.where(column == target,"),
    "the softcap's slope forgotten": (TILES, "dz *= 1 - t * t", "dz *= 1 - 0 * t"),
    "an ignored token's gradient": (TILES, "dl = tl.where(valid, dz, 0.0)", "dl = dz"),
    "dlogits beyond the piece": (TILES, "mask=column < columns)\n        else:", "mask=column <= columns)\n        else:"),
    "rows of the next sum": (TILES, "tl.minimum(first_row + ROWS, N)", "tl.minimum(first_row + ROWS + 1, N)"),
    "another sum's place": (TILES, "partial_ptr += chunk.to(tl.int64) * columns", "partial_ptr += chunk.to(tl.int64) // 2 * columns"),
    "16 bits rounded down": (TILES, "HIGHEST) + 0.5)", "HIGHEST) + 0.0)"),
    "16 bits have no infinity": (TILES, 'tl.where(z == LOWEST, float("-inf"), z * (1 / STEPS))', "z * (1 / STEPS)"),
    "16 bits by a piece's own blocks": (TILES, "tl.load(shift_ptr + (first + column) // BLOCK", "tl.load(shift_ptr + column // BLOCK"),
    "16 bits by the m before": (TILES, "if not LAST or state_ptr is not None:", "if not LAST:"),
    "an ignored row by its own m": (
        TILES,
        "tl.where(valid, tl.load(m_ptr + row, mask=valid, other=0.0) - TOP, 0.0)",
        "tl.load(m_ptr + row) - TOP",
    ),
    "what was kept capped again": (
        LAUNCHES,
        "gradients.dlogits(z, dl, first, raw=end > columns,",
        "gradients.dlogits(z, dl, first, raw=True,",
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
        for name in ("cross_entropy_fold_kernel", "cross_entropy_keep_kernel", "cross_entropy_gradient_kernel"):
            monkeypatch.setattr(kernels, name, getattr(copy, name))
        copy = kernels
    make_small(monkeypatch, copy)
    return copy


def checks(module):
    """Every mechanism once: pieces of both kinds, tails, special numbers, ties, ignored tokens and targets that do not exist."""
    rows = special_rows(100)
    arguments = rows, targets(len(rows), 100, (1,)), NOTHING, *upstream(len(rows))
    same(plain(module, *arguments), plain(reference, *arguments))
    check(plain, module, logits_of(5, 150) + 1000, targets(5, 150), NOTHING, upstream(5)[0], None)
    ties = torch.randint(0, 2, (6, 150), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(module.cross_entropy_forward(ties, targets(6, 150), *NOTHING)[3], ties.argmax(-1))
    assert module.pieces(600, 256, 512) == [(0, 256), (256, 600)]
    x, weight, bias = projection(5, 20, 530)
    dloss, dlse = upstream(5)
    x[2], dloss[2] = torch.nan, torch.inf
    check(linear, module, x, weight, bias, targets(5, 530, (2,)), EVERY, 4 * 5 * 300, dloss, dlse)
    for budget in (0, 1 << 20):
        check(linear, module, x, weight, None, targets(5, 530, (2,)), NOTHING, budget, dloss, None)
    x, weight, bias = (t.bfloat16() for t in projection(5, 20, 530))
    bias[7] = -torch.inf
    for budget in (5 * 600, 5 * (2 * 530 + 4 * 5), 1 << 20):  # in 16 bits: the first piece, all of three, one alone
        arguments = x, weight, bias, targets(5, 530, (2,)), NOTHING, budget, *upstream(5)
        check(linear, module, *arguments)
        assert not linear(module, *arguments)["dweight"][7].any()
    check_targets_that_do_not_exist(module)
    check_small_gradients(module)


def test_planted_bugs_have_a_sound_original(monkeypatch):
    make_small(monkeypatch, kernels)
    checks(kernels)


@pytest.mark.planted
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
