"""PYTHONPATH=tests python -m aot: both gates as one Markdown page, benchmarks/results/kernels.md (`make gate`)."""

import sys

import triton
from rich.console import Console
from rich.progress import track

from aot import cuda_gate, triton_cases, triton_gate
from aot.table import markdown

HEAD = """# What the kernels compile to

Written by `make gate`, which fails on what would be in bold here (a spill, more shared memory than there is, an instruction missing).
A cell is registers a thread / KiB of shared memory (of CUDA C++ without what a launch asks for) / how often an instruction stands in
the machine code; several launches are joined by +. HMMA, HGMMA, UTC*MMA and v_mfma are the matrix units of Ampere, Hopper, Blackwell
and AMD, UTMALDG is a load by TMA, LDGSTS one by
cp.async, STG.E.128 a store of 16 bytes.
"""


def main() -> None:
    if reason := cuda_gate.reason_not():
        sys.exit(f"aot: {reason}")
    console = Console(stderr=True)
    triton_rows = [row for case in track(triton_cases.CASES, "Triton", console=console) for row in triton_gate.inspect(case)]
    cuda_rows = [row for case in track(cuda_gate.CASES, "CUDA C++", console=console) for row in cuda_gate.inspect(case)]
    triton_table = markdown(("kernel", "case"), (row.cell for row in triton_rows))
    cuda_table = markdown(("kernel",), (row.cell for row in cuda_rows))
    print(f"{HEAD}\n## Triton {triton.__version__}\n\n{triton_table}\n\n## CUDA C++\n\n{cuda_table}")
    if faults := [str(row) for row in (*triton_rows, *cuda_rows) if row.faults]:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
