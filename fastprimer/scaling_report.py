"""What `fastprimer scaling` says: tables, the fitted law in words, a plot, or one JSON object."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from fastprimer.scaling_law import PUBLISHED, FitError, Law, Powers, fit, intervals
from fastprimer.terminal import Console
from fastprimer.train_report import new_figure, write_png

PLOT_FILE = "scaling.png"


def recommended(name: str, law: Law | Powers, N: float, D: float, tflops: float | None) -> dict:
    row = {"law": name, "parameters": N, "tokens": D, "tokens_per_parameter": D / N, "flops": 6 * N * D}
    row["loss"] = law.loss(N, D) if isinstance(law, Law) else None
    row |= {"days": 6 * N * D / (tflops * 1e12 * 86400)} if tflops else {}
    if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
        raise OverflowError
    return row


def recommendations(title: str, rows: list[dict]) -> Table:
    shown = {"N": "parameters", "D": "tokens", "D / N": "tokens_per_parameter", "6 N D": "flops", "loss": "loss", "days": "days"}
    shown = {head: name for head, name in shown.items() if any(row.get(name) is not None for row in rows)}
    table = _table(title, ["", *shown])
    for row in rows:
        table.add_row(row["law"], *("" if row[name] is None else f"{row[name]:.3g}" for name in shown.values()))
    return table


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    return table


def show(runs: list, args: argparse.Namespace, console: Console) -> None:
    N, D, loss = ([float(getattr(one, name)) for one in runs] for name in ("parameters", "tokens", "loss"))
    law, reason = None, ""
    try:
        law = fit(N, D, loss)
        bounds = intervals(N, D, loss, law, args.draws, args.seed)
    except FitError as error:
        reason = str(error)
    rows = []
    if law:
        budgets = [max(n * d for n, d in zip(N, D, strict=True)) * 6 * factor for factor in (0.1, 1.0, 10.0)]
        try:
            rows = [recommended("measured here", law, *law.for_flops(C), args.tflops) for C in budgets]
        except (OverflowError, ZeroDivisionError):
            law, reason = None, "what fits these runs is beyond the range of floating-point numbers: noise"
    if law:
        published = [recommended(name, one, *one.for_flops(budgets[1]), args.tflops) for name, one in PUBLISHED.items()]
        rows += [row | {"loss": None} for row in published]  # theirs is of another text and other tokens
    if args.json:
        found = dataclasses.asdict(law) | {"a": law.a, "intervals": bounds} if law else None
        print(json.dumps({"runs": [dataclasses.asdict(one) for one in runs], "law": found, "reason": reason, "recommended": rows}))
    else:
        console.print(_runs_table(runs))
        console.print(f"no law was fitted: {reason}" if reason else _in_words(law, bounds), soft_wrap=True)
        if law:
            console.print(
                recommendations("\nbest use of a tenth of the largest run's operations, of as many, and of ten times as many", rows)
            )
    if not _plot(args.out / PLOT_FILE, runs, law):
        console.print("no plot was drawn: the package matplotlib is not installed (pip install fastprimer[report])", markup=False)


def _runs_table(runs: list) -> Table:
    table = _table("weights N, tokens D, held-out loss in nats a byte", ["N", "D", "D / N", "6 N D", "loss", "bits", "epochs", "s"])
    for one in sorted(runs, key=lambda r: (r.parameters, r.tokens)):
        cells = f"{one.tokens:,}", f"{one.tokens / one.parameters:.1f}", f"{6.0 * one.parameters * one.tokens:.2g}"
        table.add_row(
            f"{one.parameters:,}", *cells, f"{one.loss:.4f}", f"{one.loss / math.log(2):.3f}", f"{one.epochs:.2f}", f"{one.seconds:.1f}"
        )
    return table


def _in_words(law: Law, bounds: dict[str, tuple[float, float]]) -> str:
    def between(name: str) -> str:
        low, high = bounds[name]
        return f"{getattr(law, name):.2f} ({low:.2f} to {high:.2f})"

    return (
        f"L = {law.E:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}: alpha {between('alpha')}, "
        f"beta {between('beta')}; the best N grows as C^{between('a')}. Hoffmann et al. found 0.46 to 0.50, Kaplan et al. 0.73."
    )


def _plot(path: Path, runs: list, law: Law | None) -> bool:
    """Loss over operations, a line for each size; whether there is a matplotlib to draw it."""
    figure = new_figure(7, 4.5)
    if figure is None:
        return False
    axes = figure.add_subplot(xlabel="operations of training, 6 N D", ylabel="held-out loss (nats a byte)", xscale="log", yscale="log")
    for N in sorted({one.parameters for one in runs}):
        mine = sorted((one.tokens, one.loss) for one in runs if one.parameters == N)
        (line,) = axes.plot([6 * N * D for D, _ in mine], [loss for _, loss in mine], "o", label=f"{N:,} weights")
        if law:
            D = torch.logspace(math.log10(mine[0][0] / 2), math.log10(mine[-1][0] * 2), 50).tolist()
            axes.plot([6 * N * d for d in D], [law.loss(N, d) for d in D], color=line.get_color(), linewidth=1)
    if law:
        least, most = (f(6.0 * one.parameters * one.tokens for one in runs) for f in (min, max))
        C = torch.logspace(math.log10(least), math.log10(most), 50, dtype=torch.float64).tolist()
        axes.plot(C, [law.loss(*law.for_flops(c)) for c in C], "k--", linewidth=1, label="best of each budget")
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write_png(figure, path)
    return True
