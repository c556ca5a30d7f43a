"""Results as text: lines that appear while they are measured, and the table of README.md."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from fastprimer.benchmark.rows import MATRIX, OURS, Row
from fastprimer.benchmark.timing import FEWEST_JUDGED

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "forward": "fwd", "backward": "bwd", "forward+backward": "both"}
SHORT |= {"training": "step", "decoding": "tok"}
FITTED = 3
COLUMNS = (("case", -24), ("type", -4), ("pass", -4), ("ms", 8), ("±", 4), ("best peer", -12), ("ours is", 8), ("of roof", 8))
"""Heading and width, negative: flush left. Together 79 columns."""


def line(cells: list[str], style: str = "") -> Text:
    shown = [cell[: abs(width)].ljust(-width) if width < 0 else cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
    return Text(" ".join(shown).rstrip(), style=style, no_wrap=True, overflow="ellipsis")


def heading() -> Text:
    return line([name for name, _ in COLUMNS], "bold")


def live_line(row: Row, with_backend: bool) -> Text:
    """Fits 80 columns; --json has every figure."""
    name = row.name.replace("linear_cross_entropy", "linear_ce").replace("cross_entropy", "ce")
    if with_backend:
        name = f"{name[: 23 - len(row.backend)]} {row.backend}"
    head = [name, SHORT.get(row.dtype, row.dtype), SHORT[row.measured]]
    if row.wrong:
        return line([*head, "WRONG", "", "not timed", "", ""], "bold red")
    spread = max(row.ours.high - row.ours.median, row.ours.median - row.ours.low) / row.ours.median
    shown = f"{spread:.0%}" if len(row.ours.samples) >= FEWEST_JUDGED else ""
    ratio = "" if row.vs_best_peer is None else f"{row.vs_best_peer:.2f}x"
    style = "red" if row.vs_best_peer is not None and row.vs_best_peer < 0.95 else ""
    roof = f"{row.of_roof:.0%} {'F' if row.limited_by == MATRIX else 'B'}"
    return line([*head, f"{row.ours.median:.2f}", shown, row.best_peer or "-", ratio, roof], style)


def summary(rows: list[Row]) -> str:
    """What stands below the lines."""
    timed = [row for row in rows if row.ours]
    parts = []
    if timed:
        parts.append(f"B: the roof is a copy at {statistics.median(r.copy_gb_per_s for r in timed):.0f} GB/s in the same rounds")
        for dtype in dict.fromkeys(r.dtype for r in timed if r.matrix_gflop_per_s):
            rate = statistics.median(r.matrix_gflop_per_s for r in timed if r.dtype == dtype and r.matrix_gflop_per_s)
            parts.append(f"F: for {dtype} a matrix product at {rate:.0f} GFLOP/s")
        found = ratios(rows)
        if found:
            parts.append(f"best peer / ours: geometric mean {found.mean:.2f}x, least {found.least:.2f}x")
    return "\n".join(parts)


@dataclass(frozen=True)
class Ratios:
    """Of the best peers' times to ours: their geometric mean and the least."""

    mean: float
    least: float


def ratios(rows: list[Row]) -> Ratios | None:
    found = [row.vs_best_peer for row in rows if row.vs_best_peer]
    return Ratios(statistics.geometric_mean(found), min(found)) if found else None


def shares(rows: list[Row]) -> float | None:
    """The median share of the roof."""
    found = [row.of_roof for row in rows if row.of_roof is not None]
    return statistics.median(found) if found else None


def left_out(rows: list[Row]) -> list[str]:
    """Why a peer was not timed, said once for all rows of an operation that say the same."""
    found: dict[tuple, list[str]] = {}
    for row in rows:
        for peer, why in row.left_out.items():
            found.setdefault((row.op, row.dtype, peer, why), []).append(f"{row.name.partition(' ')[2]} {SHORT[row.measured]}".strip())
    return [f"{op} {dtype}: {peer} {why} ({', '.join(where)})" for (op, dtype, peer, why), where in found.items()]


def overview(rows: list[tuple[str, Row]]) -> str:
    """In Markdown, of (machine, row): a line for each operation and dtype, of each backend on each machine: the best peer's and the eager
    one's time over ours (geometric means, and the least), the median share of the roof. No column that says nothing."""
    heads = ["operation", "dtype", "backend", "best peer", "least", "eager", "of roof", "rows", "wrong", "machine"]
    lines = []
    for about in dict.fromkeys((machine, row.backend, row.op, row.dtype) for machine, row in rows):
        mine = [row for machine, row in rows if (machine, row.backend, row.op, row.dtype) == about]
        eager = [row.peers["eager"].median / row.ours.median for row in mine if row.ours and "eager" in row.peers]
        best, share, wrong = ratios(mine), shares(mine), sum(bool(row.wrong) for row in mine)
        cells = [f"{best.mean:.2f}x", f"{best.least:.2f}x"] if best else ["", ""]
        cells += [f"{statistics.geometric_mean(eager):.2f}x" if eager else "", "" if share is None else f"{share:.0%}"]
        machine, backend, op, dtype = about
        lines.append([f"`{op}`", dtype, backend, *cells, str(len(mine)), str(wrong or ""), machine])
    one_machine = len({machine for machine, _ in rows}) == 1
    columns = zip(heads, ["---"] * 3 + ["--:"] * 6 + ["---"], *lines, strict=True)
    told = [column for column in columns if any(column[2:]) and not (one_machine and column[0] == "machine")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*told, strict=True))


