"""What the compile gate compiles, by operation. `PYTHONPATH=tests python -m aot.triton_cases` prints the table."""

from __future__ import annotations

import torch

from aot.triton_gate import Case, inspect
from fastprimer.kernels import rms_norm

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

WIDE_ACCESS = dict.fromkeys(("sm_80", "sm_90", "sm_100"), (r"LDG\.E\S*\.128", r"STG\.E\S*\.128")) | {
    "gfx942": (r"_load_dwordx[24]", r"_store_dwordx[24]")
}
"""16-byte accesses; on AMD, where 16 warps are twice as many threads, 8 bytes do."""


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm_forward(dtype: torch.dtype, N: int, C: int, residual: bool = False, weight: bool = True, kernels=rms_norm) -> Case:
    x, w = meta(dtype, N, C), meta(dtype, C) if weight else None
    call = lambda: kernels.rms_norm_forward(x, w, 1e-6, x if residual else None, 0.0)  # noqa: E731
    return Case(_name("rms_norm forward", dtype, N, C, residual, weight), call, WIDE_ACCESS if C % 16 == 0 else {})


def rms_norm_backward(dtype: torch.dtype, N: int, C: int, residual: bool = False, weight: bool = True, kernels=rms_norm) -> Case:
    x, w, rstd = meta(dtype, N, C), meta(dtype, C) if weight else None, meta(FLOAT32, N)
    call = lambda: kernels.rms_norm_backward(x, x if residual else None, x, w, rstd, 0.0)  # noqa: E731
    return Case(_name("rms_norm backward", dtype, N, C, residual, weight), call, WIDE_ACCESS if C % 16 == 0 else {})


def _name(operation: str, dtype: torch.dtype, N: int, C: int, residual: bool, weight: bool) -> str:
    return f"{operation} {str(dtype)[6:]} N={N} C={C}{' +residual' * residual}{' -weight' * (not weight)}"


CASES = [
    make(*arguments)
    for make in (rms_norm_forward, rms_norm_backward)
    for arguments in [
        (BFLOAT16, 4096, 128),
        (FLOAT32, 4096, 128, True),
        (BFLOAT16, 4096, 1024, True),
        (FLOAT32, 4096, 2048, True),
        (BFLOAT16, 1, 4096),
        (BFLOAT16, 4096, 4096, False, False),
        (BFLOAT16, 4096, 4096, True),
        (FLOAT32, 4096, 4096, True),
        (BFLOAT16, 4096, 8192, True),
        (FLOAT32, 4096, 8192),
        (FLOAT32, 4096, 8192, True),
        (BFLOAT16, 4096, 65536, True),
        (FLOAT32, 4096, 65536, True),
        (BFLOAT16, 3 * 2**30, 1),
    ]
]
"""Sizes in use, absent tensors, and the extremes that Triton compiles specially: a size of 1, a size beyond 32 bits."""

if __name__ == "__main__":
    for case in CASES:
        print(*inspect(case), sep="\n")
