"""What is particular to the experts' CPU kernels: blocks and slices of several sizes, tiles of bfloat16, few tokens, NaN, threads."""

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from cpu_checks import assert_same_bits_for_any_number_of_threads, instruction_set, name, products_of_torch, tiles_of_bfloat16
from fastprimer import testing
from fastprimer.backends import use_backend
from fastprimer.benchmark.timing import BOTH, prepared
from fastprimer.cases import CASES, Inputs, moe_case, route_case
from fastprimer.memory import extra_resident_bytes
from fastprimer.peers import peers
from fastprimer.verify import dtypes_of

LARGE = [
    moe_case("blocks-of-128", 700, 48, 40, 3, 3),
    moe_case("blocks-of-64", 300, 40, 130, 2, 2, skew=0.2),
    moe_case("several-chunks", 1300, 24, 70, 2, 1, skew=0.4),
    moe_case("several-columns", 150, 150, 33, 2, 1),
    moe_case("several-ranges", 400, 48, 1104, 2, 1, skew=1.0),
    moe_case("several-ranges-and-ends", 400, 40, 1100, 2, 2),
    moe_case("several-groups", 450, 60, 500, 12, 2, skew=0.05),
    moe_case("several-groups-forward", 1300, 8, 1104, 4, 3),
]
"""Beyond a block of tokens, a chunk of an expert's rows, a slice or range of hidden features, a slice of columns, a group of experts."""

SMALL = [c for c in CASES if c.op == "moe" and not c.bench]


def wrong(cases, dtype):
    return [str(row) for case in cases for row in testing.compare(case, dtype, "cpu") if not row.ok]


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "moe"), ids=name)
@pytest.mark.parametrize("limit, library", [(2, True), (2, False), (1, False), (0, False)])
def test_large_cases_with_and_without_the_products_of_torch(limit, library, dtype):
    with instruction_set(limit), products_of_torch(library):
        assert not wrong([*LARGE, *(SMALL if (limit, library) == (2, False) else [])], dtype)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_tiles_of_bfloat16_on_any_processor(limit):
    """What a processor with products of bfloat16 runs, by plain loops where this one has none."""
    with instruction_set(limit), tiles_of_bfloat16():
        assert not wrong([*SMALL, LARGE[1], LARGE[2]], torch.bfloat16)


@pytest.mark.parametrize(
    "case", [*LARGE, *(c for c in SMALL if "few" in c.name or "one-token" == c.name), route_case("threads", 300, 40, 5)], ids=str
)
def test_bits_do_not_depend_on_the_number_of_threads(case):
    assert_same_bits_for_any_number_of_threads(case)


def inputs(N, C, F, E, K, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, C), (E, 2 * F, C), (E, C, F), (N, K)
    x, gate_up, down, weights = (torch.randn(s, generator=generator) for s in shapes)
    experts = torch.rand(N, E, generator=generator).topk(K, -1).indices
    return [x.to(dtype), gate_up.to(dtype), down.to(dtype), weights, experts]


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "moe"), ids=name)
def test_few_tokens_get_what_they_get_among_many(dtype):
    """The pass for a few tokens, and the one for many, of which the same token is one."""
    device_or_skip("moe", "cpu")
    x, gate_up, down, weights, experts = inputs(120, 90, 100, 4, 2, dtype)
    with use_backend("cpu"):
        many = fp.moe(x, gate_up, down, weights, experts)
        few = torch.cat([fp.moe(x[i : i + 3], gate_up, down, weights[i : i + 3], experts[i : i + 3]) for i in range(0, 120, 3)])
    torch.testing.assert_close(few, many, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * float(many.abs().max()))


