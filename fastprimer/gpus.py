"""Which GPUs and drivers a build of the CUDA kernels, and Triton's tiles, are for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

LARGE_TILES = ("attention", "attention_with_kv_cache")
"""Operations whose Triton tiles need the 99 KiB of shared memory that a block has since Ampere."""


def capabilities() -> list[tuple[int, int]]:
    """Of every GPU that torch sees."""
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def no_room(op: str) -> str:
    """Why Triton cannot serve op on the GPUs here, or ""."""
    old = [capability for capability in capabilities() if capability < (8, 0)]
    if not old or op not in LARGE_TILES or torch.version.hip is not None:
        return ""
    return f"its tiles need the shared memory of sm_80 and later, a GPU here is {_named(old[0])}"


def not_served(architectures: Sequence[str], nvcc: str) -> str:
    """Why what an nvcc of this version built for these architectures does not serve the GPUs here, or ""."""
    if not architectures:
        return "the native library was built without its CUDA kernels" + (f", for nvcc {nvcc} is too old" if nvcc else "")
    version, driver = tuple(int(part) for part in nvcc.split(".")[:2]), _cuda_of_the_driver()
    of_driver = "a driver of CUDA {}.{}".format(*driver)
    if version[0] > driver[0]:
        return f"its kernels were built by nvcc {nvcc}, which {of_driver} does not run"
    for capability in capabilities():
        if not any(runs_on(architecture, capability) for architecture in architectures):
            return f"its kernels were built for sm_{', sm_'.join(architectures)}, a GPU here is {_named(capability)}"
        compiled = any(runs_on(architecture, capability, compiled=True) for architecture in architectures)
        if not compiled and version > driver:  # machine code runs on every driver of the major version, PTX on those that know its own
            found = f"it has no machine code for {_named(capability)}, and PTX by nvcc {nvcc}"
            return f"{found}, which {of_driver} cannot compile"
    return ""


def runs_on(architecture: str, capability: tuple[int, int], *, compiled: bool = False) -> bool:
    """Whether what CMake built for "80" (machine code of its major version, and PTX for every later GPU) or "90a" (that one alone) runs on
    a GPU; with `compiled`, as machine code."""
    built = divmod(int(architecture.rstrip("a")), 10)
    if architecture.endswith("a"):
        return capability == built
    return capability >= built and (not compiled or capability[0] == built[0])


def _cuda_of_the_driver() -> tuple[int, int]:
    """The newest version of CUDA that the driver serves."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # which a torch without CUDA lacks
    return (sys.maxsize, 0) if version is None else (version() // 1000, version() % 1000 // 10)


def _named(capability: tuple[int, int]) -> str:
    return "sm_{}{} (CUDA_VISIBLE_DEVICES hides it)".format(*capability)
