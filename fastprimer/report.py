"""`fastprimer report`: results of `fastprimer bench` as one HTML page, as pictures, and as README.md's table."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fastprimer.backends import operations
from fastprimer.benchmark import tables
from fastprimer.benchmark.models import MODEL
from fastprimer.benchmark.rows import Results, ResultsError, Row, write_whole
from fastprimer.benchmark.timing import BACKWARD, BOTH
from fastprimer.doctor import markdown as backend_table

FOLDER = Path("benchmarks/results")
MARKERS = "<!-- results -->", "<!-- /results -->"
CAPTIONS = {
    "roof": "Under the machine's roof. Filled: float32; circle: forward, triangle: backward, square: both",
    "peers": "Peers' times against ours, with 95% intervals of the medians",
}

GLANCE = (
    "Peers' times over ours: above 1x ours is faster. Of the fastest peer of each row the geometric mean and the least, of plain torch the "
    "geometric mean; and the median share of what a copy, or a matrix product, of the same run allows. What several runs of a machine have "
    "measured counts once, as the newest of them has it."
)


class ReportError(RuntimeError):
    """A report that cannot be made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, nargs="+", metavar="FILE", help="JSON files of `fastprimer bench --out` (default: FOLDER/*.json)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of results and of the compile gate's table (default {FOLDER})")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default report.html)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write each plot as PNG and SVG, too")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"rewrite what is between {MARKERS[0]} and {MARKERS[1]} in this file, too"
    )


def run(args: argparse.Namespace) -> int:
    try:
        results = _read(args)
        readme = args.readme and _rewritten(args.readme, results)
        page = _page(results, args)
        _write(args.out, page)
        if readme:
            _write(args.readme, readme)
    except (ReportError, ResultsError) as error:
        print(f"fastprimer report: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.out}" + (f", {args.readme}" if args.readme else "") + (f", plots in {args.plots}" if args.plots else ""))
    return 0


def _read(args: argparse.Namespace) -> list[Results]:
    """The files named; or every usable one of the folder, with a word about the others."""
    if args.results:
        return [Results.read(path) for path in args.results]
    found = []
    for path in sorted(args.folder.glob("*.json")):
        try:
            found.append(Results.read(path))
        except ResultsError as error:
            print(f"fastprimer report: left out: {error}", file=sys.stderr)
    if not found:
        raise ReportError(
            f"argument --results: expected results in {args.folder}, got none that can be used: run `fastprimer bench --out FILE`"
        )
    return found


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise ReportError(f"{path}: expected a file that can be written, got {error.strerror}") from None


def _about(results: Results) -> str:
    m = results.machine
    return f"{m['device']}, torch {m['torch']}, commit {m['commit'] or 'unknown'}, {m['date'][:10]}, memory {m.get('memory', 'kept')}"


def readme_table(results: list[Results]) -> str:
    """What stands between the markers, for each run: a line about the machine, a table of all its operations, and one of its rows, folded.
    Cost over size, and the backward pass by itself where there is a row of both passes, are the page's."""
    return "\n\n".join(_readme_tables(r, rows) for r in results if (rows := _single(r)))


def _readme_tables(results: Results, rows: list[Row]) -> str:
    shown = _shortened(rows)
    which = f"{len(shown)} of {len(rows)} rows; `fastprimer report` shows all" if len(shown) < len(rows) else f"All {len(rows)} rows"
    parts = [f"{_about(results)}:", tables.overview([(results.machine["device"], row) for row in rows])]
    return "\n\n".join([*parts, f"<details><summary>{which}</summary>", tables.markdown(shown), "</details>"])


def _shortened(rows: list[Row]) -> list[Row]:
    def about(row: Row) -> tuple:
        return row.op, row.case, row.dtype, row.backend

    both = {about(row) for row in rows if row.measured == BOTH}
    return [row for row in rows if row.measured != BACKWARD or about(row) not in both]


