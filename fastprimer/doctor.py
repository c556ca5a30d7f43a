"""`fastprimer doctor`: what this installation can do, and the reason for everything that it cannot."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from importlib.util import find_spec

import torch
from rich.table import Table

import fastprimer
from fastprimer.backends import (
    BACKENDS,
    backends,
    build_info,
    declared,
    emulator_reason,
    native_reason,
    operations,
)
from fastprimer.terminal import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    form.add_argument("--markdown", action="store_true", help="print the table of README.md: which kernels are written")


def facts() -> dict[str, str]:
    """What is installed and built, in the order in which it is shown."""
    build = build_info()
    sets = ", ".join(build.get("cpu_instruction_sets", []))
    cuda = ", ".join(f"sm_{a}" for a in build.get("cuda_architectures", [])) or "built without CUDA"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()} (sm_{''.join(map(str, torch.cuda.get_device_capability()))})"
    else:
        gpu = "none that this torch sees"
    native = native_reason()
    return {
        "fastprimer": fastprimer.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy")},
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "GPU": gpu,
        "native library": f"not there: {native}" if native else f"built with {build.get('compiler', 'an unknown compiler')}",
        "CPU instruction set": "" if native else f"{build.get('cpu_instruction_set_in_use', 'unknown')} (built: {sets})",
        "CUDA kernels": "" if native else cuda,
        "CUDA emulator": emulator_reason() or "there",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def markdown() -> str:
    """The operation x backend table of README.md, from the chapters' own declarations."""
    lines = ["| operation | " + " | ".join(BACKENDS) + " |", "| --- |" + " --- |" * len(BACKENDS)]
    lines += [f"| `{op}` | " + " | ".join("yes" if b in declared(op) else "" for b in BACKENDS) + " |" for op in operations()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    if args.markdown:
        print(markdown())
        return 0
    found = {name: value for name, value in facts().items() if value}
    cells = backends()
    if args.json:
        print(json.dumps({"facts": found, "backends": cells}))
        return 0
    console = Console()
    table = Table("", "this machine", title="fastprimer doctor", title_justify="left")
    for name, value in found.items():
        table.add_row(name, value)
    console.print(table)
    console.print(backend_table(cells))
    reasons = sorted({(b, reason) for op in operations() for b, reason in cells[op].items() if reason and b in declared(op)})
    for backend, reason in reasons:
        console.print(f"[bold]{backend}[/bold] is not available here: {reason}")
    stand_ins = {
        "the Triton kernels in Triton's interpreter": find_spec("triton") is not None,
        "the CUDA kernels in the emulator": not emulator_reason(),
    }
    if not torch.cuda.is_available() and any(stand_ins.values()):
        console.print(f"Without a GPU, `fastprimer verify` runs {' and '.join(what for what, there in stand_ins.items() if there)}.")
    return 0


def backend_table(cells: dict[str, dict[str, str]]) -> Table:
    table = Table("operation", *BACKENDS, title="operation x backend", title_justify="left")
    for op in operations():
        marks = [
            "-" if b not in declared(op) else "[green]ready[/green]" if not cells[op][b] else "[yellow]not here[/yellow]" for b in BACKENDS
        ]
        table.add_row(op, *marks)
    return table
