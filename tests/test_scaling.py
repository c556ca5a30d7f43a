"""`fastprimer scaling`: the law and its fit against what they must give, the text, and runs that are kept."""

import json
import math
import random
import re

import pytest
import torch

from fastprimer import cli, scaling, scaling_report
from fastprimer.model import Model
from fastprimer.scaling import LENGTH, Plan, Run, ScalingError, Text, shape
from fastprimer.scaling_law import PUBLISHED, FitError, Law, fit, intervals

LAW = Law(E=0.9, A=9.0, B=30.0, alpha=0.31, beta=0.37)
SIZES, RATIOS = (7e3, 2e4, 7e4, 2e5), (5, 10, 20, 40)
BYTES = random.Random(0).randbytes(200_000)


def points(noise=0.0):
    draw = random.Random(1)
    N, D = zip(*((n, r * n) for n in SIZES for r in RATIOS), strict=True)
    return list(N), list(D), [LAW.loss(n, d) * math.exp(draw.gauss(0, noise)) for n, d in zip(N, D, strict=True)]


@pytest.mark.parametrize("law", [law for law in PUBLISHED.values() if isinstance(law, Law)] + [LAW], ids=str)
def test_no_other_division_of_a_budget_has_a_smaller_loss(law):
    for C in (1e12, 1e21, 5.76e23):
        N, D = law.for_flops(C)
        assert 6 * N * D == pytest.approx(C)
        assert all(law.loss(N * factor, D / factor) > law.loss(N, D) for factor in (0.5, 0.99, 1.01, 2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_budget_is_found_from_either_of_its_parts(name):
    law = PUBLISHED[name]
    N, D = law.for_flops(3e20)
    assert law.for_parameters(N) == pytest.approx((N, D)) and law.for_tokens(D) == pytest.approx((N, D))


def test_published_laws_say_what_their_papers_say():
    N, D = PUBLISHED["Hoffmann 2022, 20 a weight"].for_flops(5.76e23)  # Chinchilla's budget: 70 billion weights, 1.4 trillion tokens
    assert N == pytest.approx(70e9, rel=0.02) and D == pytest.approx(1.4e12, rel=0.02)
    assert PUBLISHED["Hoffmann 2022, third fit"].for_flops(5.76e23)[0] == pytest.approx(40e9, rel=0.05)  # 40 billion by that fit
    assert PUBLISHED["Besiroglu 2024"].a == pytest.approx(0.5126, abs=1e-4)
    assert PUBLISHED["Kaplan 2020"].for_flops(1e15 * 86400) == pytest.approx((1.3e9, 2e10))  # of one petaflop-day


def test_the_law_of_exact_losses_is_found():
    found = fit(*points())
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=1e-3), name


def test_a_bad_run_does_not_decide():
    N, D, loss = points()
    loss[5] *= 1.3
    found = fit(N, D, loss)
    assert found.alpha == pytest.approx(LAW.alpha, rel=0.05) and found.beta == pytest.approx(LAW.beta, rel=0.05)


def test_intervals_hold_the_law_and_shrink_with_the_noise():
    width = {}
    for noise in (1e-3, 1e-2):
        N, D, loss = points(noise)
        found = intervals(N, D, loss, fit(N, D, loss), draws=20)
        assert all(low <= getattr(LAW, name) <= high for name, (low, high) in found.items())
        width[noise] = found["a"][1] - found["a"][0]
    assert 0 < width[1e-3] < width[1e-2]


def test_what_no_law_can_be_fitted_to():
    N, D, loss = points()
    for few in ([0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(FitError, match="expected at least 6 runs, of 3 sizes and 3 numbers of tokens, got"):
            fit(*([values[i] for i in few] for values in (N, D, loss)))
    with pytest.raises(FitError, match="expected losses that fall with [ND], got"):
        fit(N, D, [1 / value for value in loss])
    first = [float(d == min(D)) for d in D]  # a step, as noise may look: no power is so steep
    with pytest.raises(FitError, match="expected exponents up to 3.0, got runs that fit alpha = .* and beta = [0-9]+: noise"):
        fit(N, D, [value**0.01 + step for value, step in zip(loss, first, strict=True)])


def test_the_text_is_seen_once_an_epoch_and_the_held_out_part_never():
    task = Text(BYTES, shape(16), seed=3)
    n = len(task.trained)
    assert not set(task.trained.tolist()) & set(task.held_out.tolist()) and len(task.held_out) / n == pytest.approx(1 / 19, abs=0.02)
    whole = torch.frombuffer(bytearray(BYTES), dtype=torch.uint8)
    at = {bytes(whole[i * LENGTH : (i + 1) * LENGTH + 1].tolist()): i for i in range(n + len(task.held_out))}
    batch = 7
    seen = [at[bytes(row.tolist())] for step in range(-(-n // batch)) for row in task.batch(step, batch)[0]]
    assert sorted(seen[:n]) == task.trained.tolist() and seen[:n] != task.trained.tolist()
    again = Text(BYTES, shape(16), seed=3)
    assert torch.equal(again.batch(2 * n // batch, batch)[0], task.batch(2 * n // batch, batch)[0])  # of the step alone
    assert not torch.equal(Text(BYTES, shape(16), seed=4).batch(0, batch)[0], task.batch(0, batch)[0])


def test_a_text_too_short_to_hold_some_out():
    with pytest.raises(ScalingError, match="argument --text: expected at least 40961 bytes, got 40000"):
        Text(BYTES[:40000], shape(16), 0)


@pytest.mark.parametrize("width", (16, 48, 64, 128))
def test_a_size_is_counted(width):
    assert Plan(width, 1.0).parameters == sum(p.numel() for p in Model(shape(width)).parameters())
    assert Plan(width, 10.0).tokens == pytest.approx(10 * Plan(width, 1.0).parameters, rel=0.05)


def test_a_run_learns_and_is_the_same_again():
    plan = Plan(16, 3.0)
    text = b"the quick brown fox jumps over the lazy dog. " * 2000
    seen = []
    first, second = (scaling.trained(plan, text, torch.device("cpu"), seen.append) for _ in range(2))
    assert sum(seen) == 2 * plan.tokens == 2 * first.tokens and first.loss == second.loss
    assert first.loss < 0.8 * math.log(256) and first.plan == plan and first.epochs == pytest.approx(plan.tokens / 85500, rel=0.05)


@pytest.fixture
def by_law(monkeypatch):
    """Runs of no time whose losses are the law's; the plans that were trained."""
    done = []

    def trained(plan, data, device, advance):
        done.append(plan)
        if plan.ratio == 666:
            raise KeyboardInterrupt
        return Run(plan.width, plan.ratio, plan.seed, plan.parameters, plan.tokens, LAW.loss(plan.parameters, plan.tokens), 1.0, 0.1)

    monkeypatch.setattr(scaling, "trained", trained)
    return done


@pytest.fixture
def command(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(BYTES)
    return lambda *options: cli.main(["scaling", "--text", str(text), "--out", str(tmp_path / "out"), "--draws", "3", *map(str, options)])


def test_a_sweep_finds_the_law_and_goes_on_where_it_stopped(by_law, command, capsys, tmp_path):
    assert command("--ratios", "5,666") == 130
    assert "--resume keeps the finished runs" in capsys.readouterr().err and len(by_law) == 2
    assert command("--resume", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(by_law) == 2 + 15 and len(found["runs"]) == 16  # one of the first two was there
    assert found["law"]["alpha"] == pytest.approx(LAW.alpha, rel=0.01) and found["law"]["beta"] == pytest.approx(LAW.beta, rel=0.01)
    ours = [row for row in found["recommended"] if row["law"] == "measured here"]
    assert len(ours) == 3 and ours[2]["flops"] == pytest.approx(100 * ours[0]["flops"])
    assert len(json.loads((tmp_path / "out/runs.json").read_text())["runs"]) == 16
    assert command("--resume", "--widths", "16,32", "--ratios", "5") == 0 and len(by_law) == 17
    assert "no law was fitted: expected at least 6 runs" in capsys.readouterr().out
    assert command("--widths", "16", "--ratios", "5") == 0 and len(by_law) == 18
    assert "starting anew" in capsys.readouterr().out and len(json.loads((tmp_path / "out/runs.json").read_text())["runs"]) == 1


def test_a_law_beyond_all_numbers_is_none(by_law, command, capsys, monkeypatch):
    """And the runs, which took the time, are shown."""
    monkeypatch.setattr(scaling_report, "fit", lambda *_: Law(E=1.0, A=1e300, B=1e-300, alpha=1e-3, beta=1e-3))
    assert command() == 0
    said = capsys.readouterr().out
    assert "no law was fitted: what fits these runs is beyond the range of floating-point numbers" in said and "held-out loss" in said


def test_a_plot_is_drawn_where_there_is_matplotlib(by_law, command, tmp_path):
    pytest.importorskip("matplotlib")
    assert command() == 0
    assert (tmp_path / "out/scaling.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_another_text_and_broken_ones_are_refused(by_law, command, capsys, tmp_path):
    assert command("--widths", "16", "--ratios", "5") == 0
    runs, text = tmp_path / "out/runs.json", tmp_path / "text"
    text.write_bytes(BYTES + b"!")
    assert command("--resume") == 2 and "got those of another text" in capsys.readouterr().err
    text.write_bytes(BYTES)
    whole = json.loads(runs.read_text())
    runs.write_text(json.dumps(whole | {"recipe": 1}))
    assert command("--resume") == 2 and "expected runs of this version's recipe, 2, got those of another, 1" in capsys.readouterr().err
    for broken in ("{", "[]", json.dumps(whole | {"runs": [{}]}), json.dumps(whole | {"runs": [whole["runs"][0] | {"width": []}]})):
        runs.write_text(broken)
        assert command("--resume") == 2 and "got a broken one" in capsys.readouterr().err


def test_a_budget_needs_no_training(capsys):
    assert cli.main(["scaling", "--flops", "1e21", "--tflops", "400", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recommended"]
    assert rows[0]["parameters"] == pytest.approx(2.887e9, rel=1e-3) and rows[0]["days"] == pytest.approx(1e21 / 4e14 / 86400)
    assert cli.main(["scaling", "--parameters", "1e9"]) == 0
    assert re.search(r"Hoffmann 2022, 20 a weight +1e\+09 +2e\+10 +20 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--flops", "0"), "argument --flops: expected a number > 0, got 0"),
        (("--flops", "many"), "argument --flops: invalid amount value: 'many'"),
        (("--flops", "1", "--tokens", "1"), "not allowed with argument --flops"),
        (("--widths", "16,20"), "argument --widths: expected multiples of 16 with commas between them, got '16,20'"),
        (("--ratios", "5,-1"), "argument --ratios: expected a number > 0, got -1"),
        (("--draws", "1"), "argument --draws: expected an integer >= 2, got 1"),
    ],
)
def test_bad_arguments_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["scaling", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--text", "none"), ("--widths", "16"), ("--resume",), ("--threads", "2")])
def test_a_budget_takes_no_option_of_a_sweep(options, capsys):
    assert cli.main(["scaling", "--flops", "1e20", *options]) == 2
    assert f"argument {options[0]}: expected none for a budget, which trains nothing, got" in capsys.readouterr().err


def test_a_budget_beyond_all_numbers(capsys):
    assert cli.main(["scaling", "--parameters", "1e300"]) == 2
    assert "a budget beyond the range of floating-point numbers" in capsys.readouterr().err


def test_a_text_that_is_not_there(capsys, tmp_path):
    assert cli.main(["scaling", "--text", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "argument --text: expected a file, got" in capsys.readouterr().err
