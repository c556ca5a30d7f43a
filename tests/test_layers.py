"""The layers against the reference's: the same weights, random inputs, random gradients of the output, float64 truth."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from conftest import SMALL
from fastprimer import feed_forward, layers, ops, reference
from fastprimer.testing import FORWARD_FACTOR, GRADIENT_FACTOR, share_of_budget

BATCH, LENGTH = 2, 21
DENSE = dataclasses.replace(SMALL, initializer_range=0.3)
CONFIGS = {
    "dense": DENSE,
    "window": dataclasses.replace(DENSE, sliding_window=5),
    "head norm": dataclasses.replace(DENSE, qk_norm=True, head_dim=12),
    "experts": dataclasses.replace(DENSE, num_local_experts=5),
    "gelu": dataclasses.replace(DENSE, hidden_act="gelu_pytorch_tanh"),
    "partial": dataclasses.replace(DENSE, partial_rotary_factor=0.5),
    "yarn": dataclasses.replace(DENSE, rope_theta=100.0, rope_scaling={"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0}),
    "dynamic": dataclasses.replace(DENSE, max_position_embeddings=10, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "one expert": dataclasses.replace(DENSE, num_local_experts=5, num_experts_per_tok=1, norm_topk_prob=False),
}


def twins(config, dtype):
    """The reference's decoder layer and ours with the same weights."""
    torch.manual_seed(0)
    slow, fast = reference.DecoderLayer(config), layers.DecoderLayer(config)
    reference.initialize(slow, config.initializer_range)
    with torch.no_grad():
        for name, parameter in slow.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn_like(parameter))
    fast.load_state_dict(slow.state_dict())
    return slow.to(dtype), fast.to(dtype)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def slow_results(config, dtype):
    slow, _ = twins(config, dtype)
    x = numbers(BATCH, LENGTH, config.hidden_size).to(dtype).requires_grad_()
    angles = reference.rotary_angles(config, torch.arange(LENGTH).expand(BATCH, -1), dtype)
    return results(slow, x, slow(x, angles))


def fast_results(config, dtype):
    _, fast = twins(config, dtype)
    x = numbers(BATCH, LENGTH, config.hidden_size).to(dtype).requires_grad_()
    cos, sin = layers.RotaryEmbedding.from_config(config)(torch.arange(LENGTH), dtype)
    y, residual = fast(x, None, cos, sin)
    return results(fast, x, y + residual)


def results(layer, x, y):
    dy = numbers(*y.shape, 1)[..., 0].to(y.dtype)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, (x, *tensors), dy)
    return {"y": y.detach()} | dict(zip(("x", *names), gradients, strict=True))


def worst_share(config, dtype):
    """The largest share of the error budget that any output or gradient of a decoder layer takes."""
    truth, yardstick = slow_results(config, torch.float64), slow_results(config, torch.float32)
    got = fast_results(config, dtype)
    assert got.keys() == truth.keys()
    factors = {name: FORWARD_FACTOR if name == "y" else GRADIENT_FACTOR for name in truth}
    return max(share_of_budget(got[name], truth[name], yardstick[name], factors[name]) for name in truth)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_decoder_layer_is_the_references(config, dtype):
    assert worst_share(config, dtype) <= 1


def wrong_rope(*args, **options):
    return ops.rope(*args, **options, interleaved=True)


def wrong_window(*args, window=None, **options):
    return ops.attention(*args, window=(window[0] + 1, 0) if window else None, **options)


def wrong_norm(x, weight, eps, **options):
    return ops.rms_norm(x, weight, eps * 100, **options)


def wrong_route(logits, k, renormalize, **options):
    return ops.route(logits, k, renormalize=not renormalize, **options)


def wrong_halves(q, k, cos, sin, positions=None):
    """The whole of a partly rotated head, as if the other angles were 0."""
    rest = q.shape[-1] // 2 - cos.shape[-1]
    return ops.rope(q, k, F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest)), positions=positions)


def wrong_scale(q, k, cos, sin, positions=None):
    scale = torch.hypot(cos, sin)
    return ops.rope(q, k, cos / scale, sin / scale, positions=positions)


def wrong_swiglu(gate, up, **options):
    return ops.swiglu(up, gate, **options)


def wrong_activation(gate, up, activation, limit):
    return ops.swiglu(gate, up, limit=limit)


