"""Shapes, layouts and options that nobody thought of: the same examples on every run (derandomized)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import device_or_skip
from fastprimer.backends import declared
from fastprimer.cases import attention_case, decoding_case, loss_case, moe_case, rms_norm_case, rope_case, route_case, swiglu_case
from fastprimer.testing import DTYPES, compare
from fastprimer.verify import dtypes_of

LAYOUTS = {
    "contiguous": lambda t: t,
    "every other row": lambda t: t[::2],
    "columns of a wider row": lambda t: t[..., 1:] if t.shape[-1] > 1 else t,
    "transposed": lambda t: t.transpose(0, 1),
    "one row expanded": lambda t: t[:1].expand(*t.shape),
    "middle expanded": lambda t: t[:, :1].expand(t.shape) if t.dim() > 2 else t,
    "reversed dimensions": lambda t: t.permute(*reversed(range(t.dim()))),
}


@st.composite
def rms_norm_cases(draw):
    # In a row of very few numbers dx is what cancellation leaves, and the yardstick's own error a matter of luck (see CASES for those).
    C = draw(st.one_of(st.integers(5, 70), st.integers(71, 1100), st.sampled_from([2047, 2048, 2049, 4100, 8193])))
    leading = draw(st.sampled_from([(1,), (2,), (7,), (33,), (3, 5), (2, 1, 4), (0, 3)]))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    options = {
        "weight": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "weight_offset": draw(st.sampled_from([0.0, 1.0, -0.5])),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "weight_dtype": draw(st.sampled_from([None, torch.float32])),
    }
    shape = (*leading, C)
    width = LAYOUTS[layout](torch.empty(shape, device="meta")).shape[-1]
    if width == 0:
        layout, width = "contiguous", C
    # dweight has `width` numbers, each a sum over all rows: with a handful of them the yardstick's own error is a matter of luck.
    options["weight"] &= width >= 16
    return rms_norm_case(f"{shape} {layout} {options}", *shape, view=LAYOUTS[layout], **options)


@st.composite
def rope_cases(draw):
    batch = draw(st.sampled_from([(1, 1), (1, 7), (3, 5), (2, 33), (9,), (70,), (0,), (2, 0)]))
    H, Hk = draw(st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3), (2, 5), (4, 0), (33, 2)]))
    R = 2 * draw(st.integers(1, 40))
    D = R + draw(st.sampled_from([0, 0, 1, 2, 8, 17]))
    layouts = {
        "contiguous": lambda t: t,
        "every other head": lambda t: t[..., ::2, :],
        "other tokens first": lambda t: t.transpose(0, -3) if t.dim() == 4 else t,
        "features of a wider head": lambda t: t[..., 1:] if t.shape[-1] > R else t,
        "features reversed in memory": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        "heads expanded": lambda t: t[..., :1, :].expand(t.shape),
    }
    layout = draw(st.sampled_from(sorted(layouts)))
    options = {
        "interleaved": draw(st.booleans()),
        "half_tables": draw(st.booleans()),
        "positions": draw(st.sampled_from([None, lambda p: p, lambda p: p.int(), lambda p: p.flip(-1)])),
        "tables": draw(st.sampled_from([lambda t: t, lambda t: torch.cat((t, t), 1)[:, : R // 2], lambda t: t.t().contiguous().t()])),
    }
    return rope_case(f"{batch} {H} {Hk} {D} {R} {layout} {options}", batch, H, Hk, D, R, P=80, view=layouts[layout], **options)


@st.composite
def swiglu_cases(draw):
    F = draw(st.one_of(st.integers(1, 70), st.integers(71, 1100), st.sampled_from([2047, 4100, 8193, 20000])))
    leading = draw(st.sampled_from([(), (1,), (2,), (7,), (33,), (3, 5), (2, 1, 4), (0, 3)]))
    layout = draw(st.sampled_from(["separate", "views", "interleaved", "packed"]))
    view = draw(st.sampled_from([name for name in sorted(LAYOUTS) if len(leading) > 0 or name == "contiguous"]))
    width = LAYOUTS[view](torch.empty((*leading, 2 * F), device="meta")).shape[-1]
    if width != 2 * F:  # the halves would no longer be halves
        view = "contiguous"
    options = {
        "activation": draw(st.sampled_from(["silu", "gelu_tanh", "gpt_oss"])),
        "limit": draw(st.sampled_from([None, None, 0.3, 5.0])),
        "scale": draw(st.sampled_from([1.0, 0.01, 30.0])),
    }
    return swiglu_case(f"{leading} {F} {layout} {view} {options}", *leading, F, layout=layout, view=LAYOUTS[view], **options)


HEADS = [(8, 8), (8, 1), (12, 4), (10, 2), (24, 3)]
"""dsinks has H numbers, each a sum over all queries: with a handful of them the yardstick's own error is a matter of luck."""

