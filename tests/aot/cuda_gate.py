"""The compile gate for CUDA kernels: each is compiled ahead of time, for GPUs that need not be here, and inspected.

What the build has compiled already is taken from its library, if that is newer than all of its sources.

A kernel fails the gate if
    it spills: a stack, local memory, or STL/LDL in the machine code;
    it needs more static shared memory than the target has;
    an instruction that its source's case requires is missing;
    the assembler made its wgmma wait for each other.

    PYTHONPATH=tests python -m aot.cuda_gate [--markdown]       prints the table of the project's kernels
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from aot.table import KIB, cell, counted, markdown

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90a": 227 * KIB, "sm_100a": 227 * KIB}
TARGETS = tuple(SHARED_LIMIT)
COUNTED = ("LDG.E.128", "STG.E.128", "LDGSTS", "LDSM", "HMMA", "HGMMA", "UTMALDG", "SYNCS", "USETMAXREG", "SHFL", "STL", "LDL")
LIBRARY = ROOT / "fastprimer/_native.so"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-DFASTPRIMER_HOPPER", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulator'}")


@dataclass(frozen=True)
class Case:
    """A source, and for each of its kernels (name with template arguments) the instructions it must compile to."""

    source: Path
    requires: Callable[[str], tuple[str, ...]]
    targets: tuple[str, ...] = TARGETS
    remarks: bool = False
    """Whether the assembler's remarks count, which no library holds: then the gate compiles the source itself."""


@dataclass(frozen=True)
class Row:
    """What one kernel compiled to on one target; `faults` is empty if it passes the gate."""

    kernel: str
    target: str
    registers: int
    shared: int
    stack: int
    local: int
    instructions: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts, verdict = counted(self.instructions), "; ".join(self.faults) or "ok"
        return f"{self.target:7} {self.kernel:42} {self.registers:4} registers {self.shared:6} B shared  {counts:50} {verdict}"

    @property
    def cell(self) -> tuple[tuple[str], str, str]:
        return (self.kernel,), self.target, cell(self.registers, self.shared, self.instructions, self.faults)


def wide_access(kernel: str) -> tuple[str, ...]:
    """Kernels are named <name><T, V, ...>: with V > 1 they must move vectors of 16 bytes as such; V = 1 and <name><T> cannot."""
    width = re.match(r"\w+<\w+, (\d+)", kernel)
    return ("LDG.E.128", "STG.E.128") if width and int(width[1]) > 1 else ()


def tensor_core(kernel: str) -> tuple[str, ...]:
    return ("HMMA", "LDSM", "LDGSTS") if kernel.startswith("gemm_kernel<") else ()


def attention(kernel: str) -> tuple[str, ...]:
    """The products of 16 bits are made in tensor cores, those of float32 are not; all tiles come and go 16 bytes at a time."""
    if "_dsinks" in kernel:
        return ()
    if "_delta" in kernel:
        return ("LDG.E.128",)
    return ("LDGSTS", "STG.E.128") if "<float," in kernel else ("HMMA", "LDSM", "LDGSTS", "STG.E.128")


def decoding(kernel: str) -> tuple[str, ...]:
    """Keys and values come as attention's do; what appends tokens and adds up parts moves little."""
    return attention(kernel) if kernel.startswith("decoding_parts<") else ()


def routing(kernel: str) -> tuple[str, ...]:
    """Lanes of a warp choose together, without a look at memory."""
    return ("SHFL",)


def moe(kernel: str) -> tuple[str, ...]:
    """Products are made in tensor cores, those of float32 are not; their panels come and what they make goes 16 bytes at a time."""
    if kernel.startswith("moe_combine<"):
        return ("LDG.E.128", "STG.E.128")
    if "<" not in kernel:  # a few numbers for each pair: where it goes, what its weight's gradient is
        return ()
    return ("LDGSTS", "STG.E.128") if "<float," in kernel else ("HMMA", "LDSM", "LDGSTS", "STG.E.128")


def losses(kernel: str) -> tuple[str, ...]:
    """Rows come and go 16 bytes at a time; what adds up columns or finds a scale reads single numbers."""
    needs = {"fold": ("LDG.E.128", "SHFL"), "dlogits": ("LDG.E.128", "STG.E.128"), "tokens": ("LDG.E.128", "STG.E.128")}
    return (needs | {"add": needs["tokens"]}).get(kernel.removeprefix("cross_entropy_").partition("<")[0], ())


def attention_hopper(kernel: str) -> tuple[str, ...]:
    """Tiles come by TMA, barriers are in shared memory, products are those of warpgroups, registers move to those that multiply."""
    return ("UTMALDG", "SYNCS", "HGMMA", "USETMAXREG", "STG.E.128")


