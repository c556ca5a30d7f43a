"""`fastprimer bench`, its comparison, and `fastprimer report`: what they say is tested, never how fast something is."""

import json
import random
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench_checks import results, row, wrong_row
from fastprimer import bench, cases, cli
from fastprimer.backends import _functions, explain, unavailable
from fastprimer.benchmark import comparison, contest, measure, revision, roofs, timing
from fastprimer.benchmark.rows import MATRIX, Results, Row
from fastprimer.benchmark.timing import PASSES, Timing
from fastprimer.cases import CASES, rms_norm_case
from fastprimer.peers import EAGER, PEERS, peers

ROOT = Path(__file__).resolve().parent.parent
TINY = ("bench", "--memory", "fresh", "--op", "rms_norm", "--dtype", "float32", "--rounds", "7", "--peers", "eager")


@pytest.fixture
def tiny(monkeypatch):
    """The command with these arguments measures a small case, against a small copy, in a fraction of a second."""
    if reason := unavailable("rms_norm", "cpu", "cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(cases, "CASES", (rms_norm_case("bench-tiny", 64, 64, bench=True),))
    monkeypatch.setattr(roofs, "COPY_BYTES", 1 << 16)
    roofs._copies.cache_clear()
    yield lambda *more: cli.main([*TINY, *(str(word) for word in more)])
    roofs._copies.cache_clear()


def plant(monkeypatch, change):
    """`change` gets the outputs of every forward pass on the CPU kernel and returns what is handed on."""
    real = _functions["rms_norm", "cpu"]
    planted = SimpleNamespace(**vars(real))
    planted.rms_norm_forward = lambda *args: change(real.rms_norm_forward(*args))
    monkeypatch.setitem(_functions, ("rms_norm", "cpu"), planted)


def verdicts(old: Results, new: Results, threshold: float = 0.05) -> list[str]:
    return [change.verdict for change in comparison.compare_results(old, new, threshold).changes]


def test_every_measurement_is_written_down_and_read_again(tiny, tmp_path, capsys):
    assert tiny("--json", "--out", tmp_path / "a.json") == 0
    printed = Results.parse(capsys.readouterr().out, "stdout")
    assert printed == Results.read(tmp_path / "a.json") and len(printed.rows) == len(PASSES)
    for r, measured in zip(printed.rows, PASSES, strict=True):
        assert (r.measured, r.best_peer, r.limited_by) == (measured, "eager", "memory")
        assert len(r.ours.samples) == len(r.peers["eager"].samples) == len(r.roof_samples) == 7
        assert r.ours.low <= r.ours.median <= r.ours.high and r.bytes > 0 and r.copy_gb_per_s > 0
        assert r.of_roof == pytest.approx(r.bytes / r.copy_gb_per_s / 1e6 / r.ours.median, rel=1e-3)
    assert printed.rows[0].bytes + printed.rows[1].bytes == printed.rows[2].bytes
    assert {"device", "torch", "commit", "fastprimer", "date"} <= set(printed.machine)


def test_the_table_has_a_line_for_each_row(tiny, capsys):
    assert tiny("--pass", "forward") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^rms_norm tiny +fp32 fwd .* eager ", shown, re.M) and "GB/s in the same rounds" in shown
    assert re.search(r"^best peer / ours: geometric mean [\d.]+x", shown, re.M)
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith("rms_norm"))


@pytest.mark.parametrize("how", [[], ["--json"], ["--markdown"]])
def test_a_wrong_kernel_shows_as_wrong_and_is_not_timed(tiny, monkeypatch, capsys, how):
    plant(monkeypatch, lambda outputs: (outputs[0] * 1.01, *outputs[1:]))
    assert tiny("--pass", "forward", *how) == 1
    shown = capsys.readouterr()
    if how == ["--json"]:
        (r,) = Results.parse(shown.out, "stdout").rows
        assert r.wrong and r.ours is None and not r.peers and r.of_roof is None
    else:
        assert "WRONG" in shown.out + shown.err