@pytest.mark.parametrize("dtype", dtypes_of("cpu", "moe"), ids=name)
@pytest.mark.parametrize("N", [3, 70])
@pytest.mark.parametrize("spoiled", ["x", "dy", "weights", "gate_up", "down"])
def test_nan_reaches_only_what_it_has_a_part_in(spoiled, N, dtype):
    """A token's NaN its own y and dx, and its experts' gradients; that of an expert its tokens; that of one nobody chose nothing."""
    device_or_skip("moe", "cpu")
    x, gate_up, down, weights, experts = inputs(N, 20, 18, 6, 2, dtype)
    experts[experts == 5] = 0
    experts[:, 1] = torch.where(experts[:, 0] == experts[:, 1], (experts[:, 0] + 1) % 5, experts[:, 1])  # nobody chooses expert 5
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(*tensors):
        *leaves, dy = tensors
        leaves = [t.clone().requires_grad_() for t in leaves]
        with use_backend("cpu"):
            y = fp.moe(*leaves, experts)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    clean = results(x, gate_up, down, weights, dy)
    dirty = {"x": x, "gate_up": gate_up, "down": down, "weights": weights, "dy": dy}
    dirty = {k: t.clone() for k, t in dirty.items()}
    dirty[spoiled][1] = torch.nan
    for unchosen in ("gate_up", "down"):
        dirty[unchosen][5] = torch.nan
    got = results(*dirty.values())
    tokens = (experts == 1).any(1) if spoiled in ("gate_up", "down") else torch.arange(N) == 1
    touched = torch.zeros(6, dtype=torch.bool)
    touched[experts[tokens].flatten() if spoiled not in ("gate_up", "down") else 1] = True
    rows = {0: tokens, 1: tokens, 2: touched, 3: touched, 4: tokens}
    if spoiled == "dy":
        rows[0] = torch.zeros(N, dtype=torch.bool)
    for i, (a, b) in enumerate(zip(clean, got, strict=True)):
        assert torch.isfinite(b[~rows[i]]).all(), i
        assert torch.equal(a[~rows[i]], b[~rows[i]]), i
    assert any(t.isnan().any() for t in got)


def test_an_infinity_is_one_among_many_tokens_too():
    """F no multiple of a tile's rows: there are rows of weights that are zero, and 0 times infinity is NaN."""
    device_or_skip("moe", "cpu")
    x, gate_up, down = torch.rand(40, 16), torch.rand(3, 10, 16), torch.rand(3, 16, 5)
    x[0, 0] = torch.inf
    weights, experts = torch.rand(40, 2), torch.tensor([0, 2]).expand(40, 2)
    with fp.use_backend("cpu"):
        many, alone = fp.moe(x, gate_up, down, weights, experts), fp.moe(x[:1], gate_up, down, weights[:1], experts[:1])
    assert torch.equal(many[:1], alone) and alone.isinf().all() and many[1:].isfinite().all()


