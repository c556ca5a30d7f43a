"""`fastprimer bench`: ours against its peers, and against the machine's own roof, in one run.

No time is shown for a wrong result (the error budget of testing.py), nor for a peer that computes something else. What is measured:
benchmark/jobs.py (operations: measure.py, whole models: models.py, cost over size: growth.py); how: contest.py and timing.py; the
roofs: roofs.py; commit against commit: comparison.py. Outputs are
freshly allocated, as they are in use; on the CPU from memory that the process keeps (fastprimer/memory.py), or with --memory
fresh from the system, for everybody alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastprimer.backends import BACKENDS, BackendError
from fastprimer.benchmark import comparison, revision, tables
from fastprimer.benchmark.contest import Settings
from fastprimer.benchmark.jobs import OPS, Choice, jobs
from fastprimer.benchmark.models import MODEL_PEERS
from fastprimer.benchmark.rows import ALL_PASSES, DTYPES, Results, ResultsError, Row, check_writable, machine
from fastprimer.memory import keep_freed_memory
from fastprimer.options import natural, positive, thread_count
from fastprimer.peers import PEERS
from fastprimer.terminal import Console

KNOWN_PEERS = tuple(dict.fromkeys((*PEERS, *MODEL_PEERS)))


def peer_names(text: str) -> list[str]:
    """An argparse type: names with commas between them, or "none"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [] if names == ["none"] else names
    for name in names:
        if name not in KNOWN_PEERS:
            raise argparse.ArgumentTypeError(f"expected names of {', '.join(KNOWN_PEERS)} with commas between them, or none; got {name!r}")
    return names


