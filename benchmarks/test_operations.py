"""CASES under pytest-benchmark, for its storage, histograms and comparisons.

    pytest benchmarks                                       every operation, type, pass and contestant
    pytest benchmarks -k "rms_norm and llama and forward"   a few; add --benchmark-autosave, --benchmark-compare, ...

Nobody is timed before it has been checked. Contestants are measured one after another here, and the machine's roofs are not: on a
machine whose speed varies, `fastprimer bench`, which interleaves all of them, tells more.
"""

import functools

import pytest
import torch

import fastprimer
from fastprimer.backends import PREFERENCE, unavailable, use_backend
from fastprimer.benchmark.contest import Settings, checked
from fastprimer.benchmark.jobs import usual_dtypes
from fastprimer.benchmark.measure import prove, shared_arguments
from fastprimer.benchmark.timing import FORWARD, PASSES, Staged, prepared
from fastprimer.cases import benchmarks
from fastprimer.memory import keep_freed_memory
from fastprimer.peers import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = Settings(DEVICE, rounds=1)
FEWEST = 5


def parameters():
    for case in benchmarks(DEVICE):
        for dtype in usual_dtypes(case.op, DEVICE):
            for measured in (FORWARD,) if case.op == "attention_with_kv_cache" else PASSES:
                ours = [b for b in PREFERENCE[DEVICE] if b != "reference" and not unavailable(case.op, b, DEVICE)]
                for contestant in (*ours, *peers(case.op, DEVICE, measured)):
                    yield pytest.param(case, dtype, measured, contestant, id=f"{case}-{dtype}-{measured}-{contestant}")


@functools.lru_cache(maxsize=1)
def arguments_of(case, dtype):
    return shared_arguments(case, dtype, SETTINGS)


@functools.lru_cache(maxsize=1)
def errors(case, dtype, backend):
    return prove(case, dtype, backend, SETTINGS)


@pytest.mark.parametrize(("case", "dtype", "measured", "contestant"), list(parameters()))
def test_operation(benchmark, case, dtype, measured, contestant):
    keep_freed_memory()
    kind = getattr(torch, dtype)
    arguments = arguments_of(case, kind)
    ours = prepared(getattr(fastprimer, case.op), arguments, measured)
    theirs = peers(case.op, DEVICE, measured)
    with use_backend("auto" if contestant in theirs else contestant):
        if contestant in theirs:
            call, reason = checked(lambda: prepared(theirs[contestant](), arguments, measured), ours(), kind)
            if reason:
                pytest.skip(f"{contestant} {reason}")
        else:
            call = ours
            assert not errors(case, kind, contestant)
        benchmark.group = f"{case} {dtype} {measured}"
        benchmark.pedantic(run, setup=lambda: ((call.stage() if isinstance(call, Staged) else call,), {}), rounds=FEWEST, warmup_rounds=1)


def run(call):
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
