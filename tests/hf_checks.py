"""Small models of transformers, patched and not, and how they are compared."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fastprimer.integrations.transformers import patch  # noqa: E402

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
    config = transformers.AutoConfig.for_model(name, **(sizes | words | MODELS.get(name, ({},))[0] | options))
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
