"""The chapters' mathematics: the reference against numerical derivatives, and double backward."""

import pytest
import torch
import torch.nn.functional as F

import fastprimer as fp
from conftest import device_or_skip
from fastprimer.backends import use_backend
from fastprimer.cases import rms_norm_case
from fastprimer.ops._attention_arguments import scale_limit
from fastprimer.testing import CASES, Inputs


def is_differentiable(case) -> bool:
    """Small enough for numerical derivatives, with something to differentiate, and no overlapping memory (gradcheck's rule)."""
    leaves = [t for t in case.arguments(Inputs(torch.float64, "cpu", 3)).values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return bool(leaves) and 0 < sum(t.numel() for t in leaves) < 3000 and not any(0 in t.stride() and t.numel() > 1 for t in leaves)


EVERY_OPTION = rms_norm_case("every-option", 6, 9, residual=True, weight_offset=0.5, view=lambda t: t[::2, 2:7])
DIFFERENTIABLE = [c for c in (EVERY_OPTION, *CASES) if not c.bench and is_differentiable(c) and not c.name.startswith("ties")]
"""Between equal logits a step to either side makes another choice."""


def function_of(case):
    """The call as a function of its differentiable arguments alone, returning finite differentiable outputs."""
    arguments = case.arguments(Inputs(torch.float64, "cpu", seed=3))
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def function(*leaves):
        outputs = getattr(fp, case.op)(**arguments | dict(zip(names, leaves, strict=True)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [o for o in outputs if o is not None and o.is_floating_point()]
        return tuple(torch.where(torch.isinf(o), 0.0, o) for o in outputs)  # lse of a row that sees nothing

    return function, [arguments[name] for name in names]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_backward_is_the_derivative_of_forward(case):
    function, leaves = function_of(case)
    with fp.use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=sum(t.numel() for t in leaves) > 120)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_backward_is_differentiable_itself(case):
    function, leaves = function_of(case)
    with fp.use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=sum(t.numel() for t in leaves) > 40)


@pytest.mark.parametrize("loss", ["load_balancing_loss", "router_z_loss"])
def test_router_losses(loss):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    experts = fp.route(logits.detach(), 2)[1]
    arguments = (experts,) if loss == "load_balancing_loss" else ()
    assert torch.autograd.gradcheck(lambda l: getattr(fp, loss)(l, *arguments), (logits,))
    assert torch.autograd.gradgradcheck(lambda l: getattr(fp, loss)(l, *arguments), (logits,))


def test_an_even_router_has_balance_k():
    experts = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert fp.load_balancing_loss(torch.zeros(4, 4), experts).item() == pytest.approx(2.0)


def test_balance_loss_by_counting():
    logits = torch.randn(50, 6, dtype=torch.float64)
    experts = logits.topk(2).indices
    p = torch.softmax(logits, -1).mean(0)
    f = [sum(e == i for row in experts.tolist() for e in row) / 50 for i in range(6)]
    assert fp.load_balancing_loss(logits, experts).item() == pytest.approx(6 * sum(fi * pi for fi, pi in zip(f, p.tolist(), strict=True)))


def test_ties_go_to_the_lower_expert():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert fp.route(logits, 2)[1].tolist() == [[1, 2]]
    assert fp.route(torch.zeros(1, 8), 3, groups=4, top_groups=2)[1].tolist() == [[0, 1, 2]]


def test_gated_activations_are_those_of_torch_and_gpt_oss():
    gate, up = 4 * torch.randn(2, 200, dtype=torch.float64)
    torch.testing.assert_close(fp.swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(fp.swiglu(gate, up, activation="gelu_tanh"), F.gelu(gate, approximate="tanh") * up)
    a, b = (2 * gate).clamp(max=7), (2 * up).clamp(-7, 7)
    torch.testing.assert_close(fp.swiglu(2 * gate, 2 * up, activation="gpt_oss"), (b + 1) * a * torch.sigmoid(1.702 * a))
    for activation in ("silu", "gelu_tanh", "gpt_oss"):
        whole = torch.cat((gate, up))
        torch.testing.assert_close(fp.swiglu(whole, activation=activation), fp.swiglu(gate, up, activation=activation), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gpt_oss"])
def test_gated_activations_neither_overflow_nor_swallow_nan(activation):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gate = torch.tensor([-2e4, -200.0, -100.0, 0.0, 100.0, 200.0, 2e4], dtype=dtype, requires_grad=True)
        y = fp.swiglu(gate, torch.ones_like(gate), activation=activation)
        (dgate,) = torch.autograd.grad(y.sum(), gate)
        assert y.isfinite().all() and dgate.isfinite().all()
        nan = torch.full((3,), torch.nan, dtype=dtype)
        assert fp.swiglu(nan, torch.ones_like(nan), activation=activation).isnan().all()
        assert fp.swiglu(torch.ones_like(nan), nan, activation=activation).isnan().all()


def test_the_third_convention_of_rope_gives_the_same_scores():
    """Pairs (2i, 2i + 1) read, all a' written before all b': half-split after the permutation that puts even features first."""
    S, H, D = 6, 2, 8
    q, k = torch.randn(2, 1, S, H, D, dtype=torch.float64)
    angle = torch.outer(torch.arange(S), 10.0 ** -torch.arange(D // 2)).double()
    c, s = angle.cos()[None, :, None], angle.sin()[None, :, None]

    def concatenated_halves(x):
        x1, x2 = x[..., ::2], x[..., 1::2]
        return torch.cat((x1 * c - x2 * s, x1 * s + x2 * c), dim=-1)

    even_then_odd = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    half_split = fp.rope(q[..., even_then_odd], k[..., even_then_odd], angle.cos(), angle.sin())
    for mine, theirs in zip(half_split, map(concatenated_halves, (q, k)), strict=True):
        torch.testing.assert_close(mine, theirs)
    scores = torch.einsum("bshd,bthd->bhst", concatenated_halves(q), concatenated_halves(k))
    interleaved = fp.rope(q, k, angle.cos(), angle.sin(), interleaved=True)
    torch.testing.assert_close(scores, torch.einsum("bshd,bthd->bhst", *interleaved))


def test_half_split_and_interleaved_rope_differ_by_a_permutation():
    S, H, D = 5, 2, 8
    q, k = torch.randn(1, S, H, D, dtype=torch.float64), torch.randn(1, S, H, D, dtype=torch.float64)
    angle = torch.outer(torch.arange(S), 10.0 ** -torch.arange(D // 2)).double()
    even_then_odd = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    qi, ki = fp.rope(q, k, angle.cos(), angle.sin(), interleaved=True)
    qh, kh = fp.rope(q[..., even_then_odd], k[..., even_then_odd], angle.cos(), angle.sin())
    torch.testing.assert_close(qh, qi[..., even_then_odd])
    torch.testing.assert_close(torch.einsum("bshd,bthd->bhst", qh, kh), torch.einsum("bshd,bthd->bhst", qi, ki))


def test_every_token_ignored():
    logits = torch.randn(3, 4, requires_grad=True)
    ignored = torch.full((3,), -100)
    mean = fp.cross_entropy(logits, ignored)
    (gradient,) = torch.autograd.grad(mean, logits)
    assert mean.isnan() and torch.equal(gradient, torch.zeros(3, 4))
    assert fp.cross_entropy(logits, ignored, reduction="sum").item() == 0


def test_decoding_equals_attention_over_the_whole_sequence():
    q, k, v = (torch.randn(2, 9, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    whole = fp.attention(q, k, v, causal=True)
    k_cache, v_cache = (
        torch.full((2, 12, 2, 16), torch.nan, dtype=torch.float64),
        torch.full((2, 12, 2, 16), torch.nan, dtype=torch.float64),
    )
    length = torch.zeros(2, dtype=torch.int32)
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part = fp.attention_with_kv_cache(q[:, begin:end], k_cache, v_cache, length, k=k[:, begin:end], v=v[:, begin:end])
        torch.testing.assert_close(part, whole[:, begin:end])
        length += end - begin


def test_rows_without_keys_have_no_gradient():
    q, k, v = (torch.randn(1, n, 2, 4, requires_grad=True) for n in (4, 2, 2))
    sinks = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    o, lse = fp.attention(q, k, v, causal=True, return_lse=True)
    grads = torch.autograd.grad((lse * lse).sum(), (q, k, v), allow_unused=True)  # dlse is infinite there
    assert (lse[..., :2] == -torch.inf).all() and not grads[0][:, :2].any() and grads[1].isfinite().all()
    o, lse = fp.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert torch.autograd.grad(o.sum() + lse[:, 1].sum(), sinks)[0].isfinite().all()


def test_an_expert_that_nobody_chose_has_no_say():
    x, gate_up, down = torch.randn(3, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    weights, experts = torch.ones(3, 1), torch.tensor([[0], [1], [0]])
    expected = fp.moe(x, gate_up, down, weights, experts)
    gate_up[2], down[2] = torch.inf, torch.nan
    assert torch.equal(fp.moe(x, gate_up, down, weights, experts), expected)


def test_nan_of_a_token_reaches_the_weights_of_its_own_experts_alone():
    gate_up, down, weights, experts = torch.randn(3, 6, 4), torch.randn(3, 4, 3), torch.ones(3, 1), torch.tensor([[0], [1], [0]])
    for spoiled in ("x", "dy"):
        leaves = torch.randn(3, 4), gate_up.clone().requires_grad_(), down.clone().requires_grad_()
        dy = torch.randn(3, 4)
        (leaves[0] if spoiled == "x" else dy)[1] = torch.nan
        with fp.use_backend("reference"):
            grads = torch.autograd.grad(fp.moe(*leaves, weights, experts), leaves[1:], dy)
        assert all(grad[[0, 2]].isfinite().all() and grad[1].isnan().any() for grad in grads)


def test_renormalised_sigmoids_may_underflow():
    weights, _ = fp.route(torch.tensor([[-200.0, -300.0, -250.0]]), 2, score="sigmoid")
    assert weights.tolist() == [[1.0, pytest.approx(0.0)]]


def test_a_block_table_may_be_padded_with_anything():
    q, cache = torch.randn(2, 1, 2, 4), torch.randn(5, 4, 2, 4)
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    padded, plain = (torch.tensor([[3, p], [2, 0]], dtype=torch.int32) for p in (-1, 1))
    a, b = (fp.attention_with_kv_cache(q, cache, cache, lengths, block_table=table) for table in (padded, plain))
    assert torch.equal(a, b)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_the_slope_of_a_large_sigmoid(backend, renormalize):
    """1 - s is 0 in float32 from a logit of 17 on."""
    device_or_skip("route", backend)
    gradients = []
    for dtype, used in ((torch.float64, "reference"), (torch.float32, backend)):
        logits = torch.tensor([[20.0, -3.0, 18.0]], dtype=dtype, requires_grad=True)
        with use_backend(used):
            weights, _ = fp.route(logits, 2, score="sigmoid", renormalize=renormalize)
        gradients += torch.autograd.grad(weights, logits, torch.tensor([[1.0, 2.0]], dtype=dtype))
    torch.testing.assert_close(gradients[1], gradients[0].float(), rtol=1e-5, atol=0)


def test_a_scale_that_is_nothing_in_float32_is_for_the_reference():
    assert scale_limit(1e-50) and scale_limit(0.0) and scale_limit(-1.0) and not scale_limit(2.0**-100)
