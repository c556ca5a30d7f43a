"""What the compile gate compiles of routing and of the mixture of experts, forward and backward.

The calls are on meta tensors, which have no numbers: a host function that waited for a device, to look at one, would raise.
"""

from __future__ import annotations

import torch

from aot.attention_cases import FEW_ROWS, MATRIX_UNIT, meta, required
from aot.triton_gate import Case
from fastprimer.kernels import moe, routing
from fastprimer.ops.routing import SCORES

COPIES = dict.fromkeys(("sm_80", "sm_90", "sm_100"), r"\bLDGSTS\.E\S*\.128") | {"gfx942": r"(?:global|buffer)_load_dwordx[24]"}
"""Tiles come in pieces of 16 bytes, on NVIDIA GPUs past the registers; on AMD 8 bytes do."""
DISPATCH = ("moe_rank_kernel", "moe_scan_kernel", "moe_plan_kernel", "moe_scatter_kernel", "moe_combine_kernel")


def route_case(dtype: torch.dtype, N: int, E: int, K: int, score="softmax", renormalize=True, bias=False, grouped=(None, None)) -> Case:
    """Forward and backward."""
    logits, b, weights = meta(dtype, N, E), meta(torch.float32, E) if bias else None, meta(torch.float32, N, K)

    def call():
        routing.route_forward(logits, K, SCORES.index(score), renormalize, b, *grouped, 2.5)
        routing.route_backward(weights, logits, meta(torch.int64, N, K), SCORES.index(score), renormalize, 2.5)

    words = {"renormalised": renormalize, "bias": bias, f"groups={grouped[0]}/{grouped[1]}": grouped[0]}
    name = " ".join(["route", str(dtype)[6:], f"N={N} E={E} K={K} {score}", *(word for word, present in words.items() if present)])
    return Case(name, call)


def moe_cases(dtype: torch.dtype, N: int, C: int, F: int, E: int, K: int, unit=MATRIX_UNIT, kernels=moe) -> list[Case]:
    x, gate_up, down = meta(dtype, N, C), meta(dtype, E, 2 * F, C), meta(dtype, E, C, F)
    weights, experts, hidden = meta(torch.float32, N, K), meta(torch.int64, N, K), meta(dtype, N, K, 2 * F)
    name = f"moe {str(dtype)[6:]} N={N} C={C} F={F} E={E} K={K}"
    units = (unit, COPIES) if C % 16 == 0 and F % 16 == 0 else (unit,)
    needs = {} if dtype == torch.float64 else required(dtype, *units)
    return [
        Case(f"{name} forward", lambda: kernels.moe_forward(x, gate_up, down, weights, experts), needs, DISPATCH),
        Case(f"{name} backward", lambda: kernels.moe_backward(x, x, gate_up, down, weights, experts, hidden, True, True), needs, DISPATCH),
    ]


CASES = [
    route_case(torch.bfloat16, 4096, 8, 2),
    route_case(torch.bfloat16, 4096, 128, 8, renormalize=False),
    route_case(torch.float32, 4096, 256, 8, "sigmoid", bias=True, grouped=(8, 4)),
    route_case(torch.float32, 1, 60, 4, "softmax_topk"),
    route_case(torch.float32, 64, 8192, 64),
    route_case(torch.float64, 64, 160, 6, renormalize=False, grouped=(8, 3)),
    *moe_cases(torch.bfloat16, 4096, 4096, 14336, 8, 2),
    *moe_cases(torch.bfloat16, 512, 2048, 768, 16, 2, FEW_ROWS),
    *moe_cases(torch.float16, 64, 2048, 768, 128, 8, FEW_ROWS),
    *moe_cases(torch.bfloat16, 1024, 2000, 1001, 8, 2),
    *moe_cases(torch.bfloat16, 512, 64, 64, 8, 2),
    *moe_cases(torch.float16, 1024, 2001, 1001, 8, 2),
    *moe_cases(torch.float32, 1024, 512, 1024, 8, 2),
    *moe_cases(torch.float64, 1024, 512, 1024, 8, 2),
]
