"""What only large memories and GPUs show: offsets of 64 bits, streams, CUDA graphs, a second GPU."""

import os
import threading

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer import testing
from fastprimer.backends import declared, operations, use_backend
from fastprimer.cases import CASES, Inputs
from fastprimer.decoding import captured

KERNELS = [(op, backend) for op in operations() for backend in ("triton", "cuda") if backend in declared(op)]
ROW = 4096


def rotated(x):
    angles = torch.arange(64, device=x.device).float()[None]
    return fp.rope(x.view(1, -1, ROW // 128, 128), None, angles.cos(), angles.sin(), positions=torch.zeros(1, len(x)).long().to(x.device))[
        0
    ]


ROW_BY_ROW = {"rms_norm": fp.rms_norm, "rope": rotated, "swiglu": lambda x: fp.swiglu(x, x)}
"""Operations as functions of (N, ROW), whose rows are independent."""


@pytest.mark.slow
@pytest.mark.parametrize("op", ROW_BY_ROW)
def test_more_than_31_bits_of_elements(op):
    """Offsets are 64 bits wide: the last of 2^31 + 4096 elements is right. The input is one row, expanded."""
    backends = ["cuda", "triton"] if torch.cuda.is_available() else ["cpu"]
    if not torch.cuda.is_available() and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9e9:
        pytest.skip("needs 9 GB of free memory")
    for backend in backends:
        device = device_or_skip(op, backend)
        row = torch.randn(1, ROW, dtype=torch.bfloat16, device=device)
        with use_backend(backend):
            y = ROW_BY_ROW[op](row.expand(2**19 + 1, ROW)).view(-1, ROW)
            expected = ROW_BY_ROW[op](row).view(ROW)
            assert torch.equal(y[-1], expected) and torch.equal(y[2**18], expected)


def forward_and_backward(op):
    """A call of the first small case of op on the GPU, outputs and gradients in a list; always the same tensors."""
    case = next(c for c in CASES if c.op == op and not c.bench)
    arguments = case.arguments(Inputs(torch.bfloat16, "cuda", 0))
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]

    def call():
        outputs = getattr(fp, op)(**arguments)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
        with_grad = [o for o in outputs if o.requires_grad]
        gradients = torch.autograd.grad(with_grad, leaves, [torch.ones_like(o) for o in with_grad]) if leaves else ()
        # Detached: a graph that outlives this call would tie the next one's gradients to this one's stream.
        return [t.detach() for t in (*outputs, *gradients)]

    return call


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_side_stream_and_cuda_graph(op, backend):
    with use_backend(backend):
        call = forward_and_backward(op)
        expected = [t.clone() for t in call()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        for t in results:
            t.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_the_first_call_of_a_thread(op, backend):
    """It has no context yet, and memory that torch keeps needs none."""
    call = forward_and_backward(op)
    found = []

    def work():
        with use_backend(backend):
            found.extend(t.cpu() for t in call())

    with use_backend(backend):
        expected = [t.cpu() for t in call()]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("make", ["mixtral", "switch", "deepseek"])
def test_the_layer_of_experts_is_captured_in_a_cuda_graph(make, backend):
    """Another routing than at capture: nothing of it was known on the host."""
    sizes = {"mixtral": (64, 48), "switch": (64, 48, 8), "deepseek": (64, 48, 16, 2)}
    layer = getattr(fp.layers.MoE, make)(*sizes[make]).to("cuda", torch.bfloat16)
    x = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def call():
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    with use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, call(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_second_gpu(op, backend):
    case = next(c for c in CASES if c.op == op and not c.bench)
    assert all(row.ok for row in testing.compare(case, torch.bfloat16, backend, device="cuda:1"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_is_captured_on_its_own_gpu():
    """Torch's own stream for captures stays on the GPU of the first one."""
    x = [torch.ones(8, device=f"cuda:{index}") for index in (0, 1)]
    for t in x:
        replay, reason = captured(lambda t=t: t * 2, t.device)
        t += 1
        assert reason == "" and torch.equal(replay(), t * 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "mixtral", "deepseek_v3"])
def test_a_patched_model_of_transformers(name):
    checks = pytest.importorskip("hf_checks")
    model, plain, _ = checks.pair(name)
    model, plain, tokens = model.cuda().train(), plain.cuda().train(), torch.arange(1, 19, device="cuda").view(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    expected = checks.gradients(plain, **inputs)
    checks.close(checks.gradients(model, **inputs), expected, 1e-4)
    got, theirs = (each.bfloat16()(**inputs).loss.item() for each in (model, plain))
    assert abs(got - expected[0].item()) <= 2 * abs(theirs - expected[0].item()) + 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_types_are_differentiated_twice():
    x, weight = (torch.randn(n, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (4, 7))
    loss = fp.linear_cross_entropy(x, weight, torch.arange(4, device="cuda"))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    dx.float().square().sum().backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all() and x.grad.any()
