"""The layer of a mixture of experts: against transformers, against loops over tokens, its losses, statistics and balance."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import fastprimer as fp
from fastprimer import layers, reference
from fastprimer.calculator import Calculator, MixtureCalculator
from fastprimer.model import Model
from fastprimer.ops import _arguments, routing

C, INNER, E, K, N = 24, 20, 8, 2, 40


def tokens(*shape, seed=0):
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(seed))


def sharpened(layer, seed=0):
    """Weights large enough that the router has opinions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def expert(layer, e, x):
    a, b = F.linear(x, layer.experts.gate_up_proj[e]).chunk(2, -1)
    return F.linear(F.silu(a) * b, layer.experts.down_proj[e])


def assert_alike(ours, theirs, x):
    """Outputs and all gradients."""
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        output = output[0] if isinstance(output, tuple) else output
        parameters = dict(layer.named_parameters())
        results.append([output, *torch.autograd.grad(output, [leaf, *(parameters[name] for name in sorted(parameters))], y)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mixtral_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(hidden_size=C, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    theirs = sharpened(modeling.MixtralSparseMoeBlock(config))
    ours = layers.MoE.mixtral(C, INNER, E, K)
    ours.load_state_dict(theirs.state_dict())
    assert_alike(ours, theirs, tokens(3, 7))


def test_deepseek_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    sizes = {"hidden_size": C, "moe_intermediate_size": INNER, "num_local_experts": E, "n_routed_experts": E, "num_experts_per_tok": 3}
    config = modeling.DeepseekV3Config(**sizes, n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=1.5, norm_topk_prob=True)
    config._experts_implementation = "eager"
    theirs = sharpened(modeling.DeepseekV3MoE(config))
    theirs.gate.e_score_correction_bias.copy_(0.2 * torch.randn(E, generator=torch.Generator().manual_seed(5)))
    ours = layers.MoE.deepseek(C, INNER, E, 3, shared=2, groups=4, top_groups=2, scale=1.5)
    ours.load_state_dict(theirs.state_dict())
    assert_alike(ours, theirs, tokens(2, 9))
    bias = theirs.gate.e_score_correction_bias
    theirs.bfloat16().gate.e_score_correction_bias = bias  # from_pretrained, too, leaves it in float32
    x = tokens(1000).bfloat16()
    logits, _, chosen = theirs.gate(x)
    ours.bfloat16()(x)
    assert ours.routing.logits.dtype == torch.float32 and torch.equal(ours.routing.logits, logits)
    assert torch.equal(ours.routing.experts.sort().values, chosen.sort().values)


@pytest.mark.parametrize("per_token", [1, 2])
def test_capacity_drops_later_choices(per_token):
    layer = sharpened(layers.MoE(C, INNER, 4, per_token, renormalize=False, capacity_factor=0.75))
    x = tokens(N)
    p = torch.softmax(layer.gate(x), -1)
    best = torch.sort(p, descending=True, stable=True).indices[:, :per_token].tolist()
    capacity, taken, expected, dropped = math.ceil(0.75 * N * per_token / 4), [0] * 4, torch.zeros(N, C), 0
    for k in range(per_token):
        for n in range(N):
            e = best[n][k]
            taken[e] += 1
            if taken[e] <= capacity:
                expected[n] += p[n, e] * expert(layer, e, x[n])
            else:
                dropped += 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert dropped > 0 and int(layer.routing.dropped()) == dropped
    assert layer.routing.counts().tolist() == taken


def test_capacity_is_that_of_decimal_numbers():
    layer = layers.MoE.switch(8, 8, 10, capacity_factor=1.1)
    assert [layer._capacity(N) for N in (100, 101, 10, 1000)] == [11, 12, 2, 110]
    layer.capacity_factor = 2.0  # as for evaluation
    assert layer._capacity(100) == 20
    with pytest.raises(ValueError, match="MoE: capacity_factor: expected a number > 0 or None, got 0"):
        layer.capacity_factor = 0


def test_a_dropped_choice_has_no_gradient():
    layer = sharpened(layers.MoE.switch(C, INNER, 2, capacity_factor=0.5))
    x = tokens(N).requires_grad_()
    layer(x).sum().backward()
    dropped = ~layer.routing.kept[:, 0]
    assert dropped.any() and (x.grad[dropped] == 0).all() and (x.grad[~dropped] != 0).any(1).all()


def test_experts_choose_their_tokens():
    layer = sharpened(layers.MoE(C, INNER, 4, 1, capacity_factor=1.5, choice="experts"))
    x = tokens(N)
    p, capacity = torch.softmax(layer.gate(x), -1).detach(), math.ceil(1.5 * N / 4)
    expected = torch.zeros(N, C)
    for e in range(4):
        for n in sorted(range(N), key=lambda n: (-float(p[n, e]), n))[:capacity]:  # noqa: B023
            expected[n] += p[n, e] * expert(layer, e, x[n])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer.routing.counts().tolist() == [capacity] * 4 and float(layer.routing.entropy()) == pytest.approx(1)
    layer(x).sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    assert float(layers.auxiliary_losses(layer)["balance"]) == 0


def test_auxiliary_losses_are_those_of_all_layers():
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = fp.Config(**sizes, num_local_experts=4, num_experts_per_tok=2)
    model = fp.Model(config)
    assert layers.auxiliary_losses(model) == {}
    model(torch.arange(10).view(2, 5) % 11, torch.arange(10).view(2, 5) % 11)
    routings = [layer.mlp.routing for layer in model.model.layers]
    losses = layers.auxiliary_losses(model)
    torch.testing.assert_close(losses["balance"], sum(fp.load_balancing_loss(r.logits, r.experts) for r in routings))
    torch.testing.assert_close(losses["z"], sum(fp.router_z_loss(r.logits) for r in routings))
    (losses["balance"] + losses["z"]).backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    used = layers.utilisation(model)
    assert list(used) == [f"model.layers.{i}.mlp" for i in range(3)]
    assert all(sum(u["counts"]) == 8 * 2 and 0 <= u["entropy"] <= 1 and u["dropped"] == 0 for u in used.values())


def test_auxiliary_losses_are_of_the_models_device_and_dtype():
    layer = layers.MoE(8, 4, 4, 2)
    layer(torch.randn(3, 8))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            losses = layers.auxiliary_losses(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all((loss.dtype, loss.device.type) == (torch.float32, "cpu") for loss in losses.values())


def test_auxiliary_losses_under_activation_checkpointing():
    """The reentrant kind would leave them without a graph, and the routers without their balance."""
    layer, gradients = sharpened(layers.MoE.mixtral(C, INNER)), []
    x = tokens(N).requires_grad_()
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        y = run(x).square().sum()
        losses = layers.auxiliary_losses(layer)
        gradients.append(torch.autograd.grad(y + losses["balance"] + losses["z"], [*layer.parameters()]))
    torch.testing.assert_close(*gradients)
    model = torch.nn.Sequential(layer)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="auxiliary_losses: model: expected logits with a graph, got those of '0' .*use_reentrant=False"):
        layers.auxiliary_losses(model)
    with torch.no_grad():
        assert torch.equal(layers.auxiliary_losses(model)["z"], losses["z"])
    assert torch.equal(layers.auxiliary_losses(model.eval())["z"], losses["z"])
    layer.train().gate.weight.requires_grad_(False)
    assert not layers.auxiliary_losses(layer)["z"].requires_grad


def test_entropy_and_counts_of_known_routings():
    logits = torch.zeros(4, 4)
    one = layers.Routing(logits, torch.zeros(4, 1, dtype=torch.int64), None, even=False)
    even = layers.Routing(logits, torch.arange(4).view(4, 1), None, even=False)
    half = layers.Routing(logits, torch.tensor([[0], [0], [3], [3]]), None, even=False)
    assert [float(r.entropy()) for r in (one, even, half)] == pytest.approx([0, 1, 0.5])
    assert half.counts().tolist() == [2, 0, 0, 2]


def test_the_selection_bias_balances_without_a_gradient():
    """A router that sends almost everything to two experts evens out, and the weights stay those of the unbiased scores."""
    layer = sharpened(layers.MoE(C, INNER, E, K, score="sigmoid", selection_bias=True))
    with torch.no_grad():
        layer.gate.weight[:2] += 1.0
    x = tokens(400).abs()
    layer(x)
    before = float(layer.routing.entropy())
    for _ in range(300):
        layer(x)
        layer.update_selection_bias(0.01)
    layer(x)
    assert before < 0.7 and float(layer.routing.entropy()) > 0.98
    weights, experts = fp.route(layer.gate(x), K, score="sigmoid", bias=layer.gate.e_score_correction_bias)
    s = torch.sigmoid(layer.gate(x)).gather(1, experts)
    torch.testing.assert_close(weights, s / s.sum(-1, keepdim=True))
    assert "gate.e_score_correction_bias" in layer.state_dict() and "gate.e_score_correction_bias" not in dict(layer.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_selection_bias_stays_in_float32(dtype):
    """In bfloat16 no step of 0.001 would be left next to 0.5."""
    layer = layers.MoE.deepseek(C, INNER, E, K)
    layer.gate.e_score_correction_bias.fill_(0.5)
    stored = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    for _ in range(200):
        layer.update_selection_bias(0.001, counts=torch.arange(E))
    bias = layer.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and layer.gate.weight.dtype == dtype
    torch.testing.assert_close(bias, torch.tensor([0.7] * 4 + [0.3] * 4), rtol=0, atol=1e-4)
    layer(tokens(5).to(dtype))
    layer.load_state_dict(stored, assign=True)
    assert layer.gate.e_score_correction_bias.tolist() == [0.5] * E and layer.gate.e_score_correction_bias.dtype == torch.float32
    assert layer.to("meta", dtype).gate.e_score_correction_bias.is_meta
    layer.half().to_empty(device="cpu")
    assert layer.gate.e_score_correction_bias.dtype == torch.float32 and not layer.gate.e_score_correction_bias.is_meta


def test_the_bias_may_be_updated_from_counts_of_several_batches():
    layer = layers.MoE(C, INNER, 4, 1, selection_bias=True)
    layer.update_selection_bias(0.5, counts=torch.tensor([6, 2, 4, 4]))
    assert layer.gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layers.MoE(C, INNER, 4, 5), "MoE: per_token: expected a number in 1..experts = 4, got 5"),
        (lambda: layers.MoE(C, INNER, 4, 2, choice="nobody"), "MoE: choice: expected 'tokens' or 'experts', got 'nobody'"),
        (lambda: layers.MoE(C, INNER, 4, True), "MoE: per_token: expected a number in 1..experts = 4, got True"),
        (lambda: layers.MoE(C, INNER, 4, 2, capacity_factor=0), "MoE: capacity_factor: expected a number > 0 or None, got 0"),
        (lambda: layers.MoE(C, INNER, 4, 2, capacity_factor=math.inf), "MoE: capacity_factor: expected a number > 0 or None, got inf"),
        (lambda: layers.MoE(C, INNER, 4, 2, capacity_factor="2"), "MoE: capacity_factor: expected a number > 0 or None, got '2'"),
        (lambda: layers.MoE(C, INNER, 4, 2, scale=None), "MoE: scale: expected a number, got None"),
        (lambda: layers.MoE(C, INNER, 4, 2, score="bogus"), "MoE: score: expected one of softmax, softmax_topk, sigmoid, got 'bogus'"),
        (lambda: layers.MoE(C, INNER, 4, 2, groups=3, top_groups=1), "MoE: groups: expected a divisor of experts = 4, got 3"),
        (lambda: layers.MoE(C, INNER, 4, 2, groups=2), "MoE: top_groups: expected a number with groups = 2, or both None, got None"),
        (lambda: layers.MoE(C, INNER, 4, 2, groups=2, top_groups=3), "MoE: top_groups: expected a number in 1..groups = 2, got 3"),
        (lambda: layers.MoE(C, INNER, 4, 3, groups=2, top_groups=1), "MoE: per_token: expected at most 2, the experts in"),
        (lambda: layers.MoE.deepseek(16, 8, 4, 2), "MoE: groups: expected a divisor of experts = 4, got 8"),
        (lambda: layers.MoE(C, INNER, 4, 2).update_selection_bias(), "expected a layer with selection_bias=True"),
        (lambda: layers.MoE(C, INNER, 4, 2, selection_bias=True).update_selection_bias(), "there was no forward pass yet"),
        (lambda: layers.MoE(C, INNER, 4, 2, selection_bias=True).update_selection_bias(float("nan")), "rate: expected a number, got nan"),
        (
            lambda: layers.MoE(C, INNER, 4, 2, selection_bias=True).update_selection_bias(counts=torch.tensor(3)),
            r"counts: expected shape \(E,\) = \(4,\), got \(\)",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_are_copied_and_pickled_without_the_last_pass():
    layer = sharpened(layers.MoE.mixtral(C, INNER))
    x = tokens(5)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.routing is None and torch.equal(other(x), y)
    assert layer.routing is not None


@pytest.mark.slow
def test_the_capacity_of_experts_that_choose_is_no_symbol():
    """Layers of several factors in one program, whose number torch.compile would make a symbol, and sequences of several lengths."""
    torch.compiler.reset()
    for factor in (1.3, 2.0):
        layer = sharpened(layers.MoE(C, INNER, 4, 1, choice="experts", capacity_factor=factor))
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (5, 9):
            torch.testing.assert_close(compiled(tokens(n)), layer(tokens(n)))


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}, {"choice": "experts"}, {"shared": 16, "selection_bias": True}])
@pytest.mark.slow
def test_the_layer_compiles_into_one_graph(options):
    layer = sharpened(layers.MoE(C, INNER, 4, 2, **options))
    x = tokens(12)
    expected = layer(x)
    counts = layer.routing.counts()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected)
    assert torch.equal(layer.routing.counts(), counts)


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would be waited for: a number that is read, or a shape that depends on numbers."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy"):  # on the CPU they are no operators
            self.patch.setattr(torch.Tensor, name, self.refuse)
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    @staticmethod
    def refuse(*_):
        raise AssertionError("tolist or numpy waits for the device")

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        waits = name.startswith(self.WAITING)
        if name.startswith("index"):  # by a mask?
            indices = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            waits |= any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if waits:
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


