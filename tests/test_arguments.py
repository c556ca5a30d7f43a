"""Bad input: a clear error that names the operation, the argument, what was expected and what came."""

import numpy as np
import pytest
import torch

import fastprimer as fp
from fastprimer import layers


def t(*shape, **options):
    return torch.zeros(*shape, **options)


def i(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


x, table = t(2, 8), t(4, 2)
q, k = t(1, 3, 4, 8), t(1, 5, 2, 8)
packed = t(5, 2, 8)
new = {"k": t(2, 1, 2, 8), "v": t(2, 1, 2, 8)}
cache = t(2, 6, 2, 8)

BAD = [
    ("rms_norm", (3,), {}, TypeError, "rms_norm: x: expected a tensor, got int"),
    ("rms_norm", (i(1, 2),), {}, TypeError, "rms_norm: x: expected a floating-point tensor, got torch.int32"),
    ("rms_norm", (t(3, 0),), {}, ValueError, "rms_norm: x: expected shape .* got \\(3, 0\\)"),
    ("rms_norm", (x, t(7)), {}, ValueError, "rms_norm: weight: expected shape \\(C,\\) = \\(8,\\), got \\(7,\\)"),
    ("rms_norm", (x, t(8, device="meta")), {}, ValueError, "rms_norm: weight: expected x's device cpu, got meta"),
    ("rms_norm", (x,), {"residual": t(8)}, ValueError, "rms_norm: residual: expected shape"),
    (
        "rms_norm",
        (x,),
        {"residual": t(2, 8).double()},
        TypeError,
        "rms_norm: residual: expected x's dtype torch.float32, got torch.float64",
    ),
    ("rms_norm", (x, None, -1e-6), {}, ValueError, "rms_norm: eps: expected a finite number >= 0, got -1e-06"),
    ("rope", (t(3, 8), None, table, table), {}, ValueError, "rope: q: expected shape"),
    ("rope", (q, t(1, 3, 2, 6), table, table), {}, ValueError, "rope: k: expected shape"),
    ("rope", (q, None, t(4, 5), t(4, 5)), {}, ValueError, "rope: cos: expected shape \\(P, R/2\\) with 0 < R <= D = 8"),
    ("rope", (q, None, table, t(4, 1)), {}, ValueError, "rope: sin: expected shape"),
    ("rope", (q, None, t(2, 2), t(2, 2)), {}, ValueError, "rope: cos: expected at least 3 rows"),
    ("rope", (q, None, table, table), {"positions": t(1, 3)}, TypeError, "rope: positions: expected int32 or int64"),
    ("rope", (q, None, table, table), {"positions": i(0, 1, 2)}, ValueError, "rope: positions: expected shape"),
    ("rope", (q, None, t(4, 2, requires_grad=True), table), {}, ValueError, "rope: cos: expected a constant"),
    (
        "rope",
        (q, None, table, table),
        {"positions": i([0, -1, 2])},
        IndexError,
        "rope: positions: expected numbers in 0..3.* got -1..2",
    ),
    ("rms_norm", (x,), {"weight_offset": None}, TypeError, "rms_norm: weight_offset: expected a finite number, got None"),
    ("rms_norm", (x, None, "a"), {}, ValueError, "rms_norm: eps: expected a finite number >= 0, got 'a'"),
    ("rms_norm", (x, t(8), x), {}, ValueError, r"rms_norm: eps: expected a finite number >= 0; a residual is passed by .*shape \(2, 8\)"),
    ("route", (x, np.int64(2)), {}, ValueError, r"route: k: expected a number in 1..E = 8, got np.int64\(2\)"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"scale": torch.tensor(0.5)}, ValueError, r"attention: scale: .*, got a tensor of shape \(\)"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"window": (-2, 0)}, ValueError, r"attention: window: .*or None or -1 for no limit, got \(-2, 0\)"),
    ("cross_entropy", (x, i(1, 2)), {"label_smoothing": np.float32(2)}, ValueError, r"label_smoothing: .*, got np.float32\(2.0\)"),
    ("rms_norm", (x, None, 10**400), {}, ValueError, "rms_norm: eps: expected a finite number >= 0"),
    ("rms_norm", (x,), {"weight_offset": float("nan")}, TypeError, "rms_norm: weight_offset: expected a finite number"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"max_seqlen_q": 2.5}, ValueError, "attention: max_seqlen_q: expected None or a number >= 0"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"max_seqlen_k": 2**70}, ValueError, "attention: max_seqlen_k: expected None or a number >= 0"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"max_seqlen_k": 3}, ValueError, "max_seqlen_k: expected at least the 4 tokens of each .*, got 3"),
    ("attention", (t(1, 4, 0, 8), k, k), {}, ValueError, r"attention: q: expected shape \(B, S, H, D\) with H >= 1 and D >= 1, got"),
    ("attention", (1, k, k), {}, TypeError, "attention: q: expected a tensor, got int"),
    ("moe", (1, x, x, x, x), {}, TypeError, "moe: x: expected a tensor, got int"),
    ("swiglu", (x, t(2, 7)), {}, ValueError, "swiglu: up: expected shape"),
    ("swiglu", (x, x), {"activation": "relu"}, ValueError, "swiglu: activation: expected one of silu, .* got 'relu'"),
    ("swiglu", (x, x), {"activation": ["silu"]}, ValueError, "swiglu: activation: expected one of silu"),
    ("swiglu", (x, x), {"limit": -1.0}, ValueError, "swiglu: limit: expected a number > 0 or None, got -1.0"),
    ("swiglu", (x, x), {"limit": True}, ValueError, "swiglu: limit: expected a number > 0"),
    ("swiglu", (t(2, 7),), {}, ValueError, "swiglu: gate: expected shape \\(..., 2F\\), for up is not given, got \\(2, 7\\)"),
    (
        "swiglu",
        (x.to(torch.float8_e4m3fn),),
        {},
        TypeError,
        "swiglu: gate: expected float32, .* got torch.float8",
    ),
    ("rope", (q, None, table, table), {"interleaved": "yes"}, TypeError, "rope: interleaved: expected True or False, got 'yes'"),
    ("swiglu", (x, x.half()), {}, TypeError, "swiglu: up: expected gate's dtype"),
    ("attention", (packed, packed, packed), {}, ValueError, "attention: q: expected .* packed tensors need cu_seqlens_q"),
    ("attention", (q, t(1, 5, 2, 6), k), {}, ValueError, "attention: k: expected shape"),
    ("attention", (q, k, t(1, 4, 2, 8)), {}, ValueError, "attention: v: expected"),
    (
        "attention",
        (q, t(1, 5, 3, 8), t(1, 5, 3, 8)),
        {},
        ValueError,
        "attention: k: expected a number of heads Hk that divides H = 4, got 3",
    ),
    ("attention", (q, t(2, 5, 2, 8), t(2, 5, 2, 8)), {}, ValueError, "attention: k: expected q's batch 1, got 2"),
    ("attention", (q, k.half(), k), {}, TypeError, "attention: k: expected q's dtype"),
    ("attention", (q, k, k), {"window": 3}, ValueError, "attention: window: expected \\(left, right\\)"),
    ("attention", (q, k, k), {"window": (-2, 0)}, ValueError, "attention: window"),
    ("attention", (q, k, k), {"softcap": 0.0}, ValueError, "attention: softcap: expected None or a finite number > 0 .*, got 0.0"),
    ("attention", (q, k, k), {"sinks": t(2)}, ValueError, "attention: sinks: expected shape \\(H,\\) = \\(4,\\)"),
    ("attention", (packed, packed, packed), {"cu_seqlens_q": i(0, 3)}, ValueError, "attention: cu_seqlens_q: expected .* N = 5"),
    (
        "attention",
        (packed, packed, packed),
        {"cu_seqlens_q": i(0, 4, 3, 5)},
        ValueError,
        "attention: cu_seqlens_q: expected .* never falling",
    ),
    (
        "attention",
        (t(4, 2, 8), t(4, 2, 8), t(4, 2, 8)),
        {"cu_seqlens_q": i(0, 3, 4), "max_seqlen_q": 2},
        ValueError,
        "max_seqlen_q: expected at least the longest sequence's 3",
    ),
    (
        "attention",
        (t(4, 2, 8), t(4, 2, 8), t(4, 2, 8)),
        {"cu_seqlens_q": i(0, 3, 4), "max_seqlen_k": 3.0},
        ValueError,
        "max_seqlen_k: expected None or a number",
    ),
    ("attention", (t(1, 4, 2, 8),) * 3, {"softcap": 1e-46}, ValueError, "softcap: expected None or a finite number > 0"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"scale": 10**400}, ValueError, "scale: expected None or a finite number"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"softcap": True}, ValueError, "softcap: expected None or a finite number"),
    ("cross_entropy", (t(3, 5), i(0, 1, 2)), {"z_loss": True}, ValueError, "z_loss: expected a finite number"),
    ("route", (t(3, 4), 2), {"renormalize": "no"}, TypeError, "route: renormalize: expected True or False"),
    ("route", (t(3, 4), 2), {"scale": 10**400}, ValueError, "route: scale: expected a finite number"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"softcap": "1"}, ValueError, "softcap: expected None or a finite number > 0"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"scale": float("nan")}, ValueError, "scale: expected None or a finite number"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"softcap": 1e40}, ValueError, "softcap: expected None or a finite number > 0"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"return_lse": "no"}, TypeError, "return_lse: expected True or False"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"causal": "no"}, TypeError, "causal: expected True or False"),
    ("attention", (t(1, 4, 2, 8),) * 3, {"window": (True, 0)}, ValueError, "window: expected"),
    (
        "attention_with_kv_cache",
        (t(2, 1, 3, 8), cache, cache, i(0, 1)),
        {},
        ValueError,
        "k_cache: expected a number of heads",
    ),
    ("attention_with_kv_cache", (t(2, 1, 4, 0), cache[..., :0], cache[..., :0], i(0, 1)), {}, ValueError, "q: expected shape"),
    (
        "attention_with_kv_cache",
        (t(2, 1, 4, 8), cache[:1].expand(2, -1, -1, -1), cache, i(0, 1)),
        {"k": t(2, 1, 2, 8), "v": t(2, 1, 2, 8)},
        ValueError,
        "k_cache: expected memory for each token",
    ),
    (
        "attention_with_kv_cache",
        (t(2, 1, 4, 8), cache, cache, i(0, 1)),
        {"k": t(2, 1, 2, 8), "v": t(2, 1, 2, 8)},
        ValueError,
        "v_cache: expected other memory than k_cache's, got the same",
    ),
    (
        "attention_with_kv_cache",
        (t(2, 1, 4, 8), cache, cache[:], i(0, 1)),
        {"k": t(2, 1, 2, 8), "v": t(2, 1, 2, 8)},
        ValueError,
        "v_cache: expected other memory than k_cache's, got the same",
    ),
    ("attention_with_kv_cache", (t(2, 17, 4, 8), cache, cache, i(0, 0)), {}, ValueError, "q: expected shape \\(B, S <= 16, H, D\\)"),
    ("attention_with_kv_cache", (t(2, 1, 4, 8), cache, cache, i(0, 7)), {}, ValueError, "cache_seqlens: expected 0..6 tokens"),
    ("attention_with_kv_cache", (t(2, 1, 4, 8), cache, cache, i(0, 6)), {"k": t(2, 1, 2, 8)}, ValueError, "v: expected both k and v"),
    (
        "attention_with_kv_cache",
        (t(2, 1, 4, 8), cache, cache, i(0, 6)),
        {"block_table": i(0, 1)},
        ValueError,
        "block_table: expected shape",
    ),
    ("attention_with_kv_cache", (t(2, 1, 4, 8, requires_grad=True), cache, cache, i(0, 1)), {}, RuntimeError, "decoding has no backward"),
    ("route", (t(3, 4), 5), {}, ValueError, "route: k: expected a number in 1..E = 4, got 5"),
    ("route", (t(3, 4), True), {}, ValueError, "route: k: expected a number in 1..E = 4, got True"),
    ("route", (t(3, 4), 2.0), {}, ValueError, "route: k: expected a number in 1..E = 4, got 2.0"),
    ("route", (t(3, 4), 2), {"score": "tanh"}, ValueError, "route: score: expected one of softmax, softmax_topk, sigmoid, got 'tanh'"),
    ("route", (t(3, 4), 2), {"groups": 3, "top_groups": 1}, ValueError, "route: groups: expected a divisor of E = 4, got 3"),
    ("route", (t(3, 4), 2), {"groups": 2.0, "top_groups": 1}, ValueError, "route: groups: expected a divisor of E = 4, got 2.0"),
    ("route", (t(3, 4), 2), {"groups": 0, "top_groups": 1}, ValueError, "route: groups: expected a divisor of E = 4, got 0"),
    ("route", (t(3, 4), 2), {"groups": 2, "top_groups": 1.0}, ValueError, "route: top_groups: expected a number in 1..groups = 2, got 1.0"),
    ("route", (t(3, 4), 2), {"groups": 2, "top_groups": True}, ValueError, "route: top_groups: expected a number .* got True"),
    ("route", (t(3, 4), 2), {"scale": None}, TypeError, "route: scale: expected a finite number, got None"),
    ("route", (t(3, 4), 2), {"scale": "x"}, TypeError, "route: scale: expected a finite number, got 'x'"),
    ("route", (t(3, 4), 2), {"scale": "2"}, TypeError, "route: scale: expected a finite number, got '2'"),
    ("route", (t(3, 4), 2), {"scale": t(2)}, TypeError, "route: scale: expected a finite number, got tensor"),
    ("route", (t(3, 4), 2), {"scale": float("nan")}, ValueError, "route: scale: expected a finite number, got nan"),
    ("route", (t(3, 4), 2), {"groups": 2}, ValueError, "route: top_groups: expected a number with groups = 2"),
    ("route", (t(3, 4), 3), {"groups": 2, "top_groups": 1}, ValueError, "route: k: expected at most 2"),
    ("route", (t(3, 4), 2), {"bias": t(3)}, ValueError, "route: bias: expected shape"),
    ("load_balancing_loss", (t(2, 4), i([0], [4])), {}, ValueError, "load_balancing_loss: experts: expected .*0..3, got 0..4"),
    ("load_balancing_loss", (t(2, 4), i([-1], [0])), {}, ValueError, "load_balancing_loss: experts: expected .* got -1..0"),
    ("moe", (x, t(3, 5, 8), t(3, 8, 2), t(2, 1), i([0], [1])), {}, ValueError, "moe: gate_up: expected shape"),
    ("moe", (x, t(3, 4, 8), t(3, 8, 3), t(2, 1), i([0], [1])), {}, ValueError, "moe: down: expected shape \\(E, C, F\\) = \\(3, 8, 2\\)"),
    ("moe", (x, t(3, 4, 8), t(3, 8, 2), t(2, 1), i([0], [3])), {}, ValueError, "moe: experts: expected numbers in 0..2, got 0..3"),
    ("cross_entropy", (x, i(1, 9)), {}, ValueError, "cross_entropy: target: expected numbers in 0..7 or ignore_index=-100, got 9"),
    ("cross_entropy", (x, t(2)), {}, TypeError, "cross_entropy: target: expected int32 or int64"),
    ("cross_entropy", (x, i(1)), {}, ValueError, "cross_entropy: target: expected shape"),
    (
        "cross_entropy",
        (x, i(1, 2)),
        {"reduction": "avg"},
        ValueError,
        "cross_entropy: reduction: expected 'mean', 'sum' or 'none', got 'avg'",
    ),
    ("cross_entropy", (x, i(1, 2)), {"label_smoothing": 2.0}, ValueError, "cross_entropy: label_smoothing"),
    ("cross_entropy", (x, i(1, 2)), {"label_smoothing": "a"}, ValueError, "cross_entropy: label_smoothing: expected a number in 0..1"),
    ("cross_entropy", (x, i(1, 2)), {"z_loss": "0.1"}, ValueError, "cross_entropy: z_loss: expected a finite number .*, got 0.1"),
    ("cross_entropy", (x, i(1, 2)), {"z_loss": float("nan")}, ValueError, "cross_entropy: z_loss: expected a finite number .*, got nan"),
    ("cross_entropy", (x, i(1, 2)), {"softcap": float("inf")}, ValueError, "cross_entropy: softcap: expected None or a finite number > 0"),
    ("cross_entropy", (x, i(1, 2)), {"ignore_index": 1.7}, ValueError, "cross_entropy: ignore_index: expected an integer of 64 bits"),
    ("cross_entropy", (x, i(1, 2)), {"ignore_index": 2**63}, ValueError, "cross_entropy: ignore_index: expected an integer of 64 bits"),
    ("linear_cross_entropy", (x, t(5, 8), i(1, 2)), {"memory_budget": 10**30}, ValueError, "memory_budget: expected None or a number"),
    ("linear_cross_entropy", (x, t(0), i(1, 2)), {}, ValueError, "linear_cross_entropy: weight: expected .*ZeRO-3"),
    ("linear_cross_entropy", (x, t(5, 7), i(1, 2)), {}, ValueError, "linear_cross_entropy: x: expected shape"),
    ("linear_cross_entropy", (x, t(5, 8), i(1, 2)), {"bias": t(4)}, ValueError, "linear_cross_entropy: bias: expected shape"),
]


