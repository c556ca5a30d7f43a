"""Cross-entropy against torch's own over every option, what it returns besides the loss, and the layer."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastprimer as fp
from conftest import device_or_skip
from fastprimer.backends import use_backend
from fastprimer.ops.cross_entropy import _by_tensor_cores

N, C, V = 24, 12, 150


def inputs(dtype=torch.float64, n=N, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((n, C), (V, C), (V,)))
    target = torch.randint(0, V, (n,), generator=generator)
    target[::5] = 7
    return *(t.to(device).requires_grad_() for t in (x, weight, bias)), target.to(device)


OPTIONS = list(itertools.product(["mean", "sum", "none"], [0.0, 0.3], [-100, 7], [False, True]))


@pytest.mark.parametrize("reduction, label_smoothing, ignore_index, biased", OPTIONS)
def test_it_is_torchs_cross_entropy(reduction, label_smoothing, ignore_index, biased):
    """In float64, with random upstream gradients; the CPU kernels of logits in float64 too, those of x and weight in float32."""
    x, weight, bias, target = inputs()
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    expected = F.cross_entropy(F.linear(x, weight, bias if biased else None), target, **options)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [x, weight, *([bias] if biased else [])]
    grads = torch.autograd.grad(expected, leaves, upstream)

    def check(loss, leaves, **tolerance):
        torch.testing.assert_close(loss, expected.to(loss), **tolerance)
        for mine, reference in zip(torch.autograd.grad(loss, leaves, upstream.to(loss)), grads, strict=True):
            torch.testing.assert_close(mine, reference.to(mine), **tolerance)

    check(fp.linear_cross_entropy(x, weight, target, bias=bias if biased else None, **options), leaves)
    check(fp.cross_entropy(F.linear(x, weight, bias if biased else None), target, **options), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    loss = fp.linear_cross_entropy(single[0], single[1], target.int(), bias=single[2] if biased else None, **options)
    check(loss, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("fused", [False, True])
def test_what_it_returns_besides_the_loss(backend, fused):
    x, weight, _, target = inputs(torch.float32, device=device_or_skip("linear_cross_entropy", backend))
    logits = x @ weight.t()
    kept = target != 7
    expected = torch.where(kept, torch.logsumexp(logits, -1), 0.0)
    options = {"ignore_index": 7, "return_lse": True}
    with use_backend(backend):
        public, inputs_of = (fp.linear_cross_entropy, (x, weight)) if fused else (fp.cross_entropy, (logits,))

        def call(**options):
            return public(*inputs_of, target, **options)

        loss, lse, argmax = call(**options, return_argmax=True)
        assert torch.equal(call(ignore_index=7, return_argmax=True)[1], argmax)
        assert loss.dim() == 0 and not argmax.requires_grad
        torch.testing.assert_close(lse, expected)
        assert torch.equal(argmax, torch.where(kept, logits.argmax(-1), -1))
        # lse alone, and both at once: the gradients add up.
        dlse = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(x.device)
        alone = torch.autograd.grad(call(**options)[1], (x, weight), dlse, retain_graph=True)
        torch.testing.assert_close(alone, torch.autograd.grad(expected, (x, weight), dlse, retain_graph=True))
        loss, lse = call(**options)
        both = torch.autograd.grad([loss, lse], (x, weight), [torch.ones((), device=x.device), dlse], retain_graph=True)
        loss_only = torch.autograd.grad(call(ignore_index=7), (x, weight), retain_graph=True)
        for b, l, a in zip(both, loss_only, alone, strict=True):
            torch.testing.assert_close(b, l + a)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_every_token_ignored(backend):
    x, weight, bias, target = inputs(torch.float32, device=device_or_skip("linear_cross_entropy", backend))
    target[:] = -100
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        with use_backend(backend):
            loss = fp.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction)
        torch.testing.assert_close(loss.cpu(), torch.tensor(expected), equal_nan=True)
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight, bias)))


@pytest.mark.parametrize("bad, message", [(-1, "got -1"), (V, f"expected numbers in 0..{V - 1} or ignore_index=-100, got {V}")])
def test_targets_out_of_range_raise(bad, message):
    x, weight, _, target = inputs(torch.float32)
    target[3] = bad
    with pytest.raises(ValueError, match=message):
        fp.linear_cross_entropy(x, weight, target)


@pytest.mark.parametrize("budget", [-1, 1.5, "all"])
def test_a_budget_is_a_number_of_bytes(budget):
    x, weight, _, target = inputs(torch.float32)
    with pytest.raises(ValueError, match="linear_cross_entropy: memory_budget: expected None or a number of bytes >= 0"):
        fp.linear_cross_entropy(x, weight, target, memory_budget=budget)


def test_the_layer_shifts_labels_and_counts_tokens_as_hugging_face_does():
    x, weight, bias, labels = inputs(torch.float32)
    x, labels = x.unflatten(0, (3, 8)), labels.view(3, 8)
    logits = F.linear(x, weight, bias)[:, :-1].flatten(0, 1)
    shifted = labels[:, 1:].flatten()
    layer = fp.layers.LinearCrossEntropy(ignore_index=7, return_accuracy=True)
    loss, accuracy = layer(x, weight, labels, bias=bias)
    torch.testing.assert_close(loss, F.cross_entropy(logits, shifted, ignore_index=7))
    torch.testing.assert_close(accuracy, (logits.argmax(-1) == shifted)[shifted != 7].float().mean())
    aligned = fp.layers.LinearCrossEntropy(shift=False)(x, weight, labels)
    torch.testing.assert_close(aligned, F.cross_entropy(F.linear(x, weight).flatten(0, 1), labels.flatten()))
    assert layer(x[:, :0], weight, labels[:, :0])[0].isnan()  # the mean over no token, as in torch


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, weight, _, labels = inputs(torch.float32)
    x, labels = x.unflatten(0, (3, 8)), labels.view(3, 8).clone()
    labels[0, 3:] = -100  # sequences of unlike lengths
    layer = fp.layers.LinearCrossEntropy()
    (whole,) = torch.autograd.grad(layer(x, weight, labels), weight)
    count = (labels[:, 1:] != -100).sum()
    parts = [torch.autograd.grad(layer(x[i : i + 1], weight, labels[i : i + 1], num_items_in_batch=count), weight)[0] for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("ignored", [7, -1])
def test_accuracy_counts_no_ignored_token(ignored):
    layer = fp.layers.LinearCrossEntropy(shift=False, return_accuracy=True, ignore_index=ignored)
    for labels, expected in (([0, 1, ignored, ignored], 1.0), ([0, 2, ignored, ignored], 0.5)):
        assert layer(torch.eye(4)[None], torch.eye(4), torch.tensor([labels]))[1] == expected


@pytest.mark.parametrize("name", ["reduction", "return_lse", "bogus"])
def test_the_layer_takes_no_other_option(name):
    with pytest.raises(TypeError, match=f"LinearCrossEntropy: options: expected ignore_index, .* got '{name}'"):
        fp.layers.LinearCrossEntropy(**{name: 1})


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_targets_of_32_bits_are_compared_as_64(backend):
    device = device_or_skip("cross_entropy", backend)
    x, target = torch.randn(3, 5, device=device), torch.tensor([0, 4, 2], device=device)
    with use_backend(backend):
        losses = [fp.cross_entropy(x, t, ignore_index=2**40) for t in (target, target.int())]
    torch.testing.assert_close(losses[0], F.cross_entropy(x, target))
    assert torch.equal(*losses)


def test_the_square_of_a_large_lse_is_not_taken_without_z_loss():
    with use_backend("reference"):
        assert fp.cross_entropy(torch.tensor([[1e20, 0.0]]), torch.tensor([0])) == 0


def test_a_product_without_a_derivative_is_not_differentiated():
    """On a GPU; torch has no formula for a product of half types with a float32 result."""
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    transformed = []
    with torch.no_grad():
        assert _by_tensor_cores(x, x)
        torch.func.vmap(lambda t: transformed.append(_by_tensor_cores(x, x)) or t)(torch.zeros(2))
    assert transformed == [False] and not _by_tensor_cores(x, x)