def test_a_kernel_that_is_wrong_only_without_gradients_shows_as_wrong(tiny, monkeypatch, capsys):
    """It is timed so in the forward pass."""
    real = measure.fastprimer.rms_norm

    def planted(x, *args, **options):
        from_kernel = explain("rms_norm", x, *args, **options).backend == "cpu" and not x.requires_grad
        return real(x, *args, **options) * (1.01 if from_kernel else 1)

    monkeypatch.setattr(measure.fastprimer, "rms_norm", planted)
    assert tiny("--pass", "forward") == 1 and "WRONG" in capsys.readouterr().out


def test_a_slowed_kernel_is_a_regression(tiny, monkeypatch, tmp_path, capsys):
    """By a clock of its own, for a machine may stand still longer than any kernel is slow."""
    now, jitter = [0.0], random.Random(0)

    def look():
        now[0] += jitter.uniform(5e-5, 6e-5)
        return now[0]

    for module in (contest, timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=look))
    assert tiny("--pass", "forward", "--out", tmp_path / "before.json") == 0

    def slowed(outputs):
        now[0] += 0.02
        return outputs

    plant(monkeypatch, slowed)
    capsys.readouterr()
    assert tiny("--pass", "forward", "--json", "--compare", tmp_path / "before.json") == 1
    record = json.loads(capsys.readouterr().out)
    (change,) = record["comparison"]["changes"]
    assert record["comparison"]["regressed"] and change["verdict"] == "slower" and change["ratio"] > 3


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (row(2.0, seed=9), "no difference"),
        (row(2.04, seed=9), "no difference"),  # significant, but within the threshold
        (row(6.0, seed=9), "slower"),
        (row(2.4, seed=9), "slower"),
        (row(1.0, seed=9), "faster"),
        (row(3.0, eager=6.0, copy=90.0, seed=9), "no difference"),  # the machine is slower
        (row(2.4, eager=5.0, seed=9), "no difference"),  # so is eager torch, which is the same in both
        (wrong_row(), "WRONG"),
    ],
)
def test_verdicts(new, verdict):
    assert verdicts(results(row(2.0)), results(new)) == [verdict]


def test_what_only_most_measurements_say_is_no_regression():
    new = row(4.0, seed=9)
    new.ours = Timing.of([2.0, 2.01, 2.02, *new.ours.samples[3:]])
    assert verdicts(results(row(2.0)), results(new)) == ["no difference"]


def test_other_comparisons():
    old, new = results(row(2.0), row(2.0, case="bench-b")), results(row(2.3, seed=9), row(1.0, case="bench-c"))
    found = comparison.compare_results(old, new, 0.05)
    assert found.regressed and (found.only_old, found.only_new) == (1, 1)
    assert not comparison.compare_results(old, new, 0.5).regressed
    other = comparison.compare_results(old, results(row(2.0), torch="2.14"), 0.05)
    assert other.noise is None and other.notes == ["torch: 2.13 then, 2.14 now"]
    assert verdicts(results(wrong_row()), results(row(2.0))) == ["right now"]
    with pytest.raises(ValueError, match="no row in common"):
        comparison.compare_results(results(row(2.0)), results(row(2.0, case="bench-c")), 0.05)


def test_a_change_has_to_be_one_in_every_turn():
    def turns(*news):
        return [(results(row(2.0, seed=3 * i)), results(row(new, seed=3 * i + 1))) for i, new in enumerate(news)]

    steady, new = comparison.compare_turns(turns(2.6, 2.7, 2.6), 0.05)
    assert steady.regressed and len(new.rows[0].ours.samples) == 63
    assert not comparison.compare_turns(turns(2.6, 2.7, 2.0), 0.05)[0].regressed


@pytest.mark.parametrize("n", [1, 3, 6, 11, 21])
def test_interval_of_the_median(n):
    drawn = random.Random(0)
    inside = 0
    for _ in range(400):
        low, high = timing.interval([drawn.gauss(0, 1) for _ in range(n)])
        inside += low <= 0 <= high
    assert inside / 400 >= (0.93 if n >= 6 else 0)


