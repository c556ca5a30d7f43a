"""The fast model against the reference model, configurations, and model folders as Hugging Face keeps them."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from conftest import SMALL
from fastprimer import layers, reference
from fastprimer.checkpoint import CheckpointError, split_experts, stack_experts
from fastprimer.config import PRESETS, Config, ConfigError
from fastprimer.generate import generate
from fastprimer.model import Model
from fastprimer.testing import FORWARD_FACTOR, GRADIENT_FACTOR, share_of_budget


def scaled(kind, max_position_embeddings=256, **settings):
    scaling = {"rope_type": kind, **settings}
    return dataclasses.replace(SMALL, rope_theta=100.0, rope_scaling=scaling, max_position_embeddings=max_position_embeddings)


CONFIGS = {
    "llama": SMALL,
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True, rope_theta=100.0),
    "mistral": dataclasses.replace(SMALL, sliding_window=4),
    "mixtral": dataclasses.replace(SMALL, num_local_experts=4),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, head_dim=16, tie_word_embeddings=True),
    "partial": dataclasses.replace(SMALL, partial_rotary_factor=0.5, qk_norm=True),
    "linear": scaled("linear", factor=4.0),
    "dynamic": scaled("dynamic", factor=2.0, max_position_embeddings=10),
    "yarn": scaled("yarn", factor=8.0, beta_fast=4.0, original_max_position_embeddings=32),
    "llama3": scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "longrope": scaled(
        "longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[2.0, 4.0, 6.0, 8.0], factor=4.0, original_max_position_embeddings=20
    ),
    "proportional": scaled("proportional", partial_rotary_factor=0.5),
    "mixtral-yarn": dataclasses.replace(
        SMALL, num_local_experts=4, partial_rotary_factor=0.5, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    ),
    "gelu": dataclasses.replace(SMALL, hidden_act="gelu_pytorch_tanh"),
}
MODEL_TYPES = {"mistral": "mistral", "mixtral": "mixtral", "qwen3": "qwen3", "partial": "fastprimer", "mixtral-yarn": "fastprimer"}
TOKENS = torch.randint(50, (3, 14), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100, TOKENS)


def models(config, dtype=torch.float32):
    torch.manual_seed(0)
    slow = reference.Model(config)
    fast = Model(config)
    fast.load_state_dict(slow.state_dict())
    return slow.to(dtype), fast.to(dtype)


def results(model, labels=LABELS):
    """Logits, loss, the gradients of all weights from the loss, and those from random gradients of the logits."""
    model.zero_grad()
    loss = model(TOKENS, labels)
    names, tensors = zip(*model.named_parameters(), strict=True)
    from_loss = torch.autograd.grad(loss, tensors)
    logits = model(TOKENS, positions=TOKENS)
    dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    from_logits = torch.autograd.grad(logits, tensors, dlogits)
    outputs = {"loss": loss.detach(), "logits": logits.detach(), "logits in order": model(TOKENS).detach()}
    gradients = {f"d{name} of the loss": g for name, g in zip(names, from_loss, strict=True)}
    return outputs, gradients | {f"d{name} of logits": g for name, g in zip(names, from_logits, strict=True)}


def worst_share(config, dtype, labels=LABELS):
    """The largest share of the error budget that the fast model takes, and in which tensor."""
    truth, yardstick = results(models(config, torch.float64)[0]), results(models(config)[0])
    got = results(models(config, dtype)[1], labels)
    shares = []
    for part, factor in ((0, FORWARD_FACTOR), (1, GRADIENT_FACTOR)):
        assert got[part].keys() == truth[part].keys()
        shares += [(share_of_budget(t, truth[part][k], yardstick[part][k], factor), k) for k, t in got[part].items()]
    return max(shares)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_two_models_agree(name, dtype):
    share, where = worst_share(CONFIGS[name], dtype)
    assert share <= 1, where


def test_the_comparison_sees_a_planted_bug(monkeypatch):
    assert worst_share(SMALL, torch.float32, LABELS.roll(1, 1))[0] > 1
    monkeypatch.setattr(layers.RotaryEmbedding, "forward", lambda self, p, dtype, longest: two_thetas(self, p, dtype))
    assert worst_share(SMALL, torch.float32)[0] > 1


@pytest.mark.parametrize("name", ("dynamic", "yarn", "longrope", "proportional"))
def test_the_comparison_sees_an_ignored_scaling(name, monkeypatch):
    unscaled = layers.RotaryEmbedding(SMALL.head_dim, 100.0)
    monkeypatch.setattr(layers.RotaryEmbedding, "from_config", lambda config: unscaled)
    assert worst_share(CONFIGS[name], torch.float32)[0] > 1


def test_the_comparison_sees_an_ignored_activation(monkeypatch):
    monkeypatch.setitem(layers.HIDDEN_ACTS, "gelu_pytorch_tanh", "silu")
    assert worst_share(CONFIGS["gelu"], torch.float32)[0] > 1


def test_the_loss_counts_the_last_token_for_the_length():
    config = scaled("dynamic", factor=4.0, max_position_embeddings=4)
    slow, fast = models(config, torch.float64)
    losses = [fast(TOKENS, LABELS).item(), slow(TOKENS, LABELS).item()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    shorter = torch.nn.functional.cross_entropy(fast(TOKENS[:, :-1]).flatten(0, 1), LABELS[:, 1:].flatten()).item()
    assert abs(shorter - losses[0]) > 1e-6


def two_thetas(rotary, positions, dtype):
    angles = positions.to(dtype)[:, None] / (2 * rotary.theta) ** (torch.arange(0, rotary.head_dim, 2, dtype=dtype) / rotary.head_dim)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_have_the_same_names_and_start(name):
    torch.manual_seed(3)
    slow, fast = reference.Model(CONFIGS[name]), Model(CONFIGS[name])
    assert {n: p.shape for n, p in slow.state_dict().items()} == {n: p.shape for n, p in fast.state_dict().items()}
    for model in (slow, fast):
        torch.manual_seed(4)
        reference.initialize(model, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters(), strict=True))


def test_names_are_those_of_hugging_face():
    names = set(Model(dataclasses.replace(CONFIGS["mixtral"], num_hidden_layers=1, qk_norm=True)).state_dict())
    layer = "model.layers.0."
    attention = {f"{layer}self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    norms = {f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"}
    moe = {f"{layer}mlp.gate.weight", f"{layer}mlp.experts.gate_up_proj", f"{layer}mlp.experts.down_proj"}
    assert names == attention | norms | moe | {"model.embed_tokens.weight", "lm_head.weight"}
    dense = set(Model(dataclasses.replace(SMALL, num_hidden_layers=1)).state_dict())
    assert {n for n in dense if ".mlp." in n} == {f"{layer}mlp.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_a_cache_gives_the_same_tokens(name):
    slow, fast = models(CONFIGS[name], torch.float64)
    for model in (slow, fast):
        model.double()
    without, p = generate(slow, TOKENS, 12, end=7)
    cached, q = generate(fast, TOKENS, 12, end=7)
    assert without == cached
    assert p == pytest.approx(q, rel=1e-9)


def test_model_names_a_wrong_argument():
    _, fast = models(dataclasses.replace(SMALL, max_position_embeddings=14))
    fast(TOKENS)
    with pytest.raises(ValueError, match="tokens: .*max_position_embeddings = 14, got .3, 28"):
        fast(TOKENS.repeat(1, 2))
    with pytest.raises(ValueError, match="tokens"):
        fast(TOKENS[0])
    with pytest.raises(ValueError, match="labels"):
        fast(TOKENS, LABELS[:, 1:])
    with pytest.raises(ValueError, match="positions"):
        fast(TOKENS, positions=TOKENS[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_is_read_back_bit_by_bit(name, tmp_path):
    _, fast = models(CONFIGS[name])
    fast.save_pretrained(tmp_path / "model")
    again = Model.from_pretrained(tmp_path / "model")
    assert again.config == CONFIGS[name]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in fast.state_dict().items())
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == MODEL_TYPES.get(name, "llama")
    assert Model.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).model.embed_tokens.weight.dtype == torch.bfloat16


def test_mixtral_on_disk_has_one_tensor_per_expert(tmp_path):
    _, fast = models(CONFIGS["mixtral"])
    fast.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.2."
    whole = fast.model.layers[1].mlp.experts
    assert torch.equal(stored[expert + "w1.weight"], whole.gate_up_proj[2, :48])
    assert torch.equal(stored[expert + "w3.weight"], whole.gate_up_proj[2, 48:])
    assert torch.equal(stored[expert + "w2.weight"], whole.down_proj[2])
    assert "model.layers.1.block_sparse_moe.gate.weight" in stored
    assert all(torch.equal(t, fast.state_dict()[n]) for n, t in stack_experts(split_experts(fast.state_dict())).items())
    del stored[expert + "w3.weight"]
    with pytest.raises(CheckpointError, match="lack model.layers.1.block_sparse_moe.experts.2.w3.weight"):
        stack_experts(stored)


def write_folder(folder, config, shards):
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    index = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_sharded_weights(tmp_path):
    slow, _ = models(SMALL)
    items = list(slow.state_dict().items())
    write_folder(tmp_path / "m", SMALL, [dict(items[:7]), dict(items[7:])])
    assert torch.equal(Model.from_pretrained(tmp_path / "m")(TOKENS), models(SMALL)[1](TOKENS))
    (tmp_path / "m/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors are missing"):
        Model.from_pretrained(tmp_path / "m")


def test_a_tied_model_ignores_a_stored_head(tmp_path):
    config = CONFIGS["tied"]
    slow, fast = models(config)
    state = slow.state_dict()
    write_folder(tmp_path / "m", config, [state | {"lm_head.weight": slow.model.embed_tokens.weight.clone()}])
    assert torch.equal(Model.from_pretrained(tmp_path / "m")(TOKENS), fast(TOKENS))


def test_the_reference_takes_no_tokens_as_the_model_does():
    slow, fast = models(SMALL)
    for shape in ((2, 0), (0, 3)):
        tokens = torch.zeros(shape, dtype=torch.long)
        assert slow(tokens).shape == fast(tokens).shape == (*shape, SMALL.vocab_size)


def test_a_model_folder_that_does_not_fit_is_named(tmp_path):
    slow, _ = models(SMALL)
    state = slow.state_dict()
    with pytest.raises(CheckpointError, match="there is no model folder"):
        Model.from_pretrained(tmp_path / "nothing")
    broken = {
        "lack": {n: t for n, t in state.items() if n != "model.norm.weight"},
        "unknown": state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "shape": state | {"model.norm.weight": torch.zeros(31)},
    }
    expected = {
        "lack": "lack model.norm.weight",
        "unknown": "unknown tensor .*q_proj.bias",
        "shape": r"expected shape \(32,\), got \(31,\)",
    }
    for name, tensors in broken.items():
        write_folder(tmp_path / name, SMALL, [tensors])
        with pytest.raises(CheckpointError, match=expected[name]):
            Model.from_pretrained(tmp_path / name)
    file = tmp_path / "lack/model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        Model.from_pretrained(tmp_path / "lack")
    (tmp_path / "lack/config.json").unlink()
    with pytest.raises(ConfigError, match="cannot read .*config.json"):
        Model.from_pretrained(tmp_path / "lack")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"w1.bias": torch.zeros(8)}, "have an unknown tensor .*experts.0.w1.bias"),
        ({"w2.weight_scale": torch.zeros(())}, "have an unknown tensor .*experts.0.w2.weight_scale"),
        ({"w2.weight": torch.zeros(2, 2)}, "experts of model.layers.0 have different shapes"),
        ({"w2.weight": None}, "lack model.layers.0.block_sparse_moe.experts.0.w2.weight"),
    ],
    ids=str,
)
def test_a_folder_of_experts_that_does_not_fit_is_named(tmp_path, change, expected):
    config = CONFIGS["mixtral"]
    state = split_experts(Model(config).state_dict())
    for name, tensor in change.items():
        state[f"model.layers.0.block_sparse_moe.experts.0.{name}"] = tensor
    write_folder(tmp_path / "m", config, [{name: t for name, t in state.items() if t is not None}])
    with pytest.raises(CheckpointError, match=expected):
        Model.from_pretrained(tmp_path / "m")


def test_an_index_that_names_no_files_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(SMALL.to_json())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(CheckpointError, match="cannot read the index"):
        Model.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = Config.preset(name)
    assert Config.from_dict(json.loads(config.to_json())) == config
    with torch.device("meta"):
        weights = sum(p.numel() for p in Model(config).parameters())
    published = {
        "calculator": 94720,
        "llama3-8b": 8030261248,
        "mistral-7b": 7241732096,
        "mixtral-8x7b": 46702792704,
        "qwen3-8b": 8190735360,
    }
    assert weights == published[name]


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 0),
        ("intermediate_size", 1.5),
        ("vocab_size", "50"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("num_experts_per_tok", 9),
        ("sliding_window", 0),
        ("rope_theta", 0),
        ("rms_norm_eps", None),
        ("tie_word_embeddings", "yes"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "mrope"}),
        ("partial_rotary_factor", 0.4),
        ("hidden_act", "gelu"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("hidden_act", None),
        ("attention_bias", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("model_type", "gemma3"),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.4}),
    ],
)
def test_a_config_that_is_not_honoured_is_refused_by_name(field, value):
    given = json.loads(CONFIGS["mixtral"].to_json()) | {field: value}
    names = {"rope_parameters": "partial_rotary_factor"}
    with pytest.raises(ConfigError, match=names.get(field, field)):
        Config.from_dict(given)


def test_config_reads_both_ways_of_writing_rope(tmp_path):
    given = {k: v for k, v in json.loads(SMALL.to_json()).items() if k not in ("rope_theta", "rope_scaling")}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(given | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}))
    assert Config.from_json(file).rope_theta == 5e5
    file.write_text(json.dumps(given | {"rope_theta": 5e5, "rope_scaling": None}))
    assert Config.from_json(file).rope_theta == 5e5
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        Config.from_json(file)


def test_a_config_without_a_twin_says_so():
    assert dataclasses.replace(CONFIGS["mixtral"], qk_norm=True).model_type == "fastprimer"
    assert dataclasses.replace(CONFIGS["mixtral"], norm_topk_prob=False).model_type == "fastprimer"
    assert dataclasses.replace(SMALL, partial_rotary_factor=0.5).model_type == "fastprimer"


def test_only_a_dense_layer_has_another_activation():
    assert Config.from_dict({**SMALL.to_dict(), "hidden_act": "gelu_pytorch_tanh"}).hidden_act == "gelu_pytorch_tanh"
    assert Config.from_dict({**CONFIGS["mixtral"].to_dict(), "hidden_act": "swish"}).hidden_act == "swish"
    with pytest.raises(ConfigError, match="hidden_act: expected one of silu, swish in a mixture of experts, got 'gelu_pytorch_tanh'"):
        dataclasses.replace(CONFIGS["mixtral"], hidden_act="gelu_pytorch_tanh")


def test_only_dynamic_scaling_reads_beyond_its_positions():
    assert CONFIGS["dynamic"].longest_sequence is None
    assert CONFIGS["yarn"].longest_sequence == 256
    with torch.no_grad():
        assert models(CONFIGS["dynamic"])[1](TOKENS).shape == (3, 14, 50)


@pytest.mark.parametrize("name", ("dynamic", "longrope"))
@pytest.mark.parametrize("room", (14, 40))
def test_a_cache_has_the_frequencies_of_its_room(name, room):
    slow, fast = models(CONFIGS[name], torch.float64)
    with torch.no_grad():
        cache = fast.new_cache(3, room)
        steps = torch.cat([fast(TOKENS[:, start:stop], cache=cache) for start, stop in ((0, 8), (8, 13), (13, 14))], dim=1)
        torch.testing.assert_close(steps, fast(TOKENS, longest=room))
        torch.testing.assert_close(steps, slow(TOKENS, longest=room))
        assert torch.allclose(steps, fast(TOKENS)) == (room == 14)
        assert torch.allclose(steps, slow(TOKENS)) == (room == 14)


def test_both_models_take_the_greatest_position_for_the_length():
    slow, fast = models(CONFIGS["dynamic"], torch.float64)
    with torch.no_grad():
        for model in (slow, fast):
            given = model(TOKENS, positions=TOKENS)
            torch.testing.assert_close(given, model(TOKENS, positions=TOKENS, longest=int(TOKENS.max()) + 1), rtol=0, atol=0)
            assert not torch.allclose(given, model(TOKENS, positions=TOKENS, longest=14))


def test_reference_imports_no_operation():
    source = open(reference.__file__).read()
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert [line for line in imports if "fastprimer" in line] == ["from fastprimer.config import Config, Rope"]
    assert not hasattr(reference, "ops") and hasattr(layers, "ops")
