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
    "gelu": lambda: transformers.LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "linear": lambda: scaled("linear", factor=4.0),
    "dynamic": lambda: scaled("dynamic", factor=2.0, max_position_embeddings=20),
    "dynamic-mixtral": lambda: scaled(
        "dynamic", factor=4.0, max_position_embeddings=20, head_dim=8, architecture="Mixtral", num_local_experts=4, num_experts_per_tok=2
    ),
    "yarn": lambda: scaled("yarn", factor=8.0, beta_fast=4.0, original_max_position_embeddings=16),
    "yarn-mscale": lambda: scaled("yarn", factor=8.0, mscale=0.5, mscale_all_dim=2.0, truncate=False, architecture="Qwen3", head_dim=16),
    "llama3": lambda: scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "longrope-short": lambda: scaled("longrope", **LONGROPE, factor=2.0, original_max_position_embeddings=40),
    "longrope-long": lambda: scaled("longrope", **LONGROPE, factor=2.0, original_max_position_embeddings=39),
    "proportional": lambda: scaled("proportional", partial_rotary_factor=0.5),
}
LONGROPE = dict(short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[2.0, 4.0, 6.0, 8.0])


def scaled(kind, max_position_embeddings=64, architecture="Llama", **settings):
    """Frequent turns, so that 40 positions show each scaling."""
    fields = ("head_dim", "num_local_experts", "num_experts_per_tok", "use_qk_norm", "first_k_dense_replace")
    outside = {k: settings.pop(k) for k in fields if k in settings}
    sizes = SIZES | outside | {"max_position_embeddings": max_position_embeddings, "initializer_range": 0.3}
    rope = {"rope_type": kind, "rope_theta": 100.0, **settings}
    return getattr(transformers, f"{architecture}Config")(**sizes, rope_parameters=rope)


def tokens(length=12):
    return torch.randint(0, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0))


def distance(got, expected):
    """The greatest difference of logits, as a share of the greatest logit."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return ((got - expected).abs().max() / expected.abs().max()).item()


ROUNDING = 1e-5  # float32 in another order of operations; a setting that is ignored shows 100 times as much (see below)


def fresh(model):
    """The same model: theirs keeps the frequencies of the longest sequence that it has seen."""
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen3": "Qwen3"}
FIELDS = (
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window", "hidden_act", "tie_word_embeddings",
    "num_local_experts", "num_experts_per_tok", "initializer_range",
)  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_config_with_little_in_it_is_theirs(model_type):
    given = dict(vocab_size=61, hidden_size=256, intermediate_size=48, num_hidden_layers=2, num_attention_heads=32)
    theirs = getattr(transformers, f"{ARCHITECTURES[model_type]}Config").from_dict(given)
    for more in ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}):
        ours = fp.Config.from_dict(given | more | {"model_type": model_type})
        fields = [field for field in FIELDS if hasattr(theirs, field)]
        assert {f: getattr(ours, f) for f in fields} == {f: getattr(theirs, f) for f in fields}
        assert ours.head_dim == (theirs.head_dim or 256 // 32) and ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.model_type == model_type and fp.Config.from_dict(ours.to_dict()) == ours


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_they_ignore_is_ignored(model_type, tmp_path):
    """A window of LLaMA, experts of a dense model, a norm that an architecture does not have."""
    foreign = {"sliding_window": 5, "num_local_experts": 4, "qk_norm": model_type != "qwen3", "norm_topk_prob": False}
    config = getattr(transformers, f"{ARCHITECTURES[model_type]}Config").from_dict({**SIZES, "head_dim": 8, **foreign})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = fp.Model(fp.Config.from_dict({**SIZES, "head_dim": 8, **foreign, "model_type": model_type}))
    ours.load_state_dict(theirs.state_dict())
    assert ours.config.model_type == model_type
    with torch.no_grad():
        assert distance(ours(tokens(12)), theirs(tokens(12)).logits) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_their_weights_give_their_logits(name, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ours = fp.Model.from_pretrained(tmp_path)
    with torch.no_grad():
        for length in (12, 40):
            theirs = fresh(theirs)
            labels = tokens(length)
            assert distance(ours(tokens(length)), theirs(tokens(length)).logits) < ROUNDING
            torch.testing.assert_close(ours(tokens(length), labels), theirs(tokens(length), labels=labels).loss)
        if not ours.config.is_moe:  # their experts take no float64; their tables are of float32 even then
            assert distance(ours.double()(tokens(40)), fresh(theirs).double()(tokens(40)).logits) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("kind, settings", [("default", {}), ("yarn", {"factor": 4.0, "beta_fast": 4.0}), ("dynamic", {"factor": 2.0})])
def test_partly_rotated_heads(kind, settings):
    """A GLM-4.5 without experts is a Qwen3 that rotates a share of each head."""
    shape = {"head_dim": 16, "use_qk_norm": True, "first_k_dense_replace": 2, "architecture": "Glm4Moe"}
    config = scaled(kind, max_position_embeddings=20, partial_rotary_factor=0.5, **shape, **settings)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = fp.Model(fp.Config.from_dict({**config.to_dict(), "model_type": "fastprimer", "qk_norm": True}))
    ours.load_state_dict(theirs.state_dict())
    assert ours.config.rope.rotary_size == 8
    length = 40 if kind == "dynamic" else 20
    with torch.no_grad():
        assert distance(ours(tokens(length)), theirs(tokens(length)).logits) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "yarn-mscale", "llama3", "longrope-long", "proportional", "gelu"])
def test_the_comparison_sees_an_ignored_setting(name):
    config = CONFIGS[name]()
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ignored = {"hidden_act": "silu", "rope_parameters": None, "rope_theta": 100.0 if name != "gelu" else 10000.0}
    ours = fp.Model(fp.Config.from_dict({**config.to_dict(), **ignored, "max_position_embeddings": 64}))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert distance(ours(tokens(40)), theirs(tokens(40)).logits) > 100 * ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral", "gelu", "dynamic", "yarn-mscale", "llama3", "longrope-long", "proportional"])
def test_they_read_what_we_write(name, tmp_path):
    CONFIGS[name]().save_pretrained(tmp_path / "config")
    ours = fp.Model(fp.Config.from_json(tmp_path / "config/config.json"))
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        assert distance(ours(tokens(40)), theirs(tokens(40)).logits) < ROUNDING


@pytest.mark.slow
def test_frequencies_that_old_folders_hold_are_not_weights(tmp_path):
    """Those of Llama 2, for one: transformers wrote down what it computes now."""
    from safetensors.torch import load_file, save_file

    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(SIZES["num_hidden_layers"])}
    save_file(weights | old, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert distance(fp.Model.from_pretrained(tmp_path)(tokens()), theirs(tokens()).logits) < ROUNDING
