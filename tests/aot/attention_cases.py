"""What the compile gate compiles of attention: forward and backward, by head size, dtype and mask."""

from __future__ import annotations

import torch

from aot.triton_gate import Case
from fastprimer.kernels import attention

MATRIX_UNIT = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "sm_100": r"\bUTC\w*MMA", "gfx942": r"v_mfma_f32"}
"""The instruction that a half-precision product must compile to."""


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_cases(dtype: torch.dtype, D: int, *, causal: bool, packed: bool = False, kernels=attention, **options) -> list[Case]:
    """4 sequences of 2048 tokens, 32 query heads, 8 key/value heads."""
    B, S, H, Hk = 4, 2048, 32, 8
    tokens = (B * S,) if packed else (B, S)
    q, k, lse = meta(dtype, *tokens, H, D), meta(dtype, *tokens, Hk, D), meta(torch.float32, *((H, B * S) if packed else (B, H, S)))
    ends = (meta(torch.int32, B + 1),) * 2 if packed else (None, None)
    options = *ends, None, None, D**-0.5, options.get("left"), 0 if causal else None, options.get("softcap")
    name = f"attention {str(dtype)[6:]} D={D}{' causal' * causal}{' packed' * packed}"
    required = {} if dtype == torch.float32 else {target: (unit,) for target, unit in MATRIX_UNIT.items()}
    products = required, ("attention_delta_kernel",)
    return [
        Case(f"{name} forward", lambda: kernels.attention_forward(q, k, k, None, *options), *products),
        Case(f"{name} backward", lambda: kernels.attention_backward(q, None, q, k, k, q, lse, None, *options), *products),
    ]


CASES = [
    *attention_cases(torch.bfloat16, 64, causal=True),
    *attention_cases(torch.bfloat16, 128, causal=True, packed=True),
    *attention_cases(torch.bfloat16, 128, causal=False),
    *attention_cases(torch.bfloat16, 256, causal=True),
    *attention_cases(torch.float32, 64, causal=True, packed=True),
    *attention_cases(torch.float32, 128, causal=False),
    *attention_cases(torch.float32, 256, causal=True),
]
