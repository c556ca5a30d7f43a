"""The Triton RoPE in the interpreter: every shape of tile, strides, positions, same bits, registration; and planted bugs, each caught."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import rope as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, random, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.rope")

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts")

TILES = [
    (2, 9, 3, 2, 16, 16),
    (3, 1, 11, 8, 64, 64),
    (1, 70, 9, 1, 128, 128),
    (2, 5, 3, 2, 23, 6),
    (1, 3, 17, 17, 80, 32),
    (1, 2, 2, 1, 1100, 1000),
    (1, 2, 1, 1, 8301, 8202),
    (1, 2, 2, 1, 3000, 2),
]
"""(B, S, H, Hk, D, R): several tokens and heads a tile, a tail of each; features that pass through, in one piece and in several;
more pairs than a tile."""


def tables(P, R, dtype=torch.float32):
    angle = torch.outer(torch.arange(P, dtype=torch.float64), 100.0 ** -torch.linspace(0, 1, R // 2, dtype=torch.float64))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def inputs(B, S, H, Hk, D, R, dtype=torch.float32, P=None):
    """q, k, cos, sin"""
    return random(0, B, S, H, D, dtype=dtype), random(1, B, S, Hk, D, dtype=dtype) if Hk else None, *tables(P or S, R)


def some_positions(P, *shape, dtype=torch.int64):
    return torch.randint(P, shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def shares(module, q, k, cos, sin, positions=None, interleaved=False):
    """Each result's share of its error budget, by name; q and k stand for their gradients too."""

    def run(functions, wide):
        tensors = [t if t is None else wide(t) for t in (q, k, cos, sin)]
        q_rotated, k_rotated = functions.rope_forward(*tensors, positions, interleaved)
        dq, dk = functions.rope_backward(*tensors, positions, interleaved)
        return {"q": q_rotated, "k": k_rotated, "dq": dq, "dk": dk}

    return shares_of(run, module, reference)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("sizes", TILES, ids=str)
