"""The cases of cross-entropy and linear cross-entropy."""

from __future__ import annotations

from fastprimer.cases._case import Case, Inputs, Work, size


def _losses_work(a: dict) -> Work:
    if "logits" in a:
        return Work(size(a["logits"]), 2 * size(a["logits"]))
    flops = 2 * a["x"].numel() * a["weight"].shape[0]
    return Work(size(a["x"], a["weight"]), 2 * size(a["x"], a["weight"]), flops, 2 * flops)  # recomputing the logits is a choice


def loss_case(op: str, name: str, N: int, V: int, C=0, ignored=(), bias=False, int32=False, views=None, bench=False, **options) -> Case:
    """Without C, logits (N, V); with it, x (N, C) and weight (V, C). views: {argument: (shape of the sample, view)}."""
    views = views or {}

    def arguments(inputs: Inputs) -> dict:
        target = inputs.integers(0, V, N)
        target[list(ignored)] = options.get("ignore_index", -100)
        a = {"target": target.int() if int32 else target, **options}

        def normal(name: str, *shape: int):
            sample, view = views.get(name, (shape, lambda t: t))
            return inputs.normal(*sample, view=view)

        if not C:
            return a | {"logits": normal("logits", N, V)}
        return a | {"x": normal("x", N, C), "weight": normal("weight", V, C)} | ({"bias": normal("bias", V)} if bias else {})

    outputs = ("loss", *(["lse"] if options.get("return_lse") else []), *(["argmax"] if options.get("return_argmax") else []))
    return Case(op, name, arguments, outputs, bench, _losses_work)


def loss_cases(op: str, C: int, bias: bool) -> list[Case]:
    every = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    asked = {"return_lse": True, "return_argmax": True}
    return [
        loss_case(op, "mean", 7, 11, C, ignored=(2,)),
        loss_case(op, "sum", 5, 33, C, reduction="sum"),
        loss_case(op, "per-token", 6, 40, C, ignored=(0, 5), reduction="none"),
        loss_case(op, "smoothed", 6, 17, C, label_smoothing=0.2),
        loss_case(op, "z-loss", 9, 70, C, z_loss=0.1, reduction="none", bias=bias),
        loss_case(op, "softcap", 9, 70, C, softcap=2.0, reduction="none", bias=bias),
        loss_case(op, "every-option", 8, 29, C, ignored=(1,), ignore_index=3, bias=bias, **every),
        loss_case(op, "lse", 20, 50, C, ignored=(3,), return_lse=True),
        loss_case(op, "everything", 21, 300, C, ignored=(0, 20), reduction="none", bias=bias, int32=True, **every, **asked),
        loss_case(op, "all-ignored", 3, 9, C, ignored=(0, 1, 2), reduction="sum"),
        loss_case(op, "one-token", 1, 129, C, reduction="none", return_argmax=True),
        loss_case(op, "no-token", 0, 19, C, reduction="none", **asked),
        loss_case(op, "one-word", 60, 1, C, z_loss=0.5, reduction="none"),
        loss_case(op, "strided", 13, 37, C, views=_STRIDED_LINEAR if C else _STRIDED, reduction="none"),
        *([] if C else [loss_case(op, "far-from-zero", 9, 70, views=_FAR, reduction="none", return_lse=True)]),
        *([] if C else [loss_case(op, "at-the-cap", 30, 70, views=_LARGE, reduction="none", softcap=30.0)]),
        *_large(op, C, bias, every, asked),
        loss_case(op, "bench", 1024, 32000, C and 512, bench=True),
        *(loss_case(op, f"bench-{mb}-mb", 1024, 32000, 512, bench=True, memory_budget=budget) for mb, budget in _BUDGETS.items() if C),
    ]


_BUDGETS = {16: 0, 110: 88 << 20}
"""By megabytes of extra memory that tests/test_cpu_cross_entropy.py holds them to, at the benchmark's size."""

_FAR = {"logits": ((9, 70), lambda t: t + 1000)}
"""Where the digits of lse are not those of the loss and of the gradient."""
_LARGE = {"logits": ((30, 70), lambda t: t * 400)}
"""Of which a softcap makes numbers next to it, whose slope is what cancellation leaves."""
_STRIDED = {"logits": ((13, 80), lambda t: t[:, 2:76:2])}
_STRIDED_LINEAR = {"x": ((12, 13), lambda t: t.t()), "weight": ((74, 15), lambda t: t[::2, 3:])}


def _large(op: str, C: int, bias: bool, every: dict, asked: dict) -> list[Case]:
    """Beyond one tile of the vocabulary, one block of tokens and a range of the backward pass; for the fused one, budgets too.

    In 16 bits is kept what a half type and no softcap allow.
    """
    plain = {**every, "softcap": None}
    if not C:
        return [loss_case(op, "several-pieces", 5, 5001, ignored=(1,), reduction="none", **every, **asked)]
    return [
        loss_case(op, "several-blocks", 150, 270, 20, ignored=range(7, 90, 5), bias=bias, reduction="none", **every, **asked),
        loss_case(op, "nothing-kept", 40, 700, 33, ignored=(9,), bias=bias, memory_budget=0, return_lse=True),
        loss_case(op, "partly-kept", 40, 700, 33, ignored=(9,), bias=bias, memory_budget=4 * 40 * 512, reduction="none", **every),
        loss_case(op, "partly-in-16-bits", 40, 700, 33, ignored=(9,), bias=bias, memory_budget=40 * 1200, reduction="none", **plain),
        loss_case(op, "all-in-16-bits", 40, 701, 33, ignored=(9,), bias=bias, memory_budget=1 << 20, reduction="none", **plain, **asked),
        loss_case(op, "all-kept", 40, 701, 33, ignored=(9,), bias=bias, memory_budget=1 << 20, reduction="none", **every, **asked),
    ]