CASES = (
    *(Case(ROOT / f"csrc/cuda/{op}.cu", wide_access) for op in ("rms_norm", "rope", "swiglu")),
    Case(ROOT / "csrc/cuda/attention.cu", attention),
    Case(ROOT / "csrc/cuda/decoding.cu", decoding),
    Case(ROOT / "csrc/cuda/routing.cu", routing),
    Case(ROOT / "csrc/cuda/moe.cu", moe),
    Case(ROOT / "csrc/cuda/cross_entropy.cu", losses),
    Case(ROOT / "csrc/cuda/attention_hopper.cu", attention_hopper, ("sm_90a",), remarks=True),
    Case(ROOT / "tests/emulator/probe.cu", tensor_core),
)


def cuobjdump() -> str | None:
    """The disassembler comes with the CUDA toolkit, or inside the triton wheel."""
    found = shutil.which("cuobjdump")
    if found is None and find_spec("triton") is not None:
        found = shutil.which(Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump")
    return found


def reason_not() -> str:
    """Why the gate cannot run on this machine, or ""."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    if cuobjdump() is None:
        return "no cuobjdump (it comes with the CUDA toolkit and with triton)"
    return "" if shutil.which("c++filt") else "no c++filt"


def inspect(case: Case, shared_limit: dict[str, int] = SHARED_LIMIT) -> list[Row]:
    """One row for each kernel of the case on each target."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = {} if case.remarks else _built(case, Path(folder))
        running = {}
        for target in (target for target in case.targets if target not in cubins):
            cubins[target] = Path(folder) / f"{target}.cubin"
            command = ["nvcc", *FLAGS, "-cubin", case.source, f"-arch={target}", "-o", cubins[target]]
            running[target] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = {target: process.communicate()[1] for target, process in running.items()}
        if any(process.returncode for process in running.values()):
            raise RuntimeError(f"{case.source.name} does not compile\n" + "".join(said.values()))
        return [row for target in case.targets for row in _rows(case, target, cubins[target], said.get(target, ""), shared_limit[target])]


def _built(case: Case, folder: Path) -> dict[str, Path]:
    """{target: what the library holds of the case's source}, unless a source was changed since it was built."""
    sources = ROOT / "csrc/cuda"
    if case.source.parent != sources or not LIBRARY.exists():
        return {}
    if LIBRARY.stat().st_mtime < max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*")):
        return {}
    names = {target: f"{case.source.stem}.{target}.cubin" for target in case.targets}
    subprocess.run([cuobjdump(), "--extract-elf", f"{case.source.stem}.sm_", LIBRARY], check=True, capture_output=True, cwd=folder)
    return {target: folder / name for target, name in names.items() if (folder / name).exists()}


def _rows(case: Case, target: str, cubin: Path, said: str, shared_limit: int) -> list[Row]:
    counts = _instructions(cubin)
    usage = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    names = _demangled([mangled for mangled, *_ in found])
    rows = []
    for (mangled, *numbers), name in zip(found, names, strict=True):
        registers, stack, shared, local = map(int, numbers)
        row = Row(name, target, registers, shared, stack, local, counts[mangled])
        faults = _faults(row, case.requires(name), shared_limit)
        if re.search(rf"(are serialized|wait is injected) .*{mangled}'", said):
            faults = (*faults, "its wgmma are serialized")
        rows.append(Row(name, target, registers, shared, stack, local, counts[mangled], faults))
    return rows


def _instructions(cubin: Path) -> dict[str, dict[str, int]]:
    """{mangled kernel: {instruction: how often it occurs}}."""
    sass = subprocess.run([cuobjdump(), "-sass", cubin], check=True, capture_output=True, text=True).stdout
    kernels = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    counts = {}
    for mangled, text in zip(kernels[::2], kernels[1::2], strict=True):
        opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", text, flags=re.MULTILINE)
        counts[mangled] = {name: sum(opcode == name or opcode.startswith(name + ".") for opcode in opcodes) for name in COUNTED}
    return counts


def _demangled(names: list[str]) -> list[str]:
    """Kernel names as in the source: no return type, parameters or namespace."""
    text = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = [line.replace("fastprimer::", "").removeprefix("void ") for line in text.splitlines()]
    return [re.sub(r"\(.*$", "", line) for line in short]


def _faults(row: Row, required: tuple[str, ...], shared_limit: int) -> tuple[str, ...]:
    faults = []
    if row.stack or row.local or row.instructions["STL"] or row.instructions["LDL"]:
        stores, loads = row.instructions["STL"], row.instructions["LDL"]
        faults.append(f"spills: {row.stack} B stack, {row.local} B local, {stores} stores, {loads} loads")
    if row.shared > shared_limit:
        faults.append(f"{row.shared} B of shared memory, the limit is {shared_limit}")
    faults += [f"no {name}" for name in required if not row.instructions[name]]
    return tuple(faults)


if __name__ == "__main__":
    if reason_not():
        sys.exit(f"cuda_gate: {reason_not()}")
    table = [row for case in CASES for row in inspect(case)]
    print(markdown(("kernel",), (row.cell for row in table)) if "--markdown" in sys.argv else "\n".join(map(str, table)))
    sys.exit(any(row.faults for row in table))