def test_tiles(sizes, dtype, interleaved):
    assert_within_budget(shares(kernels, *inputs(*sizes, dtype), interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_alone(interleaved):
    q, _, cos, sin = inputs(2, 5, 3, 0, 40, 32, torch.bfloat16)
    assert_within_budget(shares(kernels, q, None, cos, sin, interleaved=interleaved))
    assert kernels.rope_forward(q, None, cos, sin, None, interleaved)[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions(dtype):
    B, S, P = 3, 37, 50
    q, k, cos, sin = inputs(B, S, 2, 1, 32, 32, P=P)
    numbers = some_positions(P, B, S, dtype=dtype)
    gaps = some_positions(P, B, 3 * S, dtype=dtype)[:, ::3]
    for positions in (numbers, numbers.t().contiguous().t(), numbers[:1].expand(B, -1), gaps):
        assert_within_budget(shares(kernels, q, k, cos, sin, positions))
    assert_within_budget(shares(kernels, q[0], k[0], cos, sin, gaps[0], interleaved=True))
    assert_within_budget(shares(kernels, q[0], k[0], cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_the_tables_give_nan(interleaved):
    q, k, cos, sin = inputs(1, 6, 3, 2, 24, 16)
    for bad in (-1, 6, 2**40, -(2**62)):
        positions = torch.tensor([[0, bad, 5, 3, bad, 1]])
        for rotated, x in zip(kernels.rope_forward(q, k, cos, sin, positions, interleaved), (q, k), strict=True):
            assert rotated[:, [1, 4], :, :16].isnan().all()
            assert torch.equal(rotated[..., 16:], x[..., 16:])
        outside = positions == bad
        good = reference.rope_forward(q, k, cos, sin, positions.masked_fill(outside, 0), interleaved)
        for rotated, expected in zip(kernels.rope_forward(q, k, cos, sin, positions, interleaved), good, strict=True):
            torch.testing.assert_close(rotated[~outside], expected[~outside])


@pytest.mark.parametrize("interleaved", [False, True])
def test_nan_stays_in_its_pair(interleaved):
    q, k, cos, sin = inputs(1, 4, 2, 2, 24, 16)
    q[0, 2, 1, 3] = float("nan")
    rotated = kernels.rope_forward(q, k, cos, sin, None, interleaved)[0]
    found = rotated.isnan().nonzero()[:, -1].tolist()
    assert found == ([2, 3] if interleaved else [3, 11])


@pytest.mark.parametrize("make", ["half", "whole heads", "transposed", "one pair"])
def test_tables(make):
    S, R = 9, 2 if make == "one pair" else 16
    q, k, cos, sin = inputs(2, S, 2, 1, 32, R, torch.bfloat16)
    change = {
        "half": lambda t: t.bfloat16(),
        "whole heads": lambda t: torch.cat((t, t), -1)[:, : R // 2],
        "transposed": lambda t: t.t().contiguous().t(),
        "one pair": lambda t: t.repeat(1, 3)[:, 1:2],
    }[make]
    assert_within_budget(shares(kernels, q, k, change(cos), change(sin)))


VIEWS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "part of a projection": lambda t: torch.cat((t, t, t), -2)[:, :, t.shape[2] : 2 * t.shape[2]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "unaligned": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_not_copied(view):
    q, k, cos, sin = inputs(2, 7, 4, 3, 32, 24, torch.bfloat16)
    q, k = VIEWS[view](q), VIEWS[view](k)
    assert kernels.as_heads(q).data_ptr() == q.data_ptr() and kernels.as_heads(q).stride() == q.stride()
    assert_within_budget(shares(kernels, q, k, cos, sin))
    assert_within_budget(shares(kernels, q, k.contiguous(), cos, sin, interleaved=True))


def test_scattered_features_are_copied():
    q, k, cos, sin = inputs(2, 7, 4, 3, 32, 24)
    q, k = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k))
    assert kernels.as_heads(q).is_contiguous() and torch.equal(kernels.as_heads(q), q)
    assert_within_budget(shares(kernels, q, k, cos, sin))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 1), (2, 0, 2, 1), (2, 3, 0, 0), (2, 3, 2, 0), (2, 3, 0, 2)], ids=str)
def test_nothing_to_rotate(sizes):
    B, S, H, Hk = sizes
    q, k, (cos, sin) = random(0, B, S, H, 8), random(1, B, S, Hk, 8), tables(5, 8)
    for got, expected in zip(kernels.rope_forward(q, k, cos, sin, None, False), reference.rope_forward(q, k, cos, sin, None, False)):  # noqa: B905
        torch.testing.assert_close(got, expected)


FAR = {"sequences": (3, 1, 1), "tokens": (1, 3, 1), "heads": (1, 1, 3)}


def far(kind, D=16):
    """Three sequences, tokens or heads, the last one beyond 2^31 elements (of which only these are ever touched)."""
    shape = (*FAR[kind], D)
    x = torch.empty(2**31 + D, dtype=torch.bfloat16).as_strided(shape, [2**30 if n == 3 else D for n in shape[:3]] + [1])
    return x.copy_(random(0, *shape))


@pytest.mark.parametrize("kind", FAR)
def test_offsets_beyond_32_bits(kind):
    q = far(kind)
    assert_within_budget(shares(kernels, q, q.contiguous(), *tables(3, 8)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_same_bits_in_every_program_order(interleaved):
    q, k, cos, sin = inputs(3, 40, 9, 2, 64, 48, torch.bfloat16)
    results = []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            results.append([*kernels.rope_forward(q, k, cos, sin, None, interleaved)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_tiles_are_what_triton_can_launch():
    for D in [*range(2, 300), 4096, 8191, 8194, 100000]:
        for R in {2, D // 2 // 2 * 2 or 2, D // 2 * 2}:
            for S in (1, 10, 2048):
                for heads in (1, 3, 8, 128):
                    *powers, num_warps = kernels.tile(S, heads, D, R)
                    TOKENS, HEADS, PAIRS, REST = powers
                    assert all(n & (n - 1) == 0 for n in (*powers, num_warps)) and 1 <= num_warps <= 16
                    assert TOKENS < 2 * S and HEADS < 2 * heads
                    assert TOKENS * HEADS * PAIRS <= 256 * num_warps and TOKENS * HEADS * REST <= kernels.PAIRS_IN_TILE


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_in_float64(interleaved):
    q, k, cos, sin = (t.double() for t in inputs(1, 2, 2, 1, 5, 4))
    leaves = q.requires_grad_(), k.requires_grad_()
    with fp.use_backend("triton"):
        assert torch.autograd.gradcheck(lambda q, k: fp.rope(q, k, cos, sin, interleaved=interleaved), leaves)


def test_operators():
    q, k, cos, sin = inputs(2, 5, 3, 2, 16, 12)
    positions = some_positions(5, 2, 5)
    leaves, upstream = [q.requires_grad_(), k.requires_grad_()], [random(3, *q.shape), random(4, *k.shape)]

    def call(q, k):
        return fp.rope(q, k, cos, sin, positions=positions)

    with fp.use_backend("triton"):
        assert fp.explain(fp.rope, q, k, cos, sin).backend == "triton"
        rotated = call(q, k)
        grads = torch.autograd.grad(rotated, leaves, upstream)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled[0], rotated[0]) and torch.equal(torch.autograd.grad(compiled, leaves, upstream)[1], grads[1])
    with fp.use_backend("reference"):
        torch.testing.assert_close(grads, torch.autograd.grad(call(q, k), leaves, upstream))
    q, k = q.detach(), k.detach()
    for args in [(q, k, cos, sin, positions, False), (q[0], None, cos, sin, None, True)]:
        torch.library.opcheck(torch.ops.fastprimer_triton.rope_forward.default, args)
        torch.library.opcheck(torch.ops.fastprimer_triton.rope_backward.default, args)


PLANTED = {
    "unmasked tail of pairs": ("inside = exists & (pair < R // 2)", "inside = exists & (pair < PAIRS)"),
    "unmasked tail of features": ("mask=exists & (feature < R), other", "mask=exists, other"),
    "unmasked tokens": ("(token < S) & (head < heads)", "head < heads"),
    "unmasked heads": ("(token < S) & (head < heads)", "(token < S) & (head < head + 1)"),
    "wrong pairing": ("x_b = tl.load(head_ptr + R // 2 + pair,", "x_b = tl.load(head_ptr + 1 + pair,"),
    "halves taken for pairs": ("(c.shape[0], HEADS, PAIRS, 2))", "(c.shape[0], HEADS, 2, PAIRS)).permute(0, 1, 3, 2)"),
    "sign of sin": ("rotated_head_ptr + pair, (a * c - b * s)", "rotated_head_ptr + pair, (a * c + b * s)"),
    "backward not reversed": ("s = -s", "s = s"),
    "a rounded pair": ("x_b.to(c.dtype)", "x_b.to(tl.bfloat16).to(c.dtype)"),
    "k by q's stride": ("stride_k_head, S, Hk,\n", "stride_q_head, S, Hk,\n"),
    "k by q's heads": ("stride_k_head, S, Hk,\n", "stride_k_head, S, H,\n"),
    "k's rest by q's stride": ("stride_k_token, stride_k_head, S, Hk, D", "stride_q_token, stride_k_head, S, Hk, D"),
    "heads of the first tile only": ("(first_head + tl.arange(0, HEADS))", "tl.arange(0, HEADS)"),
    "positions ignored": ("position = tl.load(position_ptr,", "_ = tl.load(position_ptr,"),
    "positions of the first sequence": ("batch * stride_positions_batch", "0 * batch"),
    "sin by cos's rows": ("position * stride_sin_row", "position * stride_cos_row"),
    "a feature not copied": ("for first_feature in range(R, D, REST)", "for first_feature in range(R + 1, D, REST)"),
}


def checks(module):
    for R in (12, 26):
        q, k, cos, sin = inputs(2, 5, 3, 9, 26, R, P=7)
        q, sin = VIEWS["heads first"](q), torch.cat((sin, sin), -1)[:, : R // 2]
        for interleaved in (False, True):
            assert_within_budget(shares(module, q, k, cos, sin, some_positions(7, 2, 5), interleaved))


def test_planted_bugs_have_a_sound_original():
    checks(kernels)


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path):
    planted = mutated(kernels, *PLANTED[bug], tmp_path)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        checks(planted)


@pytest.mark.parametrize("change", [("position < P", "position < P + 2"), ("position >= 0", "position >= -1")], ids=str)
def test_planted_unguarded_position_is_caught(change, tmp_path):
    q, k, cos, sin = inputs(1, 3, 2, 1, 8, 8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        mutated(kernels, *change, tmp_path).rope_forward(q, k, cos, sin, torch.tensor([[-1, 4, 0]]), False)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("sequences", "(tl.program_id(0) // tiles).to(tl.int64)", "tl.program_id(0) // tiles"),
        ("tokens", "(tl.program_id(0) % tiles).to(tl.int64)", "(tl.program_id(0) % tiles)"),
        ("heads", "(first_head + tl.arange(0, HEADS)).to(tl.int64)", "(first_head + tl.arange(0, HEADS))"),
    ],
)
def test_planted_32_bit_offset_is_caught(kind, old, new, tmp_path):
    q = far(kind)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        mutated(kernels, old, new, tmp_path).rope_forward(q, None, *tables(3, 8), None, False)