@pytest.mark.parametrize("op, args, kwargs, error, message", BAD, ids=[f"{b[0]}-{n}" for n, b in enumerate(BAD)])
def test_bad_input_is_named(op, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        getattr(fp, op)(*args, **kwargs)


def lm_loss(**options):
    return layers.LinearCrossEntropy()(t(1, 3, 8), t(9, 8), i([1, 2, 3]), **options)


BAD_LAYERS = [
    (lambda: layers.RMSNorm(0), "RMSNorm: width: expected an integer >= 1, got 0"),
    (lambda: layers.RMSNorm(8, eps=-1), "RMSNorm: eps: expected a finite number >= 0, got -1"),
    (lambda: layers.RMSNorm(8, weight_offset="1"), "RMSNorm: weight_offset: expected a finite number, got '1'"),
    (lambda: layers.SwiGLU(8, 2.0), "SwiGLU: inner: expected an integer >= 1, got 2.0"),
    (lambda: layers.SwiGLU(8, 4)(t(3, 7)), r"SwiGLU: x: expected shape \(..., C = 8\), got \(3, 7\)"),
    (lambda: layers.MoE(0, 4, 4, 2), "MoE: width: expected an integer >= 1, got 0"),
    (lambda: layers.MoE(8, 4, "4", 2), "MoE: experts: expected an integer >= 1, got '4'"),
    (lambda: layers.MoE(8, 4, 4, 2, shared=-1), "MoE: shared: expected an integer >= 0, got -1"),
    (lambda: layers.MoE(8, 4, 4, 2, renormalize="no"), "MoE: renormalize: expected True or False, got 'no'"),
    (lambda: layers.MoE(8, 4, 4, 2, selection_bias="no"), "MoE: selection_bias: expected True or False, got 'no'"),
    (lambda: layers.MoE(8, 4, 4, 2)(t(3, 7)), r"MoE: x: expected shape \(..., C = 8\), got \(3, 7\)"),
    *(
        (
            lambda given=given: layers.MoE(8, 4, 4, 2, choice="experts", **given),
            "MoE: choice: expected 'tokens' with another score, .* got 'e",
        )
        for given in ({"score": "sigmoid"}, {"scale": 2.0}, {"selection_bias": True}, {"groups": 2, "top_groups": 1})
    ),
    (lambda: layers.LinearCrossEntropy(label_smoothing=2), "LinearCrossEntropy: label_smoothing: expected a number in 0..1, got 2"),
    (lambda: layers.LinearCrossEntropy(memory_budget=-1), "LinearCrossEntropy: memory_budget: expected None or a number of bytes >= 0"),
    (lambda: lm_loss(num_items_in_batch=-3), "LinearCrossEntropy: num_items_in_batch: expected a number of tokens, got -3"),
    (lambda: lm_loss(num_items_in_batch="3"), "LinearCrossEntropy: num_items_in_batch: expected a finite number, got '3'"),
    (lambda: layers.RotaryEmbedding(8)(5), "RotaryEmbedding: positions: expected a tensor, got int"),
    (lambda: fp.reference.Model(3), "Model: config: expected a Config, .* got int"),
    (lambda: fp.Model(fp.Config.preset("calculator")).new_cache(-1, 4), "new_cache: batch: expected an integer >= 0, got -1"),
]


@pytest.mark.parametrize("make, message", BAD_LAYERS, ids=[message.partition(": expected")[0] for _, message in BAD_LAYERS])
def test_layers_name_bad_input(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_refused_call_writes_nothing():
    k_cache = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="cache_seqlens"):
        fp.attention_with_kv_cache(t(1, 2, 2, 8), k_cache, k_cache.clone(), i(3), k=torch.ones(1, 2, 2, 8), v=torch.ones(1, 2, 2, 8))
    assert not k_cache.any()