LAYERS = [
    lambda: layers.MoE.mixtral(C, INNER),
    lambda: layers.MoE.switch(C, INNER, 4),
    lambda: layers.MoE.deepseek(C, INNER, 8, 2),
    lambda: layers.MoE(C, INNER, 4, 2, choice="experts"),
]


@pytest.mark.parametrize("make", LAYERS, ids=["mixtral", "switch", "deepseek", "experts choose"])
def test_no_pass_waits_for_the_device(make, monkeypatch):
    """As on a GPU, where nobody looks whether expert numbers are in range."""
    monkeypatch.setattr(_arguments, "inspectable", lambda _: False)
    layer = sharpened(make())
    x = tokens(N).requires_grad_()
    with NoWaiting():
        y = layer(x)
        losses = layers.auxiliary_losses(layer)
        (y.square().sum() + losses["balance"] + losses["z"]).backward()
        if layer.gate.e_score_correction_bias is not None:
            layer.update_selection_bias()


def test_waiting_is_seen():
    x = torch.arange(4.0)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: x.tolist(), lambda: bool((x > 1).any())):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()


def test_first_choices_have_precedence():
    experts = torch.tensor([[0, 1], [1, 0], [0, 1], [2, 0]])
    assert routing.within_capacity(experts, 3, 2).tolist() == [[True, True], [True, False], [True, False], [True, False]]


def test_the_auxiliary_losses_of_a_model_are_the_references():
    """With gradients, in float64: written twice, from the papers."""
    config = dataclasses.replace(MixtureCalculator.config, vocab_size=19, initializer_range=0.4)
    ours, plain = Model(config).double(), reference.Model(config).double()
    plain.load_state_dict(ours.state_dict())
    tokens = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for model, auxiliary in ((ours, layers.auxiliary_losses), (plain, reference.auxiliary_losses)):
        model(tokens, tokens)
        found = auxiliary(model)
        losses.append(torch.stack([found["balance"], found["z"]]))
        gradients.append(
            torch.autograd.grad(found["balance"] + 3 * found["z"], [p for n, p in model.named_parameters() if "gate.weight" in n])
        )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert reference.auxiliary_losses(reference.Model(Calculator.config)) == {}


@pytest.mark.parametrize("layer", [layers.MoE.switch(C, INNER, 4), layers.MoE(C, INNER, 4, 2, choice="experts")], ids=["switch", "experts"])
def test_an_exported_layer_takes_any_number_of_tokens(layer):
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(layer, (torch.randn(3, 7, C),), dynamic_shapes=(free,), strict=False).module()
    x = torch.randn(2, 11, C)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), layer(x))
