"""`fastprimer bench --compare`: which rows became slower or faster, beyond what two runs differ by anyway.

The rule. A measurement is divided by what the limiting roof took in the same rounds (a copy, or a matrix product), so that a
machine that is slower today is slower for both. The ratio new / old of two medians so divided is given with a 95% interval from
a bootstrap (every list of measurements drawn anew, 2000 times, with a fixed seed). A row is slower if this interval lies above 1,
the ratio above 1 + margin, and the fastest measurements (ours and the roof's) say so too: another program on the machine
slows most measurements down, rarely all of them, and a slower kernel has no fast ones. Faster is the reverse, with 1 / (1 + margin).
Where two revisions were measured by turns, the ratio has to be beyond the margin in every single turn as well.

The margin is the larger of --threshold and the noise between the two runs, which the bootstrap cannot see. The noise is what the
peers tell: torch is the same in both runs, so what the peers common to both seem to have gained or lost (their own ratios, the 95% quantile
of their deviations over all rows) is no change. With another version of torch, or without peers in common, the noise is unknown and
the margin is the threshold.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich import box
from rich.table import Table

from fastprimer.benchmark.rows import Results, Row
from fastprimer.benchmark.tables import SHORT
from fastprimer.benchmark.timing import CONFIDENCE, Timing

RESAMPLES, SEED = 2000, 0
SLOWER, FASTER, SAME, WRONG, MENDED = "slower", "faster", "no difference", "WRONG", "right now"
REGRESSIONS = (SLOWER, WRONG)
NOISE_QUANTILE = 0.95


@dataclass(frozen=True)
class Change:
    """One row in both runs: milliseconds as measured, and the ratio new / old of what is left without the machine's own change."""

    name: str
    backend: str
    dtype: str
    measured: str
    verdict: str
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    threshold: float
    noise: float | None
    """What the peers seem to have changed by: 0.1 is 10%."""
    only_old: int
    only_new: int
    notes: list[str]

    @property
    def regressed(self) -> bool:
        return any(change.verdict in REGRESSIONS for change in self.changes)

    def to_record(self) -> dict:
        return asdict(self) | {"regressed": self.regressed}


def compare_results(old: Results, new: Results, threshold: float) -> Comparison:
    """`threshold`: 0.05 lets 5% pass.

    Raises ValueError if no row is in both.
    """
    before = {row.key: row for row in old.rows}
    pairs = [(before[row.key], row) for row in new.rows if row.key in before]
    if not pairs:
        raise ValueError("the two runs have no row in common (operation, case, dtype, pass and backend)")
    notes = [
        f"{what}: {old.machine.get(what)} then, {new.machine.get(what)} now"
        for what in ("device", "torch", "memory")
        if _differs(old, new, what)
    ]
    noise = None if _differs(old, new, "torch") else _noise(pairs)
    generator = np.random.default_rng(SEED)
    changes = [_change(a, b, max(threshold, noise or 0.0), generator) for a, b in pairs]
    return Comparison(changes, threshold, noise, len(before) - len(pairs), len(new.rows) - len(pairs), notes)


def compare_turns(turns: list[tuple[Results, Results]], threshold: float) -> tuple[Comparison, Results]:
    """(old, new) of several turns: all of them together, where a change has to be one in every turn; and the new results."""
    old, new = (pooled([turn[side] for turn in turns]) for side in (0, 1))
    found = compare_results(old, new, threshold)
    margin = max(threshold, found.noise or 0.0)
    ratios = [[c.ratio for c in compare_results(a, b, threshold).changes] for a, b in turns]
    changes = []
    for i, change in enumerate(found.changes):
        seen = [turn[i] for turn in ratios if i < len(turn) and turn[i] is not None]
        steady = all(r > 1 + margin for r in seen) if change.verdict == SLOWER else all(r < 1 / (1 + margin) for r in seen)
        changes.append(change if change.verdict not in (SLOWER, FASTER) or steady else replace(change, verdict=SAME))
    return replace(found, changes=changes), new


def _differs(old: Results, new: Results, what: str) -> bool:
    return old.machine.get(what) != new.machine.get(what)


def _noise(pairs: list[tuple[Row, Row]]) -> float | None:
    deviations = [
        abs(math.log(_relative(timing, b) / _relative(a.peers[name], a)))
        for a, b in pairs
        for name, timing in b.peers.items()
        if name in a.peers
    ]
    return math.expm1(float(np.quantile(deviations, NOISE_QUANTILE))) if deviations else None


