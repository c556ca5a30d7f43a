"""The contract of a backend, for every operation on every backend that this process can run.

The Triton kernels take part in Triton's interpreter, in a child process (the last test), or on a GPU.
"""

import itertools
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import fastprimer as fp
from conftest import device_or_skip
from fastprimer import testing
from fastprimer.backends import _functions, declared, interpreting, operations, unavailable, use_backend
from fastprimer.cases import CASES, Inputs, rms_norm_case
from fastprimer.verify import device_of

NO_GRADIENT, NOT_ALONE = "it has no gradient", "it writes into its arguments: compiled as part of a decoder, not alone"
EXTRA = [rms_norm_case("contract", 6, 136, residual=True, weight_offset=0.5)]


def case_of(op: str):
    """The first small case with several rows."""
    return next(c for c in [*EXTRA, *CASES] if c.op == op and not c.bench)


def tensors(arguments: dict) -> dict[str, torch.Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}


def call(case, arguments):
    outputs = getattr(fp, case.op)(**arguments)
    return [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]


def leaves_of(arguments):
    return [t for t in tensors(arguments).values() if t.requires_grad]


def test_inputs_are_not_modified(cell):
    op, backend, device = cell
    case = case_of(op)
    arguments = case.arguments(Inputs(torch.float32, device, 0))
    before = {k: t.detach().clone() for k, t in tensors(arguments).items() if not k.endswith("_cache")}
    with use_backend(backend):
        outputs = [o for o in call(case, arguments) if o.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves_of(arguments), [torch.randn_like(o) for o in outputs])
    assert all(torch.equal(arguments[k], t) for k, t in before.items())


@pytest.mark.parametrize("dim", [0, -2])
def test_upstream_gradients_may_be_expanded(cell, dim):
    """y.sum(dim) hands on a gradient of stride 0: the same bits as its contiguous copy."""
    op, backend, device = cell
    for case in (case_of(op), next((c for c in CASES if c.op == op and c.name == "expanded-middle"), case_of(op))):
        arguments = case.arguments(Inputs(torch.float32, device, 0))
        with use_backend(backend):
            outputs = [o for o in call(case, arguments) if o.requires_grad]
            if not outputs:
                pytest.skip(NO_GRADIENT)
            dys = [torch.randn_like(o) if o.dim() < 2 else torch.randn_like(o.narrow(dim, 0, 1)).expand_as(o) for o in outputs]
            leaves = leaves_of(arguments)
            expanded = torch.autograd.grad(outputs, leaves, dys, retain_graph=True)
            contiguous = torch.autograd.grad(outputs, leaves, [dy.contiguous() for dy in dys])
        if (backend, device) == ("triton", "cuda"):  # its compiler orders a sum by how the addresses are aligned
            torch.testing.assert_close(expanded, contiguous, rtol=1e-5, atol=1e-6)
        else:
            assert all(torch.equal(a, b) for a, b in zip(expanded, contiguous, strict=True))


