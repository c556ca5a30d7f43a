"""`fastprimer bench`: ours against eager torch and torch.compile, and against the machine's own roof, in one run.

No time is shown for a wrong result. All contestants are measured in every round, in random order, so that a noisy machine
is noisy for all of them and nobody always finds the memory that another has just freed; medians are compared. The roof is
the best copy bandwidth (bytes read plus bytes written) of an array larger than the last-level cache, measured between the
rounds; `of roof` is the share of it that the operation's least traffic (cases/) reaches. Outputs are freshly allocated, as
they are in use; on the CPU from memory that the process keeps (fastprimer/memory.py), or with --memory fresh from the system,
for everybody alike. On a GPU the L2 cache is cleared before every measurement, and events time the device.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastprimer
from fastprimer.backends import BACKENDS, PREFERENCE, BackendError, declared, unavailable, use_backend
from fastprimer.cases import CASES, Case, Inputs
from fastprimer.generate import natural, positive
from fastprimer.memory import keep_freed_memory
from fastprimer.peers import EAGER, compiled
from fastprimer.testing import compare

PASSES = ("forward", "forward+backward")
COPY_BYTES = 1 << 28
"""Of the array that is copied to measure the roof: well beyond any last-level cache."""


@dataclass
class Result:
    """Median milliseconds of one case, and the ratios that matter."""

    op: str
    case: str
    dtype: str
    measured: str
    backend: str
    wrong: list[str] = field(default_factory=list)
    """The tensors beyond their error budget; then nothing is timed."""
    ours_ms: float = 0.0
    ours_low_ms: float = 0.0
    ours_high_ms: float = 0.0
    eager_ms: float | None = None
    compiled_ms: float | None = None
    of_roof: float | None = None
    roof_gb_per_s: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=sorted(EAGER), action="append", help="only this operation (repeat for more)")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        action="append",
        help="measure this backend (repeat for more); default: every fast one on this device",
    )
    parser.add_argument("--quick", action="store_true", help="the first case of each operation, few rounds")
    parser.add_argument("--rounds", type=positive, help="measurements of each contestant (default 21, quick 11)")
    parser.add_argument("--threads", type=positive, help="torch's CPU threads (default: as torch chooses)")
    parser.add_argument(
        "--memory",
        choices=("kept", "fresh"),
        default="kept",
        help="where large CPU tensors come from: memory that was freed before (default), or fresh pages of the system each time",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the random inputs and of the order (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: machine, versions, results")
    parser.add_argument("--markdown", action="store_true", help="print the table of README.md")
    parser.add_argument("--out", type=Path, help="also write that JSON object to this file")


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = "kept" if args.memory == "kept" and keep_freed_memory() else "fresh"
    rounds = args.rounds or (11 if args.quick else 21)
    jobs = [job for op in args.op or EAGER for job in _jobs(op, device, args)]
    console = Console(stderr=args.json or args.markdown)
    about = machine(device)
    results = []
    with Progress(
        TextColumn("measuring {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task("", total=len(jobs))
        for case, dtype, measured, backend in jobs:
            bar.update(task, description=f"{case} {measured}")
            try:
                results.append(measure(case, dtype, measured, backend, device, rounds, args.seed))
            except BackendError as error:
                console.print(f"[red]fastprimer bench: error: {error}[/red]")
                return 2
            bar.advance(task)
    record = {"machine": about | {"memory": memory}, "results": [asdict(r) for r in results]}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.json:
        print(json.dumps(record))
    elif args.markdown:
        print(markdown(results))
    else:
        console.print(table(results))
        for line in (line for r in results for line in r.wrong):
            console.print(f"[red]{line}[/red]")
    return 1 if any(r.wrong for r in results) else 0


def _jobs(op: str, device: str, args) -> list[tuple]:
    backends = args.backend or [b for b in PREFERENCE[device] if b != "reference" and b in declared(op) and not unavailable(op, b, device)]
    cases = [case for case in CASES if case.op == op and case.bench]
    cases = cases[:1] if args.quick else cases
    dtypes = (torch.float32, torch.bfloat16)
    passes = PASSES[:1] if op == "attention_with_kv_cache" else PASSES
    return [(case, dtype, measured, b) for b in backends for case in cases for dtype in dtypes for measured in passes]


def measure(case: Case, dtype: torch.dtype, measured: str, backend: str, device: str, rounds: int, seed: int) -> Result:
    """Check one case, then time it against its peers."""
    result = Result(case.op, case.name, str(dtype).removeprefix("torch."), measured, backend)
    result.wrong = [str(row) for row in compare(case, dtype, backend, device=device, seed=seed) if not row.ok]
    if result.wrong:
        return result
    arguments = case.arguments(Inputs(dtype, device, seed))
    torch.compiler.reset()
    contestants = {"ours": getattr(fastprimer, case.op), "eager": EAGER[case.op], "compiled": compiled(case.op, device, measured)}
    with use_backend(backend):
        calls = {name: prepared(function, arguments, measured) for name, function in contestants.items()}
        roofs = copies(device, torch.get_num_threads())
        times = interleaved(calls | roofs, device, rounds, seed)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours = sorted(times["ours"])
    result.ours_ms, result.eager_ms, result.compiled_ms = medians["ours"], medians["eager"], medians["compiled"]
    result.ours_low_ms, result.ours_high_ms = ours[len(ours) // 4], ours[-1 - len(ours) // 4]
    work = case.work(arguments)
    moved = work.bytes_forward + (work.bytes_backward if measured == PASSES[1] else 0)
    result.roof_gb_per_s = 2 * COPY_BYTES / min(medians[name] for name in roofs) / 1e6
    result.of_roof = moved / medians["ours"] / 1e6 / result.roof_gb_per_s
    return result


def prepared(function: Callable, arguments: dict, measured: str) -> Callable[[], object]:
    """What is timed: the call, or the call and its gradients, for random gradients of its outputs."""
    if measured == "forward":
        arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return lambda: function(**arguments)
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def differentiable() -> list[torch.Tensor]:
        outputs = function(**arguments)
        return [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]

    upstream = [torch.randn_like(o) for o in differentiable()]
    return lambda: torch.autograd.grad(differentiable(), leaves, upstream)


@functools.cache
def copies(device: str, threads: int) -> dict[str, Callable]:
    """Ways to copy an array larger than the last-level cache; the fastest is the roof. On the CPU the C library stores past the
    caches, which spares the reading of the lines that are written; torch does not."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    calls: dict[str, Callable] = {"copy": lambda: target.copy_(source)}
    if device == "cpu":
        part = COPY_BYTES // threads
        pool = ThreadPoolExecutor(threads)

        def copy_part(i: int) -> None:
            ctypes.memmove(target.data_ptr() + i * part, source.data_ptr() + i * part, part)

        calls["memmove"] = lambda: list(pool.map(copy_part, range(threads)))
    return calls


