"""Operation x backend x dtype x case: every output and every gradient within its error budget, with random dy.

Each backend runs in a few processes of its own (fastprimer/verify.py), once for the whole session, or where Triton compiles for a GPU in
many: the tests of one share what follows the @ of their names, and so a worker (conftest.py).
"""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import fastprimer as fp
from fastprimer import cli, testing, verify
from fastprimer.backends import BACKENDS, declared, native_reason, operations
from fastprimer.cases import PRODUCTS, attention, rms_norm_case
from fastprimer.verify import WHOLE, Part, device_of, stream, work_of

FEW = 24
"""Comparisons of one process where each may have kernels to compile."""


def shares(backend: str) -> list[tuple[tuple[str, ...], Part]]:
    """The operations of each process of a backend, and which part of their work."""
    ops = [op for op in operations() if backend in declared(op)]
    if device_of(backend) == "cuda":
        processes = ((op, -(-len(work_of(op, backend)) // FEW)) for op in ops)
        return [((op,), Part(n, of)) for op, of in processes for n in range(1, of + 1)]
    light, products = ([op for op in ops if (op in PRODUCTS) == heavy and op != "attention"] for heavy in (False, True))
    return [(tuple(group), WHOLE) for group in (["attention"], products, light)]


def parameters():
    for backend in BACKENDS:
        for ops, part in shares(backend):
            for op in ops:
                slow = [pytest.mark.slow(minutes=1)] if backend in ("triton", "cuda") else []  # in a stand-in, where no GPU is
                for case, dtype in work_of(op, backend, part):
                    name = f"{backend}-{case}-{str(dtype)[6:]}@{ops[0]}-{backend}-{part.number}"
                    yield pytest.param(backend, ops, part, case, str(dtype)[6:], id=name, marks=slow)


@functools.cache
def found(backend: str, ops: tuple[str, ...], part: Part) -> list[dict]:
    return list(stream(backend, list(ops), 0, part))


@pytest.mark.parametrize("backend, ops, part, case, dtype", list(parameters()))
def test_within_budget(backend, ops, part, case, dtype):
    results = [r for r in found(backend, ops, part) if r.get("op") == case.op]
    refused = [r["refused"] for r in results if "refused" in r]
    if refused:
        pytest.skip(refused[0])
    mine = [r for r in results if (r.get("case"), r.get("dtype")) == (case.name, dtype)]
    assert {r["tensor"] for r in mine} >= set(case.outputs) - {"k_rotated"}
    assert not [r["text"] for r in mine if not r["ok"]]


# The machine that judges kernels is judged itself: a wrong result in the guise of the reference must be told apart.
CASE = rms_norm_case("judged", 6, 500, residual=True, weight_offset=1.0)


def judged(spoil) -> list[testing.Row]:
    """Rows of a backend whose public function returns spoiled tensors."""

    def function(**arguments):
        return spoil(*fp.rms_norm(**arguments))

    return testing.compare(CASE, torch.bfloat16, "reference", function=function)


def test_an_unspoiled_result_is_within_budget():
    assert all(row.ok for row in judged(lambda y, h: (y, h)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y, h: (y * 1.02, h),  # a systematic error of a few units in the last place
        lambda y, h: (torch.cat((y[:, :-1], y[:, :1]), 1), h),  # one wrong column
        lambda y, h: (torch.where(torch.arange(500) == 7, torch.nan, y), h),  # one element never written
        lambda y, h: (y, h[:, :499]),  # a wrong shape
        lambda y, h: (y.detach() + (y - y.detach()) * 1.05, h),  # right outputs, wrong gradients
    ],
)
def test_a_spoiled_result_is_not(spoil):
    assert not all(row.ok for row in judged(spoil))


def test_empty_memory_is_poisoned():
    """Of torch; that of the native library is proven by planted bugs (test_cpu_kernels: elements never written, sums not cleared)."""
    with testing.poisoned_empty():
        assert torch.empty(5).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
        if not native_reason():
            assert torch.ops.fastprimer.poison_scratch(True)  # it already was
    assert not torch.are_deterministic_algorithms_enabled()
    assert native_reason() or not torch.ops.fastprimer.poison_scratch(False)


class Shapes(testing.Inputs):
    """Of a case's tensors of random numbers: those of a benchmark for a GPU are gigabytes."""

    def normal(self, *shape, view=lambda t: t, grad=True, dtype=None):
        return view(torch.empty(shape, dtype=dtype or self.dtype, device="meta")).detach().requires_grad_(grad)


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_the_least_work_of_a_case_is_counted(case):
    """Bytes and FLOPs of benchmarks: they can be evaluated, and backward, which reads forward's inputs again, has its share."""
    arguments = case.arguments(Shapes(torch.bfloat16, "cpu", 0))
    work = case.work(arguments)
    assert work.bytes_forward >= 0 and work.flops_forward >= 0
    if any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments.values()):
        assert work.bytes_forward <= 3 * work.bytes_backward and work.flops_forward <= work.flops_backward
    else:
        assert work.bytes_backward == work.flops_backward == 0


def test_parts_are_the_whole_work_once():
    whole = work_of("rope", "cpu")
    for of in (1, 3, len(whole) + 2):
        shared = [work_of("rope", "cpu", Part(n, of)) for n in range(1, of + 1)]
        assert sorted(map(str, itertools.chain(*shared))) == sorted(map(str, whole))
        assert max(map(len, shared)) - min(map(len, shared)) <= 1
    assert Part.parse(str(Part(2, 5))) == Part(2, 5)


def test_verify_does_once_what_is_asked_for_twice_and_tells_what_is_not_here(monkeypatch, capsys):
    found = {"op": "rope", "gradient": False, "share": 0.5, "ok": True, "text": ""}
    refused = {"op": "route", "refused": "no library, see [docs]", "done": 1}
    monkeypatch.setattr(verify, "stream", lambda backend, ops, seed, part: iter([found, refused]) if part.number == 1 else iter(()))
    assert cli.main(["verify", "--json", *["--op", "rope", "--op", "route"] * 2, *["--backend", "cpu"] * 2]) == 2
    said = capsys.readouterr()
    assert said.out == json.dumps(found) + "\n" and "route on cpu: no library, see [docs]" in said.err
    assert cli.main(["verify", "--op", "rope", "--op", "route"]) == 0  # wherever there is something to prove


def test_verify_starts_no_more_processes_than_a_machine_bears(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--jobs", "100000"])
    assert "argument --jobs: expected an integer from 1 to" in capsys.readouterr().err


@pytest.fixture
def heeded():
    """Ctrl-C, which a shell has its jobs in the background ignore, and so would the processes that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and processes of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_workers_of_verify_end_with_it(number, heeded):
    command = [sys.executable, "-m", "fastprimer.cli", "verify", "--op", "attention", "--backend", "reference", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert json.loads(process.stdout.readline())["ok"]  # a worker is at work
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 143) and "Traceback" not in said
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, 0)


def test_the_cases_of_attention_cover_every_pair():
    rows = [tuple(row.split()) for row in attention.PAIRS.strip().splitlines()]
    values = [set(column) for column in zip(*rows, strict=True)]
    assert values[1] == set(attention.MASKS) and values[4] == set(attention.OPTIONS)
    for (i, some), (j, others) in itertools.combinations(enumerate(values), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(some, others))