def _relative(timing: Timing, row: Row, of=statistics.median) -> float:
    """A median (or minimum) in units of the limiting roof's."""
    return of(timing.samples) / of(row.roof_samples)


def _change(old: Row, new: Row, margin: float, generator: np.random.Generator) -> Change:
    about = new.name, new.backend, new.dtype, new.measured
    if not new.ours or not old.ours:
        verdict = SAME if bool(new.ours) == bool(old.ours) else MENDED if new.ours else WRONG
        return Change(*about, verdict, old.ours and old.ours.median, new.ours and new.ours.median)
    ratio = _relative(new.ours, new) / _relative(old.ours, old)
    medians = [_resampled(side, generator) for row in (new, old) for side in (row.ours.samples, row.roof_samples)]
    ratios = (medians[0] / medians[1]) / (medians[2] / medians[3])
    low, high = (float(q) for q in np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    fastest = _relative(new.ours, new, min) / _relative(old.ours, old, min)
    slower = low > 1 and min(ratio, fastest) > 1 + margin
    faster = high < 1 and max(ratio, fastest) < 1 / (1 + margin)
    verdict = SLOWER if slower else FASTER if faster else SAME
    return Change(*about, verdict, old.ours.median, new.ours.median, ratio, low, high)


def _resampled(samples: list[float], generator: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES draws with replacement."""
    return np.median(generator.choice(samples, (RESAMPLES, len(samples))), axis=1)


def pooled(runs: list[Results]) -> Results:
    """Several runs of the same code as one: the measurements of each row side by side."""
    first = runs[0]
    rows = []
    for row in first.rows:
        same = [other for run in runs for other in run.rows if other.key == row.key]
        timed = [other for other in same if other.ours]
        if len(timed) < len(same):
            rows.append(next(other for other in same if not other.ours))
            continue
        row = replace(row, ours=Timing.of([t for other in timed for t in other.ours.samples]))
        shared = [name for name in row.peers if all(name in other.peers for other in timed)]
        row.peers = {name: Timing.of([t for other in timed for t in other.peers[name].samples]) for name in shared}
        row.roof_samples = [t for other in timed for t in other.roof_samples]
        rows.append(row)
    return Results(first.machine, rows)


def table(found: Comparison) -> Table:
    title = "new / old, relative to the roof of each run"
    style = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "padding": (0, 1, 0, 0)}
    shown = Table(title=title, **style)
    for heading in ("case", "", "old ms", "new ms", "ratio", "95%", "verdict"):
        shown.add_column(heading, justify="right" if heading in ("old ms", "new ms", "ratio") else "left", no_wrap=heading != "case")
    colours = {SLOWER: "red", WRONG: "bold red", FASTER: "green", MENDED: "green", SAME: "dim"}
    for c in found.changes:
        what = f"{SHORT.get(c.dtype, c.dtype)} {SHORT[c.measured]}"
        times = ["-" if t is None else f"{t:.2f}" for t in (c.old_ms, c.new_ms)]
        ratio = ["", ""] if c.ratio is None else [f"{c.ratio:.2f}", f"{c.low:.2f}-{c.high:.2f}"]
        shown.add_row(f"{c.name} {c.backend}", what, *times, *ratio, f"[{colours[c.verdict]}]{c.verdict}[/]")
    return shown


def describe(found: Comparison) -> list[str]:
    """The verdict in words, with what it rests on."""
    counts = {verdict: sum(c.verdict == verdict for c in found.changes) for verdict in (SLOWER, FASTER, SAME, WRONG, MENDED)}
    lines = [", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)]
    if found.noise is None:
        lines.append(f"margin {found.threshold:.0%}; the noise between the runs is unknown: no unchanged peer is in both")
    else:
        margin = max(found.threshold, found.noise)
        lines.append(
            f"margin {margin:.0%}: the larger of {found.threshold:.0%} and the noise between the runs, {found.noise:.0%} by unchanged peers"
        )
    if found.only_old or found.only_new:
        lines.append(f"not compared: {found.only_old} rows of the old run, {found.only_new} of the new one, which the other does not have")
    return lines + [f"careful, {note}" for note in found.notes]
