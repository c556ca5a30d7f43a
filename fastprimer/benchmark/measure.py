"""One case on one backend: proven, its peers checked, then all of them timed in the same rounds as the machine's roofs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import fastprimer
from fastprimer.backends import use_backend
from fastprimer.benchmark.contest import Settings, contest
from fastprimer.benchmark.rows import Row
from fastprimer.benchmark.timing import BACKWARD, FORWARD, prepared
from fastprimer.cases import Case, Inputs, Work
from fastprimer.peers import peers
from fastprimer.testing import compare


def measure(
    case: Case, dtype: torch.dtype, backend: str, passes: tuple[str, ...], settings: Settings, proven: bool = True
) -> Iterator[Row]:
    """A row for each pass; without times where the case is beyond its error budget."""
    wrong = prove(case, dtype, backend, settings) if proven else []
    torch.compiler.reset()
    arguments = shared_arguments(case, dtype, settings)
    for measured in passes:
        row = Row(case.op, case.name, str(dtype).removeprefix("torch."), measured, backend, wrong)
        if not wrong:
            with use_backend(backend):
                _time(row, case, arguments, settings)
        yield row


def shared_arguments(case: Case, dtype: torch.dtype, settings: Settings) -> dict:
    """A case's, but for what the peers do not return."""
    drawn_on = "cpu" if case.proof is None else settings.device
    arguments = case.arguments(Inputs(dtype, settings.device, settings.seed, drawn_on))
    return arguments | ({"return_lse": False} if "return_lse" in arguments else {})


def prove(case: Case, dtype: torch.dtype, backend: str, settings: Settings) -> list[str]:
    """What is beyond its error budget. Without gradients an operation may take another way, which the proof machine does not go:
    where its bits differ, it is held against the same budget. A case too large to be proven has another proven in its place."""
    case = case.proof or case
    where = {"device": settings.device, "seed": settings.seed}
    rows = compare(case, dtype, backend, **where)
    public = getattr(fastprimer, case.op)
    arguments = case.arguments(Inputs(dtype, **where))
    if all(row.ok for row in rows) and any(isinstance(v, torch.Tensor) and v.requires_grad for v in arguments.values()):
        with use_backend(backend):
            same = all(torch.equal(a, b) for a, b in _both_ways(public, arguments))
        if not same:
            rows = compare(
                case, dtype, backend, **where, function=lambda **a: tuple(_Instead.apply(*pair) for pair in _both_ways(public, a))
            )
    return [str(row) for row in rows if not row.ok]


def _both_ways(function: Callable, arguments: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each output, computed with gradients and without."""
    detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    outputs = (function(**arguments), function(**detached))
    return list(zip(*(o if isinstance(o, tuple) else (o,) for o in outputs), strict=True))


class _Instead(torch.autograd.Function):
    """The second tensor's values with the first one's gradients."""

    @staticmethod
    def forward(ctx, proven, value):
        if not value.is_floating_point():
            ctx.mark_non_differentiable(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _time(row: Row, case: Case, arguments: dict, settings: Settings) -> None:
    row.bytes, row.flops = _of_pass(case.work(arguments), row.measured)

    def call_of(make: Callable[[], Callable]) -> Callable:
        return prepared(make(), arguments, row.measured, settings.seed)

    makers = peers(case.op, settings.device, row.measured, settings.peers)
    ours = call_of(lambda: getattr(fastprimer, case.op))
    contest(row, ours, {name: functools.partial(call_of, make) for name, make in makers.items()}, settings)


def _of_pass(work: Work, measured: str) -> tuple[int, int]:
    """(bytes, floating-point operations)"""
    parts = {
        FORWARD: [(work.bytes_forward, work.flops_forward)],
        BACKWARD: [(work.bytes_backward, work.flops_backward)],
    }
    moved, computed = zip(*parts.get(measured, parts[FORWARD] + parts[BACKWARD]), strict=True)
    return sum(moved), sum(computed)
