"""The training loop, resumed bit by bit; its files; what `fastprimer train` and `generate` print and refuse."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch

from fastprimer import checkpoint, cli, generate, train
from fastprimer.backends import emulator_reason, load_emulator
from fastprimer.calculator import Calculator, MixtureCalculator
from fastprimer.checkpoint import load_checkpoint, save_checkpoint
from fastprimer.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(scope="module")
def task():
    return Calculator(seed=0)


def parsed(module, line):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(line)


def command(*line, out):
    """`fastprimer train calculator LINE --out OUT`: the exit code."""
    options = ["calculator", "--threads", "1", "--out", str(out), *map(str, line)]
    return train.run(parsed(train, options))


@pytest.fixture
def quick(monkeypatch):
    """Evaluate on a few examples only."""
    monkeypatch.setattr(Calculator, "exact_match", few_examples(Calculator.exact_match))


def few_examples(exact_match):
    return lambda self, model, examples: exact_match(self, model, examples[:20])


def test_schedule():
    settings = train.Settings(steps=1000, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(1000)]
    assert rates[0] == 1 / 50 and rates[49] == 1 and rates[600] == 1 and rates[601] < 1
    assert rates[999] == pytest.approx(1 / 400) and min(rates) > 0
    assert all(r > 0 for r in map(train.Settings(steps=1).rate, range(1)))


def test_the_average_of_a_short_run_is_not_of_its_first_weights():
    settings = train.Settings(steps=40, batch_size=4)
    task = Calculator(0)
    trainer = train.Trainer(task, Model(task.config), settings)
    name, weight = next(iter(trainer.parameters.items()))
    expected, shares = None, []
    for step in range(settings.steps):
        trainer.train_step()
        kept = settings.kept(step)
        expected = weight.detach().double() if step == 0 else kept * expected + (1 - kept) * weight.detach().double()
        shares = [kept * share for share in shares] + [1.0 - kept if step else 1.0]
    torch.testing.assert_close(dict(trainer.average.module.named_parameters())[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert shares[0] < 1e-6 and sum(shares) == pytest.approx(1) and settings.kept(10**4) == settings.average


def tensors(out):
    return load_checkpoint(out / CHECKPOINT)[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ("fast", "reference"))
def test_a_resumed_run_has_the_same_bits(model, tmp_path, quick):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert command("--steps", 60, "--model", model, out=straight) == 0
    assert command("--steps", 60, "--model", model, "--stop-at", 30, out=parts) == 0
    assert load_checkpoint(parts / CHECKPOINT)[1]["step"] == 30 and not (parts / "model.safetensors").exists()
    assert command("--resume", "--model", model, out=parts) == 0
    a, b = tensors(straight), tensors(parts)
    assert a.keys() == b.keys() and len(a["losses"]) == 60
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    for name in ("model.safetensors", "config.json", "vocabulary.json", "loss.csv"):
        assert (straight / name).read_bytes() == (parts / name).read_bytes(), name


@pytest.mark.slow
def test_the_bits_differ_when_a_state_is_left_out(tmp_path, quick, monkeypatch):
    """The test above would see a forgotten moment of the optimizer, or a forgotten number of the step."""
    straight = tmp_path / "straight"
    assert command("--steps", 20, out=straight) == 0
    load = train.Trainer.load

    def forgetful(what):
        def planted(self, state, record):
            load(self, state, record)
            if what == "optimizer":
                self.optimizer.state.clear()
            else:
                self.average.n_averaged.zero_()

        return planted

    for what in ("optimizer", "average"):
        out = tmp_path / what
        assert command("--steps", 20, "--stop-at", 10, out=out) == 0
        monkeypatch.setattr(train.Trainer, "load", forgetful(what))
        assert command("--resume", out=out) == 0
        monkeypatch.setattr(train.Trainer, "load", load)
        a, b = tensors(straight), tensors(out)
        assert not all(torch.equal(t, b[name]) for name, t in a.items())


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, quick, monkeypatch, capsys):
    before, train_step = signal.getsignal(signal.SIGINT), train.Trainer.train_step

    def interrupted(self):
        train_step(self)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    assert command("--steps", 8, "--model", "reference", out=tmp_path / "x") == 130
    said = capsys.readouterr().out
    assert "stopped after step 4 of 8" in said
    assert f"fastprimer train calculator --out {tmp_path / 'x'} --resume --model reference --threads 1" in said
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    assert command("--resume", "--model", "reference", out=tmp_path / "x") == 0
    assert command("--steps", 8, "--model", "reference", out=tmp_path / "y") == 0
    assert all(torch.equal(t, tensors(tmp_path / "y")[name]) for name, t in tensors(tmp_path / "x").items())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_is_stopped_at_once_says_what_it_leaves(tmp_path, quick, monkeypatch, capsys):
    def stopped(*line):
        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            assert command(*line, out=tmp_path) == 130
        return capsys.readouterr().err

    assert "stopped at once; there is no checkpoint yet" in stopped("--steps", 4)
    assert command("--steps", 4, "--stop-at", 2, out=tmp_path) == 0
    assert f"it has no checkpoint yet, {tmp_path / CHECKPOINT} is an earlier run's" in stopped("--steps", 4)
    assert "stopped at once; the last checkpoint is whole" in stopped("--resume")


def test_training_off_the_main_thread(tmp_path, quick):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(command("--steps", 2, out=tmp_path / "x")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_training_on_triton_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if not torch.cuda.is_available():
        assert command("--steps", 2, "--backend", "triton", out=tmp_path) == 2
        assert capsys.readouterr().err == "fastprimer train: error: the package triton is not installed\n"


def first_and_last(lines):
    return json.loads(lines.splitlines()[0]), json.loads(lines.splitlines()[-1])


def test_training_on_emulated_cuda_kernels(tmp_path, quick, capsys):
    if torch.cuda.is_available() or emulator_reason():
        pytest.skip(emulator_reason() or "there is a GPU")
    load_emulator()
    assert command("--steps", 2, "--batch-size", 8, "--backend", "cuda", "--json", out=tmp_path / "x") == 0
    start, last = first_and_last(capsys.readouterr().out)
    assert start["served_by"]["rms_norm"] == "cuda" and last["backend"] == "cuda"


@pytest.mark.slow
def test_training_on_interpreted_triton_kernels(tmp_path):
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = ["train", "calculator", "--steps", "2", "--batch-size", "8", "--backend", "triton", "--json", "--out", str(tmp_path / "x")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "fastprimer.cli", *line], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    start, last = first_and_last(done.stdout)
    assert start["served_by"]["rms_norm"] == "triton" and last["backend"] == "triton"


def test_json_lines(tmp_path, quick, capsys):
    assert command("--steps", 100, "--json", "--seed", 3, out=tmp_path / "x") == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert [e["event"] for e in events] == ["start", *["sample"] * 5, "progress", *["sample"] * 5, "result"]
    start, last = events[0], events[-1]
    assert start["seed"] == 3 and start["parameters"] == 94720 and start["served_by"]["rope"]
    assert set(last["heldout_exact_match"]) == {"plus", "minus", "times"}
    assert all(0 <= share <= 1 for share in [*last["heldout_exact_match"].values(), last["times_unseen"]])
    assert 0 < last["loss"] < 3 and last["seconds"] > 0 and last["tokens_per_second"] > 0 and last["backend"] == "auto"
    assert set(events[1]) == {"event", "when", "prompt", "trained", "answer", "probability"}
    assert (tmp_path / "x/loss.csv").read_text().splitlines()[0] == "step,loss"
    assert len((tmp_path / "x/loss.csv").read_text().splitlines()) == 101


def test_text(tmp_path, quick, capsys):
    assert command("--steps", 5, out=tmp_path / "x") == 0
    said = capsys.readouterr().out
    for expected in (
        "94,720 weights",
        "before training",
        "after training",
        '"two plus three equals" -> "',
        "unseen sums right",
        "rms_norm",
    ):
        assert expected in said
    assert command("--steps", 5, "--stop-at", 2, out=tmp_path / "x") == 0
    assert f"stopped after step 2 of 5; {tmp_path / 'x/model.safetensors'} is an earlier run's; to go on:" in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_written(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command("--steps", 3, out=tmp_path / "x") == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "x/loss.csv").exists() and not (tmp_path / "x/loss.png").exists()


def test_the_loss_curve_is_a_png(tmp_path, quick):
    pytest.importorskip("matplotlib")
    assert command("--steps", 3, out=tmp_path / "x") == 0
    assert (tmp_path / "x/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, quick, capsys):
    assert command("--steps", 60, "--learning-rate", 1e30, out=tmp_path / "x") == 2
    assert "smaller --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "x" / CHECKPOINT).exists()


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, quick, monkeypatch, capsys):
    """The last step's loss is that of the weights before it."""
    assert command("--steps", 3, "--stop-at", 2, out=tmp_path) == 0
    before, step = (tmp_path / CHECKPOINT).read_bytes(), train.Trainer.train_step
    diverging = lambda self: (step(self), self.parameters["model.norm.weight"].data.fill_(float("nan")))  # noqa: E731
    monkeypatch.setattr(train.Trainer, "train_step", diverging)
    assert command("--resume", out=tmp_path) == 2
    assert "model.norm.weight is not finite after step 3: try a smaller --learning-rate" in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, quick, monkeypatch, capsys):
    out = tmp_path / "x"
    assert command("--steps", 8, "--stop-at", 2, out=out) == 0
    before = (out / CHECKPOINT).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        assert command("--resume", out=out) == 2
    assert "no space left on device" in capsys.readouterr().err
    assert (out / CHECKPOINT).read_bytes() == before and os.listdir(out) == [CHECKPOINT]
    assert command("--resume", out=out) == 0