def test_the_graph_can_be_retained_and_bits_repeat(cell):
    op, backend, device = cell
    case = case_of(op)
    arguments = case.arguments(Inputs(torch.float32, device, 0))
    with use_backend(backend):
        first, again = call(case, arguments), call(case, arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        outputs = [o for o in first if o.requires_grad]
        if outputs:
            dys = [torch.randn_like(o) for o in outputs]
            once = torch.autograd.grad(outputs, leaves_of(arguments), dys, retain_graph=True)
            twice = torch.autograd.grad(outputs, leaves_of(arguments), dys)
            assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_explaining_in_one_thread_leaves_others_alone():
    x, failures, stop = torch.randn(2, 8), [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                fp.rms_norm(x)
            except BaseException as error:
                failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(300):
        fp.explain("rms_norm", x)
    stop.set()
    worker.join()
    assert not failures


def test_operators_check_what_they_are_given():
    """They can be called without the public functions: never a read out of bounds."""
    device_or_skip("rms_norm", "cpu")
    x, rstd = torch.randn(2, 8), torch.ones(2)
    forward, backward = torch.ops.fastprimer.rms_norm_forward, torch.ops.fastprimer.rms_norm_backward
    for call in (
        lambda: forward(x, torch.ones(4), 1e-6, None, 0.0),
        lambda: forward(x, torch.ones(8).double(), 1e-6, None, 0.0),
        lambda: forward(x, None, 1e-6, torch.ones(1, 8), 0.0),
        lambda: forward(torch.tensor(1.0), None, 1e-6, None, 0.0),
        lambda: backward(x[:1], None, x, None, rstd, 0.0, True),
        lambda: backward(x, x.half(), x, None, rstd, 0.0, True),
        lambda: backward(x, None, x, None, rstd[:1], 0.0, True),
        lambda: torch.ops.fastprimer.cross_entropy_forward(x, torch.zeros(2, dtype=torch.int64), -100, 0.0, 0.0, -1.0),
    ):
        with pytest.raises(RuntimeError, match="fastprimer: .*: expected"):
            call()


def test_what_needs_no_gradient_gets_none():
    q, k = torch.randn(1, 3, 2, 8, requires_grad=True), torch.randn(1, 3, 1, 8)
    table = torch.rand(3, 4)
    rotated, rotated_k = fp.rope(q, k, table, table)
    assert rotated.requires_grad and not rotated_k.requires_grad
    rotated_k, rotated = fp.rope(k, q, table, table)
    assert rotated.requires_grad and not rotated_k.requires_grad
    k.requires_grad_()
    fp.rope(q, k, table, table)[1].sum().backward()  # q is rotated too, and not used
    assert q.grad is None and k.grad is not None


FROZEN = {
    "rms_norm": {("weight",): [1]},
    "moe": {("x",): [0], ("gate_up", "down"): [1, 2], ("x", "gate_up", "down"): [0, 1, 2]},
    "linear_cross_entropy": {("x",): [0], ("weight",): [1], ("x", "weight"): [0, 1]},
}
"""{operation: {inputs that need no gradient: which results of its backward pass are not to be computed then}}"""
FROZEN_CASES = ("float32-weight", "wide-odd", "odd-sizes", "empty-experts", "few-tokens", "everything", "all-ignored", "partly-in-16-bits")


@pytest.mark.parametrize("cell", [(op, backend) for op in FROZEN for backend in declared(op)], indirect=True, ids="-".join)
def test_gradients_of_frozen_inputs_are_not_computed(cell, monkeypatch):
    """And the others have the same bits."""
    op, backend, device = cell
    functions, results = _functions[op, backend], []

    def backward(*args):
        results.append(getattr(functions, f"{op}_backward")(*args))
        return results[-1]

    monkeypatch.setitem(_functions, (op, backend), SimpleNamespace(**vars(functions) | {f"{op}_backward": backward}))
    dtypes = [torch.float32] if backend == "reference" else [torch.float32, torch.bfloat16]
    for case, dtype in itertools.product([c for c in CASES if c.op == op and c.name in FROZEN_CASES], dtypes):
        gradients = {}
        for frozen, left_out in {(): [], **FROZEN[op]}.items():
            arguments = case.arguments(Inputs(dtype, device, 0))
            for name in frozen:
                arguments[name].requires_grad_(False)
            with use_backend(backend):
                outputs = [o for o in call(case, arguments) if o.requires_grad]
                names = [name for name, t in tensors(arguments).items() if t.requires_grad]
                if not names:
                    continue
                found = torch.autograd.grad(outputs, [arguments[name] for name in names], [o.detach() for o in outputs])
            gradients = gradients or dict(zip(names, found, strict=True))
            assert all(torch.equal(grad, gradients[name]) for name, grad in zip(names, found, strict=True)), (case.name, frozen)
            optional = {i for places in FROZEN[op].values() for i in places}
            assert {i for i in optional if results[-1][i].numel() == 0} == set(left_out), (case.name, frozen)


@pytest.mark.parametrize("cell", [("swiglu", backend) for backend in declared("swiglu")], indirect=True, ids="-".join)
def test_clamps_treat_nan_alike(cell):
    _, backend, device = cell
    nan = float("nan")
    gate, up = torch.tensor([[nan, 1.0, 9.0, nan, 1.0], [1.0, nan, nan, 9.0, 9.0]], device=device)
    patterns = []
    for name in (backend, "reference"):
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        with use_backend(name):
            y = fp.swiglu(*leaves, activation="gpt_oss")
            patterns.append([t.isnan().tolist() for t in (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))])
    assert patterns[0] == patterns[1]
    assert patterns[0][0] == [True, True, True, True, False]


@pytest.mark.parametrize("cell", [("route", backend) for backend in declared("route")], indirect=True, ids="-".join)
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (6, 100), (401, 101)])
def test_equal_scores_go_to_the_lower_expert(cell, shape):
    """Wherever in a tensor they stand: a function that rounds its last numbers otherwise would decide."""
    _, backend, device = cell
    equal = torch.randn(shape[0], 1).expand(shape).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        for score in ("softmax", "softmax_topk", "sigmoid"):
            with use_backend(backend):
                experts = fp.route(equal.to(dtype), 3, score=score)[1]
            assert torch.equal(experts.cpu(), torch.arange(3).expand_as(experts))


