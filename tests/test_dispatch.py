"""Who is asked: use_backend, explain, backends(), FASTPRIMER_BACKEND, and the reasons they give."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastprimer as fp
from fastprimer import gpus
from fastprimer.backends import BACKENDS, unavailable
from fastprimer.gpus import runs_on
from fastprimer.requested import requested

ROOT = Path(__file__).resolve().parent.parent
NATIVE = unavailable("rms_norm", "cpu", "cpu")
needs_native = pytest.mark.skipif(bool(NATIVE), reason=NATIVE)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


@needs_native
def test_the_fast_backend_is_chosen_and_the_rest_explained():
    answer = fp.explain("rms_norm", torch.randn(2, 8))
    assert answer.backend == "cpu" and set(answer.refusals) == {"reference", "triton", "cuda"}
    assert "TRITON_INTERPRET" in answer.refusals["triton"] or "interpret" in answer.refusals["triton"]
    assert str(answer).startswith("rms_norm: cpu\n")
    assert fp.explain(fp.rms_norm, torch.randn(2, 8)) == answer


@pytest.fixture
def no_cuda_kernel(monkeypatch):
    """As if cross_entropy had none."""
    backends = sys.modules["fastprimer.backends"]
    monkeypatch.setattr(backends, "_unavailable", {})
    monkeypatch.delitem(sys.modules["fastprimer.ops.cross_entropy"].LIMITS["cross_entropy"], "cuda")


def test_what_has_no_kernel_runs_on_the_reference_or_raises(no_cuda_kernel):
    call = torch.randn(3, 5), torch.tensor([0, 4, 1])
    best = "reference" if NATIVE else "cpu"
    assert fp.explain("cross_entropy", *call).backend == best
    with fp.use_backend("cuda"):
        assert fp.explain("cross_entropy", *call).backend is None
        with pytest.raises(fp.BackendError, match="cross_entropy: backend 'cuda' was asked for, but cross_entropy has no cuda kernel yet"):
            fp.cross_entropy(*call)
    with fp.use_backend("cuda", missing="auto"):
        assert fp.explain("cross_entropy", *call).backend == best


@needs_native
def test_a_dtype_without_kernel_steps_aside_or_raises():
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(8, dtype=torch.float16)
    assert fp.explain("rms_norm", x, weight).backend == "reference"
    fp.rms_norm(x, weight)
    with fp.use_backend("cpu"), pytest.raises(fp.BackendError, match="a weight of bfloat16 or float32, not float16"):
        fp.rms_norm(x, weight)
    with fp.use_backend("cpu", missing="auto"), pytest.raises(fp.BackendError):  # it has a kernel, which refuses
        fp.rms_norm(x, weight)


def test_a_chapter_may_know_a_faster_backend():
    """Many rows an expert in 16 bits: Triton's experts come first on a GPU, and nowhere else; what is asked for by name stays."""
    candidates = sys.modules["fastprimer.backends"]._candidates

    def arguments(tokens: int, dtype: torch.dtype) -> tuple:
        sizes = (tokens, 8), (4, 32, 8), (4, 8, 16), (tokens, 2), (tokens, 2)
        return tuple(torch.empty(*size, dtype=dtype, device="meta") for size in sizes)

    assert candidates("moe", "cuda", arguments(128, torch.bfloat16)) == ("triton", "cuda", "reference")
    assert candidates("moe", "cuda", arguments(127, torch.bfloat16)) == ("cuda", "triton", "reference")
    assert candidates("moe", "cuda", arguments(128, torch.float32)) == ("cuda", "triton", "reference")
    assert candidates("moe", "cpu", arguments(128, torch.bfloat16)) == ("cpu", "reference")

    def first(op: str, *args) -> str:
        return candidates(op, "cuda", args)[0]

    rows = torch.empty(2**14, 2**11, dtype=torch.bfloat16, device="meta")
    assert first("rms_norm", rows) == "triton" and first("rms_norm", rows[1:]) == "cuda" and first("rms_norm", rows.float()) == "cuda"
    q, cache, lengths = rows, torch.empty(2**12, 2**6, 2**3, 2**7, dtype=torch.bfloat16, device="meta"), None
    decoding = "attention_with_kv_cache"
    assert first(decoding, q, cache, cache, lengths, None, None, rows) == "triton"
    assert first(decoding, q, cache, cache, lengths, None, None, None) == "cuda"
    assert first(decoding, q, cache[1:], cache, lengths, None, None, rows) == "cuda"
    with fp.use_backend("cuda"):
        assert candidates("moe", "cuda", arguments(128, torch.bfloat16)) == ("cuda",)


