"""Bugs planted in the Triton attention, one line each, and the checks that catch them in the interpreter."""

import pytest

triton = pytest.importorskip("triton")

import attention_checks  # noqa: E402
from attention_checks import SINKS, check, inputs, kernels, lengths  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import _attention, _attention_backward, _attention_forward  # noqa: E402
from mutation import mutated  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, on infinities
]


@pytest.fixture
def small_tiles(monkeypatch):
    attention_checks.small_tiles(monkeypatch)


FORWARD, BACKWARD, SHARED, LAUNCHES = _attention_forward, _attention_backward, _attention, kernels
PLANTED = {
    "causal off by one": (SHARED, "sees = sees & (distance <= right)", "sees = sees & (distance <= right + 1)"),
    "aligned at the top left": (SHARED, "distance = key - row - shift", "distance = key - row"),
    "window off by one": (SHARED, "sees = sees & (distance >= -left)", "sees = sees & (distance > -left)"),
    "a key beyond the end is seen": (SHARED, "sees = key < T", "sees = key <= T"),
    "a key block skipped": (SHARED, "return begin, full_begin, full_end, end", "return begin, full_begin, full_end, full_end"),
    "a block of the window skipped": (SHARED, "begin = tl.maximum(first + shift - before, 0) // COLUMNS * COLUMNS", "begin = COLUMNS"),
    "full blocks begin too early": (SHARED, "tl.cdiv(tl.maximum(last + shift - before", "tl.cdiv(tl.maximum(first + shift - before"),
    "full blocks end too late": (SHARED, "full_end = tl.minimum(tl.maximum(first +", "full_end = tl.minimum(tl.maximum(last +"),
    "unmasked features": (SHARED, "tl.load(place, mask=(column < C)[None, :]", "tl.load(place, mask=(column < C + 1)[None, :]"),
    "unmasked rows": (SHARED, "tl.load(place, mask=(first + row < rows)[:, None],", "tl.load(place, mask=(first + row <= rows)[:, None],"),
    "packed offset of the length": (SHARED, "tl.load(cu_seqlens_ptr + batch + 1) - start", "tl.load(cu_seqlens_ptr + batch + 1)"),
    "tanh without its sign": (SHARED, "tl.where(x < 0, -t, t)", "t"),
    "o not rescaled": (FORWARD, "o * rescale[:, None]", "o"),
    "total not rescaled": (SHARED, "total * rescale", "total"),
    "sink left out of lse": (FORWARD, 'total = tl.where(top == float("-inf"), 0.0, 1.0)', "total = tl.zeros((BLOCK_M,), tl.float32)"),
    "lse in base 2": (FORWARD, "* LN_2", "* 1.0"),
    "head mapping": (
        FORWARD,
        "k_ptr += batch * stride_k_batch + first_k * stride_k_token + head // group",
        "k_ptr += batch * stride_k_batch + first_k * stride_k_token + head % group",
    ),
    "v of another sequence": (FORWARD, "batch * stride_v_batch + first_k", "batch * stride_v_batch + first_q"),
    "delta without dlse": (BACKWARD, "delta -= tl.load(dlse_ptr", "delta -= 0 * tl.load(dlse_ptr"),
    "softcap's derivative dropped": (BACKWARD, "ds = ds * (1 - s * s)", "ds = ds * 1"),
    "dk of one head": (BACKWARD, "step // blocks", "0 * step"),
    "p not masked": (BACKWARD, "p, ds = tl.where(sees, p, 0.0), tl.where", "p, ds = p, tl.where"),
    "ds not masked in dq": (BACKWARD, "LEFT, RIGHT), ds, 0.0)", "LEFT, RIGHT), ds, ds)"),
    "scale left out of dk": (BACKWARD, "dk * scale", "dk"),
    "sign of dsinks": (BACKWARD, "-tl.sum(share, 0)", "tl.sum(share, 0)"),
    "dsinks of one sequence": (LAUNCHES, "partial.sum(0)", "partial[0]"),
}


def plant(monkeypatch, folder, module, old, new):
    """Put the kernels (or functions) of a mutated copy wherever those of the original are used."""
    copy, originals = mutated(module, old, new, folder), dict(vars(module))
    for user in (SHARED, FORWARD, BACKWARD, LAUNCHES):
        for name, value in vars(copy).items():
            if callable(value) and value is not originals.get(name) and vars(user).get(name) is originals.get(name):
                monkeypatch.setattr(user, name, value)


def checks():
    """Every mechanism once: a window over several blocks with sinks, softcap and groups; packed causal sequences, odd sizes."""
    check(inputs(70, 100, 4, 2, 16, 8, B=1, sinks=True), left=40, right=20, softcap=3.0)
    cu = {"cu_seqlens_q": lengths(3, 40, 0), "cu_seqlens_k": lengths(70, 33, 2)}
    check(inputs(43, 105, 2, 1, 12), right=0, **cu)
    check(inputs(33, 64, 1, 1, 12, B=1))
    check(inputs(9, 12, SINKS, 12, B=2, sinks=True), right=0)


def test_planted_bugs_have_a_sound_original(small_tiles):
    checks()


@pytest.mark.planted
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, small_tiles, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *PLANTED[bug])
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        checks()
