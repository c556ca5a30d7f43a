"""The cases of routing and of the mixture of experts."""

from __future__ import annotations

import torch

from fastprimer.cases._case import Case, Inputs, Work, size


def route_case(name: str, N: int, E: int, k: int, bias=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        a = {"logits": inputs.normal(N, E), "k": k, **options}
        return a | ({"bias": inputs.normal(E, grad=False)} if bias else {})

    return Case("route", name, arguments, ("weights", "experts"), work=lambda a: Work(size(a["logits"]), 2 * size(a["logits"])))


ROUTE = [
    route_case("mixtral", 13, 8, 2),
    route_case("switch", 9, 4, 1, renormalize=False),
    route_case("topk-first", 7, 16, 3, score="softmax_topk"),
    route_case("unnormalised", 7, 16, 4, renormalize=False, scale=1.5),
    route_case("deepseek-v3", 11, 32, 4, bias=True, score="sigmoid", groups=8, top_groups=3, scale=2.5),
    route_case("sigmoid-unnormalised", 5, 8, 2, score="sigmoid", renormalize=False),
    route_case("group-limited", 6, 12, 3, groups=4, top_groups=2, renormalize=False),
    route_case("no-tokens", 0, 8, 2),
]


def _moe_work(a: dict) -> Work:
    N, K = a["experts"].shape
    flops = 2 * N * K * (a["gate_up"][0].numel() + a["down"][0].numel())
    moved = 2 * size(a["x"]) + size(a["gate_up"], a["down"])
    return Work(moved, 2 * moved, flops, 2 * flops)


def moe_case(name: str, N: int, C: int, F: int, E: int, K: int, only: int | None = None, bench=False) -> Case:
    def arguments(inputs: Inputs) -> dict:
        # K different experts for every token; with `only`, the last experts of the E stay empty.
        scores = torch.rand(N, only or E, generator=inputs.generator)
        experts = scores.topk(K, dim=-1).indices.to(inputs.device)
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        gate_up, down = inputs.normal(E, 2 * F, C), inputs.normal(E, C, F)
        return {"x": inputs.normal(N, C), "gate_up": gate_up, "down": down, "weights": inputs.normal(N, K, dtype=dtype), "experts": experts}

    return Case("moe", name, arguments, bench=bench, work=_moe_work)


MOE = [
    moe_case("top-2", 11, 16, 12, 4, 2),
    moe_case("switch", 7, 8, 6, 3, 1),
    moe_case("empty-experts", 9, 8, 6, 6, 2, only=3),
    moe_case("one-expert-takes-all", 10, 8, 5, 4, 1, only=1),
    moe_case("no-tokens", 0, 8, 6, 4, 2),
    moe_case("bench", 1024, 512, 1024, 8, 2, bench=True),
]