def test_a_checkpoint_that_cannot_be_used_is_refused(tmp_path, quick, capsys):
    out = tmp_path / "x"

    def refusal(*line):
        code = command("--resume", *line, out=out)
        said = capsys.readouterr().err
        assert code == 2 and said.startswith("fastprimer train: error: ") and said.count("\n") == 1
        return said

    assert "there is no checkpoint" in refusal()
    assert command("--steps", 4, "--stop-at", 2, out=out) == 0
    path = out / CHECKPOINT
    good = path.read_bytes()
    assert "made with --seed 0, not 1" in refusal("--seed", 1)
    assert "made with --steps 4, not 5" in refusal("--steps", 5)
    for size in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert "cannot read the checkpoint" in refusal()
    path.write_bytes(good)
    state, record = load_checkpoint(path)
    save_checkpoint(path, state, record | {"config": record["config"] | {"hidden_size": 128}})
    assert "another configuration" in refusal()
    save_checkpoint(path, state, record | {"task": "text"})
    assert "task 'text'" in refusal()
    save_checkpoint(path, {k: v for k, v in state.items() if k != "model.model.norm.weight"}, record)
    assert "does not fit the model" in refusal()
    safetensors.torch.save_file(state, path)
    assert "is not a checkpoint of `fastprimer train`" in refusal()
    path.unlink()
    path.mkdir()
    assert "cannot read the checkpoint" in refusal()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert command("--steps", 2, out=tmp_path / "x") == 2
    assert capsys.readouterr().err.startswith("fastprimer train: error: ")


