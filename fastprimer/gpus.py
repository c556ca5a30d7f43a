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
    if int(nvcc.split(".")[0]) > _cuda_of_the_driver():
        return f"its kernels were built by nvcc {nvcc}, the driver is of CUDA {_cuda_of_the_driver()}"
    for capability in capabilities():
        if not any(runs_on(architecture, capability) for architecture in architectures):
            return f"its kernels were built for sm_{', sm_'.join(architectures)}, a GPU here is {_named(capability)}"
    return ""


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether what CMake built for "80" (machine code, and PTX for every later GPU) or "90a" (that one alone) runs on a GPU."""
    built = divmod(int(architecture.rstrip("a")), 10)
    return capability == built if architecture.endswith("a") else capability >= built


def _cuda_of_the_driver() -> int:
    """The newest major version of CUDA that the driver serves."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # which a torch without CUDA lacks
    return sys.maxsize if version is None else version() // 1000


def _named(capability: tuple[int, int]) -> str:
    return "sm_{}{} (CUDA_VISIBLE_DEVICES hides it)".format(*capability)