def interleaved(calls: dict[str, Callable], device: str, rounds: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one of each in every round in random order, after two rounds of warm-up."""
    clock = _gpu_milliseconds if device == "cuda" else _cpu_milliseconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    for i in range(rounds + 2):
        for name in order.sample(list(calls), len(calls)):
            elapsed = clock(calls[name])
            if i >= 2:
                times[name].append(elapsed)
    return times


def _cpu_milliseconds(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _gpu_milliseconds(call: Callable) -> float:
    # Leaves the L2 cache cold, and the device busy until the call has been issued: only its own time is measured.
    torch.empty(1 << 32, dtype=torch.uint8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def machine(device: str) -> dict:
    """Where and with what a result was measured."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "fastprimer": fastprimer.__version__,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def table(results: list[Result]) -> Table:
    """Fits 80 columns; --json has every figure."""
    roof = statistics.median([r.roof_gb_per_s for r in results if r.roof_gb_per_s] or [0])
    one = len({r.backend for r in results}) == 1
    title = f"{results[0].backend + ': ' if one else ''}medians; the roof, a copy in the same run, is {roof:.0f} GB/s"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("case", "dtype", "pass", "ms", "vs eager", "vs compiled", "of roof"):
        shown.add_column(heading, justify="left" if heading in ("case", "dtype", "pass") else "right", no_wrap=True)
    short = {"float32": "fp32", "bfloat16": "bf16", "forward": "fwd", "forward+backward": "fwd+bwd"}
    for r in results:
        name = _shown(r)
        head = name if one else f"{name} {r.backend}", short[r.dtype], short[r.measured]
        shown.add_row(*head, *(["[red]WRONG[/red]"] if r.wrong else [f"{r.ours_ms:.2f}", *_ratios(r)]))
    return shown


def _shown(r: Result) -> str:
    return f"{'decoding' if r.op == 'attention_with_kv_cache' else r.op} {r.case.removeprefix('bench-')}"


def _ratios(r: Result) -> list[str]:
    return [f"{r.eager_ms / r.ours_ms:.1f}x", f"{r.compiled_ms / r.ours_ms:.2f}x", f"{r.of_roof:.0%}"]


def markdown(results: list[Result]) -> str:
    lines = ["| case | dtype | pass | ms | vs eager | vs torch.compile | of roof |", "| --- | --- | --- | --: | --: | --: | --: |"]
    for r in results:
        if not r.wrong:
            head = f"| {_shown(r)} | {r.dtype} | {r.measured} | {r.ours_ms:.2f} | "
            lines.append(head + " | ".join(_ratios(r)) + " |")
    return "\n".join(lines)
