"""RMSNorm's cases."""

from __future__ import annotations

import torch

from fastprimer.cases._case import Case, Inputs, Work, size


def _rms_norm_work(a: dict) -> Work:
    x, weight, residual = a["x"], a.get("weight"), a.get("residual")
    rstd = 4 * x.numel() // max(x.shape[-1], 1)
    # forward: read x (and residual), weight; write y (and h), rstd. backward: read dy (and dh), h, weight, rstd; write dx, dweight.
    forward = 2 * size(x) + 2 * size(residual) + size(weight) + rstd
    backward = 3 * size(x) + size(residual) + 2 * size(weight) + rstd
    return Work(forward, backward)


def rms_norm_case(name: str, *shape: int, weight=True, residual=False, view=lambda t: t, weight_dtype=None, bench=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        x = inputs.normal(*shape, view=view)
        a = {"x": x, **options}
        if weight:
            a["weight"] = inputs.normal(x.shape[-1], dtype=weight_dtype if weight_dtype and inputs.dtype != torch.float64 else None)
        if residual:
            a["residual"] = inputs.normal(*shape, view=view)
        return a

    return Case("rms_norm", name, arguments, ("y", "h") if residual else ("y",), bench, _rms_norm_work)


RMS_NORM = [
    rms_norm_case("one-column", 3, 1),
    rms_norm_case("odd", 5, 7),
    rms_norm_case("many-narrow-rows", 70, 64, eps=1e-5),
    rms_norm_case("per-head", 2, 3, 4, 128, view=lambda t: t.transpose(1, 2)),
    rms_norm_case("no-weight", 4, 96, weight=False),
    rms_norm_case("no-weight-residual", 4, 100, weight=False, residual=True),
    rms_norm_case("gemma", 6, 1000, weight_offset=1.0),
    rms_norm_case("float32-weight", 5, 520, weight_dtype=torch.float32, weight_offset=0.5),
    rms_norm_case("residual", 2, 3, 1024, residual=True),
    rms_norm_case("residual-odd", 9, 777, residual=True, weight_offset=1.0),
    rms_norm_case("transposed", 40, 33, view=lambda t: t.t()),
    rms_norm_case("sliced", 7, 300, view=lambda t: t[::2, 3:260]),
    rms_norm_case("expanded", 1, 48, view=lambda t: t.expand(6, 48)),
    rms_norm_case("expanded-middle", 4, 1, 40, view=lambda t: t.expand(4, 6, 40), residual=True),
    rms_norm_case("one-dimension", 256),
    rms_norm_case("no-rows", 0, 64, residual=True),
    rms_norm_case("many-rows", 300, 500, residual=True),
    rms_norm_case("llama", 17, 4096),
    rms_norm_case("wide-odd", 3, 8191, residual=True),
    rms_norm_case("split", 3, 40000, weight_offset=1.0),
    rms_norm_case("widest", 2, 262144),
    rms_norm_case("bench-llama", 2048, 4096, bench=True),
    rms_norm_case("bench-large", 8192, 4096, bench=True),
    rms_norm_case("bench-residual", 2048, 4096, residual=True, bench=True),
    rms_norm_case("bench-per-head", 2048 * 32, 128, bench=True),
    rms_norm_case("bench-wide", 256, 32768, bench=True),
    rms_norm_case("bench-calculator", 1280, 64, bench=True),
]
