"""What the compile gate compiles of cross-entropy, plain and fused: whole rows, pieces of them, kept ones, odd vocabularies.

The calls are on meta tensors, which have no numbers: a host function that waited for a device, to look at one, would raise.
"""

from __future__ import annotations

import torch

from aot.attention_cases import meta
from aot.triton_gate import Case
from fastprimer.kernels import cross_entropy
from fastprimer.ops.cross_entropy import BLOCK, keeps_16_bits, kept_columns

LOADS = dict.fromkeys(("sm_80", "sm_90", "sm_100"), (r"LDG\.E\S*\.128",)) | {"gfx942": (r"(global|buffer)_load_dwordx[24]",)}
STORES = dict.fromkeys(("sm_80", "sm_90", "sm_100"), (r"STG\.E\S*\.128",)) | {"gfx942": (r"(global|buffer)_store_dwordx[24]",)}
"""Accesses of 16 bytes; on AMD, where a warp is twice as many threads, 8 bytes do."""
BOTH = {target: LOADS[target] + STORES[target] for target in LOADS}
EVERY, NOTHING = (0.1, 1e-4, 30.0), (0.0, 0.0, None)
"""label_smoothing, z_loss, softcap"""


def vectors(N: int, dtype: torch.dtype) -> tuple:
    """dloss, target, lse"""
    wide = torch.promote_types(dtype, torch.float32)
    return meta(wide, N), meta(torch.int64, N), meta(wide, N)


def plain_cases(dtype: torch.dtype, N: int, V: int, options: tuple = NOTHING, columns_last=True, kernels=cross_entropy) -> list[Case]:
    logits = meta(dtype, N, V) if columns_last else meta(dtype, V, N).t()
    dloss, target, lse = vectors(N, dtype)
    dlse = dloss if options == EVERY else None
    name = f"cross_entropy {str(dtype)[6:]} N={N} V={V}{' every option' * (options == EVERY)}{' transposed' * (not columns_last)}"
    wide = columns_last and V % 16 == 0
    return [
        Case(f"{name} forward", lambda: kernels.cross_entropy_forward(logits, target, -100, *options), LOADS if wide else {}),
        Case(
            f"{name} backward",
            lambda: kernels.cross_entropy_backward(dloss, dlse, logits, target, lse, lse, -100, *options),
            BOTH if wide else {},
        ),
    ]


def linear_cases(
    dtype: torch.dtype, N: int, C: int, V: int, budget: int = 0, options: tuple = NOTHING, bias=False, kernels=cross_entropy
) -> list[Case]:
    x, weight, b = meta(dtype, N, C), meta(dtype, V, C), meta(dtype, V) if bias else None
    dloss, target, lse = vectors(N, dtype)
    in_16_bits = keeps_16_bits(x, b, options[-1])
    columns = kept_columns(N, V, budget, 2 if in_16_bits else lse.element_size())
    kept, shift = meta(torch.int16 if in_16_bits else lse.dtype, N, columns), meta(lse.dtype, N, -(-columns // BLOCK) if in_16_bits else 0)
    dlse = dloss if options == EVERY else None
    words = {f"kept={kept.shape[1]}": kept.shape[1], "bias": bias, "every option": options == EVERY}
    name = f"linear_cross_entropy {str(dtype)[6:]} N={N} C={C} V={V} {' '.join(word for word, present in words.items() if present)}"
    return [
        Case(
            f"{name} forward",
            lambda: kernels.linear_cross_entropy_forward(x, weight, target, b, -100, *options, budget),
            BOTH if kept.numel() == N * V and not in_16_bits else LOADS,
        ),
        Case(
            f"{name} backward",
            lambda: kernels.linear_cross_entropy_backward(
                dloss, dlse, x, weight, target, lse, lse, kept, shift, b, -100, *options, True, True
            ),
            BOTH,
        ),
    ]


CASES = [
    *plain_cases(torch.bfloat16, 8192, 128256),
    *plain_cases(torch.bfloat16, 8192, 262144, EVERY),
    *plain_cases(torch.float32, 4096, 32000),
    *plain_cases(torch.float16, 1024, 50257),
    *plain_cases(torch.float64, 1024, 32000, EVERY),
    *plain_cases(torch.bfloat16, 3 * 2**20, 1000, columns_last=False),
    *plain_cases(torch.float32, 60, 1),
    *linear_cases(torch.bfloat16, 4096, 2048, 16384, 1 << 28),
    *linear_cases(torch.bfloat16, 768, 2048, 50257),
    *linear_cases(torch.float16, 1024, 2048, 32000, 1 << 26, EVERY, bias=True),
    *linear_cases(torch.bfloat16, 1024, 2048, 16384, 1 << 26, EVERY, bias=True),
    *linear_cases(torch.float32, 1024, 512, 32000, 1 << 26, bias=True),
]