def _rewritten(path: Path, results: list[Results]) -> str:
    try:
        text = path.read_bytes().decode()  # with its own ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"argument --readme: expected a text file, got {path}: {getattr(error, 'strerror', error)}") from None
    begin, end = MARKERS
    # Each of them once: after a marker that somebody only writes about, everything up to the table would be taken for an old table.
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"argument --readme: expected the line {begin} and after it {end} once in {path}, got another number")
    shown = readme_table(results)
    if not shown:
        raise ReportError(f"argument --readme: expected results of single cases for the table in {path}, got none")
    table = f"\n{shown}\n".replace("\n", "\r\n" if "\r\n" in text else "\n")
    return text[: text.index(begin) + len(begin)] + table + text[text.index(end) :]


def _page(results: list[Results], args: argparse.Namespace) -> str:
    try:
        from fastprimer.benchmark import page, plots
    except ImportError as error:
        raise ReportError(f"the package {error.name} is not installed: pip install fastprimer[report]") from None

    def shown(name: str, figure, caption: str) -> tuple[str, str]:
        drawn = plots.svg(figure, name)
        if args.plots:
            _write(args.plots / f"{name}.svg", drawn)
            plots.save_png(figure, args.plots / f"{name}.png")
        return caption, drawn

    sections = [
        page.Section("At a glance", tables.overview(_newest(results)), notes=[GLANCE]),
        page.Section("Operation x backend", backend_table()),
    ]
    several = sum(bool(_single(r)) for r in results) > 1
    for i, r in enumerate(results):
        where = f", {r.machine['device']} {i + 1}" if several else ""
        for op in (*operations(), MODEL):
            if mine := [row for row in _single(r) if row.op == op]:
                figures = {f"{name}-{i + 1}" if i else name: figure for name, figure in plots.of_operation(op, mine).items()}
                sections.append(_operation(op, mine, where, page.Section, [shown(n, f, _caption(n)) for n, f in figures.items()]))
    for i, r in enumerate(r for r in results if any(row.series for row in r.rows)):
        sections.append(_growth(r, i, page.Section, lambda name, curves, caption: shown(name, plots.of_series(curves), caption)))
    gate = args.folder / "kernels.md"
    if gate.is_file():
        sections.append(page.Section("The compile gate", gate.read_text(encoding="utf-8", errors="replace"), gate.name))
    return page.html("benchmarks", [_about(r) for r in results], sections)


def _newest(results: list[Results]) -> list[tuple[str, Row]]:
    """(device, row) of all runs, a row that was measured again on a device only as the newest run has it, of equal dates the later one."""
    found: dict[tuple, tuple[str, Row]] = {}
    for r in results:
        date, device = r.machine["date"], r.machine["device"]  # a date has one form and zone, and sorts as text
        for row in _single(r):
            if date >= found.get((device, row.key), ("", None))[0]:
                found[device, row.key] = date, row
    return [(device, row) for (device, _), (_, row) in found.items()]


def _single(results: Results) -> list[Row]:
    """The rows that belong to no series."""
    return [row for row in results.rows if not row.series]


def _caption(name: str) -> str:
    return next(caption for kind, caption in CAPTIONS.items() if kind in name.split("-"))


def _operation(op: str, rows: list[Row], where: str, section, figures: list[tuple[str, str]]):
    found = section(f"{'Whole models' if op == MODEL else op}{where}", tables.markdown(rows), f"{len(rows)} rows", figures=figures)
    found.wrong = list(dict.fromkeys(problem for row in rows for problem in row.wrong))
    found.notes = [f"not timed: {line}" for line in tables.left_out(rows)]
    return found


def _growth(results: Results, number: int, section, shown):
    """Cost over size: a figure for each series."""
    found = section(
        "Cost over size" + (f" {number + 1}" if number else ""), tables.growth(results.rows), "the figures and the fitted exponents"
    )
    found.notes.append(f"{_about(results)}. The exponent is the slope through the last three sizes.")
    found.wrong = list(dict.fromkeys(problem for row in results.rows for problem in row.wrong))
    curves = tables.curves(results.rows)
    for about in dict.fromkeys((c.series, c.letter, c.dtype, c.measured, c.backend) for c in curves):
        mine = [c for c in curves if (c.series, c.letter, c.dtype, c.measured, c.backend) == about]
        series, letter, dtype, measured, backend = about
        name = re.sub(r"[^\w+-]+", "-", f"growth-{series}-{letter}-{dtype}-{backend}-{number + 1}")  # of a file in --plots
        found.figures.append(shown(name, mine, f"{series} over {letter}: {dtype}, {measured}, {backend}"))
    return found
