"""What is particular to the CPU kernels: instruction sets, threads, outputs that are stored past the caches."""

import contextlib

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer import testing
from fastprimer.backends import declared, operations, use_backend
from fastprimer.cases import CASES, rms_norm_case, rope_case, swiglu_case

OPERATIONS = [op for op in operations() if "cpu" in declared(op)]
HALVES = (torch.bfloat16, torch.float16)


def name(dtype):
    return str(dtype)[6:]


@contextlib.contextmanager
def instruction_set(limit):
    """The kernels of one instruction set: 0 portable, 1 AVX2, 2 AVX-512."""
    device_or_skip("rms_norm", "cpu")
    try:
        if torch.ops.fastprimer.limit_cpu_instruction_set(limit) != limit:
            pytest.skip("this processor does not have it")
        yield
    finally:
        torch.ops.fastprimer.limit_cpu_instruction_set(2)


def run(case, dtype):
    with use_backend("cpu"):
        return testing.run(case, dtype, getattr(fp, case.op))


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=name)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_instruction_set_is_within_budget(op, dtype, limit):
    small = [c for c in CASES if c.op == op and not c.bench and c.name != "widest"]
    with instruction_set(limit):
        wrong = [str(row) for case in small for row in testing.compare(case, dtype, "cpu") if not row.ok]
    assert not wrong


@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_every_half_number_survives_conversion(limit, dtype):
    """All 65,536 of them, subnormal, infinite and signed zeros too, loaded, widened, rounded and stored: h = x + (-0)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    with instruction_set(limit), use_backend("cpu"):
        h = fp.rms_norm(x, residual=torch.full_like(x, -0.0))[1]
    assert torch.equal(h.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(h.view(torch.int16)[numbers], x.view(torch.int16)[numbers])


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=name)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_sigmoid_of_every_number(limit, dtype):
    """silu(x) for all numbers of 16 bits, in float32 of as many: right to the last places, except that e^x below 2^-126 is 0."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x.to(dtype) if dtype != torch.float16 else x.view(torch.float16)
    x = x[x.isfinite()]
    with instruction_set(limit), use_backend("cpu"):
        y = fp.swiglu(x, torch.ones_like(x)).double()
    truth = (x.double() * torch.sigmoid(x.double())).to(dtype)  # underflows where dtype does
    subnormal = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
    allowed = 2 * torch.finfo(dtype).eps * truth.double().abs() + subnormal + 88 * 2.0**-126
    assert ((y - truth.double()).abs() <= allowed).all()


CASES_FOR_THREADS = [
    *(rms_norm_case("threads", *shape, residual=True) for shape in [(513, 1000), (40, 70000), (3, 64)]),
    rope_case("threads", (3, 333), 5, 2, 64, 48, P=400, positions=lambda p: p),
    swiglu_case("threads", 37, 20011),
    swiglu_case("threads-packed", 513, 300, layout="packed", activation="gpt_oss"),
]


@pytest.mark.parametrize("case", CASES_FOR_THREADS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case):
    device_or_skip(case.op, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(case, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][k], other[k]) for other in results[1:] for k in results[0])


def assert_like_its_parts(function, tensors, dys, parts=4):
    """Outputs and gradients of a call are those of calls on parts of its rows, bit for bit."""

    def results(tensors, dys):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]

    whole = results(tensors, dys)
    for i, rows in enumerate(torch.arange(len(tensors[0])).chunk(parts)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        for got, expected in zip(whole, results([t[part] for t in tensors], [d[part] for d in dys]), strict=True):
            assert torch.equal(got[part], expected), i


@pytest.mark.parametrize("width", [2048, 2035])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
@pytest.mark.parametrize("op", ["rms_norm", "rope", "swiglu", "swiglu-packed"])
@pytest.mark.parametrize("limit", [1, 2])
def test_large_outputs_are_stored_right(op, dtype, width, limit):
    """Beyond 8 MiB they go past the caches, if their rows are aligned; a part of them is small enough not to."""
    rows = (20 << 20) // (width * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    x, dy, other = random(rows, width), random(rows, width), random(rows, width)
    with instruction_set(limit), use_backend("cpu"):
        if op == "rms_norm":
            assert_like_its_parts(fp.rms_norm, [x], [dy])
        elif op == "rope":
            D = 128 if width % 128 == 0 else 55
            cos, sin = (random(1, D // 2).to(torch.promote_types(dtype, torch.float32)) for _ in range(2))
            heads = [t.view(rows, 1, -1, D) for t in (x, dy)]
            assert_like_its_parts(lambda q: fp.rope(q, None, cos, sin)[0], heads[:1], heads[1:])
        elif op == "swiglu":
            assert_like_its_parts(fp.swiglu, [x, other], [dy])
        else:
            assert_like_its_parts(fp.swiglu, [torch.cat((x, other), -1)], [dy])
