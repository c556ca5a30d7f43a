"""The compile gate for Triton kernels: each is compiled ahead of time, for GPUs that need not be here, and inspected.

A case is a call of a kernel's host function on meta tensors. The launches it would make are recorded, so what is compiled
has the very tile, warps and argument properties (absent, divisible by 16) that a GPU would run. A launch fails the gate if
    it spills: local memory reserved, or STL/LDL in the machine code (scratch memory on AMD);
    it needs more shared memory than the target has, which Triton itself finds only when it runs;
    an instruction that its case requires is missing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from aot.table import KIB, cell, counted
from fastprimer.kernels import _launch

FUSED = {"enable_fp_fusion": True}
"""What Triton does where nothing is said, until 3.9, which warns that this will change."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
"""sm_80 itself has 163 KiB of shared memory, but sm_86, sm_89 and sm_120, which get its tiles, have 99."""


COUNTED = {
    "cuda": {
        "HMMA": r"\bHMMA\.",
        "HGMMA": r"\bHGMMA\.",
        "UTCMMA": r"\bUTC\w*MMA",
        "UTMALDG": r"\bUTMALDG",
        "LDGSTS": r"\bLDGSTS",
        "16-byte loads": r"\bLDG\.E\S*\.128",
        "spills": r"\b(?:STL|LDL)\b",
    },
    "hip": {
        "MFMA": r"\bv_mfma_",
        "16-byte loads": r"\b(?:global|buffer)_load_dwordx4\b",
        "v_writelane": r"\bv_writelane_b32",
        "spills": r"\bscratch_(?:load|store)",
    },
}
"""Instructions, by Triton's backend: of the matrix unit (sm_80, sm_90, sm_100, AMD), copies by TMA and cp.async, and others.

v_writelane saves a scalar register in a lane of a vector register, which costs an instruction but no memory: no fault.
"""


@dataclass(frozen=True)
class Case:
    """A call to compile the launches of, and the instructions (regular expressions) it must compile to, by target."""

    name: str
    call: Callable[[], object]
    requires: dict[str, tuple[str, ...]] = field(default_factory=dict)
    spared: tuple[str, ...] = ()
    """Kernels of which these instructions are not required."""


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, int]

    @property
    def width(self) -> int:
        """Bytes of an element of the first tensor."""
        return next(value.element_size() for value in self.arguments.values() if hasattr(value, "element_size"))


@dataclass(frozen=True)
class Row:
    """What one launch compiled to on one target; `faults` is empty if it passes the gate."""

    case: str
    kernel: str
    target: str
    registers: int
    shared: int
    instructions: dict[str, int]
    faults: tuple[str, ...]

    def __str__(self) -> str:
        size = f"{self.registers:4} registers {self.shared:7} B shared"
        verdict = "; ".join(self.faults) or "ok"
        return f"{self.target:7} {self.case:36} {self.kernel:28} {size}  {counted(self.instructions):50} {verdict}"

    @property
    def cell(self) -> tuple[tuple[str, str], str, str]:
        return (self.kernel, self.case), self.target, cell(self.registers, self.shared, self.instructions, self.faults)


@contextmanager
def _recorded(launches: list[Launch]):
    def run(self, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        launches.append(Launch(self, arguments, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = original


def _source(launch: Launch) -> ASTSource:
    """The launch as Triton's run time would specialise it."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        address_or_value = value.storage_offset() * value.element_size() if hasattr(value, "data_ptr") else value
        if isinstance(address_or_value, int) and address_or_value % 16 == 0:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def inspect(case: Case, targets: dict[str, Target] = TARGETS) -> list[Row]:
    """Compile every launch of a case for every target, with the tile that the target would be given."""
    return [_inspect(case, launch, name, target) for name, target in targets.items() for launch in launches_on(name, case)]


def short_form(cases: list[Case]) -> dict[str, tuple[str, ...]]:
    """{case: targets} so that every case is compiled for one target, in turn, and every kernel in every width of dtype for all of them."""
    chosen, seen = {}, set()
    for number, case in enumerate(cases):
        needs = {name: {(launch.kernel.__name__, launch.width, name) for launch in launches_on(name, case)} for name in TARGETS}
        new = tuple(name for name in TARGETS if not needs[name] <= seen)
        chosen[case.name] = new or (list(TARGETS)[number % len(TARGETS)],)
        seen.update(*(needs[name] for name in new))
    return chosen


def launches_on(name: str, case: Case) -> list[Launch]:
    """What the case's call would launch on a target."""
    recorded: list[Launch] = []
    before, _launch.WITHOUT_GPU = _launch.WITHOUT_GPU, name
    try:
        with _recorded(recorded):
            case.call()
    finally:
        _launch.WITHOUT_GPU = before
    return recorded


def _inspect(case: Case, launch: Launch, name: str, target: Target) -> Row:
    compiled = triton.compile(_source(launch), target=target.gpu, options=launch.options | FUSED)
    read = _read_nvidia if target.gpu.backend == "cuda" else _read_amd
    registers, faults, code = read(compiled.asm)
    shared = compiled.metadata.shared
    if shared > target.shared_limit:
        faults.append(f"{shared} bytes of shared memory, the limit is {target.shared_limit}")
    required = () if launch.kernel.__name__ in case.spared else case.requires.get(name, ())
    faults += [f"no instruction like {pattern}" for pattern in required if not re.search(pattern, code)]
    counts = {opcode: len(re.findall(pattern, code)) for opcode, pattern in COUNTED[target.gpu.backend].items()}
    return Row(case.name, launch.kernel.__name__, name, registers, shared, counts, tuple(faults))


def _read_nvidia(asm) -> tuple[int, list[str], str]:
    usage, code = _cuobjdump(asm["cubin"], "--dump-resource-usage"), _cuobjdump(asm["cubin"], "-sass")
    count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    faults = [f"spills: {key} {count[key]} bytes" for key in ("STACK", "LOCAL") if count[key]]
    if spills := len(re.findall(r"\b(?:STL|LDL)\b", code)):
        faults.append(f"spills: {spills} STL/LDL instructions")
    return count["REG"], faults, code


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout


def _read_amd(asm) -> tuple[int, list[str], str]:
    code = asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    count = {name: int(re.search(rf"\.{name}:\s*(\d+)", code).group(1)) for name in names}
    return count["vgpr_count"], [f"spills: {name} {count[name]}" for name in names[1:] if count[name]], code