HEAD_SIZES = st.one_of(st.integers(8, 40), st.sampled_from([64, 80, 96, 128]))
# Between few keys a gradient is what cancellation leaves (see CASES for those).
KEYS = st.one_of(st.just(0), st.integers(8, 80))
WINDOWS = st.sampled_from([None, None, (2, 0), (3, None), (None, 2), (9, 4), (40, 0), (500, 500)])


@st.composite
def score_options(draw):
    options = {"window": draw(WINDOWS), "softcap": draw(st.sampled_from([None, None, 1.0, 30.0])), "sinks": draw(st.booleans())}
    # A large scale turns the rounding of the scores' sums, which differs between matrix products, into all of the error.
    return options | {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, None, 0.05, 0.1]))}


@st.composite
def attention_cases(draw):
    (H, Hk), D = draw(st.sampled_from(HEADS)), draw(HEAD_SIZES)
    Dv = draw(st.one_of(st.just(D), HEAD_SIZES))
    options = draw(score_options())
    view, name = lambda t: t, "contiguous"
    if draw(st.booleans()):
        lengths = draw(st.lists(st.tuples(st.integers(0, 20), KEYS), min_size=1, max_size=4))
        ends = [[0], [0]]
        for length in lengths:
            for side, n in zip(ends, length, strict=True):
                side.append(side[-1] + n)
        shapes = (ends[0][-1], H, D), (ends[1][-1], Hk, D)
        options |= {"cu_q": ends[0], "cu_k": ends[1]}
    else:
        B, S, T = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(0, 40)), draw(KEYS)
        shapes = (B, S, H, D), (B, T, Hk, D)
        name, view = draw(st.sampled_from(sorted(VIEWS_OF_HEADS.items(), key=str)))
        if name == "heads first":
            shapes = (B, H, S, D), (B, Hk, T, D)
    return attention_case(f"{shapes} {Dv} {name} {options}", *shapes, Dv=Dv, view=view, **options)


VIEWS_OF_HEADS = {
    "contiguous": lambda t: t,
    "heads first": lambda t: t.transpose(1, 2),
    "every other token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "features of a wider head": lambda t: torch.cat((t, t), -1)[..., 1 : t.shape[-1] + 1],
    "features first in memory": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one sequence expanded": lambda t: t[:1].expand(t.shape),
}


@st.composite
def decoding_cases(draw):
    (H, Hk), D = draw(st.sampled_from(HEADS)), draw(HEAD_SIZES)
    options = draw(score_options()) | {"page": draw(st.sampled_from([0, 0, 1, 16, 20, 64])), "append": draw(st.booleans())}
    lengths = draw(st.lists(st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 128, 300])), min_size=1, max_size=4))
    S, Dv = draw(st.integers(1, 16)), draw(st.one_of(st.none(), HEAD_SIZES))
    view = draw(st.sampled_from([None, lambda t: t.transpose(1, 2)]))
    return decoding_case(f"{lengths} {S} {H} {Hk} {D} {Dv} {options}", lengths, S, H, Hk, D, Dv=Dv, view=view, **options)