@pytest.mark.parametrize(
    "op, planted, config",
    [
        ("rope", wrong_rope, "dense"),
        ("attention", wrong_window, "window"),
        ("rms_norm", wrong_norm, "dense"),
        ("route", wrong_route, "experts"),
        ("swiglu", wrong_swiglu, "dense"),
        ("rope", wrong_halves, "partial"),
        ("rope", wrong_scale, "yarn"),
        ("swiglu", wrong_activation, "gelu"),
    ],
)
def test_the_check_sees_a_planted_bug(op, planted, config, monkeypatch):
    class Bugged:
        def __getattr__(self, name):
            return planted if name == op else getattr(ops, name)

    for module in (layers, feed_forward):
        monkeypatch.setattr(module, "ops", Bugged())
    assert worst_share(CONFIGS[config], torch.float32) > 1


def test_experts_that_choose_give_the_same_bits_again():
    """A token's experts are added up in a fixed order, and so are its gradients, on two threads."""
    layer = layers.MoE(64, 32, 8, 2, choice="experts")
    x = torch.randn(500, 64, requires_grad=True)

    def bits():
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]

    first = bits()
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, bits(), strict=True))


def test_layers_made_without_memory_are_initialised_later():
    with torch.device("meta"):
        layer = layers.MoE(16, 8, 4, 2, selection_bias=True)
    layer.to_empty(device="cpu")
    for parameter in (*layer.parameters(), *layer.buffers()):
        parameter.detach().fill_(torch.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(0.01 < p.std() < 0.03 for p in layer.parameters()) and not layer.gate.e_score_correction_bias.any()


@pytest.mark.parametrize("choice", ["tokens", "experts"])
def test_auxiliary_losses_are_part_of_one_graph(choice):
    layer, x = layers.MoE(16, 8, 4, 2, choice=choice), torch.randn(7, 16)

    def loss(x):
        y, auxiliary = layer(x), layers.auxiliary_losses(layer)
        return y.square().mean() + 0.01 * auxiliary["balance"] + 0.001 * auxiliary["z"]

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x))


def test_a_frozen_stream_needs_no_gradient_behind_a_norm_that_does():
    norm, x = layers.RMSNorm(8), torch.randn(3, 8)
    y, h = norm(x, x)
    assert y.requires_grad and not h.requires_grad and norm(x, x.clone().requires_grad_())[1].requires_grad
    torch.testing.assert_close(torch.autograd.grad(y.sum(), norm.weight)[0], (y / norm.weight).sum(0))


def test_norm_with_residual_returns_the_sum():
    norm = layers.RMSNorm(8)
    x, residual = numbers(3, 8), numbers(3, 8, 1)[..., 0]
    y, h = norm(x, residual)
    torch.testing.assert_close(h, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(h), rtol=0, atol=0)


def test_rotary_embedding_keeps_float32_tables_in_a_bfloat16_model():
    rotary = layers.RotaryEmbedding(16, 100.0).to(torch.bfloat16)
    cos, sin = rotary(torch.tensor([0, 5, 1000]), torch.bfloat16)
    angles = torch.tensor([0.0, 5.0, 1000.0], dtype=torch.float64)[:, None] / 100.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert cos.dtype == torch.float32
    assert (cos - angles.cos()).abs().max() < 1000 * 2**-23 and (sin - angles.sin()).abs().max() < 1000 * 2**-23


@pytest.mark.parametrize("activation", ("silu", "gelu_tanh", "gpt_oss"))
@pytest.mark.parametrize("limit", (None, 0.5))
def test_swiglu_passes_activation_and_limit_on(activation, limit):
    mlp = layers.SwiGLU(8, 12, activation, limit)
    x = 9 * numbers(5, 8)
    gate, up = F.linear(x, mlp.gate_proj.weight), F.linear(x, mlp.up_proj.weight)
    if limit is not None or activation == "gpt_oss":  # whose own is 7
        limit = limit or 7.0
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = {
        "silu": lambda: F.silu(gate) * up,
        "gelu_tanh": lambda: F.gelu(gate, approximate="tanh") * up,
        "gpt_oss": lambda: gate * torch.sigmoid(1.702 * gate) * (up + 1),
    }[activation]()
    torch.testing.assert_close(mlp(x), F.linear(y, mlp.down_proj.weight))


def test_swiglu_names_an_unknown_activation():
    with pytest.raises(ValueError, match="activation: expected one of silu, .*, got 'relu'"):
        layers.SwiGLU(8, 12, "relu")(numbers(5, 8))


def test_moe_keeps_leading_dimensions():
    moe = layers.MoE(8, 12, experts=4, per_token=2)
    x = numbers(2, 3, 8)
    torch.testing.assert_close(moe(x)[1, 2], moe(x[1, 2]))


