"""What the tests of the Triton cross-entropy share: small tiles, inputs, calls of both operations, and checks of one mechanism each."""

import importlib

import torch

from fastprimer.kernels import cross_entropy as kernels
from kernel_checks import assert_within_budget, random, shares_of

reference = importlib.import_module("fastprimer.ops.cross_entropy")

IGNORED = -100
NOTHING, EVERY = (IGNORED, 0.0, 0.0, None), (IGNORED, 0.1, 0.01, 5.0)
"""ignore_index, label_smoothing, z_loss, softcap"""


def make_small(monkeypatch, module):
    """Pieces of 256 columns, tiles of 128, sums over 4 rows, so that a small problem has many of each."""
    monkeypatch.setattr(module, "PIECE", 0)
    monkeypatch.setattr(module, "SUMMED", 4)
    monkeypatch.setattr(module, "fold_tile", lambda _: kernels.Tile(128, 4))
    monkeypatch.setattr(module, "gradient_tile", lambda _: kernels.Tile(128, 4))


def targets(N, V, ignored=()):
    target = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    target[list(ignored)] = IGNORED
    return target


def logits_of(N, V, dtype=torch.float32, **options):
    return random(0, N, V, dtype=dtype, scale=2.0, **options)


def projection(N, C, V, dtype=torch.float32):
    """x, weight, bias"""
    return random(0, N, C, dtype=dtype), random(1, V, C, dtype=dtype, scale=2 * C**-0.5), random(2, V, dtype=dtype)


def upstream(N, both=True):
    return random(3, N), random(4, N) if both else None


def plain(functions, logits, target, options, dloss, dlse):
    loss, lse, correction, argmax = functions.cross_entropy_forward(logits, target, *options)
    dlogits = functions.cross_entropy_backward(dloss, dlse, logits, target, lse, correction, *options)
    return {"loss": loss, "lse": lse, "argmax": argmax, "dlogits": dlogits}


def linear(functions, x, weight, bias, target, options, budget, dloss, dlse):
    loss, lse, correction, argmax, kept, shift = functions.linear_cross_entropy_forward(x, weight, target, bias, *options, budget)
    gradients = functions.linear_cross_entropy_backward(
        dloss, dlse, x, weight, target, lse, correction, kept, shift, bias, *options, True, True
    )
    outputs = {"loss": loss, "lse": lse, "argmax": argmax, "kept": recalled(kept, shift)}
    return outputs | dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))


def recalled(kept, shift):
    """z as it was kept."""
    if kept.dtype != torch.int16:
        return kept
    steps = torch.where(kept == -(2**15), -torch.inf, kept / reference.STEPS)
    return steps + shift.repeat_interleave(reference.BLOCK, 1)[:, : kept.shape[1]]


def in_16_bits(arguments):
    """Whether z is kept so, of the arguments of `linear`."""
    x, _, bias, _, options = arguments[:5]
    return reference.keeps_16_bits(x, bias, options[-1])


def check(run, module, *arguments):
    """Like the reference: argmax the same, what is kept to a step of 16 bits, all else within its budget."""
    chosen, kept = [], []

    def call(functions, wide):
        floating = lambda a: isinstance(a, torch.Tensor) and a.is_floating_point()  # noqa: E731
        results = run(functions, *(wide(a) if floating(a) else a for a in arguments))
        chosen.append(results.pop("argmax"))
        kept.append(results.pop("kept", None))
        return results

    found = shares_of(call, module, reference)
    assert torch.equal(chosen[0], chosen[2])
    if kept[0] is not None:
        torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=1.01 / reference.STEPS if in_16_bits(arguments) else 1e-5)
    assert_within_budget(found)


def same(got, expected, **tolerance):
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], equal_nan=True, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.0])


def special_rows(V):
    """Rows of few different numbers, of NaN, of an infinity alone, and of one NaN each."""
    generator = torch.Generator().manual_seed(0)
    mixed = [
        SPECIAL[torch.tensor(some)[torch.randint(len(some), (3, V), generator=generator)]] for some in ((0, 2, 3), (1, 2, 4), (2, 3, 4))
    ]
    alone = SPECIAL[:3, None].expand(3, V)
    one = torch.where(torch.arange(V) == torch.tensor([[0], [V - 1], [V // 2]]), torch.nan, random(0, 3, V))
    late = torch.where(torch.arange(V) < V - 1, -torch.inf, random(1, 2, V))
    return torch.cat((*mixed, alone, one, late))


def check_targets_that_do_not_exist(module):
    """Nothing is read beyond the logits, which the interpreter would see; the token's loss and gradient are NaN, others are right."""
    wrong = torch.tensor([-1, 300, 2**40, -(2**40), 299, 0])
    (x, weight, bias), (dloss, dlse) = projection(6, 6, 300), upstream(6)
    right = torch.where((wrong >= 0) & (wrong < 300), wrong, 0)
    for results, expected in (
        [linear(module, x, weight, bias, target, EVERY, 4 * 6 * 256, dloss, dlse) for target in (wrong, right)],
        [plain(module, logits_of(6, 300), target, EVERY, dloss, dlse) for target in (wrong, right)],
    ):
        assert results["loss"].isnan().tolist() == [True] * 4 + [False] * 2
        gradient = "dx" if "dx" in results else "dlogits"
        assert results[gradient][:4].isnan().all() and torch.equal(results[gradient][4:], expected[gradient][4:])
        assert all(torch.equal(results[name], expected[name]) for name in ("lse", "argmax"))


def far_rows():
    """Three rows of logits, the last beyond 2^31 elements (of which only they are ever touched)."""
    return torch.empty(2**31 + 70, dtype=torch.bfloat16).as_strided((3, 70), (2**30, 1)).copy_(logits_of(3, 70))


def check_small_gradients(module):
    """What would be nothing in float16: dlogits of 2^-18 / 600 in the sum of dx."""
    x, weight, _ = projection(4, 6, 600, torch.float16)
    dloss = random(3, 4).abs() * 2**-18
    dloss[3] = torch.inf  # of an ignored token
    check(linear, module, x * 0.03, weight * 30, None, targets(4, 600, (3,)), NOTHING, 0, dloss, None)
