"""`fastprimer report`: results of `fastprimer bench` as one HTML page, as pictures, and as README.md's table."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fastprimer.backends import operations
from fastprimer.benchmark import tables
from fastprimer.benchmark.rows import Results, ResultsError, Row
from fastprimer.doctor import markdown as backend_table

FOLDER = Path("benchmarks/results")
MARKERS = "<!-- results -->", "<!-- /results -->"
CAPTIONS = {
    "roof": "Under the machine's roof. Filled: float32; circle: forward, triangle: backward, square: both",
    "peers": "Peers' times against ours, with 95% intervals of the medians",
}


class ReportError(RuntimeError):
    """A report that cannot be made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, nargs="+", metavar="FILE", help="JSON files of `fastprimer bench --out` (default: FOLDER/*.json)"
    )
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help=f"of the tables of growth, of experts and of the compile gate (default {FOLDER})"
    )
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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ReportError(f"{path}: expected a file that can be written, got {error.strerror}") from None


def _about(results: Results) -> str:
    m = results.machine
    return f"{m['device']}, torch {m['torch']}, commit {m['commit'] or 'unknown'}, {m['date'][:10]}, memory {m.get('memory', 'kept')}"


def readme_table(results: list[Results]) -> str:
    """What stands between the markers: a line about the machine and a table, for each run."""
    return "\n\n".join(f"{_about(r)}:\n\n{tables.markdown(r.rows)}" for r in results)


def _rewritten(path: Path, results: list[Results]) -> str:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"argument --readme: expected a text file, got {path}: {getattr(error, 'strerror', error)}") from None
    begin, end = map(re.escape, MARKERS)
    if len(re.findall(f"{begin}.*?{end}", text, re.S)) != 1:
        raise ReportError(f"argument --readme: expected the line {MARKERS[0]} and after it {MARKERS[1]} once in {path}, got another number")
    return re.sub(f"({begin}).*?({end})", lambda m: f"{m[1]}\n{readme_table(results)}\n{m[2]}", text, flags=re.S)


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

    rows = [row for r in results for row in r.rows]
    sections = [_overview(rows, page.Section), page.Section("Operation x backend", backend_table())]
    for i, r in enumerate(results):
        for op in operations():
            mine = [row for row in r.rows if row.op == op]
            if not mine:
                continue
            section = page.Section(
                op if len(results) == 1 else f"{op}, {r.machine['device']} {i + 1}", tables.markdown(mine), f"{len(mine)} rows"
            )
            section.wrong = list(dict.fromkeys(problem for row in mine for problem in row.wrong))
            section.notes = [f"not timed: {line}" for line in tables.left_out(mine)]
            for name, figure in plots.of_operation(op, mine).items():
                kind = name.rpartition("-")[2]
                section.figures.append(shown(f"{name}-{i + 1}" if i else name, figure, CAPTIONS[kind]))
            sections.append(section)
    for path, title in _tables_of(args.folder):
        text = path.read_text()
        section = page.Section(title, text, path.name)
        figure = plots.growth(text)
        if figure:
            section.figures.append(shown(path.stem, figure, "Time and memory over the length of a sequence"))
        sections.append(section)
    return page.html("benchmarks", [_about(r) for r in results], sections)


def _overview(rows: list[Row], section):
    """A line for each operation."""
    lines = [
        "| operation | rows | wrong | ours / best peer: geometric mean | least | of roof: median |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        ratios, shares = tables.ratios(mine), tables.shares(mine)
        wrong = sum(bool(row.wrong) for row in mine)
        cells = [f"{ratios.mean:.2f}x", f"{ratios.least:.2f}x"] if ratios else ["", ""]
        lines.append(f"| `{op}` | {len(mine)} | {wrong or ''} | {' | '.join(cells)} | {'' if shares is None else f'{shares:.0%}'} |")
    text = (
        "Above 1x ours is faster than the fastest peer of the same run. A roof is what a copy, or a matrix product, of the same run allows."
    )
    return section("At a glance", "\n".join(lines), notes=[text])


def _tables_of(folder: Path) -> list[tuple[Path, str]]:
    """Those of the other programs that measure, where they are."""
    known = {"growth-*.md": "Attention over length", "experts-*.md": "Experts against transformers'", "kernels.md": "The compile gate"}
    found = [(path, title) for pattern, title in known.items() for path in sorted(folder.glob(pattern))]
    several = {title for _, title in found if sum(t == title for _, t in found) > 1}
    return [(path, f"{title}: {path.stem}" if title in several else title) for path, title in found]
