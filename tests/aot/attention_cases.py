"""What the compile gate compiles of attention, forward and backward, and of decoding: by head size, dtype, mask and pages."""

from __future__ import annotations

import torch

from aot.triton_gate import Case
from fastprimer.kernels import attention, decoding

MATRIX_UNIT = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "sm_100": r"\bUTC\w*MMA", "gfx942": r"v_mfma_f32"}
"""The instruction that a half-precision product must compile to."""
WITH_TMA = {"sm_90": r"\bUTMALDG", "sm_100": r"\bUTMALDG"}
"""The load of a tile through a tensor descriptor."""
FEW_ROWS = MATRIX_UNIT | dict.fromkeys(("sm_90", "sm_100"), r"\b(?:HMMA\.|HGMMA\.|UTC\w*MMA)")
"""The same for tiles that may have fewer than 64 rows, for which these targets have the older instruction alone."""


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def required(dtype: torch.dtype, *units: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {} if dtype == torch.float32 else {target: tuple(unit[target] for unit in units if target in unit) for target in MATRIX_UNIT}


def attention_cases(
    dtype: torch.dtype, D: int, *, causal=True, packed=False, sinks=False, left=None, softcap=None, kernels=attention
) -> list[Case]:
    """4 sequences of 2048 tokens, 32 query heads, 8 key/value heads."""
    B, S, H, Hk = 4, 2048, 32, 8
    tokens = (B * S,) if packed else (B, S)
    q, k, lse = meta(dtype, *tokens, H, D), meta(dtype, *tokens, Hk, D), meta(torch.float32, *((H, B * S) if packed else (B, H, S)))
    ends = (meta(torch.int32, B + 1),) * 2 if packed else (None, None)
    sink = meta(dtype, H) if sinks else None
    options = *ends, None, None, D**-0.5, left, 0 if causal else None, softcap
    words = {"causal": causal, "packed": packed, "sinks": sinks, "window": left is not None, "softcap": softcap is not None}
    name = " ".join(["attention", str(dtype)[6:], f"D={D}", *(word for word, present in words.items() if present)])
    spared = ("attention_delta_kernel",)
    unit = MATRIX_UNIT, WITH_TMA
    if D != attention.width(D):  # pointers, smaller tiles
        unit = (FEW_ROWS,)
    unit_backward = (FEW_ROWS,) if D == 256 else unit
    return [
        Case(f"{name} forward", lambda: kernels.attention_forward(q, k, k, sink, *options), required(dtype, *unit)),
        Case(
            f"{name} backward",
            lambda: kernels.attention_backward(q, None, q, k, k, q, lse, sink, *options),
            required(dtype, *unit_backward),
            spared,
        ),
    ]


def decoding_case(dtype: torch.dtype, D: int, *, B=8, S=1, H=32, Hk=8, T=4096, page=0, append=True, left=None, softcap=None, sinks=False):
    q, cache = meta(dtype, B, S, H, D), meta(dtype, B * T // page if page else B, page or T, Hk, D)
    new = (meta(dtype, B, S, Hk, D),) * 2 if append else (None, None)
    table, sink = meta(torch.int32, B, T // page) if page else None, meta(dtype, H) if sinks else None
    arguments = q, cache, cache, meta(torch.int32, B), *new, table, sink, D**-0.5, left, 0, softcap
    words = {f"page={page}": page, "window": left is not None, "softcap": softcap is not None, "sinks": sinks}
    name = " ".join(["decoding", str(dtype)[6:], f"B={B} S={S} H={H}/{Hk} D={D}", *(word for word, present in words.items() if present)])
    spared = "append_kernel", "attention_combine_kernel"
    return Case(name, lambda: decoding.attention_with_kv_cache_forward(*arguments), required(dtype, FEW_ROWS), spared)


CASES = [
    *attention_cases(torch.bfloat16, 64),
    *attention_cases(torch.bfloat16, 128, packed=True),
    *attention_cases(torch.bfloat16, 128, causal=False),
    *attention_cases(torch.bfloat16, 256),
    *attention_cases(torch.float32, 64, packed=True),
    *attention_cases(torch.float32, 128, causal=False),
    *attention_cases(torch.float32, 256),
    *attention_cases(torch.bfloat16, 64, left=128, sinks=True),
    *attention_cases(torch.bfloat16, 128, left=1024, packed=True, sinks=True),
    *attention_cases(torch.bfloat16, 128, softcap=50.0),
    *attention_cases(torch.float16, 256, left=4096, softcap=50.0),
    *attention_cases(torch.bfloat16, 80, left=1024),
    *attention_cases(torch.bfloat16, 192, packed=True),
    *attention_cases(torch.float32, 128, left=128, softcap=30.0, sinks=True),
    decoding_case(torch.bfloat16, 128),
    decoding_case(torch.bfloat16, 128, B=1, H=8, Hk=1),
    decoding_case(torch.bfloat16, 128, S=4, page=64),
    decoding_case(torch.bfloat16, 128, S=16, page=16, left=1024, sinks=True, B=1, H=32, Hk=2),
    decoding_case(torch.float16, 64, Hk=32, page=256, append=False),
    decoding_case(torch.bfloat16, 256, S=2, H=8, Hk=4, softcap=50.0, left=4096),
    decoding_case(torch.bfloat16, 80, Hk=32, page=17),
    decoding_case(torch.float32, 128, B=1, H=8, Hk=1),
    decoding_case(torch.float32, 256, S=4, H=16, Hk=1, page=16),
]