def test_no_grad_records_nothing(cell):
    op, backend, device = cell
    case = case_of(op)
    with use_backend(backend), torch.no_grad():
        assert not any(o.requires_grad for o in call(case, case.arguments(Inputs(torch.float32, device, 0))))


def test_autocast(cell):
    """Under autocast an operation takes what its caller has, float32 or the autocast dtype, and gradients keep their leaves' dtype."""
    op, backend, device = cell
    case = case_of(op)
    arguments = case.arguments(Inputs(torch.float32, device, 0))
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        outputs = call(case, arguments)
        with_grad = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(with_grad, leaves_of(arguments), [torch.randn_like(o) for o in with_grad]) if with_grad else []
    assert all(o.isfinite().all() for o in outputs if o.is_floating_point())
    assert [g.dtype for g in grads] == [torch.float32] * len(grads)
    if op in ("rms_norm", "swiglu"):  # not matrix products: the very same numbers
        with use_backend(backend):
            assert all(torch.equal(a, b) for a, b in zip(outputs, call(case, arguments), strict=True))


def test_gradients_that_have_a_graph_are_the_same_under_autocast(cell):
    """They come of the reference, whose products autocast would recast."""
    op, backend, device = cell
    case = case_of(op)
    arguments = case.arguments(Inputs(torch.float32, device, 0))
    if not leaves_of(arguments):
        pytest.skip(NO_GRADIENT)
    with use_backend(backend):
        outputs = [o for o in call(case, arguments) if o.requires_grad]
        dys = [torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o) for o in outputs]
        expected = torch.autograd.grad(outputs, leaves_of(arguments), dys, retain_graph=True)
        with torch.autocast(device, torch.bfloat16):
            grads = torch.autograd.grad(outputs, leaves_of(arguments), dys, create_graph=True)
    for mine, its in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5 * float(its.abs().max()) + 1e-6)


def test_double_backward_is_right(cell):
    """A second derivative goes through the reference, whichever backend computed the first."""
    op, backend, device = cell
    case = case_of(op)
    if not leaves_of(case.arguments(Inputs(torch.float32, device, 0))):
        pytest.skip(NO_GRADIENT)

    def penalty(name):
        arguments = case.arguments(Inputs(torch.float32, device, 0))
        with use_backend(name):
            outputs = [o for o in call(case, arguments) if o.requires_grad]
            generator = torch.Generator().manual_seed(0)
            dys = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
            grads = torch.autograd.grad(outputs, leaves_of(arguments), dys, create_graph=True)
            differentiable = [g.square().sum() for g in grads if g.requires_grad]
            return torch.autograd.grad(sum(differentiable), leaves_of(arguments), allow_unused=True) if differentiable else []

    for mine, reference in zip(penalty(backend), penalty("reference"), strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            torch.testing.assert_close(mine, reference)


@pytest.mark.slow
def test_registered_operators_pass_opcheck(cell, monkeypatch):
    op, backend, device = cell
    if backend == "reference":
        pytest.skip("the reference is plain torch, not an operator")
    case = case_of(op)
    functions, calls = _functions[op, backend], []

    def recorder(function):
        def call(*args):
            calls.append((function, args))
            return function(*args)

        return call

    monkeypatch.setitem(_functions, (op, backend), SimpleNamespace(**{k: recorder(f) for k, f in vars(functions).items()}))
    for dtype in (torch.float32, torch.bfloat16):
        testing.run(case, dtype, _with(backend, op), device=device)
    assert {function for function, _ in calls} == set(vars(functions).values())
    for function, args in calls:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.slow
def test_fakes_have_the_strides_of_the_kernels(cell, monkeypatch):
    """In every layout of CASES what torch.compile is told is what comes out: whatever the numbers, so that no kernel is interpreted."""
    op, backend, device = cell
    if backend == "reference":
        pytest.skip("the reference is plain torch, not an operator")
    if backend == "triton" and interpreting():
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *args, **options: None)
    functions, calls = _functions[op, backend], []

    def checked(function):
        def call(*args):
            outputs = function(*args)
            mode = FakeTensorMode()
            fake_args = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in args]
            with mode:
                fakes = function(*fake_args)
            for real, fake in zip(*((o if isinstance(o, tuple) else (o,)) for o in (outputs, fakes)), strict=True):
                calls.append(op)
                assert real.shape == fake.shape and real.dtype == fake.dtype
                assert all(a == b for n, a, b in zip(real.shape, real.stride(), fake.stride(), strict=True) if n > 1)
            return outputs

        return call

    monkeypatch.setitem(_functions, (op, backend), SimpleNamespace(**{k: checked(f) for k, f in vars(functions).items()}))
    for case in CASES:
        if case.op == op and not case.bench and case.name != "widest":
            testing.run(case, torch.bfloat16, _with(backend, op), device=device)
    assert calls


