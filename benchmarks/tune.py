"""Which tile is fastest here: the neighbours of every tile that a Triton kernel of an operation chooses, one number at a time.

    python benchmarks/tune.py --op attention [--dtype bfloat16] [--case causal] [--out FILE]        (make gpu WHAT=tune OP=attention)

Kernels choose by small functions of the shape, and nothing is tuned while they run (kernels/*.py). This program calls the operation on its
benchmark cases, sees which of these functions answers what, and puts a neighbour in the answer's place: half and twice each block and
as many warps, a stage less and more. What does not compile, or computes something else, is left out with the reason; the others are timed
in the same rounds. It changes no file: what wins by more than the noise, in every case that it serves, is worth a line in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import track

import fastprimer
from fastprimer.backends import use_backend
from fastprimer.benchmark.contest import Settings, checked
from fastprimer.benchmark.measure import shared_arguments
from fastprimer.benchmark.rows import machine
from fastprimer.benchmark.timing import BOTH, FORWARD, Timing, interleaved, prepared
from fastprimer.cases import benchmarks
from fastprimer.options import positive

CHOOSERS = {
    "rms_norm": ("rms_norm", ("tile",)),
    "rope": ("rope", ("tile",)),
    "swiglu": ("swiglu", ("tile",)),
    "attention": ("attention", ("tile",)),
    "attention_with_kv_cache": ("decoding", ("tile",)),
    "moe": ("moe", ("tile",)),
    "cross_entropy": ("cross_entropy", ("fold_tile", "gradient_tile")),
    "linear_cross_entropy": ("cross_entropy", ("fold_tile", "gradient_tile")),
}
"""By operation: the module of fastprimer.kernels, and the functions of it that return a tile."""

WARPS = (1, 2, 4, 8, 16)


class Site:
    """One place where tiles are chosen, and the last answer there."""

    def __init__(self, name: str):
        self.name, self.tile = name, None


class Choosers:
    """The functions of one kernel module that choose tiles; `instead` answers for one site."""

    def __init__(self, op: str):
        name, self.functions = CHOOSERS[op]
        self.module = importlib.import_module(f"fastprimer.kernels.{name}")
        self.sites: dict[tuple, Site] = {}
        self.instead: tuple[Site, object] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        real = {name: getattr(self.module, name) for name in self.functions}
        for name, function in real.items():
            setattr(self.module, name, self._watching(name, function))
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(self.module, name, function)

    def _watching(self, name: str, function: Callable) -> Callable:
        def answer(*args, **options):
            tables = [a for a in (*args, *options.values()) if isinstance(a, (dict, tuple))]  # a table of tiles, or limits
            key = name, *(id(a) for a in tables)
            if key not in self.sites:
                table = next((n for n, value in vars(self.module).items() if n.isupper() and any(value is a for a in tables)), "")
                self.sites[key] = Site(table or name)
            site = self.sites[key]
            if self.instead and self.instead[0] is site:
                return self.instead[1]
            site.tile = function(*args, **options)
            return site.tile

        return answer


def neighbours(tile) -> list:
    """Tiles that differ in one number."""
    found = []
    for field in tile._fields:
        value = getattr(tile, field)
        if isinstance(value, bool):
            continue
        if field == "num_stages":
            values = [n for n in (value - 1, value + 1) if n >= 1]
        elif field == "num_warps":
            values = [n for n in (value // 2, value * 2) if n in WARPS]
        else:
            values = [n for n in (value // 2, value * 2) if n >= 1]
        found += [tile._replace(**{field: n}) for n in values]
    return found


def tune(op: str, case, dtype: torch.dtype, device: str, rounds: int) -> Iterator[str]:
    """Lines of Markdown, the fastest tile of each site first."""
    choosers = Choosers(op)
    arguments = shared_arguments(case, dtype, Settings(device, rounds))
    measured = FORWARD if op == "attention_with_kv_cache" else BOTH
    with use_backend("triton"), choosers.watched():
        call = prepared(getattr(fastprimer, op), arguments, measured)
        expected = call()
        for site in list(choosers.sites.values()):
            calls, left_out = {site.tile: call}, {}
            for candidate in track(neighbours(site.tile), f"{case} {site.name}", transient=True):
                tried, reason = checked(functools.partial(_with_tile, choosers, site, candidate, call), expected, dtype)
                if reason:
                    left_out[candidate] = reason
                else:
                    calls[candidate] = tried
            times = {tile: Timing.of(t) for tile, t in interleaved(calls, device, rounds, 0).items()}
            for tile, timing in sorted(times.items(), key=lambda item: item[1].median):
                mark = "now" if tile == site.tile else ""
                spread = f"{timing.low:.3f} to {timing.high:.3f}"
                yield f"| {case} | {str(dtype)[6:]} | {site.name} | {_shown(tile)} | {timing.median:.3f} | {spread} | {mark} |"
            for tile, reason in left_out.items():
                yield f"| {case} | {str(dtype)[6:]} | {site.name} | {_shown(tile)} | | | {reason[:60].replace('|', '/')} |"


def _with_tile(choosers: Choosers, site: Site, candidate, call: Callable) -> Callable:
    def tried():
        choosers.instead = site, candidate
        try:
            return call()
        finally:
            choosers.instead = None

    return tried


def _shown(tile) -> str:
    return " ".join(f"{field.removeprefix('BLOCK_').removeprefix('num_')} {getattr(tile, field)}" for field in tile._fields)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=CHOOSERS, action="append", help="only this operation (repeat for more)")
    parser.add_argument("--case", help="only benchmark cases with this in their name")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=positive, default=21, help="measurements of each tile (default 21)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    return parser


def main(argv: list[str] | None = None, cases=None) -> None:
    args = parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    lines = [f"Tiles on {about['device']}, torch {about['torch']}, commit {about['commit']}; ms of the whole operation.", ""]
    lines += ["| case | dtype | choice | tile | ms | 95% | |", "| --- | --- | --- | --- | --: | --- | --- |"]
    for op in args.op or CHOOSERS:
        for case in cases or [c for c in benchmarks(device, op) if (args.case or "") in c.name]:
            lines += tune(op, case, getattr(torch, args.dtype), device, args.rounds)
            if args.out:
                args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
