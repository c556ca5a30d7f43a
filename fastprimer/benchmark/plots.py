"""The pictures of `fastprimer report`. Narrow and with few words each, so that a phone shows them whole."""

from __future__ import annotations

import collections
import io
import re
import statistics
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from fastprimer.benchmark.rows import OURS as OUR_CONTESTANT
from fastprimer.benchmark.rows import Row
from fastprimer.benchmark.tables import SHORT, Curve

OURS = "fastprimer"
OTHER = "#7f7f7f"
"""Of a peer that only another revision knows."""
COLOURS = collections.defaultdict(lambda: OTHER) | {
    OURS: "#0b5fa5",
    "eager": "#d1495b",
    "sdpa": "#d1495b",
    "grouped_mm": "#d1495b",
    "compiled": "#edae49",
    "transformers": "#6a994e",
    "flex": "#6a994e",
    "plain": "#8d6a9f",
    "hf-compiled": "#386641",
    "liger": "#3d405b",
    "cudnn": "#76b900",
    "flash": "#b5651d",
    "efficient": "#999999",
}
MARKS = {"forward": "o", "backward": "^", "forward+backward": "s", "training": "s", "decoding": "o"}
LEAST = {"ms": 1e-3, "MB": 0.1}
"""What is drawn in place of less, on a logarithmic axis."""
WIDTH = 5.2
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def of_operation(op: str, rows: list[Row]) -> dict[str, Figure]:
    """By name: where the operation stands under its roof, and its peers' times against ours."""
    timed = [row for row in rows if row.ours]
    if not timed:
        return {}
    roof = _roofline if any(row.flops for row in timed) else _bandwidth
    with matplotlib.rc_context(STYLE):
        figures = {f"{op}-roof": roof(timed)}
        if any(row.peers for row in timed):
            figures[f"{op}-peers"] = _against_peers(timed)
    return figures


def _contestants(row: Row) -> dict[str, float]:
    """Median milliseconds; ours last, so that it is drawn above the others."""
    return {name: timing.median for name, timing in row.peers.items()} | {OURS: row.ours.median}


def _figure(height: float, **axes) -> tuple[Figure, object]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot(**axes)


def _legend(axes, figure: Figure) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3, frameon=False)


def _scatter(axes, x: float, y: float, name: str, row: Row) -> None:
    face = COLOURS[name] if row.dtype == "float32" else "white"
    axes.scatter(x, y, s=26, marker=MARKS[row.measured], facecolor=face, edgecolor=COLOURS[name], linewidth=1.1, zorder=3, label=name)


