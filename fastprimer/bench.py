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
from fastprimer.benchmark.jobs import OPS, Choice, Job, check_peers, jobs
from fastprimer.benchmark.models import MODEL_PEERS
from fastprimer.benchmark.rows import ALL_PASSES, DTYPES, Results, ResultsError, Row, check_writable, machine
from fastprimer.memory import keep_freed_memory
from fastprimer.options import natural, positive, thread_count
from fastprimer.peers import PEERS
from fastprimer.terminal import Console

KNOWN_PEERS = tuple(dict.fromkeys((*PEERS, *MODEL_PEERS)))
MEASURING = ("op", "case", "backend", "peers", "passes", "dtype", "growth", "quick", "rounds", "threads", "memory", "seed")
"""The arguments that --results, which measures nothing, does not take."""
THRESHOLD, TURNS = 0.05, 3


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
    what.add_argument("--case", metavar="TEXT", help="only the case of this name, or else those with it in their names")
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
    given = {"action": "store_true", "default": None}  # None, as where any other argument is not given
    what.add_argument("--growth", help="cost over size (S, T, C, E, V) and over threads, instead of the usual cases", **given)
    what.add_argument("--quick", help="the first case of each operation, no backward pass by itself, few rounds", **given)
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=positive, help="measurements of each contestant (default 21, quick 11)")
    how.add_argument("--threads", type=thread_count, help="torch's CPU threads (default: as torch chooses)")
    how.add_argument(
        "--memory",
        choices=("kept", "fresh"),
        help="where large CPU tensors come from: memory that was freed before (default), or fresh pages of the system each time",
    )
    how.add_argument("--seed", type=natural, help="of the random inputs and of the order (default 0)")
    shown = parser.add_argument_group("what is done with it")
    shown.add_argument("--json", action="store_true", help="print one JSON object: machine, versions, every measurement")
    shown.add_argument("--markdown", action="store_true", help="print the table of README.md")
    shown.add_argument("--out", type=Path, help="also write that JSON object to this file (while measuring: to FILE.part)")
    shown.add_argument(
        "--compare",
        metavar="BASE",
        help="against an earlier run (its JSON file), or against a git revision, measured by turns with the working tree; "
        "exit status 1 if something became slower, or is wrong",
    )
    shown.add_argument("--results", type=Path, metavar="FILE", help="measure nothing: show, or compare, what this JSON file holds")
    shown.add_argument("--threshold", type=percent, help=f"percent that --compare lets pass (default {100 * THRESHOLD:g})")
    shown.add_argument("--turns", type=positive, help=f"runs of each side when --compare names a revision (default {TURNS})")


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except (BackendError, ResultsError, revision.RevisionError, ValueError) as error:
        print(f"fastprimer bench: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    console = Console(stderr=args.json or args.markdown, highlight=False)
    old, commit = _base(args.compare)
    _refuse_what_has_no_effect(args, commit)
    if args.out:  # not only after minutes of measuring
        check_writable(args.out)
        check_writable(_part(args.out))
    found, threshold = None, THRESHOLD if args.threshold is None else args.threshold
    if commit:
        options = _options(args)
        turns = revision.measure_by_turns(commit, options, args.turns or TURNS, lambda text: console.print(text, style="dim"))
        found, new = comparison.compare_turns(turns, threshold)
    elif args.results:
        new = Results.read(args.results)
    else:
        new = _measure_all(args, console)
    if old:
        found = comparison.compare_results(old, new, threshold)
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


def _refuse_what_has_no_effect(args: argparse.Namespace, commit: str) -> None:
    """Raises ResultsError: an option beside another one with which it would be ignored."""
    if commit and args.results:
        raise ResultsError(
            f"argument --compare: expected a file of results to hold --results against, got the git revision {args.compare!r}"
        )
    given = [name for name in MEASURING if getattr(args, name) is not None]
    if given and args.results:
        flag = "--pass" if given[0] == "passes" else f"--{given[0]}"
        raise ResultsError(f"argument {flag}: not allowed with argument --results, which measures nothing and shows all of {args.results}")
    if args.threshold is not None and not args.compare:
        raise ResultsError("argument --threshold: expected --compare BASE beside it, got none")
    if args.turns and not commit:
        raise ResultsError(f"argument --turns: expected --compare with a git revision beside it, got {args.compare or 'none'}")


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
    """What a child process is told to measure. Plain eager torch, where it takes part, tells how much two runs differ by themselves."""
    todo = _todo(args)
    peers = args.peers if args.peers is not None else ["eager"] if any("eager" in job.peers for job in todo) else []
    options = ["--peers", ",".join(peers) or "none"]
    for flag, values in (("--op", args.op), ("--backend", args.backend), ("--pass", args.passes), ("--dtype", args.dtype)):
        options += [word for value in values or () for word in (flag, value)]
    for flag in ("--rounds", "--threads", "--case", "--memory", "--seed"):
        value = getattr(args, flag[2:])
        options += [] if value is None else [flag, str(value)]
    return options + [flag for flag, given in (("--quick", args.quick), ("--growth", args.growth)) if given]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _todo(args: argparse.Namespace) -> list[Job]:
    """Raises BackendError: there is nothing to measure, or none of the peers asked for takes part."""
    found = jobs(_device(), Choice(args.op, args.backend, args.passes, args.dtype, bool(args.quick), bool(args.growth), args.case or ""))
    check_peers(found, args.peers or [])
    return found


def _measure_all(args: argparse.Namespace, console: Console) -> Results:
    if args.threads:
        torch.set_num_threads(args.threads)
    device, todo = _device(), _todo(args)
    memory = "kept" if args.memory != "fresh" and keep_freed_memory() else "fresh"
    settings = Settings(device, args.rounds or (11 if args.quick else 21), args.seed or 0, args.peers)
    found = Results(machine(device) | {"memory": memory}, [])
    live = _live(console, sum(job.rows for job in todo), len({job.backend for job in todo}) > 1)
    with _kept(found, args.out) as keep, live as (announce, show):
        for job in todo:
            announce(f"{job.what} {tables.SHORT[job.dtype]}")
            for row in job.measure(settings):
                found.rows.append(row)
                show(row)
                keep()
    _epilogue(found.rows, console)
    return found


@contextlib.contextmanager
def _kept(found: Results, out: Path | None) -> Iterator[Callable]:
    """What writes the rows so far to FILE.part; whoever stops the run is told that they are there."""
    written = 0

    def keep() -> None:
        nonlocal written
        if out:
            found.write(_part(out))
            written = len(found.rows)

    try:
        yield keep
    except KeyboardInterrupt:
        if written:
            raise KeyboardInterrupt(f"{_part(out)} holds the {written} finished row{'s' if written > 1 else ''}") from None
        raise


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
