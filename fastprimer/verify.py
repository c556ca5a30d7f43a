"""`fastprimer verify`: every operation on every backend, forward and backward, its error held against its budget.

Each backend is a process of its own (or several, each with a part of its work), for Triton decides when it is imported whether it
interprets. Without a GPU the Triton kernels run in the strict interpreter and the CUDA kernels in the emulator, on small cases; with
one, on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastprimer.backends import BACKENDS, declared, emulator_reason, load_emulator, native_reason, operations, unavailable
from fastprimer.cases import PRODUCTS
from fastprimer.options import natural, thread_count
from fastprimer.terminal import Console
from fastprimer.testing import CASES, DTYPES, compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=operations(), action="append", help="only this operation (repeat for more)")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this backend (repeat for more)")
    parser.add_argument("--seed", type=natural, default=0, help="of the random inputs and gradients (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line: every compared tensor")
    parser.add_argument(
        "--jobs", type=thread_count, help="processes at once (default 2; on a GPU, for which Triton compiles, half the cores)"
    )


@dataclass
class Cell:
    """One operation on one backend: the worst share of the error budget, and what went wrong."""

    op: str
    backend: str
    device: str
    compared: int = 0
    forward: float = 0.0
    backward: float | None = None
    failures: list[str] | None = None
    refused: str = ""

    def add(self, row: dict) -> None:
        self.compared += 1
        if row["gradient"]:
            self.backward = max(self.backward or 0.0, row["share"])
        else:
            self.forward = max(self.forward, row["share"])
        if not row["ok"]:
            self.failures = (self.failures or []) + [row["text"]]


def device_of(backend: str) -> str:
    """Where verify runs a backend: its kernels' own device if there is one, else the CPU."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def how(backend: str, device: str) -> str:
    stand_in = {"triton": "triton (interpreted)", "cuda": "cuda (emulated)"}
    return stand_in.get(backend, backend) if device == "cpu" else f"{backend} (on the GPU)"


def dtypes_of(backend: str, op: str = "") -> tuple[torch.dtype, ...]:
    """What verify judges a backend in: the kernels of products have no float64."""
    wide = backend == "reference" or (backend == "cpu" and op not in PRODUCTS)
    return DTYPES if wide else tuple(d for d in DTYPES if d != torch.float64)


