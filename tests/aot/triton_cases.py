"""What the compile gate compiles, by operation.

PYTHONPATH=tests python -m aot.triton_cases [--markdown] [text]     the table, of the cases whose names contain the text
"""

from __future__ import annotations

import sys

import torch

from aot import attention_cases, losses_cases, moe_cases
from aot.table import markdown
from aot.triton_gate import Case, inspect
from fastprimer.kernels import rms_norm, rope, swiglu
from fastprimer.ops.swiglu import constants

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64

WIDE_ACCESS = dict.fromkeys(("sm_80", "sm_90", "sm_100"), (r"LDG\.E\S*\.128", r"STG\.E\S*\.128")) | {
    "gfx942": (r"(global|buffer)_load_dwordx[24]", r"(global|buffer)_store_dwordx[24]")
}
"""16-byte accesses; on AMD, where a warp is twice as many threads, 8 bytes do."""


def never(pattern: str) -> str:
    """Matches code in which the pattern occurs nowhere."""
    return rf"\A(?![\s\S]*{pattern})"


NARROW_ACCESS = dict.fromkeys(("sm_80", "sm_90", "sm_100"), (r"LDG\S*\.U16", r"STG(?!\S*\.128)")) | {
    "gfx942": (r"_load_u?short", r"_store_(?!dwordx[24])")
}
"""A load of one half-precision number, a store of less than the above."""

WIDE_ONLY = {target: (*wide, *map(never, NARROW_ACCESS[target])) for target, wide in WIDE_ACCESS.items()}


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm_forward(dtype: torch.dtype, N: int, C: int, residual: bool = False, weight: bool = True, kernels=rms_norm) -> Case:
    x, w = meta(dtype, N, C), meta(dtype, C) if weight else None
    call = lambda: kernels.rms_norm_forward(x, w, 1e-6, x if residual else None, 0.0)  # noqa: E731
    return Case(_name("rms_norm forward", dtype, N, C, residual, weight), call, WIDE_ACCESS if C % 16 == 0 else {})


def rms_norm_backward(dtype: torch.dtype, N: int, C: int, residual: bool = False, weight: bool = True, kernels=rms_norm) -> Case:
    x, w, rstd = meta(dtype, N, C), meta(dtype, C) if weight else None, meta(FLOAT32, N)
    call = lambda: kernels.rms_norm_backward(x, x if residual else None, x, w, rstd, 0.0, True)  # noqa: E731
    return Case(_name("rms_norm backward", dtype, N, C, residual, weight), call, WIDE_ACCESS if C % 16 == 0 else {})


def _name(operation: str, dtype: torch.dtype, N: int, C: int, residual: bool, weight: bool) -> str:
    return f"{operation} {str(dtype)[6:]} N={N} C={C}{' +residual' * residual}{' -weight' * (not weight)}"


def rope_case(
    dtype: torch.dtype,
    B: int,
    S: int,
    H: int,
    Hk: int,
    D: int,
    R: int,
    interleaved: bool = False,
    positions: bool = False,
    heads_first: bool = False,
    inverse: bool = False,
    kernels=rope,
) -> Case:
    heads = lambda n: meta(dtype, B, n, S, D).transpose(1, 2) if heads_first else meta(dtype, B, S, n, D)  # noqa: E731
    cos, at = meta(FLOAT32, S, R // 2), meta(torch.int64, B, S) if positions else None
    function = kernels.rope_backward if inverse else kernels.rope_forward
    options = " interleaved" * interleaved + " positions" * positions + " heads-first" * heads_first + " inverse" * inverse
    call = lambda: function(heads(H), heads(Hk) if Hk else None, cos, cos, at, interleaved)  # noqa: E731
    name = f"rope {str(dtype)[6:]} B={B} S={S} H={H}/{Hk} D={D} R={R}{options}"
    return Case(name, call, WIDE_ONLY if D % 16 == 0 and R % 16 == 0 else {})


def swiglu_case(dtype: torch.dtype, N: int, F: int, activation: str = "silu", packed: bool = False, kernels=swiglu) -> Case:
    """Forward and backward."""
    gate, up, dy = meta(dtype, N, 2 * F if packed else F), None if packed else meta(dtype, N, F), meta(dtype, N, F)

    def call():
        kernels.swiglu_forward(gate, up, *constants(activation))
        kernels.swiglu_backward(dy, gate, up, *constants(activation))

    name = f"swiglu {str(dtype)[6:]} N={N} F={F} {activation}{' packed' * packed}"
    return Case(name, call, WIDE_ONLY if F % 16 == 0 else {})


CASES = [
    *(
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
    ),
    rope_case(BFLOAT16, 1, 2048, 32, 8, 128, 128),
    rope_case(BFLOAT16, 1, 2048, 32, 8, 128, 128, interleaved=True, positions=True),
    rope_case(FLOAT32, 1, 2048, 32, 8, 128, 128, positions=True, inverse=True),
    rope_case(FLOAT32, 4, 2048, 32, 8, 128, 128, interleaved=True),
    rope_case(BFLOAT16, 4, 2048, 32, 32, 64, 64, heads_first=True),
    rope_case(BFLOAT16, 1, 2048, 32, 32, 80, 32),
    rope_case(BFLOAT16, 1, 2048, 48, 1, 96, 48, interleaved=True),
    rope_case(BFLOAT16, 64, 1, 32, 8, 128, 128, positions=True),
    rope_case(BFLOAT16, 128, 10, 4, 2, 16, 16),
    rope_case(FLOAT64, 1, 512, 8, 0, 256, 128),
    rope_case(FLOAT64, 1, 2, 1, 1, 32768, 16384, interleaved=True),
    rope_case(BFLOAT16, 1, 1, 1, 1, 3, 2),
    rope_case(BFLOAT16, 2, 3 * 2**30, 1, 0, 2, 2),
    swiglu_case(BFLOAT16, 2048, 14336),
    swiglu_case(BFLOAT16, 2048, 14336, "gelu_tanh", packed=True),
    swiglu_case(BFLOAT16, 2048, 2880, "gpt_oss", packed=True),
    swiglu_case(FLOAT32, 1024, 5632),
    swiglu_case(FLOAT32, 1024, 5632, "gpt_oss", packed=True),
    swiglu_case(FLOAT64, 1024, 5632, "gelu_tanh"),
    swiglu_case(BFLOAT16, 1280, 176, packed=True),
    swiglu_case(FLOAT32, 65536, 16, packed=True),
    swiglu_case(BFLOAT16, 1, 1),
    swiglu_case(BFLOAT16, 3 * 2**20, 1024),
    swiglu_case(BFLOAT16, 3 * 2**30, 1, packed=True),
    *attention_cases.CASES,
    *moe_cases.CASES,
    *losses_cases.CASES,
]
"""Sizes in use, absent tensors, and the extremes that Triton compiles specially: a size of 1, a size beyond 32 bits."""

if __name__ == "__main__":
    wanted = " ".join(word for word in sys.argv[1:] if word != "--markdown")
    rows = (row for case in CASES if wanted in case.name for row in inspect(case))
    if "--markdown" in sys.argv:
        print(markdown(("kernel", "case"), (row.cell for row in rows)))
    else:
        for row in rows:
            print(row, flush=True)
