"""The Triton SwiGLU in the interpreter: tiles, activations, layouts, NaN, same bits, registration; and planted bugs, each caught."""

import functools
import importlib
import math

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
import kernel_checks  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import swiglu as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, launched, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.swiglu")

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, on infinities
]

random = functools.partial(kernel_checks.random, scale=2.0)
OPTIONS = {name: reference.constants(name) for name in reference.ACTIVATIONS} | {
    "clamped_silu": (1.0, 0.0, 0.5, 0.0),
    "clamped_gelu": (*reference.constants("gelu_tanh")[:2], 1.5, 0.25),
}
SIZES = [(1, 1), (3, 7), (70, 16), (5, 1000), (2, 1024), (3, 2500)]
"""(N, F): several rows a tile, one row a tile, a row of several tiles; a tail of each kind."""


def inputs(N, F, dtype=torch.float32, packed=False, scale=2.0):
    """dy, gate, up"""
    if packed:
        return random(0, N, F, dtype=dtype), random(1, N, 2 * F, dtype=dtype, scale=scale), None
    return random(0, N, F, dtype=dtype), random(1, N, F, dtype=dtype, scale=scale), random(2, N, F, dtype=dtype, scale=scale)


def shares(module, dy, gate, up, activation="silu"):
    """Each result's share of its error budget, by name."""
    options = OPTIONS[activation]

    def run(functions, wide):
        g, a, b = (t if t is None else wide(t) for t in (dy, gate, up))
        y = functions.swiglu_forward(a, b, *options)
        dgate, dup = functions.swiglu_backward(g, a, b, *options)
        return {"y": y, "dgate": dgate, "dup": dup}

    return shares_of(run, module, reference)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles(size, dtype, packed):
    assert_within_budget(shares(kernels, *inputs(*size, dtype, packed)))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 4.0, 70.0])
@pytest.mark.parametrize("activation", OPTIONS)
def test_activations(activation, scale, dtype):
    assert_within_budget(shares(kernels, *inputs(9, 130, dtype, scale=scale), activation))
    assert_within_budget(shares(kernels, *inputs(9, 130, dtype, True, scale), activation))


def test_a_scalar():
    dy, gate, up = random(0), random(1), random(2)
    assert_within_budget(shares(kernels, dy, gate, up))
    assert kernels.swiglu_forward(gate, up, 1.0, 0.0, None, 0.0).shape == ()


def test_halves_of_a_projection_are_not_copied(monkeypatch):
    N, F = 6, 40
    both = random(1, 2, 3, 2 * F, dtype=torch.bfloat16)
    dy = random(0, 2 * F).expand(2, 3, -1)[..., 1 : F + 1].bfloat16()
    for gate, up in [both.chunk(2, dim=-1), (both, None)]:
        assert_within_budget(shares(kernels, dy, gate, up))
    seen = launched(monkeypatch, kernels, "swiglu_backward_kernel")
    kernels.swiglu_backward(dy, *both.chunk(2, dim=-1), 1.0, 0.0, None, 0.0)
    _, _, gate, up = seen[:4]
    assert gate.data_ptr() == both.data_ptr() and up.data_ptr() == both[..., F:].data_ptr()
    assert gate.shape == up.shape == (N, F) and gate.stride() == up.stride() == (2 * F, 1)


def test_rows_without_gaps_are_one_row(monkeypatch):
    dy, gate, up = inputs(6, 40)
    seen = launched(monkeypatch, kernels, "swiglu_forward_kernel")
    kernels.swiglu_forward(gate, up, 1.0, 0.0, None, 0.0)
    assert seen[0] == (1,) and [t.shape for t in seen[1:4]] == [(1, 240)] * 3


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other number": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "one row repeated": lambda t: t[:1].expand(t.shape),
    "unaligned": lambda t: torch.nn.functional.pad(t, (1, 2))[:, 1:-2],
    "three dimensions": lambda t: t.view(3, 4, -1).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    view = LAYOUTS[layout]
    dy, gate, up = inputs(12, 48, torch.bfloat16)
    assert_within_budget(shares(kernels, view(dy), view(gate), view(up), "gpt_oss"))
    dy, gate, _ = inputs(12, 24, torch.bfloat16, packed=True)
    assert_within_budget(shares(kernels, view(dy), view(gate), None, "gpt_oss"))