def percent(text: str) -> float:
    """An argparse type: percent as a share."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected percent, a number of at least 0, got {text!r}")
    return value / 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--op", choices=OPS, action="append", help="only this operation, or whole models (repeat for more)")
    what.add_argument("--case", default="", metavar="TEXT", help="only the case of this name, or else those with it in their names")
    what.add_argument(
        "--backend",
        choices=BACKENDS,
        action="append",
        help="measure this backend (repeat for more); default: every fast one on this device",
    )
    what.add_argument(
        "--peers", type=peer_names, help=f"only these, with commas between them, of {', '.join(KNOWN_PEERS)}; or none (default: all)"
    )
    what.add_argument("--pass", dest="passes", choices=ALL_PASSES, action="append", help="only this pass (repeat for more)")
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="this one (repeat for more; default float32 and bfloat16, but only float32 where there are matrix products on a "
        "processor without instructions for half types: peers take minutes there)",
    )
    what.add_argument("--growth", action="store_true", help="cost over size (S, T, C, E, V) and over threads, instead of the usual cases")
    what.add_argument("--quick", action="store_true", help="the first case of each operation, no backward pass by itself, few rounds")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=positive, help="measurements of each contestant (default 21, quick 11)")
    how.add_argument("--threads", type=thread_count, help="torch's CPU threads (default: as torch chooses)")
    how.add_argument(
        "--memory",
        choices=("kept", "fresh"),
        default="kept",
        help="where large CPU tensors come from: memory that was freed before (default), or fresh pages of the system each time",
    )
    how.add_argument("--seed", type=natural, default=0, help="of the random inputs and of the order (default 0)")
    shown = parser.add_argument_group("what is done with it")
    shown.add_argument("--json", action="store_true", help="print one JSON object: machine, versions, every measurement")
    shown.add_argument("--markdown", action="store_true", help="print the table of README.md")
    shown.add_argument("--out", type=Path, help="also write that JSON object to this file (while measuring: to FILE.part)")
    shown.add_argument(
        "--compare",
        metavar="BASE",
        help="against an earlier run (its JSON file), or against a git revision, measured by turns with the working tree; "
        "exit status 1 if something became slower",
    )
    shown.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: show, or compare, what this JSON file holds")
    shown.add_argument("--threshold", type=percent, default=0.05, help="percent that --compare lets pass (default 5)")
    shown.add_argument("--turns", type=positive, default=3, help="runs of each side when --compare names a revision (default 3)")


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except (BackendError, ResultsError, revision.RevisionError, ValueError) as error:
        print(f"fastprimer bench: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    console = Console(stderr=args.json or args.markdown, highlight=False)
    old, commit = _base(args.compare)
    if commit and args.results:
        raise ResultsError(
            f"argument --compare: expected a file of results to hold --results against, got the git revision {args.compare!r}"
        )
    if args.out:  # not only after minutes of measuring
        check_writable(args.out)
        check_writable(_part(args.out))
    found = None
    if commit:
        turns = revision.measure_by_turns(commit, _options(args), args.turns, lambda text: console.print(text, style="dim"))
        found, new = comparison.compare_turns(turns, args.threshold)
    elif args.results:
        new = Results.read(args.results)
    else:
        new = _measure_all(args, console)
    if old:
        found = comparison.compare_results(old, new, args.threshold)
    if args.out:
        new.write(args.out)
        _part(args.out).unlink(missing_ok=True)
    if args.json:
        record = json.loads(new.to_json())
        print(json.dumps(record | ({"comparison": found.to_record()} if found else {})))
    elif args.markdown:
        print(tables.everything(new.rows))
    elif args.results and not found:
        _show_all(new.rows, console)
    if found:
        console.print(comparison.table(found))
        for line in comparison.describe(found):
            console.print(line, markup=False, soft_wrap=True)
    return 1 if any(row.wrong for row in new.rows) or (found and found.regressed) else 0


def _base(base: str | None) -> tuple[Results | None, str]:
    """What --compare names: (results of a file, "") or (None, a commit)."""
    if base is None:
        return None, ""
    if Path(base).is_file():
        return Results.read(Path(base)), ""
    commit = "" if base.endswith(".json") else revision.resolve(base)
    if not commit:
        raise ResultsError(f"argument --compare: expected a file of results or a git revision, got {base!r}, which is neither")
    return None, commit


def _options(args: argparse.Namespace) -> list[str]:
    """What a child process is told to measure. Plain eager torch tells how much two runs differ by themselves."""
    options = [
        "--peers",
        "eager" if args.peers is None else ",".join(args.peers) or "none",
        "--memory",
        args.memory,
        "--seed",
        str(args.seed),
    ]
    for flag, values in (("--op", args.op), ("--backend", args.backend), ("--pass", args.passes), ("--dtype", args.dtype)):
        options += [word for value in values or () for word in (flag, value)]
    for flag, value in (("--rounds", args.rounds), ("--threads", args.threads), ("--case", args.case)):
        options += [flag, str(value)] if value else []
    return options + [flag for flag, given in (("--quick", args.quick), ("--growth", args.growth)) if given]


def _measure_all(args: argparse.Namespace, console: Console) -> Results:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = "kept" if args.memory == "kept" and keep_freed_memory() else "fresh"
    settings = Settings(device, args.rounds or (11 if args.quick else 21), args.seed, args.peers)
    todo = jobs(device, Choice(args.op, args.backend, args.passes, args.dtype, args.quick, args.growth, args.case))
    about = machine(device) | {"memory": memory}
    rows: list[Row] = []
    with _live(console, sum(job.rows for job in todo), len({job.backend for job in todo}) > 1) as (announce, show):
        for job in todo:
            announce(f"{job.what} {tables.SHORT[job.dtype]}")
            for row in job.measure(settings):
                rows.append(row)
                show(row)
                if args.out:
                    Results(about, rows).write(_part(args.out))
    _epilogue(rows, console)
    return Results(about, rows)


def _part(out: Path) -> Path:
    """What stays of a run that is cut off, beside the results of an earlier one."""
    return out.with_name(f"{out.name}.part")


@contextlib.contextmanager
def _live(console: Console, total: int, with_backend: bool) -> Iterator[tuple[Callable, Callable]]:
    """(announce, show): the table grows line by line above a progress bar."""
    columns = TextColumn("measuring {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console.print(tables.heading())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def show(row: Row) -> None:
            bar.console.print(tables.live_line(row, with_backend), soft_wrap=True)
            bar.advance(task)

        yield lambda description: bar.update(task, description=description), show


def _show_all(rows: list[Row], console: Console) -> None:
    console.print(tables.heading())
    for row in rows:
        console.print(tables.live_line(row, len({r.backend for r in rows}) > 1), soft_wrap=True)
    _epilogue(rows, console)


def _epilogue(rows: list[Row], console: Console) -> None:
    console.print(tables.summary(rows), markup=False, soft_wrap=True)
    for line in tables.exponents(rows):
        console.print(line, markup=False, soft_wrap=True)
    for line in tables.left_out(rows):
        console.print(f"not timed: {line}", style="yellow", markup=False, soft_wrap=True)
    for line in dict.fromkeys(problem for row in rows for problem in row.wrong):
        console.print(line, style="red", markup=False, soft_wrap=True)
