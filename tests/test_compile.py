"""torch.compile beyond single operations: cold starts, several operations in one graph, symbolic numbers."""

import re
import subprocess
import sys

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer.backends import native_reason, use_backend

COLD = {
    "two operations": """
compiled = torch.compile(lambda x: fp.swiglu(fp.rms_norm(x)), fullgraph=True, backend="aot_eager")
x = torch.randn(4, 64)
torch.testing.assert_close(compiled(x), fp.swiglu(fp.rms_norm(x)))
""",
    "the reference's first": """
def call(x):
    with fp.use_backend("reference"):
        y = fp.rms_norm(x)
    return fp.swiglu(torch.func.vmap(lambda row: fp.rms_norm(row))(y), x)

compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
x = torch.randn(4, 64)
torch.testing.assert_close(compiled(x), call(x))
""",
    "a model": """
model = fp.Model(fp.Config.preset("calculator"))
tokens = torch.randint(0, 35, (2, 9))
compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
loss = compiled(tokens, labels=tokens)
loss.backward()
assert all(p.grad is not None for p in model.parameters())
torch.testing.assert_close(compiled(tokens), model(tokens))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COLD)
def test_compiles_in_a_process_that_has_called_nothing_before(what):
    program = "import torch\nimport fastprimer as fp\n" + COLD[what]
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "longrope", "proportional"])
def test_scaled_models_compile(kind):
    settings = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 8},
    }
    scaling = {"rope_type": kind, "factor": 2.0, **settings.get(kind, {})}
    config = fp.Config(35, 32, 48, 1, 2, head_dim=16, max_position_embeddings=16, rope_scaling=scaling)
    model = fp.Model(config)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 12):
        tokens = torch.randint(0, 35, (2, length))
        torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_limit_of_swiglu_may_be_symbolic(backend):
    device_or_skip("swiglu", backend)
    torch.compiler.reset()
    compiled = torch.compile(lambda g, limit: fp.swiglu(g, limit=limit), fullgraph=True, backend="aot_eager")
    gate = 3 * torch.randn(4, 8)
    with use_backend(backend):
        for limit in (1.0, 2.0, 0.5, 3, 4, None):
            torch.testing.assert_close(compiled(gate, limit), fp.swiglu(gate, limit=limit))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_position_without_a_row_is_nan_in_compiled_code(backend):
    device_or_skip("rope", backend)
    q, cos, sin = torch.randn(1, 4, 2, 8), torch.rand(6, 3), torch.rand(6, 3)
    torch.compiler.reset()
    compiled = torch.compile(lambda p: fp.rope(q, None, cos, sin, positions=p)[0], fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        rotated = compiled(torch.tensor([[0, -1, 6, 5]]))
    assert rotated[:, [1, 2], :, :6].isnan().all() and rotated[:, [0, 3]].isfinite().all()
    assert torch.equal(rotated[..., 6:], q[..., 6:])


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_target_that_is_no_word_raises_in_compiled_code_too(op):
    """Nothing looks at numbers while tracing, and the kernel reads at the target's place: its binding has to look."""
    device_or_skip(op, "cpu")
    inputs = (torch.randn(3, 7),) if op == "cross_entropy" else (torch.randn(3, 5), torch.randn(7, 5))
    torch.compiler.reset()
    compiled = torch.compile(lambda t: getattr(fp, op)(*inputs, t, reduction="none"), fullgraph=True, backend="aot_eager")
    with use_backend("cpu"):
        assert compiled(torch.tensor([2, 0, 6])).isfinite().all()
        for target in (-1, 7, 1 << 40):
            with pytest.raises(RuntimeError, match="target: expected numbers in 0..6"):
                compiled(torch.tensor([2, target, 6]))


@pytest.mark.skipif(bool(native_reason()), reason=native_reason())
def test_tracing_looks_at_no_numbers():
    with torch._subclasses.FakeTensorMode():
        q, positions = torch.randn(1, 4, 2, 8), torch.zeros(1, 4, dtype=torch.int64)
        assert fp.rope(q, None, torch.rand(6, 3), torch.rand(6, 3), positions=positions)[0].shape == q.shape


def a_token_each(N):
    return torch.randn(N, 16), torch.rand(N, 2), torch.randint(8, (N, 2))


def a_query_each(B):
    q, k = torch.randn(B, 1, 4, 8), torch.randn(B, 1, 2, 8)
    return q, torch.randn(B, 9, 2, 8), torch.randn(B, 9, 2, 8), torch.full((B,), 3), k, k.clone()


def a_page_each(B):
    q, _, _, lengths, k, v = a_query_each(B)
    return q, torch.randn(40, 4, 2, 8), torch.randn(40, 4, 2, 8), lengths, k, v, torch.randperm(40)[:B].view(B, 1)


SIZED = {
    "moe": (lambda x, w, e: fp.moe(x, torch.ones(8, 6, 16), torch.ones(8, 16, 3), w, e), a_token_each),
    "load_balancing_loss": (lambda x, w, e: fp.load_balancing_loss(x, e), a_token_each),
    "layers.MoE": (fp.layers.MoE(16, 4, 8, 2), lambda N: (torch.randn(2, N, 16),)),
    "attention_with_kv_cache": (lambda q, k, v, n, *new: fp.attention_with_kv_cache(q, k, v, n, k=new[0], v=new[1]), a_query_each),
    "pages": (
        lambda q, k, v, n, *new: fp.attention_with_kv_cache(q, k, v, n, k=new[0], v=new[1], block_table=new[2]),
        a_page_each,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZED)
def test_another_size_compiles_nothing_again(name):
    """A size within the text of an error becomes a constant of the graph, even where the text is written for no error."""
    function, arguments = SIZED[name]
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for size in (7, 12, 3, 30):
        with torch.no_grad():
            compiled(*arguments(size))
    assert len(graphs) == 1


@pytest.mark.slow
def test_an_exported_program_is_loaded_by_another_process(tmp_path):
    device_or_skip("rms_norm", "cpu")
    layer, x, path = fp.layers.RMSNorm(8), torch.randn(3, 8), tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, (x,)), path)
    code = "import sys, torch, fastprimer; fastprimer.backends(); print(torch.export.load(sys.argv[1]).module()(torch.ones(3, 8)).sum())"
    loaded = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert re.search(r"tensor\((23\.999|24\.)", loaded.stdout), loaded.stdout


@pytest.mark.slow
def test_one_tensor_may_be_passed_twice_under_compile():
    x = torch.randn(4, 2, 8, requires_grad=True)
    lengths = torch.tensor([0, 1, 4], dtype=torch.int32)
    for function in (
        lambda x: fp.rms_norm(x, residual=x)[0],
        lambda x: fp.swiglu(x, x),
        lambda x: fp.attention(x, x, x, cu_seqlens_q=lengths, cu_seqlens_k=lengths),
        lambda x: fp.attention(x, x, x, cu_seqlens_q=lengths, causal=True),
    ):
        torch.compiler.reset()
        expected, got = function(x), torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
        torch.testing.assert_close(*grads)