def test_only_one_has_gaps():
    dy, gate, up = inputs(12, 48)
    for gaps in range(3):
        tensors = [LAYOUTS["unaligned"](t) if i == gaps else t for i, t in enumerate((dy, gate, up))]
        assert_within_budget(shares(kernels, *tensors))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,), (2, 0, 6)], ids=str)
def test_nothing_to_do(shape):
    x = torch.empty(shape)
    assert kernels.swiglu_forward(x, x, 1.0, 0.0, None, 0.0).shape == shape
    assert [t.shape for t in kernels.swiglu_backward(x, x, x, 1.0, 0.0, None, 0.0)] == [shape, shape]
    y = kernels.swiglu_forward(x, None, 1.0, 0.0, None, 0.0)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert [t.shape for t in kernels.swiglu_backward(y, x, None, 1.0, 0.0, None, 0.0)] == [shape, (0,)]


def everything(functions, dy, gate, up, activation):
    options = OPTIONS[activation]
    return [functions.swiglu_forward(gate, up, *options), *functions.swiglu_backward(dy, gate, up, *options)]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("activation", OPTIONS)
def test_no_finite_input_overflows_on_the_way(activation, dtype):
    """Infinite where float64, in which nothing overflows, has a number too large for the type, and nowhere else; never NaN."""
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([-largest, -largest / 2, -1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4, largest / 2, largest])
    gate, up = (t.flatten().to(dtype) for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    dy = torch.full_like(gate, 0.5)
    truth = everything(reference, dy.double(), gate.double(), up.double(), activation)
    for got, expected in zip(everything(kernels, dy, gate, up, activation), truth, strict=True):
        assert not got.isnan().any() and torch.equal(got.isinf(), expected.to(dtype).isinf())


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("activation", OPTIONS)
def test_nan_and_infinity_are_those_of_the_reference(activation, packed):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.25, -20.0])
    dy, gate, up = (t.flatten() for t in torch.meshgrid(special, special, special, indexing="ij"))
    y, dgate, dup = everything(kernels, dy, gate, up, activation)
    assert y[gate.isnan() | up.isnan()].isnan().all()
    assert dgate[gate.isnan() | up.isnan()].isnan().all() and dup[gate.isnan()].isnan().all()
    arguments = (dy, torch.cat((gate, up)), None) if packed else (dy, gate, up)
    expected = everything(reference, *arguments, activation)
    torch.testing.assert_close(everything(kernels, *arguments, activation), expected, equal_nan=True)


def far_rows(F=64):
    """Three rows, the last one beyond 2^31 elements (of which only the rows are ever touched)."""
    x = torch.empty(2**31 + F, dtype=torch.bfloat16).as_strided((3, F), (2**30, 1))
    return x.copy_(random(0, 3, F))


def test_offsets_beyond_32_bits():
    x = far_rows()
    assert_within_budget(shares(kernels, x, x, x))
    assert_within_budget(shares(kernels, x[:, :32], x, None))


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_same_bits_in_every_program_order(packed):
    dy, gate, up = inputs(7, 1500, torch.bfloat16, packed)
    results = []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            results.append(everything(kernels, dy, gate, up, "gelu_tanh"))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_tiles_are_what_triton_can_launch():
    for F in [*range(1, 300), 1023, 1024, 1025, 14336, 2**33]:
        for N in (1, 2, 100, 10**6):
            ROWS, COLUMNS, num_warps = kernels.tile(N, F)
            assert all(n & (n - 1) == 0 for n in (ROWS, COLUMNS, num_warps)) and 1 <= num_warps <= 16
            assert ROWS < 2 * N and COLUMNS < 2 * F and ROWS * COLUMNS <= min(1024, 256 * num_warps)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradients_in_float64(activation, packed):
    leaves = [t.double().requires_grad_() for t in inputs(2, 4, packed=packed)[1:] if t is not None]
    with fp.use_backend("triton"):
        assert torch.autograd.gradcheck(lambda *a: fp.swiglu(*a, activation=activation, limit=1.5), leaves)


def test_operators():
    dy, gate, up = inputs(6, 48)
    leaves = [gate.requires_grad_(), up.requires_grad_()]

    def call(gate, up):
        return fp.swiglu(gate, up, activation="gpt_oss")

    with fp.use_backend("triton"):
        assert fp.explain(fp.swiglu, gate, up).backend == "triton"
        y = call(gate, up)
        grads = torch.autograd.grad(y, leaves, dy)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, y) and torch.equal(torch.autograd.grad(compiled, leaves, dy)[1], grads[1])
    with fp.use_backend("reference"):
        torch.testing.assert_close(grads, torch.autograd.grad(call(gate, up), leaves, dy))
    for args in [(gate.detach(), up.detach(), *OPTIONS["gpt_oss"]), (gate.detach(), None, *OPTIONS["silu"])]:
        torch.library.opcheck(torch.ops.fastprimer_triton.swiglu_forward.default, args)
        upstream = dy if args[1] is not None else dy[:, :24]
        torch.library.opcheck(torch.ops.fastprimer_triton.swiglu_backward.default, (upstream, *args))