def _roofline(rows: list[Row]) -> Figure:
    """Arithmetic rate over intensity, below what copies and matrix products allow."""
    figure, axes = _figure(3.4, xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    for row in rows:
        for name, ms in _contestants(row).items():
            _scatter(axes, row.flops / row.bytes, row.flops / ms / 1e6, name, row)
    copy = statistics.median(row.copy_gb_per_s for row in rows)
    intensities = [row.flops / row.bytes for row in rows]
    rates = {d: statistics.median(r.matrix_gflop_per_s for r in rows if r.dtype == d) for d in dict.fromkeys(row.dtype for row in rows)}
    low, high = min([*intensities, *(rate / copy for rate in rates.values())]) / 4, max(intensities) * 4
    for dtype, rate in rates.items():
        ridge = min(rate / copy, high)
        style = "-" if dtype == "float32" else "--"
        axes.plot([low, ridge, high], [copy * low, copy * ridge, min(rate, copy * high)], style, color="0.4", label=f"roof {SHORT[dtype]}")
    axes.set_xlim(low, high)
    _plain_ticks(axes.xaxis, "%g", subs=(1,))
    _plain_ticks(axes.yaxis, "%g")
    _legend(axes, figure)
    return figure


def _bandwidth(rows: list[Row]) -> Figure:
    """Bandwidth over size, below that of a copy."""
    figure, axes = _figure(3.4, xscale="log", xlabel="MB that have to be moved", ylabel="GB/s")
    sizes = [row.bytes / 1e6 for row in rows]
    for row in rows:
        for name, ms in _contestants(row).items():
            _scatter(axes, row.bytes / 1e6, row.bytes / ms / 1e6, name, row)
    axes.axhline(statistics.median(row.copy_gb_per_s for row in rows), color="0.4", label="roof: a copy")
    axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
    axes.set_ylim(bottom=0)
    _plain_ticks(axes.xaxis, "%g", subs=(1,) if max(sizes) > 100 * min(sizes) else (1, 2, 5))
    _legend(axes, figure)
    return figure


def _plain_ticks(axis, form: str, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """Of a logarithmic axis: 1, 2, 5, 10 and no powers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FormatStrFormatter(form))
    axis.set_minor_locator(NullLocator())


def _against_peers(rows: list[Row]) -> Figure:
    """A line for each row: every peer's time / ours, with the interval of its median."""
    figure, axes = _figure(1.0 + 0.19 * len(rows), xscale="log", xlabel="time / ours (right of 1: ours is faster)")
    several = len({row.backend for row in rows}) > 1
    for y, row in enumerate(rows):
        for name, timing in row.peers.items():
            ratio, low, high = (t / row.ours.median for t in (timing.median, timing.low, timing.high))
            axes.plot([low, high], [y, y], color=COLOURS[name], linewidth=1, alpha=0.6)
            axes.plot(ratio, y, "o", color=COLOURS[name], markersize=4, label=name)
        axes.plot([row.ours.low / row.ours.median, row.ours.high / row.ours.median], [y, y], color=COLOURS[OURS], linewidth=3, alpha=0.4)
    axes.axvline(1, color=COLOURS[OURS], linewidth=1, label=OURS)
    labels = [
        f"{row.name.partition(' ')[2]} {SHORT[row.dtype]} {SHORT[row.measured]}{' ' + row.backend if several else ''}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    left, right = axes.get_xlim()
    subs = (1,) if right > 50 * left else (1, 2, 5) if right > 4 * left else (1, 1.2, 1.5, 2, 3, 5, 6, 8)
    _plain_ticks(axes.xaxis, "%gx", subs=subs)
    _legend(axes, figure)
    return figure


def of_series(curves: list[Curve]) -> Figure:
    """Time and memory of every contestant over size, one series in one dtype; the exponents stand in the table."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        units = [unit for unit in ("ms", "MB") if any(curve.unit == unit for curve in curves)]
        for place, unit in enumerate(units):
            axes = figure.add_subplot(1, len(units), place + 1, xscale="log", yscale="log", xlabel=curves[0].letter, ylabel=unit)
            mine = [curve for curve in curves if curve.unit == unit]
            for curve in mine:
                name = OURS if curve.contestant == OUR_CONTESTANT else curve.contestant
                points = [(size, max(cost, LEAST[unit])) for size, cost in curve.points]
                axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], markersize=3, label=name)
            sizes = sorted({size for curve in mine for size, _ in curve.points})
            axes.set_xticks(sizes, [_short(size) for size in sizes], fontsize=7.5)
            axes.xaxis.set_minor_locator(NullLocator())
            _plain_ticks(axes.yaxis, "%g", subs=(1, 2, 5) if axes.get_ylim()[1] < 100 * axes.get_ylim()[0] else (1,))
        _legend(axes, figure)
    return figure


def _short(size: int) -> str:
    return (
        f"{size // 1000}k" if size >= 1000 and size % 1000 == 0 else f"{size // 1024}Ki" if size >= 1024 and size % 1024 == 0 else str(size)
    )


def svg(figure: Figure, name: str) -> str:
    """An element for a page: without prolog and metadata, with identifiers that no other figure of the page has."""
    written = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    # matplotlib names its groups (figure_1, axes_1, ...) alike in every figure.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)


def save_png(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure).print_figure(path, dpi=160)
