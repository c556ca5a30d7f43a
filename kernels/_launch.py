"""What every launch needs: tensors as rows or heads, the type to compute in, the device's size, the right device made current,
and memory for tensor descriptors.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED_PROCESSORS = 4
"""What stands for the number of multiprocessors on the CPU: few, but enough for programs to share work."""


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C) with contiguous rows: a view if one row stride can express it, otherwise one copy."""
    C = x.shape[-1]
    rows = x.reshape(x.numel() // C, C)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def as_heads(x: Tensor) -> Tensor:
    """x (..., S, heads, D) as (B, S, heads, D), the features of a head adjacent: a view if they are, otherwise one copy."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: Tensor) -> tl.dtype:
    """The type a kernel computes in: float32, or float64 for float64 tensors."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU."""
    return _multiprocessors(device) if device.type == "cuda" else INTERPRETED_PROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor):
    """A context in which Triton launches on the tensor's device; it costs nothing where that is the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def with_scratch(launch, *arguments, **options) -> None:
    """Launch a kernel that may make tensor descriptors, which stand in memory that Triton asks for; the user's own allocator stays."""

    def call():
        triton.set_allocator(_scratch)
        launch(*arguments, **options)

    contextvars.copy_context().run(call)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


WITHOUT_GPU = "sm_80"
"""What stands for the architecture where there is no GPU to ask; the compile gate sets what it compiles for."""


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, or AMD's name for its own."""
    return _architecture(device) if device.type == "cuda" else WITHOUT_GPU


@functools.cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
