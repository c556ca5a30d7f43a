"""Weights pass to and from Hugging Face's transformers, and the logits agree."""

import pytest
import torch

import fastprimer as fp

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastprimer[hf])")

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=None,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def tokens():
    return torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_their_weights_give_their_logits(name, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ours = fp.Model.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits)
        labels = tokens()
        torch.testing.assert_close(ours(tokens(), labels), theirs(tokens(), labels=labels).loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_they_read_what_we_write(name, tmp_path):
    CONFIGS[name]().save_pretrained(tmp_path / "config")
    ours = fp.Model(fp.Config.from_json(tmp_path / "config/config.json"))
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits)
