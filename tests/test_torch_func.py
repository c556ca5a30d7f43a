"""The transforms of torch.func: they see through the reference, which is plain torch, and so that is what computes under them."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vjp, vmap

import fastprimer as fp
from fastprimer.backends import operations
from fastprimer.cases import CASES, Inputs

PLAIN = [next(c for c in CASES if c.op == op and not c.bench) for op in operations() if op != "attention_with_kv_cache"]
"""One small case of every operation but decoding, which writes into its caches and has no gradient."""


def split(case):
    """The arguments that may have a gradient, and a function of them alone: all outputs, added up."""
    arguments = case.arguments(Inputs(torch.float64, "cpu", 0))
    leaves = {k: t.detach() for k, t in arguments.items() if isinstance(t, torch.Tensor) and t.requires_grad}

    def scalar(leaves):
        outputs = getattr(fp, case.op)(**{**arguments, **leaves})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(o.sin().sum() for o in outputs if o is not None and o.is_floating_point())

    return leaves, scalar


def by_autograd(scalar, leaves):
    leaves = {k: t.detach().requires_grad_() for k, t in leaves.items()}
    return dict(zip(leaves, torch.autograd.grad(scalar(leaves), list(leaves.values())), strict=True))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_gradients_are_those_of_autograd(case):
    leaves, scalar = split(case)
    expected = by_autograd(scalar, leaves)
    torch.testing.assert_close(grad(scalar)(leaves), expected)
    value, pull_back = vjp(scalar, leaves)
    torch.testing.assert_close(value, scalar(leaves))
    torch.testing.assert_close(pull_back(torch.ones_like(value))[0], expected)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_forward_mode_is_the_transpose_of_backward(case):
    leaves, scalar = split(case)
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in leaves.items()}
    (_, along) = jvp(scalar, (leaves,), (direction,))
    gradients = by_autograd(scalar, leaves)
    torch.testing.assert_close(along, sum((gradients[k] * direction[k]).sum() for k in leaves))


def test_vmap_hands_gradients_on_to_what_it_maps_over():
    x = torch.randn(5, 8)
    weights = torch.randn(3, 8, 16, requires_grad=True)

    def call(w):
        return fp.rms_norm(fp.swiglu(x @ w))

    mapped, one_by_one = vmap(call)(weights), torch.stack([call(w) for w in weights])
    torch.testing.assert_close(mapped, one_by_one)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), weights)[0] for y in (mapped, one_by_one)))


def test_gradients_of_each_sample_of_a_model():
    config = fp.Config(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model, tokens = fp.Model(config), torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None], row[None]))

    each = vmap(grad(loss), (None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        alone = torch.autograd.grad(model(row[None], row[None]), list(parameters.values()))
        torch.testing.assert_close([g[i] for g in each.values()], list(alone))
