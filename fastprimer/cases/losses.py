"""The cases of cross-entropy and linear cross-entropy."""

from __future__ import annotations

from fastprimer.cases._case import Case, Inputs, Work, size


def _losses_work(a: dict) -> Work:
    if "logits" in a:
        return Work(size(a["logits"]), 2 * size(a["logits"]))
    flops = 2 * a["x"].numel() * a["weight"].shape[0]
    return Work(size(a["x"], a["weight"]), 2 * size(a["x"], a["weight"]), flops, 3 * flops)  # backward recomputes the logits


def loss_case(op: str, name: str, N: int, V: int, C=0, ignored=(), bias=False, bench=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        target = inputs.integers(0, V, N)
        target[list(ignored)] = options.get("ignore_index", -100)
        a = {"target": target, **options}
        if not C:
            return a | {"logits": inputs.normal(N, V)}
        return a | {"x": inputs.normal(N, C), "weight": inputs.normal(V, C)} | ({"bias": inputs.normal(V)} if bias else {})

    return Case(op, name, arguments, ("loss",), bench, _losses_work)


def loss_cases(op: str, C: int, bias: bool) -> list[Case]:
    every = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    return [
        loss_case(op, "mean", 7, 11, C, ignored=(2,)),
        loss_case(op, "sum", 5, 33, C, reduction="sum"),
        loss_case(op, "per-token", 6, 40, C, ignored=(0, 5), reduction="none"),
        loss_case(op, "smoothed", 6, 17, C, label_smoothing=0.2),
        loss_case(op, "every-option", 8, 29, C, ignored=(1,), ignore_index=3, bias=bias, **every),
        loss_case(op, "all-ignored", 3, 9, C, ignored=(0, 1, 2), reduction="sum"),
        loss_case(op, "bench", 1024, 32000, C and 512, bench=True),
    ]
