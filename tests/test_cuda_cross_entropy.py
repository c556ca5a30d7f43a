"""What is particular to the fused cross-entropy on CUDA, or in its emulator: several pieces of the vocabulary, ignored tokens, float16."""

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer import testing
from fastprimer.backends import use_backend
from fastprimer.cases import CASES, loss_case
from fastprimer.verify import dtypes_of

EVERY = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "return_lse": True, "return_argmax": True}
PIECES = [
    *(c for c in CASES if c.op == "linear_cross_entropy" and not c.bench),
    loss_case("linear_cross_entropy", "five-pieces", 40, 1200, 24, ignored=(0, 39), bias=True, reduction="none", **EVERY),
    loss_case(
        "linear_cross_entropy", "kept-ends", 40, 1000, 24, bias=True, memory_budget=4 * 40 * 512, reduction="none", return_argmax=True
    ),
]
"""With pieces of 256 columns most have several, kept or not."""


@pytest.fixture(autouse=True)
def device():
    return device_or_skip("linear_cross_entropy", "cuda")


@pytest.fixture
def small_pieces(device):
    functions = torch.ops.fastprimer if device == "cuda" else torch.ops.fastprimer_emulated
    functions.set_loss_piece_bytes(1)
    yield
    functions.set_loss_piece_bytes(0)


@pytest.mark.parametrize("dtype", dtypes_of("cuda", "linear_cross_entropy"), ids=lambda d: str(d)[6:])
def test_piece_by_piece(dtype, device, small_pieces):
    assert not [str(row) for case in PIECES for row in testing.compare(case, dtype, "cuda", device=device) if not row.ok]


def problem(N, C, V, dtype, device):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in ((N, C), (V, C)))
    return x, weight, torch.randint(0, V, (N,), generator=generator).to(device)


def gradients(x, weight, target, **options):
    loss = fp.linear_cross_entropy(x, weight, target, **options)
    return loss, *torch.autograd.grad(loss, (x, weight), torch.ones_like(loss))


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_nothing_of_an_ignored_token_is_looked_at(budget, device):
    x, weight, target = problem(9, 24, 300, torch.float32, device)
    target[[2, 5]] = -100
    with use_backend("cuda"):
        expected = gradients(x, weight, target, memory_budget=budget)
        with torch.no_grad():
            x[[2, 5]] = torch.tensor([[torch.nan], [torch.inf]], device=device)
        found = gradients(x, weight, target, memory_budget=budget)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        nothing = gradients(x, weight, torch.full_like(target, -100), memory_budget=budget)
    assert nothing[0].isnan() and not nothing[1].any() and not nothing[2].any()


def test_small_gradients_of_float16_do_not_vanish(device):
    """The mean over many tokens: most dlogits are below the smallest number of float16, their sums are not."""
    x, weight, target = problem(512, 16, 600, torch.float16, device)
    with torch.no_grad():
        x *= 0.01
    with use_backend("cuda"):
        dx = gradients(x, weight, target)[1]
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), target), wide)[0]
    assert ((dx.float() - expected).norm() / expected.norm()) < 2e-3


def test_a_target_that_is_no_word(device):
    """On a GPU nobody looks: that token's loss is NaN, and nothing is read outside."""
    functions = torch.ops.fastprimer if device == "cuda" else torch.ops.fastprimer_emulated
    x, weight, target = problem(5, 24, 300, torch.float32, device)
    target[1], target[3] = 300, -5
    options = -100, 0.0, 0.0, None
    loss, lse, _, argmax, *_ = functions.linear_cross_entropy_forward(x.detach(), weight.detach(), target, None, *options, 0)
    logits = x.detach() @ weight.detach().t()
    assert loss.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert torch.equal(argmax, logits.argmax(-1))
    for budget in (0, 1 << 20):
        loss, lse, correction, _, *kept = functions.linear_cross_entropy_forward(
            x.detach(), weight.detach(), target, None, *options, budget
        )
        ones = torch.ones_like(loss)
        given = ones, None, x.detach(), weight.detach(), target, lse, correction, *kept
        dx = functions.linear_cross_entropy_backward(*given, None, *options, True, True)[0]
        assert dx.isnan().any(1).tolist() == [False, True, False, True, False]
    dlogits = functions.cross_entropy_backward(ones, None, logits, target, lse, correction, *options)
    assert dlogits.isnan().all(1).tolist() == dlogits.isnan().any(1).tolist() == [False, True, False, True, False]


def test_an_infinite_gradient_leaves_small_ones_of_float16_their_scale(device):
    functions = torch.ops.fastprimer if device == "cuda" else torch.ops.fastprimer_emulated
    x, weight, target = (t.detach() for t in problem(8, 32, 2000, torch.float16, device))
    options = -100, 0.0, 0.0, None
    _, lse, correction, _, *kept = functions.linear_cross_entropy_forward(x, weight, target, None, *options, 0)
    dloss, results = torch.full((8,), 1e-4, device=device), []
    for first in (1e-4, torch.inf):
        dloss[0] = first
        given = dloss, None, x, weight, target, lse, correction, *kept
        results.append(functions.linear_cross_entropy_backward(*given, None, *options, True, True)[0][1:])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_is_nan_is_nothing_to_an_ignored_token(dtype, device):
    functions = torch.ops.fastprimer if device == "cuda" else torch.ops.fastprimer_emulated
    x, weight, target = (t.detach() for t in problem(5, 24, 300, dtype, device))
    weight[7, 3], target[2] = torch.nan, -100
    options = -100, 0.0, 0.0, None
    loss, lse, correction, _, *kept = functions.linear_cross_entropy_forward(x, weight, target, None, *options, 1 << 20)
    given = loss.nan_to_num(), None, x, weight, target, lse, correction, *kept
    dx = functions.linear_cross_entropy_backward(*given, None, *options, True, True)[0]
    assert not dx[2].any() and dx[torch.arange(5) != 2].isnan().any(1).all()


def test_operators_take_inputs_that_ask_for_gradients(device):
    """The products inside are no part of a graph: torch refuses those with `out` that would be."""
    functions = torch.ops.fastprimer if device == "cuda" else torch.ops.fastprimer_emulated
    x, weight, target = problem(5, 24, 300, torch.bfloat16, device)
    options = -100, 0.0, 0.0, None
    loss, lse, correction, _, kept, shift = functions.linear_cross_entropy_forward(x, weight, target, None, *options, 0)
    functions.linear_cross_entropy_backward(loss, None, x, weight, target, lse, correction, kept, shift, None, *options, True, True)
    assert torch.is_grad_enabled()