def everything(rows: list[Row]) -> str:
    """Every row in Markdown: single cases, and series over size."""
    parts = [markdown([row for row in rows if not row.series]), growth(rows)]
    return "\n\n".join(part for part in parts if part)


def markdown(rows: list[Row]) -> str:
    """The table of README.md: every peer's time over ours, the fastest first; memory is what a call needs beyond what is there.
    Of a GPU's rows also the rate, and the host's time to issue a call."""
    if not rows:
        return ""
    several, on_gpu = len({row.backend for row in rows}) > 1, any(row.host_us for row in rows)
    heads = ["case", *(["backend"] if several else []), "dtype", "pass", "ms", "others take", "of roof"]
    heads += [*(["rate", "host us"] if on_gpu else []), "MB", "leanest other"]
    left = 4 if several else 3
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * left + " --: | --- |" + " --: |" * (5 if on_gpu else 3)]
    for row in rows:
        head = [row.name, *([row.backend] if several else []), row.dtype, row.measured]
        if row.wrong:
            cells = ["WRONG", *[""] * (len(heads) - len(head) - 1)]
        else:
            others = sorted((timing.median / row.ours.median, name) for name, timing in row.peers.items())
            against = ", ".join(f"{name} {ratio:.2f}x" for ratio, name in others)
            cells = [f"{row.ours.median:.{3 if on_gpu else 2}f}", against, f"{row.of_roof:.0%} of {row.limited_by}"]
            issued = f"{row.host_us[OURS]:.0f}" if row.host_us else ""
            cells += [*((_rate(row), issued) if on_gpu else ()), *_memory(row)]
        lines.append(f"| {' | '.join(head + cells)} |")
    return "\n".join(lines)


def _rate(row: Row) -> str:
    """Of what limits the row."""
    if row.limited_by == MATRIX:
        return f"{row.flops / row.ours.median / 1e9:.0f} TFLOP/s"
    return f"{row.bytes / row.ours.median / 1e6:.0f} GB/s"


def _memory(row: Row) -> tuple[str, str]:
    """Megabytes of ours, and of the peer that needs least."""
    others = [mb for name, mb in row.peak_mb.items() if name != OURS]
    ours = row.peak_mb.get(OURS)
    return "" if ours is None else f"{ours:.1f}", f"{min(others):.1f}" if others else ""


@dataclass(frozen=True)
class Curve:
    """One contestant's milliseconds, or megabytes, over size."""

    series: str
    letter: str
    dtype: str
    measured: str
    backend: str
    contestant: str
    unit: str
    points: tuple[tuple[int, float], ...]

    @property
    def exponent(self) -> float | None:
        """The slope of log(cost) over log(size) by least squares through the last three sizes: before them the cost of a call is in it.
        None below three, or where something costs nothing."""
        last = self.points[-FITTED:]
        if len(last) < FITTED or min(cost for _, cost in last) <= 0:
            return None
        return float(np.polyfit(*np.log(last).T, 1)[0])


def curves(rows: list[Row]) -> list[Curve]:
    """Of all series among these rows; ours first."""
    found: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row.series and row.ours:
            about = row.series, row.letter, row.dtype, row.measured, row.backend
            for name, timing in ({OURS: row.ours} | row.peers).items():
                found.setdefault((*about, name, "ms"), {})[row.size] = timing.median
            for name, megabytes in row.peak_mb.items():
                found.setdefault((*about, name, "MB"), {})[row.size] = megabytes
    return [Curve(*about, tuple(sorted(points.items()))) for about, points in found.items()]


def growth(rows: list[Row]) -> str:
    """A table for each letter that grows; "" if nothing does."""
    every, tables = curves(rows), []
    for letter in dict.fromkeys(curve.letter for curve in every):
        mine = [curve for curve in every if curve.letter == letter]
        sizes = sorted({size for curve in mine for size, _ in curve.points})
        heads = ["series", "dtype", "pass", "contestant", "", *(f"{letter} {size}" for size in sizes), "exponent"]
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * 5 + " --: |" * (len(sizes) + 1)]
        for curve in mine:
            points = dict(curve.points)
            cells = [f"{points[size]:.2f}" if size in points else "" for size in sizes]
            slope = "" if curve.exponent is None else f"{curve.exponent:.2f}"
            lines.append(f"| {' | '.join([curve.series, curve.dtype, curve.measured, curve.contestant, curve.unit, *cells, slope])} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def exponents(rows: list[Row]) -> list[str]:
    """In a line for each series, what stands below the lines of a run over size."""
    fitted = [curve for curve in curves(rows) if curve.exponent is not None and curve.unit == "ms"]
    lines: dict[tuple, list[str]] = {}
    for c in fitted:
        lines.setdefault((c.series, SHORT[c.dtype], SHORT[c.measured], c.letter), []).append(f"{c.contestant} {c.exponent:.2f}")
    return [
        f"{series} {dtype} {measured}: time grows with {letter} to the power of {', '.join(found)}"
        for (series, dtype, measured, letter), found in lines.items()
    ]
