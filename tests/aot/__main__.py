"""PYTHONPATH=tests python -m aot: both gates as one Markdown page, benchmarks/results/kernels.md (`make gate`)."""

import sys

import triton
from rich.console import Console
from rich.progress import track

from aot import cuda_gate, triton_cases, triton_gate
from aot.table import markdown

HEAD = """# What the kernels compile to

Written by `make gate`; the test suite fails on what is in bold here (a spill, more shared memory than there is, an instruction missing).
A cell is registers a thread / KiB of shared memory (of CUDA C++ without what a launch asks for) / how often an instruction stands in
the machine code; several launches are joined by +. HMMA, HGMMA, UTC*MMA and v_mfma are the matrix units of Ampere, Hopper, Blackwell
and AMD, UTMALDG is a load by TMA, LDGSTS one by
cp.async, STG.E.128 a store of 16 bytes.
"""


def main() -> None:
    console = Console(stderr=True)
    compiled = track(triton_cases.CASES, "Triton", console=console)
    triton_table = markdown(("kernel", "case"), (row.cell for case in compiled for row in triton_gate.inspect(case)))
    if reason := cuda_gate.reason_not():
        sys.exit(f"aot: {reason}")
    compiled = track(cuda_gate.CASES, "CUDA C++", console=console)
    cuda_table = markdown(("kernel",), (row.cell for case in compiled for row in cuda_gate.inspect(case)))
    print(f"{HEAD}\n## Triton {triton.__version__}\n\n{triton_table}\n\n## CUDA C++\n\n{cuda_table}")


if __name__ == "__main__":
    main()
