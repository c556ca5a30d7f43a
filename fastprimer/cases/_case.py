"""What a case is: the call of an operation, and what that call must at least move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Inputs:
    """Makes a case's tensors: random, of the case's dtype and device, leaves that require a gradient.

    Drawn on the CPU they are the same on every device; a GPU draws a billion of them in no time.
    """

    def __init__(self, dtype: torch.dtype, device: str, seed: int, drawn_on: str = "cpu"):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(drawn_on).manual_seed(seed)

    @property
    def drawn(self) -> dict:
        """What torch's random functions are told."""
        return {"generator": self.generator, "device": self.generator.device}

    def normal(self, *shape: int, view: Callable[[Tensor], Tensor] = lambda t: t, grad: bool = True, dtype=None) -> Tensor:
        """A normal sample of `shape`, seen through `view` (which may transpose, slice or expand it)."""
        sample = torch.randn(shape, dtype=torch.float32, **self.drawn)
        return view(sample.to(dtype or self.dtype).to(self.device)).detach().requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, **self.drawn).to(self.device)

    def tensor(self, values: list, dtype=torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Work:
    """What a case must move and compute at least: bytes to and from memory, floating-point operations."""

    bytes_forward: int
    bytes_backward: int
    flops_forward: int = 0
    flops_backward: int = 0


@dataclass(frozen=True)
class Case:
    """One call of an operation. `arguments(inputs)` returns its keyword arguments."""

    op: str
    name: str
    arguments: Callable[[Inputs], dict]
    outputs: tuple[str, ...] = ("y",)
    bench: bool = False
    """Large, for benchmarks: too slow for the interpreter and the emulator."""
    work: Callable[[dict], Work] | None = field(default=None, compare=False)
    writes: tuple[str, ...] = ()
    """Arguments that the call changes in place."""
    proof: Case | None = None
    """Of a benchmark for GPUs, for which float64 and a processor's memory are too small: what is proven in its place."""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