def test_blocks_nest_and_survive_errors():
    x = torch.randn(2, 8)
    before = fp.explain("rms_norm", x).backend
    with pytest.raises(KeyError), fp.use_backend("reference"):
        with fp.use_backend("auto"):
            assert fp.explain("rms_norm", x).backend == before
        assert fp.explain("rms_norm", x).backend == "reference"
        raise KeyError
    assert fp.explain("rms_norm", x).backend == before


def test_a_block_may_be_within_itself():
    block = fp.use_backend("reference")
    with block, fp.use_backend("cpu"):
        with block:
            assert requested().name == "reference"
        assert requested().name == "cpu"


FIRST_CALLS = """
import sys, threading
from fastprimer.backends import unavailable
sys.setswitchinterval(1e-6)
failed, start = [], threading.Barrier(8)
def first_call():
    start.wait()
    try:
        unavailable("swiglu", "triton", "cpu")
    except Exception as error:
        failed.append(error)
threads = [threading.Thread(target=first_call) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
sys.exit(str(failed[0]) if failed else 0)
"""


def test_threads_may_call_their_first_operations_together():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="use_backend: name: expected one of reference, cpu, triton, cuda, auto, got 'gpu'"):
        fp.use_backend("gpu")
    with pytest.raises(ValueError, match="missing"):
        fp.use_backend("cpu", missing="ignore")
    with pytest.raises(ValueError, match="explain: op: expected one of rms_norm, .*, got 'softmax'"):
        fp.explain("softmax", torch.randn(2))


def test_backends_lists_every_cell():
    table = fp.backends()
    assert all(set(row) == set(BACKENDS) and row["reference"] == "" for row in table.values())
    if not torch.cuda.is_available():
        assert table["rms_norm"]["triton"] == "this torch sees no CUDA device"


@pytest.mark.slow
def test_the_variable_chooses_and_is_checked():
    ask = "import torch, fastprimer as fp; print(fp.explain('rms_norm', torch.randn(2, 8)).backend)"
    assert python(ask, FASTPRIMER_BACKEND="reference").stdout.strip() == "reference"
    assert "FASTPRIMER_BACKEND: expected one of" in python(ask, FASTPRIMER_BACKEND="gpu").stderr
    assert "ValueError: FASTPRIMER_BACKEND" in python("import fastprimer", FASTPRIMER_BACKEND="gpu").stderr
    refused = python("import torch, fastprimer as fp; fp.rms_norm(torch.randn(2, 8))", FASTPRIMER_BACKEND="cuda")
    if not torch.cuda.is_available():
        assert "CUDA kernels run on CPU tensors only in the emulator" in refused.stderr


@pytest.mark.parametrize("how", ["fastprimer", "fastprimer.cli", "script"])
@pytest.mark.parametrize("line", [["doctor"], ["generate", "--model", "x", "two"]], ids=" ".join)
@pytest.mark.slow
def test_the_command_line_says_what_is_wrong_with_the_variable(how, line, tmp_path):
    command = ["-m", how]
    if how == "script":  # as pip writes it
        (tmp_path / "fastprimer").write_text("import sys\nfrom fastprimer.cli import main\nsys.exit(main())\n")
        command = [str(tmp_path / "fastprimer")]
    environment = os.environ | {"FASTPRIMER_BACKEND": "nope", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, *line], env=environment, capture_output=True, text=True)
    expected = "fastprimer: error: FASTPRIMER_BACKEND: expected one of reference, cpu, triton, cuda, auto, got 'nope'\n"
    assert done.returncode == 2 and done.stderr.endswith(expected) and "Traceback" not in done.stderr


