"""Configs and model folders: what is derived, what is refused, and what passes through for whoever generates."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

import fastprimer as fp
from conftest import SMALL
from fastprimer.checkpoint import CheckpointError
from fastprimer.config import ConfigError

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


def test_what_was_left_out_follows_from_the_changed_fields():
    config = fp.Config(**SIZES)
    wider = config.replace(hidden_size=64, num_attention_heads=2)
    assert (wider.head_dim, wider.num_key_value_heads) == (32, 2)
    assert wider == fp.Config(**SIZES | dict(hidden_size=64, num_attention_heads=2))
    assert wider.replace(num_attention_heads=8).num_key_value_heads == 8
    given = fp.Config(**SIZES, head_dim=16, num_key_value_heads=2).replace(hidden_size=64)
    assert (given.head_dim, given.num_key_value_heads) == (16, 2)
    assert config.replace(num_key_value_heads=1).replace(num_attention_heads=8).num_key_value_heads == 1
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        dataclasses.replace(config, num_attention_heads=2)


def test_configs_are_keys():
    scaled = SMALL.replace(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert {SMALL: 1, scaled: 2}[SMALL.replace(rope_scaling={"rope_type": "linear", "factor": 2.0})] == 2


def test_an_unknown_field_is_refused_where_nothing_says_whose_config_it_is():
    assert fp.Config.from_dict({**SIZES, "use_cache": True, "attention_bias": False}) == fp.Config(**SIZES)
    with pytest.raises(ConfigError, match="config: hidden_sise: there is no such field"):
        fp.Config.from_dict({**SIZES, "hidden_sise": 3})
    assert fp.Config.from_dict({**SIZES, "model_type": "llama", "some_new_field": 3}).model_type == "llama"


@pytest.mark.parametrize(("field", "value"), [("eos_token_id", "2"), ("eos_token_id", []), ("bos_token_id", [1]), ("pad_token_id", 0.5)])
def test_a_token_that_is_none_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"config: {field}: expected a token's number"):
        fp.Config(**SIZES, **{field: value})


@pytest.mark.parametrize("ends", [37, [37, 5], None], ids=str)
def test_the_tokens_that_end_a_text_survive_the_way_there_and_back(ends, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, bos_token_id=3, eos_token_id=ends, pad_token_id=4)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    model = fp.Model.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id) == (3, ends, 4)
    assert again.generation_config.eos_token_id == ends
    before, after = (json.loads((tmp_path / folder / "generation_config.json").read_text()) for folder in "ab")
    assert before == after


def test_a_folder_without_tokens_has_those_of_its_kind_and_a_model_made_here_none(tmp_path):
    transformers = pytest.importorskip("transformers")
    for model_type, kind in (("llama", "Llama"), ("mistral", "Mistral"), ("mixtral", "Mixtral"), ("qwen3", "Qwen3")):
        theirs = getattr(transformers, f"{kind}Config")()
        ours = fp.Config.from_dict({**SIZES, "model_type": model_type, "num_key_value_heads": 4})
        assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    fp.Model(fp.Config(**SIZES)).save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id is None
    assert not (tmp_path / "generation_config.json").exists()


def test_a_mixture_whose_loss_holds_that_of_its_routers_is_refused():
    with pytest.raises(ConfigError, match="output_router_logits: only False is supported"):
        fp.Config.from_dict({**SIZES, "model_type": "mixtral", "num_key_value_heads": 4, "output_router_logits": True})


def test_a_tied_model_refuses_another_head(tmp_path):
    tied, untied = fp.Model(SMALL.replace(tie_word_embeddings=True)), fp.Model(SMALL)
    with pytest.raises(RuntimeError, match="lm_head.weight"):
        tied.load_state_dict(untied.state_dict())
    embedding = untied.model.embed_tokens.weight
    tied.load_state_dict(untied.state_dict() | {"lm_head.weight": embedding.clone()})
    assert torch.equal(tied.model.embed_tokens.weight, embedding)
    untied.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(tied.config.to_json())
    with pytest.raises(CheckpointError, match="unknown tensor lm_head.weight"):
        fp.Model.from_pretrained(tmp_path)


def test_the_dtype_of_a_folder_may_be_named(tmp_path):
    fp.Model(SMALL).bfloat16().save_pretrained(tmp_path)
    for dtype, found in (("auto", torch.bfloat16), (None, torch.bfloat16), ("float32", torch.float32), (torch.float64, torch.float64)):
        assert fp.Model.from_pretrained(tmp_path, dtype=dtype).lm_head.weight.dtype == found
    for wrong in ("int8", torch.int8, "bf16", 3):
        with pytest.raises(ValueError, match="Model: dtype: expected a floating-point dtype"):
            fp.Model.from_pretrained(tmp_path, dtype=wrong)


def test_a_broken_generation_config_is_named(tmp_path):
    model = fp.Model(SMALL)
    model.save_pretrained(tmp_path)
    for text in ("[]", "{"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="generation_config.json"):
            fp.Model.from_pretrained(tmp_path)
    assert len(safetensors.torch.load_file(tmp_path / "model.safetensors")) == len(model.state_dict())


def test_a_model_names_what_it_was_given_instead_of_a_config_or_tokens():
    with pytest.raises(TypeError, match="Model: config: expected a Config, .* got str"):
        fp.Model("calculator")
    with pytest.raises(TypeError, match="Model: tokens: expected a tensor, got list"):
        fp.Model(SMALL)([[1, 2]])
    with pytest.raises(TypeError, match="Model: tokens: expected int32 or int64"):
        fp.Model(SMALL)(torch.ones(1, 2))
    with pytest.raises(ValueError, match="Model: tokens: expected numbers from 0 to 49, got -1 to 3"):
        fp.Model(SMALL)(torch.tensor([[-1, 3]]))


def test_the_reference_takes_labels_of_32_bits_as_the_model_does():
    reference, tokens = fp.reference.Model(SMALL), torch.tensor([[1, 2, 3]])
    assert torch.equal(reference(tokens, tokens.int()), reference(tokens, tokens))
