"""Which backend computes an operation: what is available, what is preferred, and the reason for every refusal.

A backend offers `<op>_forward` and `<op>_backward` with the signatures of the operation's own chapter:

    reference   the chapter itself, plain torch: always there
    cpu, cuda   the native library (torch.ops.fastprimer), where the tensor's device picks the kernel
    triton      fastprimer.kernels.<op>, registered as torch.ops.fastprimer_triton

Native and Triton functions are registered operators whose fake is the chapter's function, so torch.compile sees through
them. Without a GPU, CPU tensors may run the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1) and the CUDA
kernels in the emulator (`load_emulator`); neither is ever chosen automatically.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from fastprimer import gpus
from fastprimer.requested import BACKENDS, requested
from fastprimer.requested import VARIABLE as VARIABLE
from fastprimer.requested import use_backend as use_backend

PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Automatic choice by device type, but for what a chapter knows better; any other device has the reference."""

PACKAGE = Path(__file__).parent


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would use (None: the call would raise), and why not the others."""

    op: str
    backend: str | None
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend: the call would raise'}"]
        return "\n".join(lines + [f"  not {backend}: {reason}" for backend, reason in self.refusals.items()])


class _Explained(Exception):
    """Carries an Explanation from `choose` out of the public function that `explain` called."""


class _Explaining(threading.local):
    def __init__(self):  # of each thread; not of the class, or compiled code would be guarded by its absence
        self.active = False


_explaining = _Explaining()


_chapters: dict[str, object] = {}
_faster: dict[str, object] = {}
_functions: dict[tuple[str, str], SimpleNamespace] = {}
_unavailable: dict[tuple[str, str, str], str] = {}
_emulated = False


def register(chapter) -> None:
    """Make a chapter's operations known. It offers LIMITS = {op: {backend: function of the forward's arguments -> reason}}, and may
    offer FASTER = {op: function of the forward's arguments -> the backend to be tried before the usual ones, or ""}."""
    _faster.update(getattr(chapter, "FASTER", {}))
    for op in chapter.LIMITS:
        _chapters[op] = chapter
        names = [name for name in (f"{op}_forward", f"{op}_backward") if hasattr(chapter, name)]
        _functions[op, "reference"] = SimpleNamespace(**{name: outside_autocast(getattr(chapter, name)) for name in names})


AUTOCAST = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))
"""Types of device that have autocast. torch.compile cannot ask for it before torch 2.12."""


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device; some have none (meta)."""
    return device in AUTOCAST and torch.is_autocast_enabled(device)


def outside_autocast(function):
    """The chapters choose every dtype themselves; autocast, which would recast their matrix products, has no say there."""

    @functools.wraps(function)
    def call(x, *args):
        device = x.device.type
        if autocasting(device):
            with torch.autocast(device, enabled=False):
                return function(x, *args)
        return function(x, *args)

    return call


def choose(op: str, *args) -> str:
    """The backend that serves this call of op; args are the arguments of op's forward, the first one a tensor."""
    if _explaining.active:
        raise _Explained(_explain(op, args))
    x = args[0]
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # which takes longer
    if torch.compiler.is_compiling():
        _load_all(device)
    for backend in _candidates(op, device, args):
        reason = refusal(op, backend, device, args)
        if not reason:
            return backend
    raise BackendError(f"{op}: backend {requested().name!r} was asked for, but {reason}")


def _candidates(op: str, device: str, args: tuple) -> tuple[str, ...]:
    """The backends that may serve a call, best first: the one asked for, or all that are preferred on this device."""
    request = requested()
    name = request.name
    if name == "auto" or (request.missing == "auto" and name != "reference" and name not in _chapters[op].LIMITS[op]):
        usual = PREFERENCE.get(device, ("reference",))
        if op not in _faster or device != "cuda":  # only there several are fast
            return usual
        first = _faster[op](*args)
        return (first, *(backend for backend in usual if backend != first)) if first in usual else usual
    return (name,)


