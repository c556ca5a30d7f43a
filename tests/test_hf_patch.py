"""transformers' models patched: the same losses and gradients as before, whatever the labels and the dtype; as they were after undo."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
import unittest.mock

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from hf_checks import EVERYTHING, MODELS, close, gradients, pair, tiny  # noqa: E402

from fastprimer.integrations import hf_attention, hf_layers  # noqa: E402
from fastprimer.integrations.transformers import OPERATIONS, patch  # noqa: E402


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_logits(name, tokens):
    model, plain, patched = pair(name)
    assert {what.split(": ")[1] for what in patched.replaced} == MODELS[name][1], str(patched)
    right = torch.ones_like(tokens)
    right[0, 6:] = 0
    inputs = {"input_ids": tokens, "attention_mask": right, "labels": tokens.masked_fill(right == 0, -100)}
    close(gradients(model.train(), **inputs), gradients(plain.train(), **inputs))
    for mask in (right, right.flip(1), torch.ones_like(tokens)):
        kept = mask.bool()
        close([model.eval()(tokens, attention_mask=mask).logits[kept]], [plain.eval()(tokens, attention_mask=mask).logits[kept]])


@pytest.mark.parametrize(
    "inputs",
    [
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": torch.arange(18).view(2, 9)},
        {"return_dict": False},
        {"ignore_index": 3},
        {"logits_to_keep": 0},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_options_of_the_loss(inputs, tokens):
    model, plain, _ = pair("llama")
    labels = tokens.masked_fill(tokens % 2 == 0, 3)
    close([model.train()(tokens, labels=labels, **inputs)[0]], [plain.train()(tokens, labels=labels, **inputs)[0]])


def test_the_memory_budget_is_that_of_the_loss(tokens):
    model, plain = tiny("llama"), tiny("llama")
    patch(model, memory_budget=12345)
    close(gradients(model.train(), input_ids=tokens, labels=tokens), gradients(plain.train(), input_ids=tokens, labels=tokens))
    with unittest.mock.patch("fastprimer.ops.linear_cross_entropy", return_value=torch.zeros(())) as called:
        model(tokens, labels=tokens)
    assert called.call_args.kwargs["memory_budget"] == 12345
    with pytest.raises(ValueError, match="patch: memory_budget: expected None or a number of bytes >= 0, got -1"):
        patch(plain, memory_budget=-1)


def test_logits_are_there_but_for_training(tokens):
    model, plain, _ = pair("llama")
    output = model.train()(tokens, labels=tokens)
    assert output.logits is None and "logits" not in output.keys()
    assert model(tokens).logits.shape == (2, 9, 97)
    output, expected = model.eval()(tokens, labels=tokens), plain.eval()(tokens, labels=tokens)
    close([output.loss, output.logits], [expected.loss, expected.logits])


def test_a_head_or_a_loss_of_ones_own_is_respected(tokens):
    model, plain, _ = pair("llama")
    for each in (model, plain):
        each.train().loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    close([model(tokens, labels=tokens).loss], [plain(tokens, labels=tokens).loss])
    model, plain, _ = pair("llama")

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(64, 97, bias=False)

        def forward(self, x):
            return self.base(x) + self.more(x)

    for each in (model.train(), plain.train()):
        torch.manual_seed(2)
        each.lm_head = Adapted(each.lm_head)
        torch.manual_seed(3)
        each.model.layers[0].mlp.gate_proj = nn.Sequential(each.model.layers[0].mlp.gate_proj, nn.Linear(96, 96))
    close(gradients(model, input_ids=tokens, labels=tokens), gradients(plain, input_ids=tokens, labels=tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "autocast"])
def test_other_dtypes(dtype, tokens):
    model, plain, _ = pair("llama")
    exact = float(plain.train()(tokens, labels=tokens).loss)
    model, plain = (each.train() if dtype is None else each.train().to(dtype) for each in (model, plain))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        got, theirs = (each(tokens, labels=tokens).loss for each in (model, plain))
    assert got.dtype == theirs.dtype and abs(float(got) - exact) <= 2 * abs(float(theirs) - exact) + 0.01


def test_a_loss_of_a_models_own_making(tokens):
    class Masking(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            own = labels.masked_fill(labels % 2 == 0, -100)
            loss = self.loss_function(logits=logits, labels=own, vocab_size=97)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    class Adding(Masking):
        def forward(self, input_ids, labels=None, **kwargs):
            output = super().forward(input_ids, labels)
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
            return output

    for cls, fused in ((Masking, True), (Adding, False)):
        model = cls(tiny("llama").config)
        plain = copy.deepcopy(model)
        assert (f"{cls.__name__}: linear_cross_entropy" in patch(model).replaced) == fused
        inputs = {"input_ids": tokens, "labels": tokens}
        close(gradients(model.train(), **inputs), gradients(plain.train(), **inputs))


def test_hooks_of_the_head_see_logits(tokens):
    model, plain, _ = pair("llama")
    for each in (model.train(), plain.train()):
        each.lm_head.register_forward_hook(lambda module, args, logits: 3 * logits)
    inputs = {"input_ids": tokens, "labels": tokens}
    close(gradients(model, **inputs), gradients(plain, **inputs))
    assert model(**inputs).logits.shape == (2, 9, 97)


def test_a_patched_model_is_pickled(tokens):
    model, plain, _ = pair("mixtral")
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin.model.norm) is type(model.model.norm)
    inputs = {"input_ids": tokens, "labels": tokens}
    close(gradients(twin.train(), **inputs), gradients(plain.train(), **inputs))


@pytest.mark.slow
def test_a_patched_model_runs_in_another_process(tmp_path, tokens):
    model = pair("llama")[0]
    torch.save((model, tokens), tmp_path / "model.pt")
    code = "import torch; model, tokens = torch.load('model.pt', weights_only=False); torch.save(model.eval()(tokens).logits, 'logits.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    close([torch.load(tmp_path / "logits.pt")], [model.eval()(tokens).logits])


def test_an_activation_has_its_hooks_and_may_be_replaced(tokens):
    """The hooks are not called while patch tries the layer, and not ignored after it."""
    model, plain, patched = pair("llama")
    patched.undo()
    seen = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    patch(model)
    assert not seen
    model.eval()(tokens)
    assert len(seen) == len(model.model.layers)
    for each in (model, plain):
        each.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    close([model(tokens).logits], [plain.eval()(tokens).logits])


def test_checkpointing_copies_and_saving(tmp_path, tokens):
    model, plain, _ = pair("mixtral")
    for each in (model.train(), plain.train()):
        each.activation_checkpointing_enable() if hasattr(each, "activation_checkpointing_enable") else each.gradient_checkpointing_enable()
    inputs = {"input_ids": tokens, "labels": tokens}
    close(gradients(model, **inputs), gradients(plain, **inputs))
    twin = copy.deepcopy(model)
    assert twin.lm_head is not model.lm_head and hf_layers.is_ours(twin.lm_head)
    close(gradients(twin, **inputs), gradients(plain, **inputs))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain) and loaded.config.architectures == ["MixtralForCausalLM"]
    close([loaded.eval()(tokens).logits], [plain.eval()(tokens).logits])


def test_the_routers_losses_are_added(tokens):
    model, plain, _ = pair("mixtral")
    inputs = {"input_ids": tokens, "labels": tokens, "output_router_logits": True}
    close(gradients(model.train(), **inputs), gradients(plain.train(), **inputs))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
@pytest.mark.slow
def test_compiles_into_one_graph(name, tokens):
    from torch._dynamo.testing import CompileCounterWithBackend

    model, plain, _ = pair(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    close(gradients(compiled, **inputs), gradients(plain.train(), **inputs))
    code = "".join(graph.print_readable(print_output=False) for graph in counter.graphs)
    called = set(re.findall(r"fastprimer\.([a-z_]+)_forward", code))
    assert called == MODELS[name][1]


def test_undo_gives_everything_back():
    model = tiny("mixtral")
    plain = copy.deepcopy(model)
    with patch(model) as patched:
        assert any(map(hf_layers.is_ours, model.modules()))
        assert model.config._attn_implementation == hf_attention.NAME
        assert isinstance(model, transformers.MixtralForCausalLM) and type(model).__name__ == "MixtralForCausalLM"
        assert inspect.signature(model.forward) == inspect.signature(plain.forward)  # Trainer goes by it
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert patched.undo() is model


def test_undo_finds_copies_within_the_model_and_models_beside_each_other():
    both = nn.ModuleDict({"a": tiny("llama"), "b": tiny("gemma2")})
    before = [model.config._attn_implementation for model in both.values()]
    patched = patch(both)
    assert patched.replaced["LlamaForCausalLM: attention"] == patched.replaced["Gemma2ForCausalLM: linear_cross_entropy"] == 1
    both["c"] = copy.deepcopy(both["a"].model.norm)  # as peft's modules_to_save
    patched.undo()
    assert not any(map(hf_layers.is_ours, both.modules()))
    assert [both[name].config._attn_implementation for name in "ab"] == before


def test_other_models_are_not_touched(tokens):
    plain = tiny("llama").train()
    pair("llama")
    assert not any(map(hf_layers.is_ours, plain.modules())) and plain(tokens, labels=tokens).logits is not None


def test_a_part_of_the_operations():
    model = tiny("llama")
    assert [what for what in patch(model, only=("rms_norm",)).replaced] == ["LlamaRMSNorm: rms_norm"]
    assert patch(tiny("llama", num_hidden_layers=1).model.layers[0]).replaced.total() == 4  # any part of a model
    adapted = nn.Sequential(tiny("llama"))
    patched = patch(adapted)
    assert {what.split(": ")[1] for what in patched.replaced} == EVERYTHING
    patched.undo()
    assert adapted[0].config._attn_implementation == "sdpa" and not any(map(hf_layers.is_ours, adapted.modules()))


def test_what_computes_something_else_is_left_alone():
    class OtherRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    class HookedRMSNorm(nn.RMSNorm):
        pass

    class ReLUMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 8, 4)), nn.Parameter(torch.ones(2, 4, 4))

        def forward(self, x, experts, weights):
            return x

    class ClampedMLP(ReLUMLP):
        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x).clamp(max=16)) * self.up_proj(x).clamp(-16, 16))

    class DroppingMLP(ReLUMLP):
        def forward(self, x):
            down = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
            return nn.functional.dropout(down, 0.1, self.training)

    class MoreExperts(Experts):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(3, 8, 4))

    hooked = HookedRMSNorm(8)
    hooked.forward = hooked.forward
    model = nn.Sequential(OtherRMSNorm(), hooked, ReLUMLP(), ClampedMLP(), DroppingMLP(), Experts(), MoreExperts())
    patched = patch(model)
    assert not patched.replaced and not any(map(hf_layers.is_ours, model))
    assert {what: reason.split(" ")[1] for what, reason in patched.left.items()} == {
        "OtherRMSNorm: rms_norm": "computes",
        "HookedRMSNorm: rms_norm": "has",
        "ReLUMLP: swiglu": "activation",
        "ClampedMLP: swiglu": "activation",
        "DroppingMLP: swiglu": "activation",
        "Experts: moe": "is",
        "MoreExperts: moe": "parameters",
    }
    assert "left alone: ReLUMLP: swiglu: its activation is neither" in str(patched)


def test_tied_resized_and_scripted(tokens):
    model, plain, patched = pair("llama", tie_word_embeddings=True)
    inputs = {"input_ids": tokens, "labels": tokens}
    close(gradients(model.train(), **inputs), gradients(plain.train(), **inputs))
    for each in (model, plain):
        each.resize_token_embeddings(120, mean_resizing=False)
    plain.load_state_dict(model.state_dict())
    close(gradients(model, **inputs), gradients(plain, **inputs))
    patched.undo()
    assert not patch(nn.Sequential(torch.jit.script(nn.Linear(2, 2)))).replaced


def test_trying_leaves_no_trace():
    model = tiny("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.device("meta"):
        patch(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model",), "patch: model: expected a module, got str"),
        ((nn.Linear(2, 2), "rope"), "patch: only: expected some of .*, got 'rope'"),
        ((nn.Linear(2, 2), ["rope", "ropes"]), "patch: only: expected some of .*, got \\['rope', 'ropes'\\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        patch(arguments[0], **({"only": arguments[1]} if len(arguments) > 1 else {}))


def test_patched_twice_and_undone_too_late():
    model = tiny("llama")
    patched = patch(model)
    with pytest.raises(ValueError, match="patch: model: expected one that is not patched, got one that is: undo that first"):
        patch(model)
    norm = model.model.norm
    ours = type(norm)
    norm.__class__ = type("FSDPLlamaRMSNorm", (ours,), {})
    with pytest.raises(RuntimeError, match="got a FSDPLlamaRMSNorm, which was wrapped since"):
        patched.undo()
    assert hf_layers.is_ours(model.lm_head)
    norm.__class__ = ours
    patched.undo()
    assert not any(map(hf_layers.is_ours, model.modules())) and set(OPERATIONS) >= EVERYTHING
