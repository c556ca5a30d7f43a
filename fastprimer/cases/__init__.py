"""CASES: what every operation is called with, in tests and in benchmarks, and what each call must at least move and compute."""

from fastprimer.cases._case import Case, Inputs, Work
from fastprimer.cases.attention import ATTENTION, DECODING, attention_case, decoding_case
from fastprimer.cases.gpu import GPU
from fastprimer.cases.losses import loss_case, loss_cases
from fastprimer.cases.moe import MOE, ROUTE, moe_case, route_case
from fastprimer.cases.rms_norm import RMS_NORM, rms_norm_case
from fastprimer.cases.rope import ROPE, rope_case
from fastprimer.cases.swiglu import SWIGLU, swiglu_case

__all__ = [
    "CASES",
    "PRODUCTS",
    "Case",
    "Inputs",
    "Work",
    "attention_case",
    "benchmarks",
    "decoding_case",
    "loss_case",
    "moe_case",
    "rms_norm_case",
    "rope_case",
    "route_case",
    "swiglu_case",
]


PRODUCTS = ("attention", "attention_with_kv_cache", "moe", "linear_cross_entropy")
"""Operations that are matrix products above all."""


def benchmarks(device: str, op: str | None = None) -> list[Case]:
    """The cases that are measured on a type of device."""
    found = [case for case in CASES if case.bench and op in (None, case.op)]
    return [case for case in found if (case.proof is not None) == (device == "cuda")]


CASES: tuple[Case, ...] = (
    *RMS_NORM,
    *ROPE,
    *SWIGLU,
    *ATTENTION,
    *DECODING,
    *ROUTE,
    *MOE,
    *loss_cases("cross_entropy", 0, False),
    *loss_cases("linear_cross_entropy", 12, True),
    *GPU,
)