@dataclass(frozen=True)
class Part:
    """One of several equal parts of a backend's work, the first one being number 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Part()


def work_of(op: str, backend: str, part: Part = WHOLE) -> list[tuple]:
    """(case, dtype) of each comparison."""
    work = [(case, dtype) for case in CASES if case.op == op and not case.bench for dtype in dtypes_of(backend, op)]
    return work[part.number - 1 :: part.of]


def results(op: str, backend: str, device: str, seed: int, part: Part) -> Iterator[dict]:
    """In a worker: one object for every compared tensor of op on a backend."""
    for case, dtype in work_of(op, backend, part):
        for row in compare(case, dtype, backend, device=device, seed=seed):
            yield {
                "op": op,
                "backend": backend,
                "device": device,
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "tensor": row.tensor,
                "gradient": row.gradient,
                "share": row.share,
                "ok": row.ok,
                "text": str(row),
            }
        yield {"done": 1}


def worker(backend: str, device: str, seed: int, part: Part, ops: list[str]) -> None:
    if backend == "cuda" and device == "cpu":
        load_emulator()
    for op in ops:
        reason = unavailable(op, backend, device)
        if reason:
            print(json.dumps({"op": op, "refused": reason, "done": len(work_of(op, backend, part))}), flush=True)
            continue
        for result in results(op, backend, device, seed, part):
            print(json.dumps(result), flush=True)


def run(args: argparse.Namespace) -> int:
    ops = list(dict.fromkeys(args.op or operations()))
    names = tuple(dict.fromkeys(args.backend or BACKENDS))
    cells = {(op, b): Cell(op, b, device_of(b)) for b in names for op in ops if b in declared(op)}
    if not cells:
        print(f"fastprimer verify: error: none of {', '.join(ops)} has a kernel on {', '.join(names)}", file=sys.stderr)
        return 2
    total = sum(len(work_of(op, b)) for op, b in cells)
    console = Console(stderr=args.json)
    columns = TextColumn("verifying {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    jobs = args.jobs or (max(2, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 2)
    parts = max(1, jobs // 2)  # of each backend: two of them have most of the work
    work = [(b, [op for op, of in cells if of == b], Part(n, parts)) for n in range(1, parts + 1) for b in names]
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(jobs) as pool, _workers_end_too(pool):
        task = progress.add_task(" ", total=total)
        list(pool.map(lambda item: _drive(*item, args, cells, progress, task), work))
    if not args.json:
        console.print(_table(cells))
        for cell in cells.values():
            for failure in (cell.failures or [])[:10]:
                console.print(failure, style="red", markup=False)
    for cell in cells.values():
        if cell.refused:  # with --json too, on stderr: nothing compared is nothing proven
            console.print(f"{cell.op} on {cell.backend}: {cell.refused}", markup=False)
    if any(cell.failures for cell in cells.values()):
        return 1
    return 2 if args.backend and any(cell.refused for cell in cells.values()) else 0  # what was asked for by name is not proven


def stream(backend: str, ops: list[str], seed: int, part: Part = WHOLE) -> Iterator[dict]:
    """Run a backend's worker on its work or a part of it; yields its `results`, or {"op", "refused", "done"} for what is not here.

    Raises RuntimeError if the worker did not end well.
    """
    device = device_of(backend)
    reason = emulator_reason() if backend == "cuda" and device == "cpu" else native_reason() if backend == "cpu" else ""
    if reason:
        for op in ops:
            yield {"op": op, "refused": reason, "done": len(work_of(op, backend, part))}
        return
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if backend == "triton" and device == "cpu" else {})
    command = [sys.executable, "-m", "fastprimer.verify", backend, device, str(seed), str(part), *ops]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        _workers.append(process)
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            _workers.remove(process)
    if process.returncode != 0:
        raise RuntimeError(f"verifying {backend} ended with exit status {process.returncode}; its error is printed above")


_workers: list[subprocess.Popen] = []


@contextlib.contextmanager
def _workers_end_too(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Where the block ends early, by Ctrl-C or SIGTERM (and with them this command), no worker goes on and no other one begins."""
    main = threading.current_thread() is threading.main_thread()  # only there may signals be handled
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if main else None
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_workers):
            process.terminate()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


_adding = threading.Lock()


def _drive(backend: str, ops: list[str], part: Part, args, cells, progress, task) -> None:
    """Take in what a backend's worker finds."""
    try:
        for result in stream(backend, ops, args.seed, part) if ops else ():
            if "refused" in result:
                cells[result["op"], backend].refused = result["refused"]
            elif "share" in result:
                with _adding:  # other parts add to the same cells
                    cells[result["op"], backend].add(result)
                if args.json:
                    sys.stdout.write(json.dumps(result) + "\n")  # one call: several report at once
            progress.update(task, advance=result.get("done", 0), description=backend)
    except RuntimeError as error:
        with _adding:
            for op in ops:
                cells[op, backend].failures = (cells[op, backend].failures or []) + [str(error)]


def _table(cells: dict[tuple[str, str], Cell]) -> Table:
    title = "error / budget, the worst of all cases, dtypes and tensors: at most 1 is right"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("operation", "backend", "compared", "forward", "backward", ""):
        table.add_column(heading, justify="left" if heading in ("operation", "backend", "") else "right", no_wrap=True)
    for (op, backend), cell in sorted(cells.items(), key=lambda item: operations().index(item[0][0])):
        if cell.refused:
            table.add_row(op, how(backend, cell.device), "", "", "", "[yellow]not here[/yellow]")
            continue
        verdict = "[red]WRONG[/red]" if cell.failures else "[green]ok[/green]"
        backward = "-" if cell.backward is None else f"{cell.backward:.2f}"
        table.add_row(op, how(backend, cell.device), str(cell.compared), f"{cell.forward:.2f}", backward, verdict)
    return table


if __name__ == "__main__":
    try:
        worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), Part.parse(sys.argv[4]), sys.argv[5:])
    except KeyboardInterrupt:  # of which its parent speaks
        sys.exit(130)
    except BrokenPipeError:  # its parent is gone
        sys.stderr.close()
