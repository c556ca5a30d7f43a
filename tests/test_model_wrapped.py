"""What users put around a model and in place of its parts, adapters, hooks, pruning, FSDP2, compiled layers: nothing is passed over."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastprimer as fp
from fastprimer.checkpoint import CheckpointError
from fastprimer.layers import MoE, pack_projections

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = fp.Config(**SIZES, num_key_value_heads=2)
TIED = fp.Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
TOKENS = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(0))
MODELS = [fp.Model, fp.reference.Model]


class Adapter(nn.Module):
    """As LoRA is put around a linear layer, whose weight it still shows."""

    def __init__(self, base):
        super().__init__()
        self.base, self.b = base, nn.Parameter(torch.ones(base.out_features, base.in_features))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + nn.functional.linear(x, self.b)


def plain_loss(model):
    logits = model(TOKENS)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_around_the_head_counts(kind):
    model = kind(SMALL)
    before = model(TOKENS)
    model.lm_head = Adapter(model.lm_head)
    assert not torch.allclose(model(TOKENS), before)
    loss = model(TOKENS, TOKENS)
    torch.testing.assert_close(loss, plain_loss(model))
    loss.backward()
    assert model.lm_head.b.grad.any()


@pytest.mark.parametrize("kind", MODELS)
def test_the_bias_of_another_head_counts(kind):
    model = kind(SMALL)
    before = model(TOKENS)
    head = nn.Linear(32, 50)
    head.weight = model.lm_head.weight
    model.lm_head = head
    torch.testing.assert_close(model(TOKENS), before + head.bias)
    torch.testing.assert_close(model(TOKENS, TOKENS), plain_loss(model))


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_of_the_head_are_called(kind):
    model, called = kind(SMALL), []
    model.lm_head.register_forward_hook(lambda *_: called.append("forward"))
    model.lm_head.register_full_backward_hook(lambda *_: called.append("backward"))
    model(TOKENS)
    model(TOKENS, TOKENS).backward()
    assert called == ["forward", "forward", "backward"]


def test_global_hooks_are_called_of_packed_layers():
    model, called = pack_projections(fp.Model(SMALL)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        with torch.no_grad():
            model(TOKENS)
    finally:
        handle.remove()
    linear = {module for module in model.modules() if isinstance(module, nn.Linear)}
    assert linear <= set(called)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.slow
def test_a_plain_head_forms_no_logits(compiled):
    model = fp.Model(SMALL)
    expected = plain_loss(model)
    fused = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp.ops, "cross_entropy", None)
        torch.testing.assert_close(fused(TOKENS, TOKENS), expected)


def test_a_pruned_head_and_pruned_experts_follow_their_weights():
    """Pruning writes `weight` before each call of its layer: who reads it past the call trains an old one, and fails in the second step."""
    model = fp.Model(SMALL)
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    layer = MoE.mixtral(32, 16)
    prune.random_unstructured(layer.experts, "gate_up_proj", 0.5)
    x = torch.randn(4, 32)
    parameters = [*model.parameters(), *layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(TOKENS, TOKENS) + layer(x).square().sum()).backward()
        optimizer.step()
    assert model.lm_head.weight_orig.grad is not None
    hidden = model.model(TOKENS, None, None, None)
    torch.testing.assert_close(model(TOKENS), nn.functional.linear(hidden, model.lm_head.weight_orig * model.lm_head.weight_mask))


def test_a_model_of_compiled_layers_is_saved_under_its_own_names(tmp_path):
    model = fp.Model(SMALL)
    expected = model(TOKENS)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(fp.Model.from_pretrained(tmp_path)(TOKENS), expected)


def test_a_model_with_other_parts_is_not_saved(tmp_path):
    model = fp.Model(SMALL)
    model.lm_head = Adapter(model.lm_head)
    with pytest.raises(CheckpointError, match="the model has an unknown tensor lm_head.b; nothing was saved"):
        model.save_pretrained(tmp_path / "m")
    model = fp.Model(SMALL)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, 40, bias=False)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(40, \d+\), not its config's .*; nothing was saved"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_weights_tied_by_hand_are_saved_twice(tmp_path):
    model = fp.Model(SMALL)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(fp.Model.from_pretrained(tmp_path)(TOKENS), model(TOKENS))


def test_a_tied_model_takes_a_state_dict_that_names_the_embedding_twice():
    model, other = fp.Model(TIED), fp.Model(TIED)
    state = other.state_dict()
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    assert torch.equal(model(TOKENS), other(TOKENS))


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import fastprimer as fp
from fastprimer.checkpoint import CheckpointError
from fastprimer.generate import generate

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
tokens = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(0))
for experts in ({}, dict(num_local_experts=4, num_experts_per_tok=2)):
    for units in (("self_attn",), ("lm_head",), ("experts",), ()):
        torch.manual_seed(0)
        model = fp.Model(fp.Config(**sizes, **experts))
        with torch.no_grad():
            expected = model(tokens), model(tokens, tokens)
        for name, module in list(model.named_modules()):
            if name.split(".")[-1] in units:
                fully_shard(module, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(model(tokens), expected[0])
        loss = model(tokens, tokens)
        torch.testing.assert_close(loss, expected[1])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
        with torch.no_grad():
            cache = model.new_cache(2, 12)
            torch.testing.assert_close(model(tokens[:, :9], cache=cache)[:, -1], expected[0][:, 8])
            torch.testing.assert_close(model(tokens[:, 9:], cache=cache)[:, -1], expected[0][:, 9])
        try:
            model.save_pretrained(sys.argv[2])
        except CheckpointError as error:
            assert "is sharded; nothing was saved" in str(error)
        else:
            raise AssertionError("saved")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_with_any_unit(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "rendezvous"), str(tmp_path / "m")]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    assert not (tmp_path / "m").exists()