@st.composite
def route_cases(draw):
    # Each token has K gradients that are not 0: with a handful of them the yardstick's own error is a matter of luck.
    N, E = (
        draw(st.one_of(st.just(0), st.integers(12, 50))),
        draw(st.one_of(st.integers(4, 20), st.integers(21, 150), st.sampled_from([64, 128, 256]))),
    )
    divisors = [g for g in range(1, E + 1) if E % g == 0]
    groups = draw(st.sampled_from([None, *divisors]))
    top = None if groups is None else draw(st.integers(1, groups))
    room = E if groups is None else top * (E // groups)
    options = {
        "score": draw(st.sampled_from(["softmax", "softmax_topk", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "ties": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5, -1.0])),
    } | ({} if groups is None else {"groups": groups, "top_groups": top})
    k = draw(st.integers(min(2, room), min(room, 12)))
    # The only weight of a token is always `scale`: its gradient is what cancellation leaves.
    options["renormalize"] &= k > 1
    if k == 1 and options["score"] == "softmax_topk":
        options["score"] = "softmax"
    return route_case(f"{N} {E} {k} {options}", N, E, k, **options)


@st.composite
def moe_cases(draw):
    N = draw(st.one_of(st.integers(0, 12), st.integers(13, 100)))
    C, F = (draw(st.one_of(st.integers(8, 40), st.sampled_from([64, 65, 96]))) for _ in range(2))
    E = draw(st.integers(1, 8))
    options = {"only": draw(st.one_of(st.none(), st.integers(1, E))), "skew": draw(st.sampled_from([0.0, 0.0, 0.2]))}
    K = draw(st.integers(1, options["only"] or E))
    # dweights has N K numbers: with a handful of them the yardstick's own error is a matter of luck.
    options |= {"weights": draw(st.sampled_from(["wide", "like x"])) if N * K >= 24 else "constant"}
    options |= {"experts": draw(st.sampled_from([torch.int64, torch.int32]))}
    shapes = {"x": (N, C), "gate_up": (E, 2 * F, C), "down": (E, C, F)}
    views = {}
    for name, shape in shapes.items():
        layout = draw(st.sampled_from(["contiguous", "other order", "wider rows", "first dimension expanded"]))
        if layout == "other order":
            views[name] = ((*shape[:-2], shape[-1], shape[-2]), lambda t: t.transpose(-1, -2))
        elif layout == "wider rows":
            views[name] = ((*shape[:-1], shape[-1] + 3), lambda t, width=shape[-1]: t[..., 2 : width + 2])
        elif layout == "first dimension expanded":
            views[name] = ((1, *shape[1:]), lambda t, n=shape[0]: t.expand(n, *t.shape[1:]))
    return moe_case(f"{N} {C} {F} {E} {K} {options} {sorted(views)}", N, C, F, E, K, views=views, **options)


@st.composite
def loss_cases(draw, fused: bool):
    # A loss is a single number, or few: with a handful of tokens or words the yardstick's own error is a matter of luck.
    N = draw(st.one_of(st.just(0), st.integers(32, 80), st.integers(100, 300)))
    V = draw(st.one_of(st.integers(8, 40), st.integers(100, 600), st.sampled_from([127, 128, 129, 256, 2048, 2049])))
    C = draw(st.one_of(st.integers(8, 40), st.sampled_from([64, 65, 96, 300]))) if fused else 0
    ignored = draw(st.sampled_from([range(0), range(0, N, 3), range(N // 2)]))
    options = {
        "reduction": draw(st.sampled_from(["none", "none", "sum"])),
        "ignore_index": draw(st.sampled_from([-100, 0, 5])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-3, 0.1])),
        "softcap": draw(st.sampled_from([None, None, 3.0, 30.0])),
        "return_lse": draw(st.booleans()),
    }
    options |= {"memory_budget": draw(st.sampled_from([None, 0, 4 * N * 256, 1 << 22]))} if fused else {}
    shapes = {"x": (N, C), "weight": (V, C)} if fused else {"logits": (N, V)}
    views = {}
    for name, (rows, columns) in shapes.items():
        layout = draw(st.sampled_from(["contiguous", "transposed", "wider rows", "every other row"]))
        if layout == "transposed":
            views[name] = (columns, rows), lambda t: t.t()
        elif layout == "wider rows":
            views[name] = (rows, columns + 3), lambda t, width=columns: t[:, 2 : width + 2]
        elif layout == "every other row":
            views[name] = (2 * rows, columns), lambda t: t[::2]
    op, bias = "linear_cross_entropy" if fused else "cross_entropy", fused and draw(st.booleans())
    name = f"{N} {V} {C} {ignored} {bias} {options} {sorted(views)}"
    return loss_case(op, name, N, V, C, ignored=ignored, bias=bias, int32=draw(st.booleans()), views=views, **options)


def assert_within_budget(case, backend, dtype, seed):
    device = device_or_skip(case.op, backend)
    if dtype not in dtypes_of(backend, case.op):
        dtype = torch.float32
    wrong = [str(row) for row in compare(case, dtype, backend, device=device, seed=seed) if not row.ok]
    assert not wrong


fuzz = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
EXAMPLES = {"dtype": st.sampled_from(DTYPES), "seed": st.integers(0, 3)}


def backends_of(op):
    """All but Triton's interpreter; `make check` those of the CPU."""
    others = [pytest.param(b, marks=pytest.mark.slow) for b in declared(op) if b not in ("cpu", "triton")]
    return pytest.mark.parametrize("backend", ["cpu", *others])


@backends_of("rms_norm")
@fuzz
@given(case=rms_norm_cases(), **EXAMPLES)
def test_rms_norm(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("rope")
@fuzz
@given(case=rope_cases(), **EXAMPLES)
def test_rope(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("swiglu")
@fuzz
@given(case=swiglu_cases(), **EXAMPLES)
def test_swiglu(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("attention")
@fuzz
@given(case=attention_cases(), **EXAMPLES)
def test_attention(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("attention_with_kv_cache")
@fuzz
@given(case=decoding_cases(), **EXAMPLES)
def test_attention_with_kv_cache(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("route")
@fuzz
@given(case=route_cases(), **EXAMPLES)
def test_route(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("moe")
@fuzz
@given(case=moe_cases(), **EXAMPLES)
def test_moe(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("cross_entropy")
@fuzz
@given(case=loss_cases(fused=False), **EXAMPLES)
def test_cross_entropy(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)


@backends_of("linear_cross_entropy")
@fuzz
@given(case=loss_cases(fused=True), **EXAMPLES)
def test_linear_cross_entropy(backend, case, dtype, seed):
    assert_within_budget(case, backend, dtype, seed)