@pytest.mark.parametrize("config", [CONFIGS["dense"], CONFIGS["experts"]], ids=["dense", "experts"])
def test_autocast(config):
    slow, fast = twins(config, torch.float32)
    x = numbers(BATCH, LENGTH, config.hidden_size)
    cos, sin = layers.RotaryEmbedding.from_config(config)(torch.arange(LENGTH))
    truth = slow(x, reference.rotary_angles(config, torch.arange(LENGTH).expand(BATCH, -1), x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y, residual = fast(x, None, cos, sin)
    (y + residual).sum().backward()
    assert (y + residual - truth).abs().max() < 0.05 * truth.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.parametrize("chunks", ([21], [17, 1, 3], [1, 16, 4], [5, 16]), ids=str)
@pytest.mark.parametrize("name", ("dense", "window", "partial", "dynamic"))
def test_cached_attention_is_attention(name, chunks):
    config = CONFIGS[name]
    _, fast = twins(config, torch.float64)
    x = numbers(BATCH, LENGTH, config.hidden_size).double()
    rotary = layers.RotaryEmbedding.from_config(config)
    whole = fast.self_attn(x, *rotary(torch.arange(LENGTH), x.dtype))
    kv = torch.zeros(BATCH, LENGTH, config.num_key_value_heads, config.head_dim, dtype=x.dtype)
    cache = layers.LayerCache(kv, kv.clone())
    with torch.no_grad():
        for part in x.split(chunks, dim=1):
            start, stop = cache.length, cache.length + part.shape[1]
            tables = rotary(torch.arange(start, stop), x.dtype, longest=cache.room)
            torch.testing.assert_close(fast.self_attn(part, *tables, cache=cache), whole[:, start:stop])
        with pytest.raises(ValueError, match="at most 21 tokens, got 22"):
            fast.self_attn(x[:, :1], *rotary(torch.arange(1), x.dtype), cache=cache)


def test_the_norm_has_what_torchs_has():
    norm = layers.RMSNorm(8, 1e-5, weight_offset=1.0, dtype=torch.bfloat16, device="cpu")
    assert norm.weight.dtype == torch.bfloat16 and not norm.weight.any()
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(norm.float()(x), F.rms_norm(x, (8,), torch.ones(8), 1e-5))
        norm.weight.fill_(9)
    norm.reset_parameters()
    assert not norm.weight.any() and repr(norm) == "RMSNorm(8, eps=1e-05, weight_offset=1.0)"
    assert layers.RMSNorm(8, device="meta").weight.is_meta


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (layers.SwiGLU(8, 16, "gpt_oss", limit=2.0), "activation='gpt_oss', limit=2.0"),
        (layers.MoE.switch(8, 16, 4), "per_token=1, renormalize=False, score='softmax', scale=1.0, choice='tokens', capacity_factor=1.25"),
        (layers.MoE(8, 16, 4, 2).experts, "Experts(experts=4, width=8, inner=16)"),
        (layers.MoE(8, 16, 4, 2).gate, "Router(width=8, experts=4, selection_bias=False, wide=False)"),
        (layers.RotaryEmbedding(16, 500000.0), "RotaryEmbedding(16, theta=500000, rope_type='default')"),
        (layers.LinearCrossEntropy(z_loss=0.1), "LinearCrossEntropy(shift=True, return_accuracy=False, z_loss=0.1)"),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, torch.nn.Module) else "",
)
def test_a_printed_layer_says_what_it_is(layer, said):
    assert said in repr(layer)


def test_a_wide_router_is_wide_under_autocast():
    """Of a model in float32, whose router's tokens are already rounded."""
    torch.manual_seed(0)
    wide, narrow = layers.MoE.deepseek(32, 16, 16, 4), layers.MoE.mixtral(32, 16)
    x = torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        wide(x.bfloat16()), narrow(x.bfloat16())
    assert wide.routing.logits.dtype == torch.float32 and narrow.routing.logits.dtype == torch.bfloat16
    torch.testing.assert_close(wide.routing.logits, F.linear(x.bfloat16().float(), wide.gate.weight))


def test_a_routing_of_within_vmap_is_refused_by_name():
    moe = layers.MoE.mixtral(8, 16)
    params = {name: p.detach() for name, p in moe.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(moe, params, (x,)).sum() + layers.auxiliary_losses(moe)["z"]

    x = torch.randn(3, 5, 8)
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    assert grads["gate.weight"].shape == (3, 8, 8)
    for function in (layers.auxiliary_losses, layers.utilisation):
        with pytest.raises(RuntimeError, match="within torch.func.vmap"):
            function(moe)
    moe(x)
    assert set(layers.utilisation(moe)) == {""}


def test_positions_of_several_rows_are_refused():
    with pytest.raises(ValueError, match=r"RotaryEmbedding: positions: expected shape \(P,\), got \(1, 4\)"):
        layers.RotaryEmbedding(8)(torch.arange(4)[None])