def test_the_limiting_roof_is_the_one_that_takes_longer():
    r = Row("moe", "bench", "float32", "forward", "cpu", bytes=10**9, flops=10**12, ours=Timing.of([400.0]))
    roof = roofs.Roofs({"copy": None}, {"mm": None}, {"copy": 10**9, "mm": 10**11})
    contest.judge(r, roof, {"copy": [100.0], "mm": [20.0]})
    assert (r.limited_by, r.least_ms, r.of_roof, r.copy_gb_per_s, r.matrix_gflop_per_s) == (MATRIX, 200.0, 0.5, 10.0, 5000.0)


@pytest.mark.parametrize("op", EAGER)
def test_every_peer_computes_the_same(op):
    """On a small case that has no option the peers do not take; torch.compile's is the first one's own."""
    cases = [c for c in CASES if c.op == op and not c.bench]
    names = {
        "rms_norm": "plain",
        "attention": "causal",
        "attention_with_kv_cache": "",
        "cross_entropy": "sum",
        "linear_cross_entropy": "sum",
    }
    case = next((c for c in cases if c.name == names.get(op)), cases[0])
    for name, make in peers(op, "cpu", "forward").items():
        if name in ("compiled", "flex"):
            continue
        arguments = case.arguments(measure.Inputs(torch.float32, "cpu", 0))
        arguments = {k: v for k, v in arguments.items() if k not in ("ignore_index", "reduction", "bias")}
        arguments |= {"return_lse": False} if "return_lse" in arguments else {}
        if op == "attention_with_kv_cache":
            pytest.skip("the peers decode sequences of one length: tests/test_cpu_decoding.py")
        ours = getattr(measure.fastprimer, op)(**arguments)
        assert not contest.difference(make()(**arguments), ours, torch.float32), name
    assert {n for of in EAGER for n in peers(of, "cpu", "forward")} <= set(PEERS)


def test_implementations_of_sdpa_are_peers_on_a_gpu_and_compute_the_same():
    names = {"cudnn", "flash", "efficient"}
    assert names <= set(peers("attention", "cuda", "forward")) and not names & set(peers("attention", "cpu", "forward"))
    q, k = torch.randn(1, 20, 4, 16), torch.randn(1, 20, 4, 16)
    flash = peers("attention", "cuda", "forward")["flash"]()  # the one that a CPU has, too
    assert not contest.difference(flash(q, k, k, causal=True), measure.fastprimer.attention(q, k, k, causal=True), q.dtype)


