"""The cases of routing and of the mixture of experts."""

from __future__ import annotations

import torch

from fastprimer.cases._case import Case, Inputs, Work, size


def route_case(name: str, N: int, E: int, k: int, bias=False, ties=False, view=None, bench=False, float32=False, **options) -> Case:
    """float32: whatever the case's dtype, as routers compute their logits; in half types many are equal, among which torch takes any."""

    def arguments(inputs: Inputs) -> dict:
        if float32:
            logits = inputs.normal(N, E, dtype=torch.float32)
        elif ties:  # few different numbers: every row has equal ones
            logits = inputs.integers(-2, 3, N, E).to(inputs.dtype).requires_grad_()
        else:
            logits = inputs.normal(N, E) if view is None else inputs.normal(*view[0], view=view[1])
        a = {"logits": logits, "k": k, **options}
        return a | ({"bias": inputs.normal(E, grad=False)} if bias else {})

    return Case(
        "route",
        name,
        arguments,
        ("weights", "experts"),
        bench,
        lambda a: Work(size(a["logits"]) + N * k * 12, 2 * size(a["logits"]) + N * k * 12),
    )


ROUTE = [
    route_case("mixtral", 13, 8, 2),
    route_case("switch", 9, 4, 1, renormalize=False),
    route_case("topk-first", 7, 16, 3, score="softmax_topk"),
    route_case("unnormalised", 7, 16, 4, renormalize=False, scale=1.5),
    route_case("deepseek-v3", 11, 32, 4, bias=True, score="sigmoid", groups=8, top_groups=3, scale=2.5),
    route_case("sigmoid-unnormalised", 5, 8, 2, score="sigmoid", renormalize=False),
    route_case("group-limited", 6, 12, 3, groups=4, top_groups=2, renormalize=False),
    route_case("odd-number-of-experts", 5, 37, 5, bias=True),
    route_case("biased", 14, 10, 3, bias=True, renormalize=False),
    route_case("many-experts", 3, 160, 6, groups=8, top_groups=3, renormalize=False, scale=16.0),
    route_case("groups-of-one", 4, 6, 2, bias=True, score="sigmoid", groups=6, top_groups=3),
    route_case("every-expert", 6, 5, 5, score="sigmoid"),
    route_case("one-expert", 6, 1, 1, renormalize=False),
    route_case("ties", 20, 12, 4, ties=True, renormalize=False),
    route_case("ties-of-groups", 20, 12, 3, ties=True, score="sigmoid", groups=4, top_groups=2),
    route_case("ties-top-k-first", 20, 12, 4, ties=True, score="softmax_topk", bias=True),
    route_case("columns-apart", 6, 9, 2, view=((9, 6), lambda t: t.t())),
    route_case("rows-apart", 6, 9, 2, view=((6, 21), lambda t: t[:, 5:14])),
    route_case("no-tokens", 0, 8, 2),
    route_case("bench-mixtral", 8192, 8, 2, bench=True),
    route_case("bench-deepseek", 8192, 256, 8, bias=True, score="sigmoid", groups=8, top_groups=4, scale=2.5, bench=True),
]


def _moe_work(a: dict) -> Work:
    N, K = a["experts"].shape
    flops = 2 * N * K * (a["gate_up"][0].numel() + a["down"][0].numel())
    weights, tokens = size(a["gate_up"], a["down"]), 2 * size(a["x"])
    read = weights * len(a["experts"].unique()) // len(a["gate_up"])  # of the experts that anybody chose; all get a gradient
    return Work(tokens + read, 2 * tokens + read + weights, flops, 2 * flops)


def moe_case(
    name: str,
    N: int,
    C: int,
    F: int,
    E: int,
    K: int,
    *,
    only: int | None = None,
    skew: float = 0.0,
    views: dict | None = None,
    weights: str = "wide",
    experts: torch.dtype = torch.int64,
    bench: bool = False,
) -> Case:
    """`only`: the last of the E experts stay empty; `skew`: the first are chosen more often; `views`: {argument: (shape, view)};
    `weights`: "wide", as `route` gives them, "like x", or "constant": without a gradient."""

    def arguments(inputs: Inputs) -> dict:
        # K different experts for every token.
        scores = torch.rand(N, only or E, **inputs.drawn) - skew * torch.arange(only or E, device=inputs.generator.device)
        choice = scores.topk(K, dim=-1).indices.to(experts).to(inputs.device)
        tensors = {"x": (N, C), "gate_up": (E, 2 * F, C), "down": (E, C, F)}
        for argument, shape in tensors.items():
            stored, view = (views or {}).get(argument, (shape, lambda t: t))
            tensors[argument] = inputs.normal(*stored, view=view)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        chosen = inputs.normal(N, K, grad=weights != "constant", dtype=inputs.dtype if weights == "like x" else wide)
        return {**tensors, "weights": chosen, "experts": choice}

    return Case("moe", name, arguments, bench=bench, work=_moe_work)


MOE = [
    moe_case("top-2", 11, 16, 12, 4, 2),
    moe_case("switch", 7, 8, 6, 3, 1),
    moe_case("empty-experts", 9, 8, 6, 6, 2, only=3),
    moe_case("one-expert-takes-all", 10, 8, 5, 4, 1, only=1),
    moe_case("skewed", 70, 16, 24, 5, 2, skew=0.3),
    moe_case("several-tiles", 90, 80, 72, 2, 1),
    moe_case("odd-sizes", 19, 33, 21, 3, 2),
    moe_case("one-feature", 6, 1, 1, 3, 2),
    moe_case("every-expert", 12, 16, 8, 3, 3),
    moe_case("a-single-expert", 37, 16, 16, 1, 1),
    moe_case("one-token", 1, 40, 70, 8, 2),
    moe_case("few-tokens", 6, 33, 66, 5, 3),
    moe_case("int32-experts", 12, 16, 8, 3, 2, experts=torch.int32),
    moe_case("weights-like-x", 12, 16, 8, 3, 2, weights="like x"),
    moe_case(
        "transposed-weights",
        20,
        16,
        24,
        3,
        2,
        views={"gate_up": ((3, 16, 48), lambda t: t.transpose(1, 2)), "down": ((3, 24, 16), lambda t: t.transpose(1, 2))},
    ),
    moe_case(
        "rows-apart",
        20,
        16,
        24,
        3,
        2,
        views={
            "x": ((20, 40), lambda t: t[:, 8:24]),
            "gate_up": ((3, 50, 24), lambda t: t[:, :48, :16]),
            "down": ((5, 16, 32), lambda t: t[1:4, :, 8:]),
        },
    ),
    moe_case("one-token-repeated", 17, 16, 8, 3, 2, views={"x": ((1, 16), lambda t: t.expand(17, 16))}),
    moe_case("no-tokens", 0, 8, 6, 4, 2),
    moe_case("bench-mixtral", 1024, 512, 1024, 8, 2, bench=True),
    moe_case("bench-deepseek", 1024, 512, 128, 64, 6, bench=True),
    moe_case("bench-skewed", 1024, 512, 512, 16, 2, skew=0.05, bench=True),
    moe_case("bench-one-token", 1, 1024, 3584, 8, 2, bench=True),
]
