"""Triton's interpreter as fastprimer/interpreter.py mends it: each thing it promises, and that it notices each planted bug."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as stock  # noqa: E402

import fastprimer.kernels  # noqa: E402, F401
from fastprimer import interpreter, interpreter_speed  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402

HERE = Path(__file__).parent
FILES = [*sorted(path.name for path in HERE.glob("test_triton_*.py")), "test_attention.py", "test_traffic.py", Path(__file__).name]

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="runs in the process that test_in_the_interpreter starts")


@pytest.mark.slow(minutes=3)
@pytest.mark.skipif(interpreting(), reason="this is the process with the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    """This file and all others with Triton kernels once more, each in a process that has TRITON_INTERPRET set when it imports Triton."""
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-p", "no:cacheprovider", "--tb=short"]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if child.returncode:
        pytest.fail(f"under TRITON_INTERPRET=1:\n{child.stdout[-20000:]}", pytrace=False)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@triton.jit
def _elementwise(x_ptr, y_ptr, add_ptr, mul_ptr, fma_ptr, less_ptr, clamp_ptr, constant_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(add_ptr + i, x + y)
    tl.store(mul_ptr + i, x * y)
    tl.store(fma_ptr + i, tl.fma(x, y, x))
    tl.store(less_ptr + i, (x < y).to(tl.bfloat16))
    tl.store(clamp_ptr + i, tl.clamp(x, -y, y))
    tl.store(constant_ptr + i, tl.full((N,), 0.1, tl.bfloat16))


@needs_interpreter
def test_bfloat16_elementwise():
    x, y = random(256), random(2, 256)[1].abs()
    out = [torch.empty_like(x) for _ in range(6)]
    _elementwise[(1,)](x, y, *out, 256)
    fma = (x.float() * y.float() + x.float()).bfloat16()
    for got, expected in zip(out, [x + y, x * y, fma, (x < y).bfloat16(), x.clamp(-y, y), torch.full_like(x, 0.1)], strict=True):
        assert torch.equal(got, expected)


@triton.jit
def _collective(x_ptr, y_ptr, sum_ptr, cumsum_ptr, argmax_ptr, max_ptr, dot_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(sum_ptr + i, tl.sum(x, 1))
    tl.store(cumsum_ptr + at, tl.cumsum(x, 1))
    largest, place = tl.max(x, 1, return_indices=True)
    tl.store(max_ptr + i, largest.to(tl.bfloat16))
    tl.store(argmax_ptr + i, place)
    tl.store(dot_ptr + at, tl.dot(x, y))


@needs_interpreter
def test_bfloat16_collective():
    N = 32
    x, y = random(N, N), random(2, N, N)[1].contiguous()
    total, largest, place = x.new_empty(N), x.new_empty(N), torch.empty(N, dtype=torch.int32)
    running, product = torch.empty_like(x), torch.empty(N, N)
    _collective[(1,)](x, y, total, running, place, largest, product, N)
    torch.testing.assert_close(total, x.float().sum(1).bfloat16())
    torch.testing.assert_close(running, x.float().cumsum(1).bfloat16())
    assert torch.equal(largest, x.max(1).values) and torch.equal(place.long(), x.max(1).indices)
    torch.testing.assert_close(product, x.float() @ y.float())


@triton.jit
def _product(x_ptr, y_ptr, dot_ptr, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(x_ptr + n[:, None] * K + k[None, :]), tl.load(y_ptr + n[:, None] * K + k[None, :])
    tl.store(dot_ptr + n[:, None] * N + n[None, :], tl.dot(x, tl.trans(y), input_precision="ieee"))


@needs_interpreter
def test_float32_products_have_one_order():
    x, y = random(2, 64, 256, dtype=torch.float32)
    whole, part, exchanged = torch.empty(64, 64), torch.empty(16, 16), torch.empty(64, 64)
    _product[(1,)](x, y, whole, 64, 256)
    _product[(1,)](x[:16], y[:16], part, 16, 256)
    _product[(1,)](y, x, exchanged, 64, 256)
    assert torch.equal(whole[:16, :16], part) and torch.equal(whole.T, exchanged)
    torch.testing.assert_close(whole, x @ y.T, rtol=1e-5, atol=1e-5)


@triton.jit
def _add_product(x_ptr, sum_ptr, N: tl.constexpr, SAID: tl.constexpr):
    n = tl.arange(0, N)
    x, total = tl.load(x_ptr + n[:, None] * N + n[None, :]), tl.zeros((N, N), x_ptr.dtype.element_ty)
    total = tl.dot(x, x, total, input_precision="ieee", out_dtype=total.dtype) if SAID else tl.dot(x, x, total, input_precision="ieee")
    tl.store(sum_ptr + n[:, None] * N + n[None, :], total)


@needs_interpreter
def test_a_sum_wider_than_float32_is_to_be_said():
    """Triton 3.6 does not compile it otherwise; later ones do."""
    x, total = random(16, 16, dtype=torch.float64), torch.empty(16, 16, dtype=torch.float64)
    _add_product[(1,)](x, total, 16, True)
    torch.testing.assert_close(total, x @ x)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out_dtype=fp64"):
        _add_product[(1,)](x, total, 16, False)


@triton.jit
def _subnormal(x_ptr, exp2_ptr, sqrt_ptr, rsqrt_ptr, exact_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(exp2_ptr + i, tl.exp2(x))
    tl.store(sqrt_ptr + i, tl.sqrt(x))
    tl.store(rsqrt_ptr + i, tl.rsqrt(x))
    tl.store(exact_ptr + i, 0.5 * tl.sqrt_rn(x))


@needs_interpreter
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
def test_subnormal_numbers_are_zeros_to_what_a_gpu_approximates():
    x = torch.tensor([2.0**-126, 2.0**-127, -126.0, -126.5, 4.0, 0.0, torch.inf, torch.nan])
    exp2, sqrt, rsqrt, exact = (torch.empty_like(x) for _ in range(4))
    _subnormal[(1,)](x, exp2, sqrt, rsqrt, exact, len(x))
    nan, inf = torch.nan, torch.inf
    for got, expected in (
        (exp2, [1, 1, 2.0**-126, 0, 16, 1, inf, nan]),
        (sqrt, [2.0**-63, 0, nan, nan, 2, 0, inf, nan]),
        (rsqrt, [2.0**63, inf, nan, nan, 0.5, inf, 0, nan]),
        (exact, [2.0**-64, 2.0**-64.5, nan, nan, 1, 0, inf, nan]),
    ):
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0, equal_nan=True)


@triton.jit
def _cast(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


def cast(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    _cast[(1,)](x, y, x.numel())
    return y


def float32_near_bfloat16_ties():
    upper = torch.arange(0, 2**16, 2**5, dtype=torch.int64)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] << 16 | lower).flatten()
    bits = torch.cat([bits, torch.full((2**14 - bits.numel(),), 0x7F800001)])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


@needs_interpreter
def test_bfloat16_rounds_to_nearest_even():
    x = float32_near_bfloat16_ties()
    torch.testing.assert_close(cast(x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_interpreter
def test_planted_truncation_is_caught(monkeypatch):
    monkeypatch.setattr(interpreter, "_round", interpreter._truncate)
    with pytest.raises(AssertionError):
        test_bfloat16_rounds_to_nearest_even()


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32], ids=str)
def test_bfloat16_casts(dtype):
    x = random(64) * 10
    assert torch.equal(cast(x, dtype), x.to(dtype))
    assert torch.equal(cast(x.to(dtype), torch.bfloat16), x.to(dtype).to(torch.bfloat16))


@triton.jit
def _copy_without_mask(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@needs_interpreter
def test_out_of_bounds_is_caught():
    whole, part = torch.zeros(128), torch.zeros(128)[:100]
    _copy_without_mask[(4,)](whole, torch.zeros(128), 32)
    with pytest.raises(Exception, match=r"out-of-bounds store by program \(3, 0, 0\): 28 addresses, the first 400 bytes from .* y_ptr"):
        _copy_without_mask[(4,)](whole, part, 32)
    with pytest.raises(Exception, match="out-of-bounds load"):
        _copy_without_mask[(4,)](part, whole, 32)


@needs_interpreter
def test_gaps_of_a_view_are_out_of_bounds():
    rows = torch.zeros(4, 40)[:, :32]
    with pytest.raises(Exception, match="out-of-bounds load .*: 8 addresses, the first .* from the start of x_ptr"):
        _copy_without_mask[(4,)](rows, torch.zeros(128), 32)
    for view in (rows, rows.T, torch.zeros(2, 3, 4, 5)[:, ::2, 1:], torch.zeros(4).expand(3, 4), torch.zeros(9).unfold(0, 4, 1)):
        extent = interpreter.Extent.of("view", view)
        offsets = sum(torch.arange(n).view(-1, *[1] * (view.dim() - 1 - d)) * s for d, (n, s) in enumerate(zip(view.shape, view.stride())))  # noqa: B905
        elements = set((offsets.flatten() * 4 + view.data_ptr()).tolist())
        around = torch.arange(-20, 200) * 4 + view.data_ptr()
        assert extent.contains(around.numpy().astype("uint64"), 4).tolist() == [a in elements for a in around.tolist()]


@triton.jit
def _count(x_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(x_ptr + tl.arange(0, BLOCK), 1)


@needs_interpreter
def test_out_of_bounds_atomic_is_caught():
    with pytest.raises(Exception, match="out-of-bounds atomic"):
        _count[(1,)](torch.zeros(7, dtype=torch.int32), 8)


@triton.jit
def _load_without_other(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_masked_load_without_other_is_poison(dtype):
    x, y = torch.ones(5, dtype=dtype), torch.zeros(8, dtype=dtype)
    _load_without_other[(1,)](x, y, 5, 8)
    assert torch.equal(y[:5], x)
    assert y[5:].isnan().all() if dtype.is_floating_point else (y[5:] == torch.iinfo(dtype).max).all()


@triton.jit
def _running_sum(x_ptr):
    i = tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2)
    tl.store(x_ptr + i, tl.load(x_ptr + i - 1, mask=i > 0, other=0) + 1)


@needs_interpreter
def test_dependence_on_program_order_is_caught():
    def run(seed):
        x = torch.zeros(24, dtype=torch.int32)
        with interpreter.program_order(seed):
            _running_sum[(4, 3, 2)](x)
        assert (x > 0).all()
        return x.tolist()

    assert run(None) == list(range(1, 25))
    assert run(1) == run(1) != run(2)


@triton.jit
def _loop(x_ptr, N, BLOCK: tl.constexpr):
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + i, i, mask=i < N)


@needs_interpreter
def test_scalar_is_a_loop_bound():
    x = torch.zeros(100, dtype=torch.int32)
    _loop[(1,)](x, 100, 32)
    assert x.tolist() == list(range(100))


@needs_interpreter
def test_a_class_among_the_builtins_is_one():
    """As in Triton 3.8."""

    class Made:
        def __init__(self, value, _semantic):
            self.value, self.semantic = value, _semantic

    owner = types.SimpleNamespace(made=Made)
    scope = types.SimpleNamespace(set_attr=setattr)
    interpreter_speed._patch_builtin(None)(owner, "made", Made, stock.interpreter_builder, scope)
    assert owner.made(3).value == 3 and isinstance(owner.made(3).semantic, stock.TritonSemantic)


@needs_interpreter
def test_a_missing_private_function_is_named():
    with pytest.raises(RuntimeError, match=f"does not fit Triton {triton.__version__}: .*InterpreterBuilder.gone has gone"):
        interpreter._replace("InterpreterBuilder.gone", None)
