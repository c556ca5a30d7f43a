"""What the tests of the Triton kernels share: random tensors, each result's share of its error budget, a record of launches."""

from __future__ import annotations

import torch

from fastprimer.testing import FORWARD_FACTOR, GRADIENT_FACTOR, poisoned_empty, share_of_budget

HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


def random(seed, *shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def shares_of(run, kernels, reference):
    """Each result's share of its error budget, by name. run(functions, wide) -> {name: result}, gradients named d...

    `wide` converts every floating-point input; the truth is the reference's result with inputs of float64.
    """
    with poisoned_empty():
        got = run(kernels, lambda t: t)
    yardstick, truth = run(reference, lambda t: t), run(reference, lambda t: t.double())
    assert all(got[name].shape == truth[name].shape and got[name].is_contiguous() for name in truth)
    factor = {name: GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR for name in truth}
    return {name: share_of_budget(got[name], truth[name], yardstick[name], factor[name]) for name in truth}


def assert_within_budget(found):
    assert max(found.values()) <= 1, found


def launched(monkeypatch, kernels, name):
    """A list that takes in the grid and the arguments of every launch of a kernel from now on."""
    kernel, seen = getattr(kernels, name), []

    class Recorder:
        def __getitem__(self, grid):
            seen.append(grid)
            return lambda *args, **options: (seen.extend(args), kernel[grid](*args, **options))

    monkeypatch.setattr(kernels, name, Recorder())
    return seen
