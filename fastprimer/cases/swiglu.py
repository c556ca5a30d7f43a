"""SwiGLU's cases."""

from __future__ import annotations

from fastprimer.cases._case import Case, Inputs, Work, size


def _swiglu_work(a: dict) -> Work:
    y = size(a["gate"]) if a.get("up") is not None else size(a["gate"]) // 2
    return Work(3 * y, 5 * y)  # forward: read gate, up; write y. backward: read dy, gate, up; write dgate, dup.


def swiglu_case(name: str, *shape: int, layout="separate", view=lambda t: t, scale=1.0, bench=False, **options) -> Case:
    """layout: gate and up "separate", two "views" of one tensor (the interleaved halves: "interleaved"), or one tensor, "packed"."""

    def arguments(inputs: Inputs) -> dict:
        F = shape[-1] if shape else 0
        wide = (*shape[:-1], 2 * F)
        if layout == "packed":
            return {"gate": inputs.normal(*wide, view=lambda t: scale * view(t)), **options}
        layouts = {
            "separate": (shape, lambda t: t, lambda t: t),
            "views": (wide, lambda t: t[..., :F], lambda t: t[..., F:]),
            "interleaved": (wide, lambda t: t[..., ::2], lambda t: t[..., 1::2]),
        }
        whole, gate, up = layouts[layout]
        a = {"gate": inputs.normal(*whole, view=lambda t: gate(view(scale * t)))}
        return a | {"up": inputs.normal(*whole, view=lambda t: up(view(scale * t)))} | options

    return Case("swiglu", name, arguments, bench=bench, work=_swiglu_work)


SWIGLU = [
    swiglu_case("odd", 3, 7),
    swiglu_case("one-number", 1, 1),
    swiglu_case("scalar"),
    swiglu_case("gelu", 5, 33, activation="gelu_tanh"),
    swiglu_case("gpt-oss", 5, 33, scale=6.0, activation="gpt_oss"),
    swiglu_case("clamped-silu", 4, 40, layout="packed", limit=0.5),
    swiglu_case("views", 2, 5, 96, layout="views"),
    swiglu_case("views-odd", 5, 13, layout="views", activation="gelu_tanh"),
    swiglu_case("interleaved-views", 3, 24, layout="interleaved", activation="gpt_oss"),
    swiglu_case("packed", 2, 5, 96, layout="packed"),
    swiglu_case("packed-odd", 3, 13, layout="packed", activation="gpt_oss"),
    swiglu_case("packed-sliced", 6, 32, layout="packed", view=lambda t: t[::2]),
    swiglu_case("large-numbers", 6, 50, scale=70.0),
    swiglu_case("large-numbers-gelu", 6, 50, scale=70.0, activation="gelu_tanh"),
    swiglu_case("transposed", 24, 17, view=lambda t: t.t()),
    swiglu_case("channels-last", 2, 4, 6, 3, view=lambda t: t.permute(0, 3, 1, 2)),
    swiglu_case("packed-channels-last", 2, 4, 6, 3, layout="packed", view=lambda t: t.permute(0, 3, 1, 2)),
    swiglu_case("expanded-middle", 4, 1, 40, view=lambda t: t.expand(4, 6, 40)),
    swiglu_case("no-rows", 0, 16),
    swiglu_case("no-columns", 4, 0, layout="packed"),
    swiglu_case("many", 150, 700),
    swiglu_case("many-packed", 150, 700, layout="packed"),
    swiglu_case("bench", 1024, 5632, bench=True),
    swiglu_case("bench-llama3-8b", 2048, 14336, bench=True),
    swiglu_case("bench-packed", 1024, 5632, layout="packed", bench=True),
    swiglu_case("bench-gelu", 1024, 5632, activation="gelu_tanh", bench=True),
    swiglu_case("bench-gpt-oss", 1024, 5632, activation="gpt_oss", bench=True),
    swiglu_case("bench-calculator", 1280, 176, bench=True),
]