WRONG = "cooking", "--steps 0", "--steps x", "--learning-rate -1", "--learning-rate nan", "--seed -1", "--backend gpu", "--threads 100000"


@pytest.mark.parametrize("line", WRONG)
def test_bad_arguments(line, capsys):
    with pytest.raises(SystemExit) as error:
        parsed(train, [*(["calculator"] if line.startswith("-") else []), *line.split()])
    assert error.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("train", "generate"))
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and f"Example: fastprimer {name} " in capsys.readouterr().out


def ask(*line):
    return generate.run(parsed(generate, list(map(str, line))))


def test_generate(tmp_path, quick, capsys):
    out = tmp_path / "x"
    assert command("--steps", 2, out=out) == 0
    capsys.readouterr()
    assert ask("--model", out, "--json", "Forty-two plus ONE equals") == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"prompt", "answer", "probability"} and 0 <= said["probability"] <= 1
    assert ask("--model", out, "two plus three equals") == 0
    assert capsys.readouterr().out.startswith("two plus three equals -> ")
    for temperature in (1.5, 1e-310):
        assert ask("--model", out, "--temperature", temperature, "--seed", 4, "two plus three equals") == 0

    def refusal(*line):
        code = ask(*line)
        said = capsys.readouterr().err
        assert code == 2 and said.startswith("fastprimer generate: error: ") and said.count("\n") == 1
        return said

    assert "unknown word 'tree'" in refusal("--model", out, "two plus tree equals")
    assert "the prompt is empty" in refusal("--model", out, " ")
    assert "32 words at most" in refusal("--model", out, "one " * 30)
    assert "nowhere" in refusal("--model", tmp_path / "nowhere", "two")
    (out / "vocabulary.json").write_text('["<end>", "two"]')
    assert "has 2 words, the model 35" in refusal("--model", out, "two")
    assert command("--steps", 2, out=out) == 0
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    capsys.readouterr()
    assert "cannot read the weights" in refusal("--model", out, "two")


@pytest.mark.slow
def test_the_calculator_learns(tmp_path, capsys):
    """The main job in full: about a minute."""
    assert command("--json", "--seed", 0, out=tmp_path / "x") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    share = result["heldout_exact_match"]
    assert share["plus"] >= 0.99 and share["minus"] >= 0.985 and share["times"] >= 0.95
    assert ask("--model", tmp_path / "x", "--json", "two plus three equals") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["answer"] == "five" and said["probability"] > 0.9
    assert Model.from_pretrained(tmp_path / "x").config == Calculator.config


@pytest.mark.slow
def test_experts_are_balanced_logged_and_resumed(tmp_path, quick, capsys):
    """The routers' losses are in the gradient: without them the same steps give other weights, and less even a use of experts."""

    def trained(name, *more):
        line = ["calculator-moe", "--threads", "1", "--json", "--steps", "60", "--out", str(tmp_path / name), *more]
        assert train.run(parsed(train, line)) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    last = trained("straight")
    assert set(last["experts"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(sum(used["counts"]) == 2 * 128 * 10 for used in last["experts"].values())
    trained("parts", "--stop-at", "30")
    trained("parts", "--resume")
    assert all(torch.equal(t, tensors(tmp_path / "parts")[name]) for name, t in tensors(tmp_path / "straight").items())

    def used(**settings):
        task = MixtureCalculator(0)
        trainer = train.Trainer(task, Model(task.config), train.Settings(steps=60, **settings))
        for _ in range(60):
            trainer.train_step()
        return sum(layer["entropy"] for layer in trainer.utilisation().values())

    assert used() > used(balance=0.0)
