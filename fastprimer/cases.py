"""CASES: what every operation is called with, in tests and in benchmarks, and what each call must at least move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Inputs:
    """Makes a case's tensors: random, of the case's dtype and device, leaves that require a gradient."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int, view: Callable[[Tensor], Tensor] = lambda t: t, grad: bool = True, dtype=None) -> Tensor:
        """A normal sample of `shape`, seen through `view` (which may transpose, slice or expand it)."""
        sample = torch.randn(*shape, generator=self.generator, dtype=torch.float32)
        return view(sample.to(dtype or self.dtype).to(self.device)).detach().requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def tensor(self, values: list, dtype=torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Work:
    """What a case must move and compute at least: bytes to and from memory, floating-point operations."""

    bytes_forward: int
    bytes_backward: int
    flops_forward: int = 0
    flops_backward: int = 0


@dataclass(frozen=True)
class Case:
    """One call of an operation. `arguments(inputs)` returns its keyword arguments."""

    op: str
    name: str
    arguments: Callable[[Inputs], dict]
    outputs: tuple[str, ...] = ("y",)
    bench: bool = False
    """Large, for benchmarks: too slow for the interpreter and the emulator."""
    work: Callable[[dict], Work] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _rms_norm_work(a: dict) -> Work:
    x, weight, residual = a["x"], a.get("weight"), a.get("residual")
    rstd = 4 * x.numel() // max(x.shape[-1], 1)
    # forward: read x (and residual), weight; write y (and h), rstd. backward: read dy (and dh), h, weight, rstd; write dx, dweight.
    forward = 2 * _size(x) + 2 * _size(residual) + _size(weight) + rstd
    backward = 3 * _size(x) + _size(residual) + 2 * _size(weight) + rstd
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
    rms_norm_case("bench-residual", 2048, 4096, residual=True, bench=True),
    rms_norm_case("bench-per-head", 2048 * 32, 128, bench=True),
    rms_norm_case("bench-wide", 256, 32768, bench=True),
    rms_norm_case("bench-calculator", 1280, 64, bench=True),
]


def _case(op: str, name: str, arguments: Callable[[Inputs], dict], outputs=("y",), work=None, bench=False) -> Case:
    return Case(op, name, arguments, outputs, bench, work)


def _rope_work(a: dict) -> Work:
    moved = 2 * _size(a["q"], a["k"]) + _size(a["cos"], a["sin"])  # read, rotated, written; the same backward
    return Work(moved, moved)


