"""`fastprimer bench --compare`: which rows became slower or faster, beyond what two runs differ by anyway.

The rule. A measurement is divided by what the limiting roof took in the same rounds (a copy, or a matrix product), so that a
machine that is slower today is slower for both. The ratio new / old of two medians so divided is given with a 95% interval from
a bootstrap (every list of measurements drawn anew, 2000 times, with a fixed seed). A row is slower if this interval lies above 1,
the ratio above 1 + margin, and the fastest measurements (ours and the roof's) say so too: another program on the machine
slows most measurements down, rarely all of them, and a slower kernel has no fast ones. Faster is the reverse, with 1 / (1 + margin).
Where two revisions were measured by turns, the ratio has to be beyond the margin in every single turn as well.

Not judged, which is "no difference" with a note, is a row that another roof limits in one run than in the other (a GB copied and a GFLOP
are no common unit: its ratio is that of milliseconds), and one of fewer than three measurements. WRONG is what is wrong now; it is a
regression unless it was wrong before.

The margin is the larger of --threshold and the noise between the two runs, which the bootstrap cannot see. The noise is what the
peers tell: where their packages are the same in both runs, what the peers common to both seem to have gained or lost (their own ratios,
the 95% quantile of their deviations over all rows) is no change. Without such peers the noise is unknown and the margin is the threshold.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich import box
from rich.table import Table

from fastprimer.benchmark.rows import PACKAGES, Results, Row
from fastprimer.benchmark.tables import SHORT
from fastprimer.benchmark.timing import CONFIDENCE, FEWEST_JUDGED, Timing

RESAMPLES, SEED = 2000, 0
SLOWER, FASTER, SAME, WRONG, MENDED = "slower", "faster", "no difference", "WRONG", "right now"
NOISE_QUANTILE = 0.95
THEIR_PACKAGES = {"transformers": ("transformers",), "hf-compiled": ("transformers",), "liger": ("liger-kernel", "transformers")}
"""What peers need beside torch; Liger-Kernel's layers lie in models of transformers."""


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
    not_judged: str = ""
    """Why the ratio has no verdict."""

    @property
    def regressed(self) -> bool:
        return self.verdict == SLOWER or (self.verdict == WRONG and self.old_ms is not None)


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
        return any(change.regressed for change in self.changes)

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
        f"{what}: {old.machine[what]} then, {new.machine[what]} now"
        for what in ("device", "torch", "memory", *PACKAGES)
        if what in old.machine and what in new.machine and old.machine[what] != new.machine[what]
    ]
    noise = _noise(pairs, lambda peer: _unchanged(peer, old, new))
    generator = np.random.default_rng(SEED)
    changes = [_change(a, b, max(threshold, noise or 0.0), generator) for a, b in pairs]
    notes += [f"{n} of {len(pairs)} rows not judged: {why}" for why, n in Counter(c.not_judged for c in changes if c.not_judged).items()]
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


def _unchanged(peer: str, old: Results, new: Results) -> bool:
    """Whether both runs are known to have had the same versions of what this peer is made of."""
    packages = ("torch", *THEIR_PACKAGES.get(peer, ()))
    return all(name in old.machine and old.machine[name] == new.machine.get(name) for name in packages)


def _noise(pairs: list[tuple[Row, Row]], unchanged: Callable[[str], bool]) -> float | None:
    deviations = [
        abs(math.log(_relative(timing, b) / _relative(a.peers[name], a)))
        for a, b in pairs
        if a.limited_by == b.limited_by
        for name, timing in b.peers.items()
        if name in a.peers and unchanged(name)
    ]
    return math.expm1(float(np.quantile(deviations, NOISE_QUANTILE))) if deviations else None


def _relative(timing: Timing, row: Row, of=statistics.median) -> float:
    """A median (or minimum) in units of the limiting roof's, which only rows with the same `limited_by` share."""
    return of(timing.samples) / of(row.roof_samples)


def _change(old: Row, new: Row, margin: float, generator: np.random.Generator) -> Change:
    about = new.name, new.backend, new.dtype, new.measured
    if not new.ours or not old.ours:
        return Change(*about, MENDED if new.ours else WRONG, old.ours and old.ours.median, new.ours and new.ours.median)
    times = old.ours.median, new.ours.median
    if old.limited_by != new.limited_by:
        why = "another roof limits them now than then, and their ratios are of milliseconds"
        return Change(*about, SAME, *times, new.ours.median / old.ours.median, not_judged=why)
    ratio = _relative(new.ours, new) / _relative(old.ours, old)
    if min(len(side) for row in (new, old) for side in (row.ours.samples, row.roof_samples)) < FEWEST_JUDGED:
        return Change(*about, SAME, *times, ratio, not_judged=f"fewer than {FEWEST_JUDGED} measurements do not tell how much they vary")
    medians = [_resampled(side, generator) for row in (new, old) for side in (row.ours.samples, row.roof_samples)]
    ratios = (medians[0] / medians[1]) / (medians[2] / medians[3])
    low, high = (float(q) for q in np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    fastest = _relative(new.ours, new, min) / _relative(old.ours, old, min)
    slower = low > 1 and min(ratio, fastest) > 1 + margin
    faster = high < 1 and max(ratio, fastest) < 1 / (1 + margin)
    verdict = SLOWER if slower else FASTER if faster else SAME
    return Change(*about, verdict, *times, ratio, low, high)


def _resampled(samples: list[float], generator: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES draws with replacement."""
    return np.median(generator.choice(samples, (RESAMPLES, len(samples))), axis=1)


def pooled(runs: list[Results]) -> Results:
    """Several runs of the same code as one: the measurements of each row side by side, and what follows from them."""
    same: dict[tuple, list[Row]] = {}
    for row in (row for run in runs for row in run.rows):
        same.setdefault(row.key, []).append(row)
    return Results(runs[0].machine, [_side_by_side(rows) for rows in same.values()])


def _side_by_side(same: list[Row]) -> Row:
    """A row of all measurements of one; a roof's rate is the median of the runs'. What is wrong in one run is wrong."""
    if wrong := [row for row in same if not row.ours]:
        return wrong[0]
    first = same[0]
    shared = [name for name in first.peers if all(name in row.peers for row in same)]
    found = replace(
        first,
        ours=Timing.of([t for row in same for t in row.ours.samples]),
        peers={name: Timing.of([t for row in same for t in row.peers[name].samples]) for name in shared},
        copy_gb_per_s=statistics.median(row.copy_gb_per_s for row in same),
        matrix_gflop_per_s=first.matrix_gflop_per_s and statistics.median(row.matrix_gflop_per_s for row in same),
    )
    found.judge()
    # In no common unit with the samples of another roof. There are some: what limits by the medians does so in one of the runs.
    found.roof_samples = [t for row in same if row.limited_by == found.limited_by for t in row.roof_samples]
    return found


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
        ratio = "" if c.ratio is None else f"{c.ratio:.2f}"
        interval = "" if c.low is None else f"{c.low:.2f}-{c.high:.2f}"
        shown.add_row(f"{c.name} {c.backend}", what, *times, ratio, interval, f"[{colours[c.verdict]}]{c.verdict}[/]")
    return shown


def describe(found: Comparison) -> list[str]:
    """The verdict in words, with what it rests on."""
    counts = {verdict: sum(c.verdict == verdict for c in found.changes) for verdict in (SLOWER, FASTER, SAME, WRONG, MENDED)}
    lines = [", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)]
    if before := sum(c.verdict == WRONG and not c.regressed for c in found.changes):
        lines.append(f"of what is WRONG, {before} was so in the old run, too")
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
