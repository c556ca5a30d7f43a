"""The Triton routing in the interpreter: every score, groups, ties, NaN, strides, same bits, registration; and planted bugs."""

import importlib
import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

import fastprimer as fp  # noqa: E402
from fastprimer import interpreter  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import routing as kernels  # noqa: E402
from kernel_checks import HALF_AND_SINGLE, assert_within_budget, random, shares_of  # noqa: E402
from mutation import mutated  # noqa: E402

reference = importlib.import_module("fastprimer.ops.routing")

numpy_on_nan = "ignore:(overflow encountered|invalid value encountered|divide by zero|All-NaN slice):RuntimeWarning"
pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings(numpy_on_nan),
]

WAYS = list(itertools.product((reference.SOFTMAX, reference.SOFTMAX_TOPK, reference.SIGMOID), (True, False)))
"""score, renormalize"""
GROUPS = [None, (4, 2), (3, 1), (6, 6), (12, 5)]
"""groups, top_groups, of 12 experts"""


def options(way=(reference.SOFTMAX, True), bias=None, grouped=None, scale=1.5):
    """score, renormalize, bias, groups, top_groups, scale"""
    return (*way, bias, *(grouped or (None, None)), scale)


def assert_routes_like_the_reference(module, logits, k, *opts):
    """The same experts, and weights and gradients within their budget."""
    score, renormalize, bias, groups, top_groups, scale = opts
    dweights = random(9, len(logits), k)
    chosen = []

    def run(functions, wide):
        l, b = wide(logits), None if bias is None else wide(bias)
        weights, experts = functions.route_forward(l, k, score, renormalize, b, groups, top_groups, scale)
        chosen.append(experts)
        return {"weights": weights, "dlogits": functions.route_backward(wide(dweights), l, experts, score, renormalize, scale)}

    found = shares_of(run, module, reference)
    assert torch.equal(chosen[0], chosen[1])
    assert_within_budget(found)


def valid(experts, E):
    """In 0..E-1, and different within each row."""
    return 0 <= experts.min() and experts.max() < E and all(len(set(row)) == len(row) for row in experts.tolist())


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_scores(way, dtype):
    assert_routes_like_the_reference(kernels, random(0, 21, 24, dtype=dtype, scale=2.0), 5, *options(way))
    assert_routes_like_the_reference(kernels, random(0, 21, 24, dtype=dtype, scale=2.0), 5, *options(way, random(1, 24)))


@pytest.mark.parametrize("grouped", GROUPS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_groups(way, grouped):
    groups, top_groups = grouped or (1, 1)
    k = min(3, top_groups * (12 // groups))
    assert_routes_like_the_reference(kernels, random(0, 30, 12), k, *options(way, random(1, 12), grouped))


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 2), (5, 33, 33), (7, 100, 1), (2, 257, 9), (70, 3, 2)], ids=str)
def test_sizes(size):
    N, E, k = size
    for way in WAYS:
        assert_routes_like_the_reference(kernels, random(0, N, E), k, *options(way))