PLANTED = {
    "unmasked tail": ("(row < N) & (column < F)", "(row < N) & (column >= 0)"),
    "unmasked rows": ("(row < N) & (column < F)", "(row >= 0) & (column < F)"),
    "up by gate's stride": ("b = tl.load(up_ptr + row * stride_up_row", "b = tl.load(up_ptr + row * stride_gate_row"),
    "dy by gate's stride": ("dy_ptr + row * stride_dy_row", "dy_ptr + row * stride_gate_row"),
    "gradients by F": ("place = row * stride_gradient_row", "place = row * F"),
    "rows with gaps joined": (
        "t.view(1, -1) for t in tensors) if all(t.is_contiguous() for t in tensors)",
        "t.as_strided((1, t.numel()), (1, 1)) for t in tensors) if tensors[-1].is_contiguous()",
    ),
    "gate and up exchanged": ("return rows(gate).chunk(2, dim=1) if", "return rows(gate).chunk(2, dim=1)[::-1] if"),
    "offset dropped in forward": ("sigma * (b + OFFSET)", "sigma * b"),
    "offset dropped in backward": ("dy_a * slope * (b + OFFSET)", "dy_a * slope * b"),
    "mask of gate dropped": ("dy_a = tl.where(gate > limit, 0.0, dy)", "dy_a = dy"),
    "mask of up one-sided": ("tl.where(tl.abs(up) > limit, 0.0", "tl.where(up > limit, 0.0"),
    "gate clamped from both sides": (
        "a = tl.where(a > limit, limit, a)",
        "a = tl.where(a > limit, limit, tl.where(a < -limit, -limit, a))",
    ),
    "up clamped from above only": ("tl.where(b < -limit, -limit, b))", "b)"),
    "sigma of -t": ("tl.where(t < 0, e * r, r)", "tl.where(t > 0, e * r, r)"),
    "alpha forgotten in the slope": ("slope = sigma + ALPHA * p", "slope = sigma + p"),
    "beta forgotten in the slope": ("slope += 3 * BETA", "slope += BETA"),
}


def checks(module):
    for activation in ("silu", "gelu_tanh", "clamped_gelu"):
        for N, F in [(5, 13), (3, 1100)]:
            dy, gate, up = inputs(N, F)
            assert_within_budget(shares(module, LAYOUTS["every other row"](dy), LAYOUTS["unaligned"](gate), up, activation))
            assert_within_budget(shares(module, *inputs(N, F, packed=True), activation))


def test_planted_bugs_have_a_sound_original():
    checks(kernels)


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path):
    planted = mutated(kernels, *PLANTED[bug], tmp_path)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        checks(planted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.exp(-tl.abs(t))", "tl.exp(-t)"),
        ("3 * BETA * p * a * a", "3 * BETA * (a * a) * p"),
        ("return tl.where(t < 0, e * r, r), e * r * r", "return 1 / (1 + tl.exp(-t)), tl.exp(t) / (1 + tl.exp(t)) / (1 + tl.exp(t))"),
    ],
)
def test_planted_overflow_is_caught(old, new, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "kernels", mutated(kernels, old, new, tmp_path))
    with pytest.raises(AssertionError):
        for activation in OPTIONS:
            test_no_finite_input_overflows_on_the_way(activation, torch.float32)


def test_planted_swallowed_nan_is_caught(tmp_path, monkeypatch):
    planted = mutated(kernels, "a = tl.where(a > limit, limit, a)", "a = tl.where(a < limit, a, limit)", tmp_path)
    monkeypatch.setitem(globals(), "kernels", planted)
    with pytest.raises(AssertionError):
        test_nan_and_infinity_are_those_of_the_reference("gpt_oss", False)


def test_planted_32_bit_offset_is_caught(tmp_path):
    planted = mutated(kernels, "(tl.program_id(0) // blocks).to(tl.int64)", "(tl.program_id(0) // blocks)", tmp_path)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        planted.swiglu_forward(far_rows(), None, 1.0, 0.0, None, 0.0)
