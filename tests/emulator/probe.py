"""Does the emulator lay out matrix fragments, copies, shuffles and conversions as the hardware does?

    PYTHONPATH=tests python -m emulator.probe

builds the probes for the emulator and, where there is a GPU and nvcc, for the GPU, runs both and compares every number.
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

PROBES = {"native": HERE / "probe.cu", "sm_90a": HERE / "probe_hopper.cu"}
"""{what nvcc compiles for: a probe}; those for one architecture run on no other."""

DRIVER_MAJOR, DRIVER_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def emulated(source: Path, tree: Path = ROOT) -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(folder) / "probe", [source], "plain", tree)
        return subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout


def capability() -> tuple[int, int] | None:
    """The compute capability of the first GPU, if there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    driver.cuDeviceGetAttribute(ctypes.byref(major), DRIVER_MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), DRIVER_MINOR, 0)
    return major.value, minor.value


def reason_no_hardware(architecture: str = "native") -> str:
    """Why the probe for an architecture cannot run on a GPU here, or ""."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    found = capability()
    if found is None:
        return "no NVIDIA GPU, or no driver"
    there = "sm_{}{}a".format(*found)
    return "" if architecture in ("native", there) else f"the GPU is {there}, not {architecture}"


def hardware(architecture: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        folders = [f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / HERE}"]
        number = architecture.removeprefix("sm_")  # -arch=sm_90a would also compile for sm_90, which has no wgmma
        target = f"-gencode=arch=compute_{number},code={architecture}" if number != architecture else f"-arch={architecture}"
        command = ["nvcc", "-std=c++17", "-O2", target, *folders, ROOT / PROBES[architecture], "-o", program]
        subprocess.run(command, check=True)
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
    failed = False
    for architecture, source in PROBES.items():
        ours = emulated(source)
        reason = reason_no_hardware(architecture)
        if reason:
            print(f"{source.name}: the emulator printed {len(ours.splitlines())} numbers; not compared with hardware: {reason}")
            continue
        for name, difference in differences(ours, hardware(architecture)).items():
            print(f"{name:28} {difference or 'as on the GPU'}")
            failed |= bool(difference)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