@pytest.mark.parametrize("grouped", [None, (4, 2)], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ties_go_to_the_lower_expert(way, grouped):
    few = torch.randint(-1, 2, (40, 12), generator=torch.Generator().manual_seed(0)).float()
    zeros = torch.where(few == 0, torch.where(random(1, 40, 12) > 0, 0.0, -0.0), few)
    for logits in (few, zeros, torch.zeros(3, 12), few * 150):  # the last: scores of 0, that differ as logits
        for k in (1, 5):
            opts = options(way, None, grouped)
            experts = [functions.route_forward(logits, k, *opts)[1] for functions in (kernels, reference)]
            assert torch.equal(*experts)


@pytest.mark.parametrize("grouped", GROUPS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nan_and_infinity_choose_what_they_do_in_the_reference(way, grouped):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.0])
    logits = special[torch.randint(5, (40, 12), generator=torch.Generator().manual_seed(0))]
    logits = torch.cat((logits, special[:3, None].expand(3, 12), torch.where(torch.eye(12) > 0, torch.nan, random(0, 12, 12))))
    groups, top_groups = grouped or (1, 1)
    k, opts = min(4, top_groups * (12 // groups)), options(way, torch.where(torch.arange(12) == 5, -torch.inf, 0.1), grouped)
    weights, experts = kernels.route_forward(logits, k, *opts)
    expected_weights, expected = reference.route_forward(logits, k, *opts)
    assert valid(experts, 12) and torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights, equal_nan=True)
    dweights, tail = random(1, *weights.shape), (*way, 1.5)
    dlogits = [functions.route_backward(dweights, logits, experts, *tail) for functions in (kernels, reference)]
    torch.testing.assert_close(*dlogits, equal_nan=True)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nan_stays_in_its_row(way):
    logits, dweights = random(0, 9, 6), random(1, 9, 2)
    results = []
    for spoiled in (False, True):
        if spoiled:
            logits, dweights = logits.clone(), dweights.clone()
            logits[4] = dweights[7] = torch.nan
        weights, experts = kernels.route_forward(logits, 2, *options(way))
        results.append((weights, experts, kernels.route_backward(dweights, logits, experts, *way, 1.5)))
    clean = [0, 1, 2, 3, 5, 6, 8]
    assert all(torch.equal(a[clean], b[clean]) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("way", [(reference.SOFTMAX, False), (reference.SIGMOID, True), (reference.SIGMOID, False)], ids=str)
def test_extreme_logits_do_not_overflow(way):
    logits = torch.tensor(
        [
            [-80.0, -90.0, -100.0, -3e4],
            [3e4, 90.0, 0.0, -90.0],
            [-1e38, -2e38, -3e38, 3e38],
            [17.0, 18.0, 40.0, 89.0],
            [0.0, -100.0, -95.0, -99.0],
        ]
    )
    weights, experts = kernels.route_forward(logits, 2, *options(way))
    expected, chosen = reference.route_forward(logits, 2, *options(way))
    assert weights.isfinite().all() and torch.equal(experts, chosen)
    torch.testing.assert_close(weights, expected)
    dlogits = [functions.route_backward(random(1, len(logits), 2), logits, experts, *way, 1.5) for functions in (kernels, reference)]
    torch.testing.assert_close(*dlogits)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other expert": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other token": lambda t: t.repeat_interleave(2, 0)[::2],
    "one token repeated": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, monkeypatch):
    view = LAYOUTS[layout]
    logits, dweights, bias = random(0, 9, 10), random(1, 9, 3), random(2, 20)[::2]
    for way in WAYS:
        assert_routes_like_the_reference(kernels, view(logits), 3, *options(way, bias))
        experts = kernels.route_forward(view(logits), 3, *options(way))[1]
        tail = (view(experts), *way, 1.5)
        dlogits = kernels.route_backward(view(dweights), view(logits), *tail)
        assert torch.equal(dlogits, kernels.route_backward(view(dweights).contiguous(), view(logits).contiguous(), *tail))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_bias_of_another_type(dtype):
    assert_routes_like_the_reference(kernels, random(0, 9, 10), 3, *options(bias=random(1, 10, dtype=dtype)))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_experts_that_do_not_exist_have_no_gradient(way):
    logits, dweights = random(0, 3, 6), random(1, 3, 2)
    experts = torch.tensor([[-1, 6], [2, 99], [2**40, -(2**40)]])
    dlogits = kernels.route_backward(dweights, logits, experts, *way, 1.0)
    assert dlogits.isfinite().all() and not dlogits[[0, 2]].any()


def test_no_tokens():
    weights, experts = kernels.route_forward(torch.empty(0, 6), 2, *options())
    assert weights.shape == experts.shape == (0, 2) and experts.dtype == torch.int64
    assert kernels.route_backward(weights, torch.empty(0, 6), experts, 0, True, 1.0).shape == (0, 6)


def test_offsets_beyond_32_bits():
    E = 8
    logits = torch.empty(2**31 + E, dtype=torch.bfloat16).as_strided((3, E), (2**30, 1))
    logits.copy_(random(0, 3, E))
    assert_routes_like_the_reference(kernels, logits, 2, *options())
    assert_routes_like_the_reference(kernels, torch.as_strided(logits, (E, 3), (1, 2**30)), 2, *options())


def test_same_bits_in_every_program_order():
    logits, dweights = random(0, 300, 17), random(1, 300, 3)
    results = []
    for seed in (None, 1, 2):
        with interpreter.program_order(seed):
            weights, experts = kernels.route_forward(logits, 3, *options())
            results.append((weights, experts, kernels.route_backward(dweights, logits, experts, 0, False, 1.0)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_in_float64(way):
    logits, bias = random(0, 3, 6).double().requires_grad_(), random(1, 6).double()
    with fp.use_backend("triton"):
        call = lambda l: fp.route(l, 2, score=reference.SCORES[way[0]], renormalize=way[1], bias=bias, scale=2.5)[0]  # noqa: E731
        assert torch.autograd.gradcheck(call, [logits])
    weights = [functions.route_forward(logits.detach(), 2, *options(way))[0] for functions in (kernels, reference)]
    torch.testing.assert_close(*weights, rtol=1e-14, atol=0)


def test_tiles_are_what_triton_can_launch():
    for E, groups in itertools.product([1, 2, 3, 8, 60, 160, 256, 512, 8192], [1, 2, 3, 8, 20]):
        for N, K in itertools.product((1, 2, 100, 10**6), (1, 8)):
            if E % groups == 0:
                ROWS, GROUPS, SIZE, SLOTS, num_warps = kernels.tile(N, E, K, groups)
                assert all(n & (n - 1) == 0 for n in (ROWS, GROUPS, SIZE, SLOTS, num_warps)) and 1 <= num_warps <= 16
                assert GROUPS >= groups and SIZE >= E // groups and SLOTS >= K and ROWS < 2 * N


def test_operators():
    logits, bias, dweights = random(0, 6, 8).requires_grad_(), random(1, 8), random(2, 6, 2)

    def call(logits):
        return fp.route(logits, 2, score="sigmoid", bias=bias, groups=4, top_groups=2, scale=2.5)

    with fp.use_backend("triton"):
        assert fp.explain(fp.route, logits, 2).backend == "triton"
        assert "at most 8192 experts" in fp.explain(fp.route, torch.zeros(1, 8193), 2).refusals["triton"]
        weights, experts = call(logits)
        (dlogits,) = torch.autograd.grad(weights, logits, dweights)
        compiled, chosen = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    assert torch.equal(compiled, weights) and torch.equal(chosen, experts)
    assert torch.equal(torch.autograd.grad(compiled, logits, dweights)[0], dlogits)
    operators = torch.ops.fastprimer_triton
    torch.library.opcheck(operators.route_forward.default, (logits.detach(), 2, 2, True, bias, 4, 2, 2.5))
    torch.library.opcheck(operators.route_backward.default, (dweights, logits.detach(), experts, 2, True, 2.5))


PLANTED = {
    "a tie to the higher expert": (
        "tl.min(tl.where(order == tl.max(order, 1)[:, None], place, order.shape[1]), 1)",
        "tl.max(tl.where(order == tl.max(order, 1)[:, None], place, -1), 1)",
    ),
    "0 above -0": ("x = tl.where(x == 0, 0.0, x)", "x = x"),
    "padding chosen": ("order = tl.where(exists, order, lowest)", "order = tl.where(exists, order, _ordered(float('inf') + l))"),
    "padding in the softmax": ("e = tl.where(exists, _exp(x - top), 0.0)", "e = _exp(x - top)"),
    "an expert chosen twice": ("order = tl.where(place == best, lowest, order)", "order = tl.where(place == best, order - 1, order)"),
    "the first group once more": ("left = tl.where(group == _first_of_the_largest(left), lowest, left)", "left = left"),
    "padding among the groups": ("left = tl.where(group < groups, _ordered(worth), lowest)", "left = _ordered(worth)"),
    "a group worth its best": ("worth += _float_of", "worth += 0 * _float_of"),
    "negative floats in the wrong order": ("return bits ^ ((bits >> 31) & 0x7FFFFFFF)", "return bits"),
    "the bias in the weights": ("l = tl.load(logits_ptr + chosen.to(tl.int64)", "l = 0.1 + tl.load(logits_ptr + chosen.to(tl.int64)"),
    "the bias forgotten": ("choice += tl.load(bias_ptr", "choice += 0 * tl.load(bias_ptr"),
    "chosen by the logit": (
        "choice, top, total = _softmax(l, exists)",
        "choice, top, total = l, _softmax(l, exists)[1], _softmax(l, exists)[2]",
    ),
    "unmasked rows": ("inside = (row < N) & (slot < K)\n    l =", "inside = (row >= 0) & (slot < K)\n    l ="),
    "scale forgotten": ("r * SCALE", "r"),
    "scale forgotten in backward": ("other=0.0).to(WIDE) * SCALE", "other=0.0).to(WIDE)"),
    "the last choice without gradient": ("    for k in range(K):\n        this", "    for k in range(K - 1):\n        this"),
    "one choice's gradient for all": ("this = (slot == k) & inside", "this = (slot <= k) & inside"),
    "dweights by another stride": ("slot * stride_dweights_slot", "slot * stride_dweights_row"),
    "the mean of dr forgotten": ("dchosen = r * (dr - tl.sum(tl.where(inside, r * dr, 0.0), 1)[:, None])", "dchosen = r * dr"),
    "the slope of log sigma forgotten": ("dchosen *= _sigmoid(-l)", "dchosen *= 1"),
    "softmax over all without the mean": ("dl = -s_all *", "dl = 0 * s_all *"),
}


def checks(module):
    ties = torch.randint(-1, 2, (9, 12), generator=torch.Generator().manual_seed(0)).float() * 150
    ties = torch.where(ties == 0, torch.where(random(1, 9, 12) > 0, 0.0, -0.0), ties)
    for way in WAYS:
        for grouped in (None, (3, 2), (6, 2)):
            for logits in (random(0, 9, 12), -random(0, 9, 12).abs(), ties):
                assert_routes_like_the_reference(module, logits, 3, *options(way, random(2, 12) if grouped else None, grouped))
    few = torch.where(ties > 0, -150.0, ties)  # so that the zeros are chosen
    opts = options((reference.SOFTMAX_TOPK, True))
    assert torch.equal(module.route_forward(few, 4, *opts)[1], reference.route_forward(few, 4, *opts)[1])


def test_planted_bugs_have_a_sound_original():
    checks(kernels)


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, tmp_path):
    planted = mutated(kernels, *PLANTED[bug], tmp_path)
    with pytest.raises((AssertionError, RuntimeError, triton.runtime.errors.InterpreterError)):
        checks(planted)


def test_planted_nan_below_all_is_caught(tmp_path, monkeypatch):
    planted = mutated(
        kernels,
        "_order_of_bits(x.to(tl.int32, bitcast=True)), 0x7FFFFFFF)",
        "_order_of_bits(x.to(tl.int32, bitcast=True)), -0x7FFFFFFF)",
        tmp_path,
    )
    monkeypatch.setitem(globals(), "kernels", planted)
    with pytest.raises(AssertionError):
        test_nan_and_infinity_choose_what_they_do_in_the_reference((reference.SOFTMAX_TOPK, True), None)


def test_planted_32_bit_offset_is_caught(tmp_path, monkeypatch):
    monkeypatch.setitem(
        globals(),
        "kernels",
        mutated(
            kernels,
            "row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]\n    place",
            "row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]\n    place",
            tmp_path,
        ),
    )
    with pytest.raises(triton.runtime.errors.InterpreterError, match="out-of-bounds load"):
        test_offsets_beyond_32_bits()