def _with(backend, op):
    def function(**arguments):
        with use_backend(backend):
            return getattr(fp, op)(**arguments)

    return function


@pytest.mark.slow
def test_compiles_into_one_graph_with_dynamic_shapes(cell):
    op, backend, device = cell
    if op == "attention_with_kv_cache":
        pytest.skip(NOT_ALONE)
    case = case_of(op)
    torch.compiler.reset()
    compiled = torch.compile(getattr(fp, op), fullgraph=True, dynamic=True)
    rows = testing.compare(case, torch.float32, backend, device=device, function=compiled)
    assert not [str(row) for row in rows if not row.ok]


@pytest.mark.slow
def test_a_compiled_function_follows_use_backend():
    device_or_skip("rms_norm", "cpu")
    torch.compiler.reset()
    x, weight = torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    graphs = []
    compiled = torch.compile(fp.rms_norm, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph)
    for name in ("reference", "cpu", "reference"):
        with use_backend(name):
            compiled(x, weight)
    assert len(graphs) == 2 and "fastprimer.rms_norm_forward" in graphs[1] and "fastprimer.rms_norm_forward" not in graphs[0]


def test_forward_mode_derivatives_raise_rather_than_lie(cell):
    op, backend, device = cell
    case = case_of(op)
    arguments = case.arguments(Inputs(torch.float32, device, 0))
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    if not names:
        pytest.skip(NO_GRADIENT)
    with use_backend(backend), forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        primal = arguments[names[0]].detach()
        getattr(fp, op)(**arguments | {names[0]: forward_ad.make_dual(primal, torch.ones_like(primal))})


def test_shapes_beyond_31_bits_on_meta():
    x = torch.empty(2**20, 4096, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = fp.rms_norm(x, torch.empty(4096, device="meta"))
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert y.shape == dx.shape == x.shape and y.numel() > 2**31


HEAVY = "attention", "moe"


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("ops", [HEAVY[:1], HEAVY[1:], [op for op in operations() if op not in HEAVY]], ids=" ".join)
def test_triton_in_the_interpreter(ops):
    """This file once more, in a process whose Triton interprets, for the cells of Triton."""
    if interpreting() or device_of("triton") == "cuda":
        pytest.skip("Triton's cells ran in this process")
    if unavailable("rms_norm", "triton", "cpu") == "the package triton is not installed":
        pytest.skip("the package triton is not installed")
    cells = " or ".join(f"[{op}-triton" for op in ops if "triton" in declared(op))
    command = [sys.executable, "-m", "pytest", __file__, "-k", cells, "-p", "no:cacheprovider", "-rs"]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:]
    skipped = [line for line in child.stdout.splitlines() if line.startswith("SKIPPED")]
    assert " passed" in child.stdout and all(line.endswith((NO_GRADIENT, NOT_ALONE)) for line in skipped), skipped
