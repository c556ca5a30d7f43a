"""The proof machine: one table of CASES, the same for correctness, gradients and benchmarks, and the error budget.

A case (cases/) says what an operation is called with. It runs on any backend and in any dtype, on random inputs and with
random gradients of its outputs, and every output and every gradient is compared with a float64 computation on the same
inputs. The error may be 2x (outputs) or 3x (gradients) the error of a yardstick in the same dtype, plus a floor of a few
units in the last place, in the maximum norm and in the root-mean-square norm:

    a backend      is measured against the reference in float64; the yardstick is the reference
    the reference  is measured against an independent formulation (oracles.py) in float64; the yardstick is that formulation
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fastprimer
from fastprimer.backends import native_reason, use_backend
from fastprimer.cases import CASES, Case, Inputs
from fastprimer.oracles import ORACLES

__all__ = ["CASES", "DTYPES", "Case", "Inputs", "Row", "compare", "poisoned_empty", "run", "share_of_budget"]

FORWARD_FACTOR, GRADIENT_FACTOR, FLOOR_ULPS = 2.0, 3.0, 2.0
DRAWS, BEYOND_LUCK = 8, 3.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(case: Case, dtype: torch.dtype, function: Callable, *, device: str = "cpu", seed: int = 0, like=None) -> dict[str, Tensor]:
    """Call `function` as the case says, with random upstream gradients; returns its outputs, the arguments that
    it writes, and gradients ("d" + argument) by name.

    With `like` the inputs are those of dtype `like`, then converted to dtype: the same numbers, computed more precisely.
    """
    arguments = case.arguments(Inputs(like or dtype, device, seed))
    if like not in (None, dtype):
        arguments = {k: _converted(v, dtype) for k, v in arguments.items()}
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {k: o for k, o in zip(case.outputs, outputs, strict=True) if o is not None}
    results |= {name: arguments[name] for name in case.writes}
    with_grad = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    upstream = [torch.randn(o.shape, generator=generator).to(like or dtype).to(o) for o in with_grad]
    leaves = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(with_grad, list(leaves.values()), upstream) if with_grad else []
    return {k: v.detach() for k, v in (results | {f"d{k}": g for k, g in zip(leaves, grads, strict=False)}).items()}


def _converted(value, dtype: torch.dtype):
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def is_gradient(case: Case, tensor: str) -> bool:
    return tensor not in case.outputs + case.writes


@dataclass(frozen=True)
class Row:
    """One compared tensor. `share` is error / budget in the worse of the two norms: at most 1 is within budget."""

    case: Case
    dtype: torch.dtype
    backend: str
    tensor: str
    share: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.share <= 1

    @property
    def gradient(self) -> bool:
        return is_gradient(self.case, self.tensor)

    def __str__(self) -> str:
        what = self.problem or f"error is {self.share:.2f} of its budget"
        return f"{self.case} {str(self.dtype)[6:]} {self.backend}: {self.tensor}: {what}"


def share_of_budget(got: Tensor, truth: Tensor, yardstick: Tensor, factor: float) -> float:
    """error / budget, the larger of the maximum norm's and the root-mean-square norm's.

    For float64 there is no truth of higher precision: truth is the yardstick's own formulation in float64, and the
    yardstick, computed in float32, has its error scaled down to float64 and granted once more for the truth's own error.
    """
    if truth.numel() == 0:
        return 0.0
    eps = torch.finfo(got.dtype).eps
    allowed = factor
    if got.dtype == torch.float64:
        allowed = (factor + 1) * eps / torch.finfo(yardstick.dtype).eps
    same = torch.isinf(truth) & (got.double() == truth)  # an expected infinity is no error
    truth, got, yardstick = (torch.where(same, 0.0, t.double()) for t in (truth, got, yardstick))
    shares = []
    for norm in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
        budget = allowed * norm(yardstick - truth) + FLOOR_ULPS * eps * norm(truth)
        error = norm(got - truth)
        shares.append(0.0 if error == 0 else float(error / budget) if budget > 0 else math.inf)
    return max(math.inf if math.isnan(s) else s for s in shares)


def compare(
    case: Case, dtype: torch.dtype, backend: str, *, device: str = "cpu", seed: int = 0, function: Callable | None = None
) -> list[Row]:
    """Run the case on a backend and hold every output and gradient against its budget; `function`: a wrapped public function.

    An error's size is a random number too: where a few scores decide it, one draw of inputs may find the yardstick at its
    luckiest. What is over its budget by less than a factor of BEYOND_LUCK is therefore judged again, by the errors of DRAWS draws
    taken together (the largest, the mean square): a kernel that is less precise than it may be is so on average as well.
    """
    draws = [_draw(case, dtype, backend, device, seed, function)]
    rows = _judge(case, dtype, backend, draws)
    if any(row.problem for row in rows) or not 1 < max((row.share for row in rows), default=0) < BEYOND_LUCK:
        return rows
    draws += [_draw(case, dtype, backend, device, seed + 1000 * n, function) for n in range(1, DRAWS)]
    return _judge(case, dtype, backend, draws)


def _draw(case: Case, dtype: torch.dtype, backend: str, device: str, seed: int, function: Callable | None) -> tuple[dict, dict, dict]:
    """(got, truth, yardstick), each a tensor by name, of the inputs with that seed."""
    public = getattr(fastprimer, case.op)
    judge = ORACLES[case.op] if backend == "reference" else public
    sampled = torch.float32 if dtype == torch.float64 else dtype
    with use_backend("reference"):
        truth = run(case, torch.float64, judge, device=device, seed=seed, like=sampled)
        yardstick = run(case, sampled, judge, device=device, seed=seed)
    with use_backend(backend), poisoned_empty():
        got = run(case, dtype, function or public, device=device, seed=seed, like=sampled)
    return got, truth, yardstick


def _judge(case: Case, dtype: torch.dtype, backend: str, draws: list[tuple[dict, dict, dict]]) -> list[Row]:
    rows = []
    for name in draws[0][1]:
        problem, share = "", 0.0
        for got, truth, _ in draws:
            if name not in got:
                problem = "is missing"
            elif got[name].shape != truth[name].shape:
                problem = f"has shape {tuple(got[name].shape)}, expected {tuple(truth[name].shape)}"
            elif not got[name].is_floating_point() and not torch.equal(got[name], truth[name]):
                problem = "differs"
        if not problem and draws[0][0][name].is_floating_point():
            factor = GRADIENT_FACTOR if is_gradient(case, name) else FORWARD_FACTOR
            got, truth, yardstick = (torch.cat([tensors[name].flatten() for tensors in side]) for side in zip(*draws, strict=True))
            share = share_of_budget(got, truth, yardstick, factor)
        rows.append(Row(case, dtype, backend, name, share, problem))
    return rows


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within the block torch.empty, and the CPU kernels' own scratch memory, is full of NaN: what a kernel forgets to write shows."""
    native = not native_reason()
    scratch = native and torch.ops.fastprimer.poison_scratch(True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        if native:
            torch.ops.fastprimer.poison_scratch(scratch)
