"""Checks and conversions that every chapter shares: errors that name the argument, and what autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastprimer.backends import autocasting, transforming
from fastprimer.config import is_count, is_number

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Refuse the argument unless the condition holds. `if ...: refuse(...)` instead where calls are to be cheap, for building a message
    takes time, and where it contains a size, which torch.compile would specialise on and recompile for."""
    if not condition:
        refuse(name, expected, got)


def refuse(name: str, expected: str, got: object) -> None:
    """Raise ValueError("<op>: <argument>: expected ..., got ...")."""
    raise ValueError(f"{name}: expected {expected}, got {shown(got)}")


def shown(got: object) -> object:
    """What came, for an error: numpy's numbers and tensors look like what was expected, unless their types are told."""
    if isinstance(got, Tensor):
        return f"a tensor of shape {tuple(got.shape)}"
    return repr(got) if type(got).__module__ == "numpy" else got


def check_shape(name: str, tensor: Tensor, shape: tuple, letters: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {letters} = {tuple(shape)}, got {tuple(tensor.shape)}")


def check_sizes(name: str, **sizes: int) -> None:
    for argument, size in sizes.items():
        check(is_count(size, 1), f"{name}: {argument}", "an integer >= 1", repr(size))


def check_width(name: str, x: object, C: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != C:
        refuse(name, f"shape (..., C = {C})", tuple(x.shape))


def check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        expected = "float32, bfloat16, float16 or float64" if tensor.is_floating_point() else "a floating-point tensor"
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def check_integer(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def number(name: str, value: object) -> float:
    """A finite number as a float; it may come as one of numpy or as a tensor."""
    try:
        result = value if isinstance(value, (int, float)) else float(None if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a finite number, got {value!r}") from None
    if not is_number(result):
        refuse(name, "a finite number", value)
    return float(result)


SOFTCAPS = 2.0**-126, 2.0**126
"""Kernels have it and its reciprocal in float32, where a smaller one is 0, which means none, and a larger one infinite."""


def check_softcap(name: str, softcap: object) -> None:
    fits = softcap is None or (is_number(softcap) and SOFTCAPS[0] <= softcap <= SOFTCAPS[1])
    check(fits, f"{name}: softcap", "None or a finite number > 0 (2^-126..2^126)", softcap)


def traced(tensor: Tensor) -> bool:
    """Whether a tensor only stands for one with numbers in it."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def inspectable(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at without waiting for a device, and are there at all: not while tracing."""
    return tensor.device.type == "cpu" and not traced(tensor)


def check_numbers(name: str, tensor: Tensor, n: int) -> None:
    """Integers must be in 0..n-1, where they can be looked at."""
    if tensor.numel() and inspectable(tensor):
        low, high = int(tensor.min()), int(tensor.max())
        check(0 <= low and high < n, name, f"numbers in 0..{n - 1}", f"{low}..{high}")


def check_like(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """The two must agree in dtype and device (shape is each operation's own business)."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like_name}'s dtype {like.dtype}, got {tensor.dtype}")
    check_device(name, tensor, like, like_name)


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected {like_name}'s device {like.device}, got {tensor.device}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


KERNEL_FLOATS = {
    names: tuple(getattr(torch, name) for name in names.split())
    for names in ("float32 bfloat16 float16", "float32 bfloat16 float16 float64")
}
"""What kernels take, by the words that say so."""


def dtype_limit(x: Tensor, constant: Tensor | None, names: str, what: str = "a weight") -> str:
    """Why a kernel for x's dtype in `names`, and a constant in x's dtype or float32, cannot take these, or ""."""
    known = x.dtype in KERNEL_FLOATS[names]
    if known and (constant is None or constant.dtype in (x.dtype, torch.float32)):
        return ""
    dtype = str(x.dtype).removeprefix("torch.")
    if not known:
        return f"its kernel takes {names.replace(' ', ', ')}, not {dtype}"
    allowed = dtype if x.dtype == torch.float32 else f"{dtype} or float32"
    return f"its kernel takes {what} of {allowed}, not {str(constant.dtype).removeprefix('torch.')}"


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call on these tensors, or forward-mode derivatives are asked for (which then raise). Not under a
    transform of torch.func: there the reference is called as it is, which is plain torch."""
    if transforming():
        return False
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def distinct(*tensors: Tensor | None) -> tuple:
    """While compiling, a tensor that comes twice as two views of it: Dynamo takes no duplicates into an autograd.Function."""
    if not torch.compiler.is_compiling():
        return tensors
    result: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        result.append(t if t is None or not any(t is u for u in tensors[:i]) else t.view_as(t))
    return tuple(result)


def autocast(*tensors: Tensor | None) -> tuple:
    """What torch.matmul does under autocast: cast floating-point operands, the first of them given, to the autocast dtype (others pass
    through)."""
    device = tensors[0].device.type
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t for t in tensors)