def rope_case(
    name: str, batch: tuple, H: int, Hk: int, D: int, R: int, P=64, positions=False, bench=False, view=lambda t: t, **options
) -> Case:
    def arguments(inputs: Inputs) -> dict:
        angle = torch.outer(torch.arange(P, dtype=torch.float64), 100.0 ** (-torch.arange(R // 2, dtype=torch.float64) / (R // 2)))
        tables = {"cos": angle.cos(), "sin": angle.sin()}
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        a = {k: t.to(dtype).to(inputs.device) for k, t in tables.items()}
        a["q"] = inputs.normal(*batch, H, D, view=view)
        a["k"] = inputs.normal(*batch, Hk, D, view=view) if Hk else None
        if positions:
            a["positions"] = inputs.integers(0, P, *a["q"].shape[:-2])
        return a | options

    return _case("rope", name, arguments, ("q_rotated", "k_rotated"), _rope_work, bench)


ROPE = [
    rope_case("half-split", (2, 9), 4, 2, 16, 16),
    rope_case("interleaved", (2, 9), 4, 2, 16, 16, interleaved=True),
    rope_case("partial", (2, 5), 3, 1, 24, 8),
    rope_case("positions", (2, 7), 4, 2, 64, 64, positions=True),
    rope_case("packed-positions", (11,), 2, 2, 32, 16, positions=True, interleaved=True),
    rope_case("q-alone", (2, 5), 3, 0, 128, 128),
    rope_case("sliced", (2, 18), 2, 1, 32, 32, view=lambda t: t[:, ::2]),
    rope_case("one-token", (1, 1), 2, 1, 8, 8),
    rope_case("bench-llama", (1, 2048), 32, 8, 128, 128, P=2048, bench=True),
]


def swiglu_case(name: str, *shape: int, packed=False, bench=False) -> Case:
    def arguments(inputs: Inputs) -> dict:
        if not packed:
            return {"gate": inputs.normal(*shape), "up": inputs.normal(*shape)}
        F = shape[-1]
        wide = (*shape[:-1], 2 * F)
        return {"gate": inputs.normal(*wide, view=lambda t: t[..., :F]), "up": inputs.normal(*wide, view=lambda t: t[..., F:])}

    return _case("swiglu", name, arguments, work=lambda a: Work(3 * _size(a["gate"]), 5 * _size(a["gate"])), bench=bench)


SWIGLU = [
    swiglu_case("odd", 3, 7),
    swiglu_case("packed", 2, 5, 96, packed=True),
    swiglu_case("no-rows", 0, 16),
    swiglu_case("bench", 1024, 5632, bench=True),
]


def _attention_work(a: dict) -> Work:
    q, k, v = a["q"], a["k"], a["v"]
    pairs = q.shape[-3] * k.shape[-3] * (q.shape[0] if q.dim() == 4 else 1) * q.shape[-2]
    if a.get("causal"):
        pairs //= 2
    flops = 2 * pairs * (q.shape[-1] + v.shape[-1])
    moved = 2 * _size(q) + _size(k, v)
    return Work(moved, 2 * moved, flops, flops * 5 // 2)


def attention_case(name: str, q: tuple, k: tuple, Dv=None, cu_q=None, cu_k=None, sinks=False, bench=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        a = {"q": inputs.normal(*q), "k": inputs.normal(*k), "v": inputs.normal(*k[:-1], Dv or k[-1]), "return_lse": True, **options}
        if sinks:
            a["sinks"] = inputs.normal(q[-2])
        if cu_q:
            a |= {"cu_seqlens_q": inputs.tensor(cu_q), "cu_seqlens_k": inputs.tensor(cu_k or cu_q)}
        return a

    return _case("attention", name, arguments, ("o", "lse"), _attention_work, bench)


ATTENTION = [
    attention_case("full", (2, 5, 4, 16), (2, 7, 2, 16)),
    attention_case("causal", (2, 9, 4, 32), (2, 9, 1, 32), causal=True),
    attention_case("causal-bottom-right", (1, 3, 2, 16), (1, 8, 2, 16), causal=True),
    attention_case("rows-without-keys", (1, 6, 2, 16), (1, 3, 1, 16), causal=True),
    attention_case("window", (1, 12, 4, 16), (1, 12, 2, 16), causal=True, window=(3, None)),
    attention_case("window-both", (1, 10, 2, 16), (1, 12, 2, 16), window=(2, 3)),
    attention_case("softcap", (1, 6, 2, 16), (1, 6, 2, 16), softcap=2.0, scale=0.7),
    attention_case("sinks", (2, 5, 4, 16), (2, 5, 2, 16), causal=True, sinks=True),
    attention_case("value-size", (1, 5, 2, 24), (1, 6, 1, 24), Dv=8),
    attention_case("packed", (9, 4, 16), (9, 2, 16), cu_q=[0, 4, 4, 9], causal=True),
    attention_case("packed-lengths", (5, 2, 16), (8, 1, 16), cu_q=[0, 2, 2, 5], cu_k=[0, 0, 3, 8], causal=True),
    attention_case("bench-causal", (1, 1024, 16, 64), (1, 1024, 4, 64), causal=True, bench=True),
]


def decoding_case(name: str, lengths: list, S: int, H: int, Hk: int, D: int, pages=0, append=True, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        B, T = len(lengths), max(lengths) + S
        size = 16
        shape = (pages, size, Hk, D) if pages else (B, T, Hk, D)
        a = {"q": inputs.normal(B, S, H, D, grad=False), "cache_seqlens": inputs.tensor(lengths), "return_lse": True, **options}
        a |= {"k_cache": inputs.normal(*shape, grad=False), "v_cache": inputs.normal(*shape, grad=False)}
        if append:
            a |= {"k": inputs.normal(B, S, Hk, D, grad=False), "v": inputs.normal(B, S, Hk, D, grad=False)}
        if pages:
            n = -(-T // size)
            a["block_table"] = torch.randperm(pages, generator=inputs.generator)[: B * n].view(B, n).int().to(inputs.device)
        return a

    return _case("attention_with_kv_cache", name, arguments, ("o", "lse"))


DECODING = [
    decoding_case("append", [5, 0, 17], 1, 4, 2, 16),
    decoding_case("speculative", [3, 9], 4, 4, 1, 32, window=(4, None)),
    decoding_case("paged", [20, 3], 2, 2, 2, 16, pages=7),
    decoding_case("read-only", [6, 2], 2, 4, 2, 16, append=False),
]


def route_case(name: str, N: int, E: int, k: int, bias=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        a = {"logits": inputs.normal(N, E), "k": k, **options}
        return a | ({"bias": inputs.normal(E, grad=False)} if bias else {})

    return _case("route", name, arguments, ("weights", "experts"), lambda a: Work(_size(a["logits"]), 2 * _size(a["logits"])))


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
    moved = 2 * _size(a["x"]) + _size(a["gate_up"], a["down"])
    return Work(moved, 2 * moved, flops, 2 * flops)


def moe_case(name: str, N: int, C: int, F: int, E: int, K: int, only: int | None = None, bench=False) -> Case:
    def arguments(inputs: Inputs) -> dict:
        # K different experts for every token; with `only`, the last experts of the E stay empty.
        scores = torch.rand(N, only or E, generator=inputs.generator)
        experts = scores.topk(K, dim=-1).indices.to(inputs.device)
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        gate_up, down = inputs.normal(E, 2 * F, C), inputs.normal(E, C, F)
        return {"x": inputs.normal(N, C), "gate_up": gate_up, "down": down, "weights": inputs.normal(N, K, dtype=dtype), "experts": experts}

    return _case("moe", name, arguments, work=_moe_work, bench=bench)


MOE = [
    moe_case("top-2", 11, 16, 12, 4, 2),
    moe_case("switch", 7, 8, 6, 3, 1),
    moe_case("empty-experts", 9, 8, 6, 6, 2, only=3),
    moe_case("one-expert-takes-all", 10, 8, 5, 4, 1, only=1),
    moe_case("no-tokens", 0, 8, 6, 4, 2),
    moe_case("bench", 1024, 512, 1024, 8, 2, bench=True),
]


def _losses_work(a: dict) -> Work:
    if "logits" in a:
        return Work(_size(a["logits"]), 2 * _size(a["logits"]))
    flops = 2 * a["x"].numel() * a["weight"].shape[0]
    return Work(_size(a["x"], a["weight"]), 2 * _size(a["x"], a["weight"]), flops, 3 * flops)  # backward recomputes the logits


def loss_case(op: str, name: str, N: int, V: int, C=0, ignored=(), bias=False, bench=False, **options) -> Case:
    def arguments(inputs: Inputs) -> dict:
        target = inputs.integers(0, V, N)
        target[list(ignored)] = options.get("ignore_index", -100)
        a = {"target": target, **options}
        if not C:
            return a | {"logits": inputs.normal(N, V)}
        return a | {"x": inputs.normal(N, C), "weight": inputs.normal(V, C)} | ({"bias": inputs.normal(V)} if bias else {})

    return _case(op, name, arguments, ("loss",), _losses_work, bench)


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
)