def test_without_the_native_library_everything_still_works(tmp_path):
    """As on a machine with no compiler: the reason is recorded at installation, and shown."""
    (tmp_path / "_native.json").write_text('{"reason": "no C++ compiler was found when fastprimer was built"}')
    code = f"""
import pathlib, torch, sys
import fastprimer as fp
sys.modules["fastprimer.backends"].PACKAGE = pathlib.Path({str(tmp_path)!r})
answer = fp.explain("rms_norm", torch.randn(2, 8))
print(answer.backend, "|", answer.refusals["cpu"])
fp.rms_norm(torch.randn(2, 8))
from fastprimer.cli import main
main(["doctor"])
"""
    shown = python(code, COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    assert "reference | no C++ compiler was found when fastprimer was built" in shown.stdout
    assert "not there: no C++ compiler was found when fastprimer was built" in shown.stdout
    assert "in the emulator" not in shown.stdout  # which lies beside the library


def test_why_the_native_library_is_not_there(tmp_path, monkeypatch):
    module = sys.modules["fastprimer.backends"]
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    reason = module.native_reason.__wrapped__
    assert reason() == "the native library was not built: install fastprimer (pip install .)"
    (tmp_path / "_native.so").write_text("no library")
    assert reason().startswith(f"the native library does not load: {tmp_path / '_native.so'}: ")


def test_which_gpus_a_build_serves():
    assert runs_on("80", (8, 0)) and runs_on("80", (8, 9)) and runs_on("80", (12, 0)) and not runs_on("80", (7, 5))
    assert runs_on("90a", (9, 0)) and not runs_on("90a", (10, 0)) and runs_on("100a", (10, 0)) and not runs_on("100a", (12, 0))


def test_what_older_gpus_and_drivers_cannot_run(monkeypatch):
    monkeypatch.setattr(gpus, "capabilities", lambda: [(9, 0), (7, 5)])
    reason = "its tiles need the shared memory of sm_80 and later, a GPU here is sm_75 (CUDA_VISIBLE_DEVICES hides it)"
    look = sys.modules["fastprimer.backends"]._look
    assert look("attention", "triton", "cuda") == look("attention_with_kv_cache", "triton", "cuda") == reason
    assert gpus.no_room("rms_norm") == ""
    assert gpus.not_served(["80"], "12.0.1") == "its kernels were built for sm_80, a GPU here is sm_75 (CUDA_VISIBLE_DEVICES hides it)"
    monkeypatch.setattr(gpus, "capabilities", lambda: [(9, 0), (8, 0)])
    assert gpus.no_room("attention") == gpus.not_served(["80"], "12.0.1") == ""
    assert gpus.not_served([], "11.5.119") == "the native library was built without its CUDA kernels, for nvcc 11.5.119 is too old"
    for driver, expected in (12080, "its kernels were built by nvcc 13.0.48, which a driver of CUDA 12.8 does not run"), (13000, ""):
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda driver=driver: driver, raising=False)
        assert gpus.not_served(["80"], "13.0.48") == expected
    # Machine code runs on a driver of an older minor version; PTX, which is all that there is for sm_120, does not.
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080)
    for capability, nvcc, served in (
        ((9, 0), "12.9.86", True),
        ((8, 6), "12.9.86", True),
        ((12, 0), "12.8.93", True),
        ((12, 0), "12.9.86", False),
    ):
        monkeypatch.setattr(gpus, "capabilities", lambda capability=capability: [capability])
        found = gpus.not_served(["80", "90a"], nvcc)
        assert found == "" if served else found.startswith("it has no machine code for sm_120") and "a driver of CUDA 12.8" in found


def test_blocks_of_two_threads_may_end_in_any_order():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with fp.use_backend("reference"):
            entered.set()
            leave.wait()

    def chosen():
        return fp.explain("swiglu", torch.randn(2, 8)).backend

    usual, thread = chosen(), threading.Thread(target=other)
    thread.start()
    entered.wait()
    with fp.use_backend("auto"):
        assert chosen() == usual
        leave.set()
        thread.join()
        assert chosen() == usual
    assert chosen() == usual


@needs_native
def test_a_backend_asked_for_by_name_refuses_the_transforms_of_torch_func():
    x = torch.randn(2, 8)
    torch.func.grad(lambda x: fp.rms_norm(x).sin().sum())(x)
    with fp.use_backend("cpu"), pytest.raises(fp.BackendError, match="the transforms of torch.func .* see through the reference alone"):
        torch.func.grad(lambda x: fp.rms_norm(x).sin().sum())(x)
