"""How the cost of attention grows with the length of a sequence: time, and memory beyond inputs and outputs.

    python benchmarks/growth.py --out benchmarks/results/growth-cpu.md

Causal attention must grow with S^2 in time, a sliding window with S, and both with S in memory, where plain attention holds
S x S numbers per head. Times are medians of interleaved calls, and the exponent is that of the last two lengths. Memory is the
highest resident set (on a GPU: allocated) during a call less what was there before it, in a process of its own; the outputs
are in it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.progress import track

import fastprimer
from fastprimer.benchmark.rows import machine
from fastprimer.benchmark.timing import BOTH, FORWARD, interleaved, prepared
from fastprimer.cases import Inputs, attention_case
from fastprimer.memory import keep_freed_memory
from fastprimer.peers import EAGER

LENGTHS = (512, 1024, 2048, 4096, 8192)
LONGEST_OF_PLAIN = 4096
"""Plain attention with a mask needs seconds and gigabytes beyond."""
MASKS = {"causal": {"causal": True}, "window of 256": {"causal": True, "window": (255, None)}}
CONTESTANTS = {"fastprimer": fastprimer.attention, "SDPA": EAGER["attention"]}


def call_of(contestant: str, mask: str, S: int, dtype: torch.dtype, measured: str, device: str):
    case = attention_case("growth", (1, S, 8, 64), (1, S, 2, 64), **MASKS[mask])
    arguments = case.arguments(Inputs(dtype, device, 0)) | {"return_lse": False}
    return prepared(CONTESTANTS[contestant], arguments, measured)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def extra_memory_of_call(call, device: str) -> int:
    """Bytes that one call needs at most beyond what is there before it, its results included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS:")
    result = call()
    peak = resident("VmHWM:")
    del result
    return peak - before


def extra_memory(contestant: str, mask: str, S: int, dtype: torch.dtype, measured: str, device: str) -> int:
    """Run in a process of its own: bytes that one call needs beyond what was there before it."""
    call_of(contestant, mask, 256, dtype, measured, device)()  # what is loaded, compiled and started once
    call = call_of(contestant, mask, S, dtype, measured, device)
    return extra_memory_of_call(call, device)


def measured_apart(file: str, *arguments) -> float:
    """MB that `file --measure ...` prints in bytes: of a process of its own."""
    command = [sys.executable, file, "--measure", *(str(a).removeprefix("torch.") for a in arguments)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: {child.stderr}")
    return float(child.stdout) / 1e6


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float:
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def rows(dtype: torch.dtype, measured: str, device: str, rounds: int):
    """Lines of the table: for each mask and contestant the time and the memory at every length."""
    for mask in MASKS:
        pairs = [(name, S) for name in CONTESTANTS for S in LENGTHS if name == "fastprimer" or S <= LONGEST_OF_PLAIN]
        times = interleaved({pair: call_of(pair[0], mask, pair[1], dtype, measured, device) for pair in pairs}, device, rounds, 0)
        medians = {pair: statistics.median(t) for pair, t in times.items()}
        memory = {pair: measured_apart(__file__, pair[0], mask, pair[1], dtype, measured, device) for pair in pairs}
        for name in CONTESTANTS:
            mine = [S for S in LENGTHS if (name, S) in medians]
            for unit, values in (("ms", medians), ("MB", memory)):
                cells = [f"{values[name, S]:.1f}" if S in mine else "" for S in LENGTHS]
                growth = exponent(*((S, max(values[name, S], 1e-3)) for S in mine[-2:]))
                yield f"| {mask} | {measured} | {str(dtype)[6:]} | {name} | {unit} | {' | '.join(cells)} | {growth:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each call (default 7)")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        contestant, mask, S, dtype, measured, device = args.measure
        print(extra_memory(contestant, mask, int(S), getattr(torch, dtype), measured, device))
        return
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    lines = [f"Attention's growth with S: B 1, H 8/2, D 64, on {about['device']}, torch {about['torch']}, commit {about['commit']}.", ""]
    lines += [f"| mask | pass | dtype | | | {' | '.join(f'S {S}' for S in LENGTHS)} | exponent |", "| " + "--- | " * (6 + len(LENGTHS))]
    for dtype, measured in track([(d, m) for d in (torch.float32, torch.bfloat16) for m in (FORWARD, BOTH)], "measuring"):
        lines += rows(dtype, measured, device, args.rounds)
    table = "\n".join(lines) + "\n"
    print(table)
    if args.out:
        args.out.write_text(table)


if __name__ == "__main__":
    main()
