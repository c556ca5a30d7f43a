"""`fastprimer bench --compare`: what is not judged, what turns add up to, and which peers tell the noise."""

from importlib import metadata

import pytest

from bench_checks import results, row, wrong_row
from fastprimer import bench, cli
from fastprimer.backends import unavailable
from fastprimer.benchmark import comparison, revision, rows, tables
from fastprimer.benchmark.rows import MATRIX, MEMORY, Row
from fastprimer.benchmark.timing import Timing


def by_matrix(ours: float, **more) -> Row:
    """Milliseconds for a GFLOP are other numbers than those for a GB."""
    return row(ours, copy=0.5, limited_by=MATRIX, **more)


@pytest.mark.parametrize("old, new", [(row(2.0), by_matrix(6.0, eager=12.0, seed=9)), (by_matrix(2.0), row(6.0, eager=12.0, seed=9))])
def test_what_another_roof_limits_than_before_is_not_judged_and_tells_no_noise(old, new):
    found = comparison.compare_results(results(old, row(2.0, case="bench-b")), results(new, row(2.0, case="bench-b", seed=9)), 0.05)
    first, second = found.changes
    assert (first.verdict, first.low, first.ratio) == ("no difference", None, pytest.approx(3.0, rel=0.05))
    assert second.low < 1 < second.high and found.noise < 0.05 and not found.regressed
    assert [note.partition(":")[0] for note in found.notes] == ["1 of 2 rows not judged"] and "another roof" in found.notes[0]
    assert comparison.table(found).row_count == 2 and any("another roof" in line for line in comparison.describe(found))


@pytest.mark.parametrize("n, verdict", [(1, "no difference"), (2, "no difference"), (3, "slower")])
def test_a_few_measurements_have_no_verdict_and_no_spread(n, verdict):
    old, new = row(2.0), row(6.0, seed=9)
    for r in (old, new):
        r.ours, r.roof_samples = Timing.of(r.ours.samples[:n]), r.roof_samples[:n]
    found = comparison.compare_results(results(old), results(new), 0.05)
    assert [change.verdict for change in found.changes] == [verdict] and found.regressed == (n == 3)
    assert [note for note in found.notes if "fewer than 3 measurements" in note] == found.notes and len(found.notes) == (n < 3)
    assert comparison.table(found).row_count == 1
    assert tables.live_line(new, False).plain.count("%") == (1 if n < 3 else 2)  # the share of the roof, and the ±


def turn(ours: float, copy_gb_per_s: float, **more) -> Row:
    """Memory takes 1000 ms / copy_gb_per_s, products 80 ms."""
    made = row(ours, bytes=10**9, flops=8 * 10**8, copy_gb_per_s=copy_gb_per_s, matrix_gflop_per_s=10.0, **more)
    made.judge()
    made.roof_samples = [1e3 / (copy_gb_per_s if made.limited_by == MEMORY else 10.0)] * 5
    return made


def test_turns_add_up_to_a_row_that_fits_its_own_medians():
    first = turn(200.0, 10.0, eager=300.0)
    first.peers["flex"] = Timing.of([100.0] * 5)  # in this turn alone
    first.judge()
    (found,) = comparison.pooled([results(r) for r in (first, turn(600.0, 10.0, eager=450.0), turn(600.0, 10.0, eager=450.0))]).rows
    assert list(found.peers) == ["eager"] == [found.best_peer] and first.best_peer == "flex"
    assert (found.limited_by, found.least_ms) == (MEMORY, pytest.approx(100.0))
    assert found.of_roof == pytest.approx(100 / found.ours.median) and found.ours.median == pytest.approx(600, rel=0.03)
    assert found.vs_best_peer == pytest.approx(found.peers["eager"].median / found.ours.median)


def test_turns_that_different_roofs_limit_do_not_mix_their_units():
    same = [turn(200.0, copy) for copy in (20.0, 10.0, 11.0)]
    assert [r.limited_by for r in same] == [MATRIX, MEMORY, MEMORY]
    (found,) = comparison.pooled([results(r) for r in same]).rows
    assert (found.limited_by, found.copy_gb_per_s, found.least_ms) == (MEMORY, 11.0, pytest.approx(1e3 / 11))
    assert found.roof_samples == [100.0] * 5 + [1e3 / 11] * 5


def test_what_was_wrong_before_is_wrong_and_no_regression():
    both = comparison.compare_results(results(wrong_row()), results(wrong_row()), 0.05)
    assert [change.verdict for change in both.changes] == ["WRONG"] and not both.regressed
    assert any("1 was so in the old run" in line for line in comparison.describe(both))
    assert comparison.compare_results(results(row(2.0)), results(wrong_row()), 0.05).regressed


def test_versions_of_peers_are_written_down_where_they_are_there(monkeypatch):
    def version(name):
        if name == "liger-kernel":
            raise metadata.PackageNotFoundError(name)
        return f"1 of {name}"

    monkeypatch.setattr(metadata, "version", version)
    about = rows.machine("cpu")
    assert (about["transformers"], about["triton"]) == ("1 of transformers", "1 of triton") and "liger-kernel" not in about


@pytest.mark.parametrize(
    "peer, then, now, counts",
    [
        ("transformers", {"transformers": "5"}, {"transformers": "5"}, True),
        ("transformers", {"transformers": "5"}, {"transformers": "6"}, False),
        ("hf-compiled", {"transformers": "5"}, {"transformers": "6"}, False),
        ("hf-compiled", {}, {}, False),  # nothing was written down
        ("liger", {"transformers": "5", "liger-kernel": "1"}, {"transformers": "5", "liger-kernel": "2"}, False),
        ("liger", {"transformers": "5", "liger-kernel": "1"}, {"transformers": "5", "liger-kernel": "1"}, True),
        ("compiled", {"transformers": "5"}, {"transformers": "6"}, True),
    ],
)
def test_a_peer_tells_the_noise_only_if_its_package_is_the_same(peer, then, now, counts):
    def run(seed, **machine):
        made = row(2.0, seed=seed)
        made.peers = {peer: made.peers["eager"]}
        return results(made, **machine)

    found = comparison.compare_results(run(0, **then), run(9, **now), 0.05)
    assert (found.noise is not None) == counts
    assert found.notes == [f"{name}: {then[name]} then, {now[name]} now" for name in then if then[name] != now[name]]


@pytest.mark.parametrize(
    "options, peers",
    [(["--op", "rope"], "eager"), (["--op", "model", "--pass", "decoding"], "none"), (["--op", "rope", "--peers", "compiled"], "compiled")],
)
def test_a_revision_is_measured_beside_eager_torch_where_it_takes_part(monkeypatch, options, peers):
    """Peers of which none takes part are refused, and so would be the plain model, which does not decode."""
    if reason := unavailable("attention", "cpu", "cpu"):
        pytest.skip(reason)
    told = []

    def measured(commit, words, turns, say):
        told.append((words, turns))
        raise revision.RevisionError("enough")

    monkeypatch.setattr(bench, "_device", lambda: "cpu")
    monkeypatch.setattr(revision, "resolve", lambda name: "abc")
    monkeypatch.setattr(revision, "measure_by_turns", measured)
    assert cli.main(["bench", *options, "--seed", "0", "--compare", "HEAD"]) == 2
    ((words, turns),) = told
    assert words[:2] == ["--peers", peers] and words[-2:] == ["--seed", "0"] and turns == bench.TURNS