def refusal(op: str, backend: str, device: str, args: tuple) -> str:
    """Why this backend cannot serve this call, or ""."""
    if backend == "reference":
        return ""
    if transforming():
        return "the transforms of torch.func (grad, vmap, ...) see through the reference alone"
    return unavailable(op, backend, device) or _chapters[op].LIMITS[op][backend](*args)


def transforming() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def implementation(op: str, backend: str):
    """The object that offers <op>_forward and <op>_backward for a backend that `choose` has named."""
    return _functions[op, backend]


def unavailable(op: str, backend: str, device: str) -> str:
    """Why this backend cannot serve op on this type of device at all, or "". Loads the backend's functions."""
    key = op, backend, device
    if key not in _unavailable:
        with _looking:
            if key not in _unavailable:
                _unavailable[key] = _look(*key)
    return _unavailable[key]


_looking = threading.RLock()
"""Operators can be registered only once, and threads may call their first ones at the same time."""


def _load_all(device: str) -> str:
    """Load every backend that is of use on this device: while torch.compile traces a second operation, it sees `_functions` as it was
    after the first."""
    first = next(iter(_chapters))  # of the operations: all of a backend's are loaded at once
    return "".join(unavailable(first, backend, device) for backend in BACKENDS)


# What torch.compiler.assume_constant_result marks; that decorator imports torch._dynamo and Triton at once, which takes
# seconds and leaves no time to ask for Triton's interpreter.
unavailable._dynamo_marked_constant = transforming._dynamo_marked_constant = _load_all._dynamo_marked_constant = True


def _look(op: str, backend: str, device: str) -> str:
    if backend == "reference":
        return ""
    if backend not in _chapters[op].LIMITS[op]:
        return f"{op} has no {backend} kernel yet"
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for {device} tensors"
    reason = {"cpu": _no_cpu, "triton": _no_triton, "cuda": _no_cuda}[backend](device)
    if not reason and backend == "triton" and device == "cuda":
        reason = gpus.no_room(op)
    if not reason:
        for served in _chapters:
            if backend in _chapters[served].LIMITS[served] and (served, backend) not in _functions:
                _functions[served, backend] = _load(served, backend, device)
    return reason


def _no_cpu(device: str) -> str:
    return native_reason() if device == "cpu" else f"the tensors are on {device}"