def test_a_token_is_routed_alike_beside_any_other():
    """Exponentials of 64 tokens are computed together, but one by one where a number is extreme."""
    device_or_skip("route", "cpu")
    logits = torch.randn(50, 8, dtype=torch.float64)
    extreme = torch.cat([logits, torch.tensor([[0.0, -900.0] + [-1000.0] * 6], dtype=torch.float64)])
    with fp.use_backend("cpu"):
        alone, beside = fp.route(logits, 2)[0], fp.route(extreme, 2)[0]
    assert torch.equal(beside[:-1], alone) and beside[-1].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_weights_of_sigmoids_that_vanish(dtype):
    """Around where a sum of sigmoids stops being a normal number, and far below: then their logarithms must do."""
    device_or_skip("route", "cpu")
    far = [[-644.0, -645.0, -646.0], [-700.0, -710.0, -720.0], [-745.0, -746.0, -1e4], [-1e38, -2e38, -3e38], [-1e4, 3.0, 2.0]]
    dweights, results = torch.arange(10.0, dtype=dtype).view(5, 2), []
    for backend in ("cpu", "reference"):
        logits = torch.tensor(far, dtype=dtype, requires_grad=True)
        with use_backend(backend):
            weights, experts = fp.route(logits, 2, score="sigmoid")
        results.append((weights, experts, *torch.autograd.grad(weights, logits, dweights)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_operators_check_what_they_are_given():
    device_or_skip("moe", "cpu")
    ops = torch.ops.fastprimer
    x, gate_up, down, weights, experts = inputs(4, 8, 6, 3, 2, torch.float32)
    y, hidden = ops.moe_forward(x, gate_up, down, weights, experts)
    for bad, message in [
        ((x[0], gate_up, down, weights, experts), "x: expected shape"),
        ((x, gate_up[:, :5], down, weights, experts), "gate_up: expected shape"),
        ((x, gate_up, down[:2], weights, experts), "down: expected another shape"),
        ((x, gate_up.half(), down, weights, experts), "gate_up: expected dtype"),
        ((x, gate_up, down, weights[:3], experts), "weights: expected shape"),
        ((x, gate_up, down, weights, experts[:, :1]), "experts: expected another shape"),
        ((x, gate_up, down, weights, experts + 1), "experts: expected numbers in 0..2"),
        ((x, gate_up, down, weights, experts.short()), "experts: expected int32 or int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.moe_forward(*bad)
    with pytest.raises(RuntimeError, match="dy: expected another shape"):
        ops.moe_backward(y[:2], x, gate_up, down, weights, experts, hidden, True, True)
    with pytest.raises(RuntimeError, match="hidden: expected another shape"):
        ops.moe_backward(y, x, gate_up, down, weights, experts, hidden[..., 1:], True, True)
    logits = torch.randn(4, 6)
    w, chosen = ops.route_forward(logits, 2, 0, True, None, None, None, 1.0)
    for bad, message in [
        ((logits, 7, 0, True, None, None, None, 1.0), "k: expected a number in 1..E"),
        ((logits, 2, 3, True, None, None, None, 1.0), "score: expected a number in 0..2"),
        ((logits, 2, 0, True, logits[0, :5], None, None, 1.0), "bias: expected another shape"),
        ((logits, 4, 0, True, None, 3, 1, 1.0), "groups: expected a divisor of E"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.route_forward(*bad)
    with pytest.raises(RuntimeError, match="experts: expected numbers in 0..5"):
        ops.route_backward(w, logits, chosen + 5, 0, True, 1.0)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
def test_rows_of_nan_and_infinities_still_choose_valid_experts(score):
    device_or_skip("route", "cpu")
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1, 3], rows[2, 5], rows[3], rows[4, 2] = torch.nan, torch.nan, torch.inf, -torch.inf, -torch.inf
    with use_backend("reference"):
        expected = fp.route(rows, 3, score=score)
    with use_backend("cpu"):
        weights, experts = fp.route(rows, 3, score=score)
    assert torch.equal(experts, expected[1])
    torch.testing.assert_close(weights, expected[0], equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["bench-mixtral", "bench-deepseek"])
def test_extra_memory_is_at_most_60_percent_of_that_of_transformers(shape, one_thread):
    """Of one forward and backward, gradients included: the highest resident set beyond what is there before, measured.

    With one thread: with two the other's depends on whether both threads of its matrix products hold their scratch memory at once.
    """
    pytest.importorskip("transformers")
    device_or_skip("moe", "cpu")
    arguments = next(case for case in CASES if case.op == "moe" and case.name == shape).arguments(Inputs(torch.float32, "cpu", 0))

    def extra(function):
        call = prepared(function, arguments, BOTH)
        call()  # what is loaded and started once
        return [extra_resident_bytes(call) for _ in range(3)]

    ours, theirs = (extra(function) for function in (fp.moe, peers("moe", "cpu", BOTH)["transformers"]()))
    if None in ours:
        pytest.skip("needs glibc and Linux's /proc")
    assert 0 < min(ours) <= 0.6 * min(theirs)
