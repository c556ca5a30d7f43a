"""Decoding with whole models: packed projections, the cache, and a token that is replayed as a CUDA graph is."""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastprimer as fp
from conftest import SMALL, device_or_skip
from fastprimer import decoding
from fastprimer.backends import use_backend
from fastprimer.generate import GRAPH_FROM, generate
from fastprimer.layers import pack_projections
from fastprimer.ops import _arguments as arguments

SHAPE = dataclasses.replace(SMALL, qk_norm=True, max_position_embeddings=64)
TOKENS = torch.randint(50, (3, 14), generator=torch.Generator().manual_seed(3))


def model(config=SHAPE):
    torch.manual_seed(0)
    return fp.Model(config)


class Products(TorchDispatchMode):
    """Counts the matrix products in which a weight of a linear layer takes part."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)
        return function(*args, **(kwargs or {}))


def products(module):
    with torch.no_grad(), Products() as counter:
        logits = module(TOKENS)
    return counter.count, logits


def test_packed_projections_are_fewer_products_of_the_same_numbers():
    apart, packed = model(), pack_projections(model())
    (many, expected), (few, logits) = products(apart), products(packed)
    assert (many, few) == (2 * 7 + 1, 2 * 4 + 1)
    torch.testing.assert_close(logits, expected)
    mixture = dataclasses.replace(SHAPE, num_local_experts=4, num_experts_per_tok=2, qk_norm=False)
    torch.testing.assert_close(products(pack_projections(model(mixture)))[1], products(model(mixture))[1])


def test_packing_changes_no_parameter():
    packed = model()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in packed.named_parameters()}
    assert pack_projections(packed) is packed
    for name, parameter in packed.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_gradients_are_those_of_layers_apart():
    apart, packed = model(), pack_projections(model())
    for module in (apart, packed):
        module(TOKENS, TOKENS).backward()
    for one, other in zip(apart.parameters(), packed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for module in (apart, packed):  # in place, where the packed weights see it
        torch.optim.SGD(module.parameters(), lr=0.5).step()
    count, logits = products(packed)
    assert count == 9
    torch.testing.assert_close(logits, products(apart)[1])


def replaced(packed):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = packed.model.layers[0].self_attn.k_proj
    packed.model.layers[0].self_attn.k_proj = new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight


def assigned(packed):
    state = {name: t + 0.25 if "up_proj" in name else t.clone() for name, t in packed.state_dict().items()}
    packed.load_state_dict(state, assign=True)


def swapped(packed):
    k, v = packed.model.layers[1].self_attn.projections()[1:]
    k.weight.data, v.weight.data = v.weight.data, k.weight.data


OTHERWISE = {
    "in another order": swapped,
    "another type": lambda packed: packed.double(),
    "assigned": assigned,
    "a hook": lambda packed: packed.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, x, y: 3 * y),
    "a hook before": lambda packed: packed.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
    "another layer": replaced,
    "one weight": lambda packed: setattr(packed.model.layers[0].self_attn.v_proj, "weight", torch.nn.Parameter(torch.ones(16, 32))),
    "one weight's numbers": lambda packed: setattr(packed.model.layers[0].self_attn.q_proj.weight, "data", torch.ones(32, 32)),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_is_no_longer_packed_is_computed_apart(what):
    apart, packed = model(), pack_projections(model())
    for module in (apart, packed):
        OTHERWISE[what](module)
    count, logits = products(packed)
    assert count > 9
    torch.testing.assert_close(logits, products(apart)[1])


def test_packed_models_are_copied_saved_and_compiled(tmp_path):
    packed = pack_projections(model())
    packed.save_pretrained(tmp_path)
    expected = products(model())[1]
    for other in (copy.deepcopy(packed), fp.Model.from_pretrained(tmp_path), torch.compile(packed, backend="eager", fullgraph=True)):
        with torch.no_grad():
            torch.testing.assert_close(other(TOKENS), expected)
    with torch.no_grad():  # numbers that are not the parameters' own
        doubled = {name: 2 * t for name, t in packed.named_parameters()}
        torch.testing.assert_close(
            torch.func.functional_call(packed, doubled, TOKENS), torch.func.functional_call(model(), doubled, TOKENS)
        )


def test_a_cache_forgets():
    module = model()
    with torch.no_grad():
        cache = module.new_cache(3, 20)
        module(TOKENS, cache=cache)
        cache.keep(9)
        assert cache.length == 9 and cache.lengths.tolist() == [9] * 3
        torch.testing.assert_close(module(TOKENS[:, 9:], cache=cache), module(TOKENS)[:, 9:])
        with pytest.raises(ValueError, match=r"cache: length: expected one of 0\.\.14, got 15"):
            cache.keep(15)
        with pytest.raises(ValueError, match="cache: expected at most 20 tokens, got 21"):
            module(TOKENS[:, :7], cache=cache)
        assert cache.length == 14


def test_a_call_that_failed_between_two_layers_can_be_repeated():
    module = model()
    with torch.no_grad():
        tokens = TOKENS.repeat(1, 2)
        cache = module.new_cache(3, 28)
        module(tokens[:, :5], cache=cache)
        second = module.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        for stop in (6, 28):
            with pytest.raises(ZeroDivisionError):
                module(tokens[:, 5:stop], cache=cache)
        second.remove()
        torch.testing.assert_close(module(tokens[:, 5:], cache=cache), module(tokens)[:, 5:])


def test_a_call_that_failed_after_all_layers_can_be_repeated(monkeypatch):
    module = model()

    def fail(*_):
        raise torch.OutOfMemoryError("no room for the logits")

    with torch.no_grad():
        cache = module.new_cache(3, 20)
        module(TOKENS[:, :5], cache=cache)
        for place, name in ((module.model.norm, "forward"), (module, "logits")):
            with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
                patch.setattr(place, name, fail)
                module(TOKENS[:, 5:8], cache=cache)
            assert cache.length == 5 and cache.lengths.tolist() == [5] * 3
        torch.testing.assert_close(module(TOKENS[:, 5:], cache=cache), module(TOKENS)[:, 5:])


def test_a_loss_with_a_cache_leaves_all_tokens_in_it():
    module = model()
    with torch.no_grad():
        cache = module.new_cache(3, 20)
        torch.testing.assert_close(module(TOKENS[:, :6], labels=TOKENS[:, :6], cache=cache), module(TOKENS[:, :6], labels=TOKENS[:, :6]))
        torch.testing.assert_close(module(TOKENS[:, 6:], cache=cache), module(TOKENS)[:, 6:])


def test_a_cache_made_in_inference_mode_serves_outside_it():
    module = model()
    with torch.inference_mode():
        cache = module.new_cache(3, 20)
        module(TOKENS[:, :3], cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(module(TOKENS[:, 3:], cache=cache), module(TOKENS)[:, 3:])


@pytest.mark.parametrize("S", (3, 20))
def test_a_cache_of_another_batch_or_model_is_refused(S):
    module = model()
    layers, tokens = len(module.model.layers), TOKENS.repeat(1, 2)[:, :S]
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"cache: expected one of 3 sequences in {layers} layers, got one of 2 in {layers}"):
            module(tokens, cache=module.new_cache(2, 28))
        other = module.new_cache(3, 28)
        other.layers.pop()
        with pytest.raises(ValueError, match=f"cache: expected one of 3 sequences in {layers} layers, got one of 3 in {layers - 1}"):
            module(tokens, cache=other)
        assert not other.layers[0].k.any()


def test_logits_of_the_last_tokens_alone():
    module = model()
    with torch.no_grad():
        torch.testing.assert_close(module(TOKENS, logits_to_keep=2), module(TOKENS)[:, -2:])
        assert module(TOKENS, logits_to_keep=99).shape == module(TOKENS).shape
    for wrong in (-1, True, 1.0):
        with pytest.raises(ValueError, match=f"Model: logits_to_keep: expected an integer >= 0, got {wrong!r}"):
            module(TOKENS, logits_to_keep=wrong)


class Recorded(TorchDispatchMode):
    """A CUDA graph's rule, on a CPU: what ran on the device once, runs again with the same numbers of the host and the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(call, device, undo):
    call()
    undo()
    with Recorded() as graph:
        result = call()
    undo()

    def replayed():
        graph.replay()
        return result

    return replayed, ""


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on a CPU, and none of the looks at numbers that are free there alone."""
    monkeypatch.setattr(decoding, "captured", recorded)
    monkeypatch.setattr(arguments, "inspectable", lambda *_: False)
    begin = decoding.Cache.begin

    def on_device(cache, *sizes):
        cache.place_on_device = True
        return begin(cache, *sizes)

    monkeypatch.setattr(decoding.Cache, "begin", on_device)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rope_scaling", [None, {"rope_type": "dynamic", "factor": 2.0}], ids=str)
def test_a_replayed_token_is_read_where_the_cache_ends(backend, rope_scaling, graphs):
    device_or_skip("attention", backend)
    module = model(dataclasses.replace(SHAPE, rope_scaling=rope_scaling))
    with torch.no_grad(), use_backend(backend):
        cache = module.new_cache(3, 14)
        module(TOKENS[:, :6], cache=cache)
        one_more = decoding.NextToken(module, cache)
        assert not one_more.reason and cache.length == 6
        expected = module(TOKENS, longest=14)
        for place in range(6, 14):
            torch.testing.assert_close(one_more(TOKENS[:, place : place + 1]), expected[:, place])
            assert cache.length == place + 1 and cache.lengths.tolist() == [place + 1] * 3
        with pytest.raises(ValueError, match="NextToken: expected at most 14 tokens, the 14 in the cache included, got one more"):
            one_more(TOKENS[:, :1])
        cache.keep(6)
        torch.testing.assert_close(one_more(TOKENS[:, 6:7]), expected[:, 6])


def test_generation_by_a_graph_is_generation(graphs, monkeypatch):
    module = model()
    drawn = {"temperature": 1.0}
    expected = generate(module, TOKENS, GRAPH_FROM - 1), generate(module, TOKENS, 5, **drawn, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("fastprimer.generate.GRAPH_FROM", 1)
    got = generate(module, TOKENS, GRAPH_FROM - 1), generate(module, TOKENS, 5, **drawn, generator=torch.Generator().manual_seed(0))
    for (rows, probabilities), (expected_rows, expected_probabilities) in zip(got, expected, strict=True):
        assert rows == expected_rows
        torch.testing.assert_close(torch.tensor(probabilities), torch.tensor(expected_probabilities))


def test_a_replayed_token_does_not_go_beyond_the_positions(graphs):
    module = model(dataclasses.replace(SHAPE, max_position_embeddings=15))
    with torch.no_grad():
        cache = module.new_cache(3, 40)
        module(TOKENS, cache=cache)
        one_more = decoding.NextToken(module, cache)
        one_more(TOKENS[:, :1])
        with pytest.raises(ValueError, match="NextToken: expected at most 15 tokens"):
            one_more(TOKENS[:, :1])


def test_without_a_gpu_the_reason_says_so():
    module = model()
    with torch.no_grad():
        cache = module.new_cache(3, 20)
        module(TOKENS, cache=cache)
        one_more = decoding.NextToken(module, cache)
        assert one_more.reason == "a CUDA graph is for a GPU, not for cpu"
        torch.testing.assert_close(one_more(TOKENS[:, :1]), module(torch.cat((TOKENS, TOKENS[:, :1]), 1))[:, -1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generation_by_a_cuda_graph(monkeypatch):
    module = model().cuda()
    with torch.no_grad():
        assert decoding.NextToken(module, module.new_cache(3, 20)).reason == ""
    rows, probabilities = generate(module, TOKENS.cuda(), 2 * GRAPH_FROM)
    monkeypatch.setattr("fastprimer.generate.GRAPH_FROM", 1000)
    expected_rows, expected = generate(module, TOKENS.cuda(), 2 * GRAPH_FROM)
    assert rows == expected_rows
    torch.testing.assert_close(torch.tensor(probabilities), torch.tensor(expected))
