"""The experts against those of transformers: time of forward and backward, and the memory that they take beyond what is there before.

    python benchmarks/experts.py --out benchmarks/results/experts-cpu.md

Contestants are `fastprimer.moe` and transformers' `MixtralExperts`, in its "eager" form (a loop over experts) and with "grouped_mm", on
the same weights and the same routing, checked against each other first. Times are medians of interleaved calls. Memory is the highest
resident set (on a GPU: allocated) during one forward and backward less what was there before, in a process of its own: saved
activations, gradients and scratch are in it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from growth import extra_memory_of_call, measured_apart
from rich.progress import track
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fastprimer
from fastprimer.benchmark.rows import machine
from fastprimer.benchmark.timing import interleaved
from fastprimer.generate import positive
from fastprimer.memory import keep_freed_memory

SHAPES = {
    "Mixtral-like": (1024, 512, 1024, 8, 2),
    "DeepSeek-like": (1024, 512, 128, 64, 6),
}
"""N, C, F, E, K"""
CONTESTANTS = ("fastprimer", "grouped_mm", "eager")
DTYPES = ("float32", "bfloat16")


class Problem:
    """Weights, tokens and routing of one shape."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, device: str):
        N, C, F, E, K = sizes
        generator = torch.Generator().manual_seed(0)

        def random(*size, scale=1.0, dtype=dtype):
            return (scale * torch.randn(size, generator=generator)).to(dtype).to(device)

        self.config = MixtralConfig(hidden_size=C, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
        self.x, self.dy, self.weights = random(N, C).requires_grad_(), random(N, C), random(N, K, dtype=torch.float32).requires_grad_()
        self.experts = torch.rand(N, E, generator=generator).topk(K, -1).indices.to(device)
        self.gate_up, self.down = (random(*size, scale=0.05).requires_grad_() for size in ((E, 2 * F, C), (E, C, F)))

    def function_of(self, contestant: str):
        """y of (x, gate_up, down, weights)."""
        if contestant == "fastprimer":
            return lambda: fastprimer.moe(self.x, self.gate_up, self.down, self.weights, self.experts)
        self.config._experts_implementation = contestant
        with torch.device("meta"):
            module = MixtralExperts(self.config)
        module.gate_up_proj, module.down_proj = torch.nn.Parameter(self.gate_up), torch.nn.Parameter(self.down)
        self.gate_up, self.down = module.gate_up_proj, module.down_proj
        return lambda: module(self.x, self.experts, self.weights.to(self.x.dtype))

    def call_of(self, contestant: str):
        """Forward and backward."""
        function = self.function_of(contestant)
        leaves = [self.x, self.gate_up, self.down, self.weights]
        return lambda: torch.autograd.grad(function(), leaves, self.dy)


def extra_memory(contestant: str, shape: str, dtype: torch.dtype, device: str) -> int:
    """Run in a process of its own."""
    call = Problem(SHAPES[shape], dtype, device).call_of(contestant)
    Problem((16, 64, 64, 4, 2), dtype, device).call_of(contestant)()  # what is loaded and started once
    return extra_memory_of_call(call, device)


def extra_memory_of(contestant: str, shape: str, dtype: torch.dtype, device: str) -> float:
    """MB."""
    return measured_apart(__file__, contestant, shape, dtype, device)


def rows(shape: str, dtype: torch.dtype, device: str, rounds: int):
    """Lines of the table."""
    calls = {contestant: Problem(SHAPES[shape], dtype, device).call_of(contestant) for contestant in CONTESTANTS}
    for ours, theirs in zip(calls["fastprimer"](), calls["grouped_mm"](), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        if error > 8 * torch.finfo(dtype).eps:
            raise RuntimeError(f"{shape} {dtype}: results differ by {float(error):.1e}")
    medians = {name: statistics.median(t) for name, t in interleaved(calls, device, rounds, 0).items()}
    memory = {name: extra_memory_of(name, shape, dtype, device) for name in CONTESTANTS}
    N, C, F, _, K = SHAPES[shape]
    for name in CONTESTANTS:
        ratios = f"{medians[name] / medians['fastprimer']:.2f}x", f"{memory['fastprimer'] / memory[name]:.0%}"
        rate = 18 * N * K * C * F / medians[name] / 1e6
        cells = f"{medians[name]:.1f}", f"{rate:.0f}", ratios[0], f"{memory[name]:.0f}", ratios[1]
        yield f"| {shape} {SHAPES[shape]} | {str(dtype)[6:]} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=9, help="measurements of each call (default 9)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default both; without AVX-512 the peers take minutes in bfloat16")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        contestant, shape, dtype, device = args.measure
        print(extra_memory(contestant, shape, getattr(torch, dtype), device))
        return
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    lines = [
        f"Experts, forward and backward, (N, C, F, E, K) as given, on {about['device']}, torch {about['torch']}, commit {about['commit']}.",
        "Ratios: a contestant's time to ours, and our memory to its.",
        "",
        "| shape | dtype | contestant | ms | GFLOP/s | time / ours | extra MB | ours / its |",
        "| --- | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for shape, dtype in track([(s, d) for s in SHAPES for d in args.dtype or DTYPES], "measuring"):
        lines += rows(shape, getattr(torch, dtype), device, args.rounds)
    table = "\n".join(lines) + "\n"
    print(table)
    if args.out:
        args.out.write_text(table)


if __name__ == "__main__":
    main()