def test_a_peer_that_fails_or_computes_something_else_is_left_out():
    x = torch.randn(4, 4)
    ours = (2 * x,)
    assert contest.checked(lambda: lambda: 2 * x, ours, x.dtype)[1] == ""
    assert "computes something else" in contest.checked(lambda: lambda: 3 * x, ours, x.dtype)[1]
    assert "shape" in contest.checked(lambda: lambda: x[0], ours, x.dtype)[1]
    assert "ZeroDivisionError" in contest.checked(lambda: lambda: 1 / 0, ours, x.dtype)[1]
    assert "ZeroDivisionError" in contest.checked(lambda: 1 / 0, ours, x.dtype)[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "eager,lager"], "argument --peers: expected names of eager.*got 'lager'"),
        (["--threads", "100000"], "argument --threads: expected an integer from 1 to .*got 100000"),
        (["--out", "/proc/x/y.json"], "argument --out: expected a file .*, got /proc/x/y.json: No such"),
        (["--out", "{tmp}"], "argument --out: expected a file that can be written, got .*: Is a directory"),
        (["--threshold", "much"], "argument --threshold: expected percent.*got 'much'"),
        (["--compare", "no-such-revision"], "argument --compare: expected .* got 'no-such-revision'"),
        (["--compare", "missing.json"], "argument --compare: expected .* got 'missing.json'"),
        (["--results", "missing.json"], "missing.json: expected a file of results, got No such file"),
        (["--results", "{tmp}/bad.json"], "bad.json: expected JSON"),
        (["--results", "{tmp}/old.json"], "old.json: expected results of schema 2, got schema none"),
        (["--results", "{tmp}/broken.json"], "broken.json: expected results of schema 2, got a broken record"),
        (
            ["--results", "{tmp}/empty.json", "--compare", "HEAD"],
            "argument --compare: expected a file of results .*, got the git revision 'HEAD'",
        ),
        (["--pass", "backward", "--op", "attention_with_kv_cache"], "nothing to measure: attention_with_kv_cache"),
        (["--results", "{tmp}/empty.json", "--op", "rope"], "argument --op: not allowed with argument --results"),
        (["--results", "{tmp}/empty.json", "--pass", "forward"], "argument --pass: not allowed with argument --results"),
        (["--results", "{tmp}/empty.json", "--seed", "0"], "argument --seed: not allowed with argument --results"),
        (["--results", "{tmp}/empty.json", "--quick"], "argument --quick: not allowed with argument --results"),
        (["--threshold", "0"], "argument --threshold: expected --compare BASE beside it, got none"),
        (["--turns", "2"], "argument --turns: expected --compare with a git revision beside it, got none"),
        (
            ["--turns", "2", "--compare", "{tmp}/empty.json"],
            "argument --turns: expected --compare with a git revision .*, got .*empty.json",
        ),
        (["--op", "rms_norm", "--backend", "reference", "--peers", "flex"], "argument --peers: expected one at least of eager, .*got flex"),
        (["--op", "rope", "--backend", "reference", "--peers", "sdpa,plain"], "argument --peers: expected .* compiled.*got sdpa, plain"),
    ],
)
def test_errors_say_what_was_expected(tmp_path, capsys, monkeypatch, argv, message):
    for name, text in {
        "bad": "{",
        "old": '{"machine": {}, "results": []}',
        "broken": '{"schema": 2, "machine": {}, "rows": [{"x": 1}]}',
        "empty": results().to_json(),
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.setattr(bench, "_live", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(revision, "measure_by_turns", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(revision, "resolve", lambda name: "abc" if name == "HEAD" else "")
    measuring = [] if "--results" in argv else ["--quick", "--peers", "none"]
    try:
        status = cli.main(["bench", *measuring, *(word.replace("{tmp}", str(tmp_path)) for word in argv)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and re.search(message, capsys.readouterr().err)


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_live", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["bench", "--quick", "--op", "rms_norm", "--backend", "reference"]) == 130
    assert capsys.readouterr().err == "fastprimer bench: stopped\n"


def test_ctrl_c_says_where_the_finished_rows_are(tiny, tmp_path, monkeypatch, capsys):
    shown, out = [], tmp_path / "a.json"
    (tmp_path / "a.json.part").write_text("of another run")

    def line(row, with_backend, until=1):
        shown.append(row)
        if len(shown) > until:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(bench.tables, "live_line", line)
    assert tiny("--out", out) == 130
    assert capsys.readouterr().err == f"fastprimer bench: stopped: {out}.part holds the 1 finished row\n"
    assert len(Results.read(tmp_path / "a.json.part").rows) == 1
    shown.append(None)
    assert tiny("--out", out) == 130  # before its first row
    assert capsys.readouterr().err == "fastprimer bench: stopped\n"


@pytest.mark.slow
def test_a_revision_is_measured_by_turns(tmp_path, capsys):
    commit = revision.resolve("HEAD")
    same = commit and subprocess.run(["git", "diff", "--quiet", commit, "--", *revision.NATIVE], cwd=ROOT).returncode == 0
    if not same:
        pytest.skip("needs a git checkout whose native sources are those of HEAD")
    before = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True).stdout
    wanted = ["--quick", "--op", "route", "--dtype", "float32", "--pass", "forward", "--rounds", "3", "--turns", "1"]
    assert cli.main(["bench", *wanted, "--json", "--compare", "HEAD", "--threshold", "1e9"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["comparison"]["changes"]) == len(record["rows"]) == 1
    assert subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True).stdout == before