def _no_triton(device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cpu" and not interpreting():
        return "Triton kernels run on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
    return ""


def _no_cuda(device: str) -> str:
    if device == "cpu":
        return "" if _emulated else "CUDA kernels run on CPU tensors only in the emulator, which is not loaded"
    return native_reason() or gpus.not_served(build_info().get("cuda_architectures", []), build_info().get("cuda_compiler", ""))


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def build_info() -> dict:
    """What the build wrote down: compiler, architectures, or why there is no native library."""
    try:
        from fastprimer import _build
    except ImportError:
        return {}
    return _build.info()


@functools.cache
def native_reason() -> str:
    """Why the native library is not usable, or "". Loads it."""
    library = PACKAGE / "_native.so"
    if not library.exists():
        record = PACKAGE / "_native.json"
        if record.exists():
            return json.loads(record.read_text())["reason"] or "the native library is gone: install fastprimer again"
        return "the native library was not built: install fastprimer (pip install .)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        cause = str(error.__cause__ or error)  # torch's own words name the file, those of the loader say what it lacks
        return f"the native library does not load: {cause.splitlines()[0]}"
    return ""


def emulator_reason() -> str:
    """Why the CUDA kernels cannot be emulated here, or ""."""
    if torch.cuda.is_available():
        return "there is a GPU to run the CUDA kernels on"
    if not (PACKAGE / "_emulated.so").exists():
        return "the emulated CUDA kernels were not built (they come with an editable install from the source tree)"
    return ""


def load_emulator() -> None:
    """Let the backend "cuda" serve CPU tensors, by running the CUDA kernels on the CPU (slow; for tests)."""
    global _emulated
    if emulator_reason():
        raise BackendError(emulator_reason())
    torch.ops.load_library(str(PACKAGE / "_emulated.so"))
    _emulated = True
    _unavailable.clear()


def _load(op: str, backend: str, device: str) -> SimpleNamespace:
    """The backend's functions for op as operators with fakes, called without the overload look-up."""
    chapter = _chapters[op]
    names = list(vars(_functions[op, "reference"]))
    if backend == "triton":
        space = "fastprimer_triton"
        _register_triton(chapter, names)
    else:
        space = "fastprimer_emulated" if backend == "cuda" and device == "cpu" else "fastprimer"
    for name in names:
        _register_fake(f"{space}::{name}", getattr(chapter, name))
    return SimpleNamespace(**{name: getattr(getattr(torch.ops, space), name).default for name in names})


def schema(function) -> str:
    """The operator schema of a chapter's function, read off its annotations; what is named a cache is written in place."""
    caches = [name for name in inspect.signature(function).parameters if name.endswith("_cache")]
    return torch.library.infer_schema(function, mutates_args=caches)


def _register_triton(chapter, names: list[str]) -> None:
    stem = chapter.__name__.rpartition(".")[2]
    kernels = importlib.import_module(f"fastprimer.kernels.{stem}")
    library = _library("fastprimer_triton")
    for name in names:
        if not hasattr(torch.ops.fastprimer_triton, name):
            library.define(name + schema(getattr(chapter, name)))
            library.impl(name, getattr(kernels, name), "CompositeExplicitAutograd")


@functools.cache
def _library(space: str) -> torch.library.Library:
    return torch.library.Library(space, "FRAGMENT")


@functools.cache
def _register_fake(name: str, function) -> None:
    torch.library.register_fake(name, function)


def operations() -> list[str]:
    """Every operation that dispatches, in the order of the chapters."""
    return list(_chapters)


def declared(op: str) -> list[str]:
    """The backends that have a kernel for op, the reference included."""
    return ["reference"] + [backend for backend in BACKENDS if backend in _chapters[op].LIMITS[op]]


def backends() -> dict[str, dict[str, str]]:
    """{op: {backend: "" or the reason it is unavailable on this machine}}."""
    device = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda", "reference": "cpu"}
    if not torch.cuda.is_available():
        return {op: {b: _without_gpu(op, b) for b in BACKENDS} for op in _chapters}
    return {op: {b: unavailable(op, b, device[b]) for b in BACKENDS} for op in _chapters}


def _without_gpu(op: str, backend: str) -> str:
    reason = unavailable(op, backend, "cpu")
    if reason and backend in ("triton", "cuda") and backend in _chapters[op].LIMITS[op]:
        return "this torch sees no CUDA device"
    return reason


def explain(op, *args, **kwargs) -> Explanation:
    """Which backend this very call of `op` (its name or the function) would use, and why not the others.

    Raises:
        ValueError: no such operation. Whatever the call itself would raise for its arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _chapters:
        raise ValueError(f"explain: op: expected one of {', '.join(_chapters)}, got {name!r}")
    _explaining.active = True
    try:
        getattr(_chapters[name], name)(*args, **kwargs)
    except _Explained as answer:
        return answer.args[0]
    finally:
        _explaining.active = False
    raise AssertionError(f"{name} never chose a backend")


def _explain(op: str, args: tuple) -> Explanation:
    device = args[0].device.type
    refusals = {backend: refusal(op, backend, device, args) for backend in BACKENDS}
    chosen = next((backend for backend in _candidates(op, device, args) if not refusals[backend]), None)
    reasons = {b: reason or _reason_not_preferred(device, chosen) for b, reason in refusals.items() if b != chosen}
    return Explanation(op, chosen, reasons)


def _reason_not_preferred(device: str, chosen: str | None) -> str:
    if (name := requested().name) != "auto":
        return f"{name!r} was asked for by name"
    return f"{chosen!r} is preferred for {device} tensors"
