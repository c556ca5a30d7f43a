"""transformers' models patched: the same numbers as before, whatever the mask, the cache, the labels; and as they were after undo."""

import copy
import inspect
import re
import unittest.mock
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastprimer as fp

transformers = pytest.importorskip("transformers")

from fastprimer.integrations import hf_attention, hf_layers  # noqa: E402
from fastprimer.integrations.transformers import OPERATIONS, patch  # noqa: E402

HEADS = {"head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
EVERYTHING = {"rms_norm", "swiglu", "rope", "attention", "linear_cross_entropy"}
MODELS = {
    "llama": ({}, EVERYTHING),
    "mistral": ({"sliding_window": 4}, EVERYTHING),
    "mixtral": (EXPERTS, EVERYTHING - {"swiglu"} | {"moe"}),
    "qwen2": ({}, EVERYTHING),
    "qwen3": (HEADS, EVERYTHING),
    "qwen3_moe": (HEADS | EXPERTS, EVERYTHING - {"swiglu"} | {"moe"}),
    "gemma": (HEADS, EVERYTHING),
    "gemma2": (HEADS | {"sliding_window": 4}, EVERYTHING),  # caps its scores and its logits
    "gemma3_text": (HEADS | {"sliding_window": 4}, EVERYTHING),
    "gpt_oss": (HEADS | EXPERTS | {"sliding_window": 4}, EVERYTHING - {"swiglu"}),  # sinks
    "phi3": ({}, EVERYTHING),  # one projection for gate and up
    "granite": ({"logits_scaling": 3.0, "attention_multiplier": 0.1}, EVERYTHING),
    "cohere": ({}, EVERYTHING - {"rms_norm"}),  # neighbouring pairs, scaled logits, LayerNorm
    "glm4": (HEADS, EVERYTHING),  # half of each head is turned
    "starcoder2": ({}, {"rope", "attention", "linear_cross_entropy"}),
    "deepseek_v3": (MLA | DEEPSEEK, EVERYTHING | {"moe"}),  # Dv != D
}


def tiny(name, seed=0, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words = {"vocab_size": 97, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **(sizes | words | MODELS[name][0] | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pair(name, **options):
    """A patched model, the same unpatched, and the patch."""
    model = tiny(name, **options)
    plain = copy.deepcopy(model)
    return model, plain, patch(model)


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))


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


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(name, cache, tokens):
    model, plain, _ = pair(name)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.eval().generate(tokens, **options), plain.eval().generate(tokens, **options))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_other_masks(name, tokens):
    model, plain, _ = pair(name)
    model.eval(), plain.eval()
    holes = torch.ones_like(tokens)
    holes[1, 3] = holes[1, 5] = 0
    kept = holes.bool()
    close([model(tokens, attention_mask=holes).logits[kept]], [plain(tokens, attention_mask=holes).logits[kept]])
    added = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    close([model(tokens, attention_mask=added).logits], [plain(tokens, attention_mask=added).logits])
    first, second = model(tokens[:, :5], use_cache=True), plain(tokens[:, :5], use_cache=True)
    (cache,) = {"cache", "past_key_values"} & first.keys()
    close([model(tokens[:, 5:], **{cache: first[cache]}).logits], [plain(tokens[:, 5:], **{cache: second[cache]}).logits])
    whole, ends = tokens.view(1, 18), torch.tensor([0, 5, 12, 18], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (5, 7, 6)])[None]
    expected = plain(whole, position_ids=positions, use_cache=False).logits
    close([model(whole, position_ids=positions, use_cache=False).logits], [expected])
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    close([model(whole, position_ids=positions, use_cache=False, **packed).logits], [expected])


def test_what_is_plainly_masked_needs_no_mask(monkeypatch, tokens):
    served = []
    monkeypatch.setattr(hf_attention, "by_torch", lambda *args, **kwargs: served.append("torch"))
    model, _, _ = pair("mistral")
    model.eval()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    model(tokens), model(tokens, attention_mask=mask), model.generate(tokens, attention_mask=mask, max_new_tokens=3)
    assert not served


def mask_of(S, T, **options):
    known = inspect.signature(transformers.masking_utils.sdpa_mask).parameters
    queries = {"cache_position": torch.arange(S)} if "cache_position" in known else {"q_length": S}
    return hf_attention.mask(batch_size=1, kv_length=T, **queries, **options)


def test_what_else_is_masked_needs_one():
    config = SimpleNamespace(sliding_window=4)
    assert mask_of(9, 9, local_size=4, config=config).window == 4
    config.attention_chunk_size = 4  # then the local size may be that of chunks
    assert isinstance(mask_of(9, 9, local_size=4, config=config), torch.Tensor)
    assert mask_of(4, 6).shape == (1, 1, 4, 6)  # queries that are not the last tokens
    assert mask_of(4, 4, mask_function=lambda b, h, q, k: q != k, allow_is_causal_skip=False).shape == (1, 1, 4, 4)


def test_attention_with_dropout_or_wide_heads_is_torchs(tokens):
    class Module(nn.Module):
        is_causal = True

    q, k, v = torch.randn(2, 4, 5, 300), torch.randn(2, 2, 7, 300), torch.randn(2, 2, 7, 16)
    bias = torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(3).bool(), -torch.inf)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)
    close([hf_attention.attention(Module(), q, k, v, None)[0]], [expected])
    q, k = q[..., :16], k[..., :16]
    sinks = torch.randn(4)
    served = fp.attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, window=(2, 0), softcap=3.0, sinks=sinks)
    options = {"sliding_window": 3, "softcap": 3.0, "s_aux": sinks}
    close([hf_attention.attention(Module(), q, k, v, None, dropout=1e-12, **options)[0]], [served])
    thinned = hf_attention.attention(Module(), q, k, v, None, dropout=0.5, **options)[0]
    assert (thinned - served).abs().max() > 0.01


@pytest.mark.parametrize("length", [9, 5])
def test_encoders_and_cross_attention(length, tokens):
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, decoder_start_token_id=2)).eval()
    plain = copy.deepcopy(model)
    assert patch(model).replaced == {"BartForConditionalGeneration: attention": 1}
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens.flip(1)[:, :length]}
    close([model(**inputs).logits], [plain(**inputs).logits])


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


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
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


def test_other_models_are_not_touched(tokens):
    plain = tiny("llama").train()
    pair("llama")
    assert not any(map(hf_layers.is_ours, plain.modules())) and plain(tokens, labels=tokens).logits is not None


def test_a_part_of_the_operations():
    model = tiny("llama")
    assert [what for what in patch(model, only=("rms_norm",)).replaced] == ["LlamaRMSNorm: rms_norm"]
    assert patch(tiny("llama", num_hidden_layers=1).model.layers[0]).replaced.total() == 4  # any part of a model


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

    hooked = HookedRMSNorm(8)
    hooked.forward = hooked.forward
    model = nn.Sequential(OtherRMSNorm(), hooked, ReLUMLP(), Experts())
    patched = patch(model)
    assert not patched.replaced and not any(map(hf_layers.is_ours, model))
    assert {what: reason.split(" ")[1] for what, reason in patched.left.items()} == {
        "OtherRMSNorm: rms_norm": "computes",
        "HookedRMSNorm: rms_norm": "has",
        "ReLUMLP: swiglu": "activation",
        "Experts: moe": "is",
    }
    assert "left alone: ReLUMLP: swiglu: its activation is neither" in str(patched)


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
