"""The package map, and the native build: CMake does the work (CMakeLists.txt), this file finds what it needs.

Where torch, CMake or a C++ compiler is missing, fastprimer installs without its native library and runs on the reference
(and Triton) backends; the reason is recorded in fastprimer/_native.json, which `fastprimer doctor` shows. A compile error,
in contrast, fails the installation. The CUDA kernels are left out beside a torch without CUDA, unless they are asked for. Extra CMake
options go into the usual CMAKE_ARGS, for example CMAKE_ARGS="-DFASTPRIMER_CUDA_ARCHITECTURES=90a" pip install .
"""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch() -> Path | None:
    """Folder of the installed torch package, found as files: pip's isolated builds cannot import it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(folder) / "torch" for folder in (*site.getsitepackages([sys.prefix, sys.base_prefix]), site.getusersitepackages())]
    return next((f for f in folders if (f / "include/torch/csrc/stable/library.h").exists()), None)


def missing_tool(torch: Path | None) -> str:
    """Why the native library cannot be built here, or ""."""
    if "-DFASTPRIMER_NATIVE=OFF" in os.environ.get("CMAKE_ARGS", ""):
        return "the build was told to leave it out (FASTPRIMER_NATIVE=OFF)"
    if torch is None:
        return (
            "torch >= 2.10 was not found when fastprimer was built: install it, then reinstall fastprimer, "
            "with --no-build-isolation if it still is not found"
        )
    if shutil.which("cmake") is None:
        return "CMake was not found when fastprimer was built"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not installed when fastprimer was built"
    if not any(shutil.which(shlex.split(cxx)[0]) for cxx in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return "no C++ compiler was found when fastprimer was built"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's own headers (python3-dev) were not found when fastprimer was built"
    return ""


class CMakeBuild(build_ext):
    def run(self):
        in_source = self.inplace or getattr(self, "editable_mode", False)
        destination = (ROOT if in_source else Path(self.build_lib).resolve()) / "fastprimer"
        destination.mkdir(parents=True, exist_ok=True)
        for stale in destination.glob("_*.so"):
            stale.unlink()
        torch = find_torch()
        reason = missing_tool(torch)
        if reason and "-DFASTPRIMER_CUDA=ON" in os.environ.get("CMAKE_ARGS", ""):
            sys.exit(f"fastprimer: FASTPRIMER_CUDA=ON was asked for, but {reason}")
        if reason:
            print(f"fastprimer: building without the native library: {reason}", file=sys.stderr)
        else:
            self.build_native(torch, destination, emulator=in_source and sys.platform == "linux")
        (destination / "_native.json").write_text(json.dumps({"reason": reason}) + "\n")

    def build_native(self, torch: Path, destination: Path, emulator: bool) -> None:
        import pybind11

        configure = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"] if shutil.which("ninja") else []
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DFASTPRIMER_TORCH={torch}", f"-DFASTPRIMER_EMULATOR={'ON' if emulator else 'OFF'}"]
        asked = os.environ.get("CMAKE_ARGS", "")
        if "FASTPRIMER_CUDA" not in asked and not (torch / "lib/libtorch_cuda.so").exists():
            configure += ["-DFASTPRIMER_CUDA=OFF"]  # minutes for kernels that this torch cannot call
        configure += shlex.split(asked)
        # One folder per configuration: what CMake remembers of another one does not hold here.
        build = ROOT / "build" / hashlib.sha256("\n".join(configure).encode()).hexdigest()[:12]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(destination)], check=True)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    packages=["fastprimer", "fastprimer.benchmark", "fastprimer.cases", "fastprimer.integrations", "fastprimer.ops", "fastprimer.kernels"],
    package_dir={"fastprimer": "fastprimer", "fastprimer.kernels": "kernels"},
    ext_modules=[Extension("fastprimer._native", [])],
    cmdclass={"build_ext": CMakeBuild},
)
