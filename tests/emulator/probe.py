"""Does the emulator lay out matrix fragments, copies, shuffles and conversions as the hardware does?

    PYTHONPATH=tests python -m emulator.probe

builds tests/emulator/probe.cu for the emulator and, where there is a GPU and nvcc, for the GPU, runs both and compares every number.
Exit code 0: they agree, or there is no GPU to compare with; 1: they do not.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .build import HERE, ROOT, compile_program

SOURCE = HERE / "probe.cu"


def emulated(tree: Path = ROOT) -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(folder) / "probe", [SOURCE], "plain", tree)
        return subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout


def reason_no_hardware() -> str:
    """Why the probe cannot run on a GPU here, or ""."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "no NVIDIA GPU"
    return ""


def hardware() -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        folders = [f"-I{ROOT / 'csrc/cuda'}"]
        subprocess.run(["nvcc", "-std=c++17", "-O2", "-arch=native", *folders, ROOT / SOURCE, "-o", program], check=True)
        return subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout


def parse(text: str) -> dict[str, list[str]]:
    """{primitive: its numbers} of a probe's output."""
    numbers: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, index, word = line.split()
        numbers.setdefault(name, []).append(word)
        if int(index) != len(numbers[name]) - 1:
            raise ValueError(f"{name}: line {index} is out of order")
    return numbers


def differences(ours: str, theirs: str) -> dict[str, str]:
    """{primitive: "" or what differs first} between the emulator's output and the hardware's."""
    emulator, gpu = parse(ours), parse(theirs)
    result = {}
    for name in emulator | gpu:
        a, b = emulator.get(name, []), gpu.get(name, [])
        wrong = [i for i in range(min(len(a), len(b))) if a[i] != b[i]]
        result[name] = f"{len(a)} and {len(b)} numbers" if len(a) != len(b) else ""
        if wrong:
            i = wrong[0]
            result[name] = f"{len(wrong)} of {len(a)} numbers differ, the first is number {i}: emulator {a[i]}, GPU {b[i]}"
    return result


def main() -> int:
    ours = emulated()
    reason = reason_no_hardware()
    if reason:
        print(f"the emulator printed {len(ours.splitlines())} numbers; not compared with hardware: {reason}")
        return 0
    result = differences(ours, hardware())
    for name, difference in result.items():
        print(f"{name:20} {difference or 'as on the GPU'}")
    return int(any(result.values()))


if __name__ == "__main__":
    sys.exit(main())
